# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""libblkio as a client of disks that we serve: a program of its own, with data that is checked."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.homes import storage_daemon
from tests.support.seen import Seen
from tests.support.tally import tallied
from vdpa_bridge import Target
from vdpa_bridge.vhost_user.server import Server

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif("VDPA_BRIDGE_LIBBLKIO" not in os.environ, reason='no $VDPA_BRIDGE_LIBBLKIO: run eval "$(tools/setup newer)"'),
]
REQUESTS = 96 * 4
"""Of the program, on one queue, beside flushes, discards and zeroes."""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """How to call the program."""
    place = Path(os.environ["VDPA_BRIDGE_LIBBLKIO"])
    program = tmp_path_factory.mktemp("blkio") / "blkio"
    subprocess.run([str(place / "compile"), str(Path(__file__).parents[1] / "support" / "blkio.c"), str(program)], check=True, timeout=60)
    return [str(place / "run"), str(program)]


def verified(client: list[str], path: Path | str, queues: int, *more: str) -> None:
    done = subprocess.run(
        [*client, "virtio-blk-vhost-user", str(path), str(queues), *more], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"{REQUESTS * queues} requests verified\n"), done.stderr


@pytest.mark.parametrize("polled", [False, True], ids=["events", "polled"])
@pytest.mark.parametrize("queues", [1, 3])
def test_a_disk_of_ours(short_dir: Path, client: list[str], queues: int, polled: bool, seen: Seen) -> None:
    path = short_dir / "s"
    with tallied(f"model:blk?size=64M&queues={queues}") as (opener, chains), Server(opener, str(path)) as server:
        for _ in range(2):
            verified(client, path, queues, *["poll"] * polled)
    assert server.served == 2
    assert all(chains[queue] > 2 * REQUESTS for queue in range(queues)), chains
    seen("clients", "libblkio", "blk", "model", "split", "memory slots", "memory hotplug", "successor", *["multi-queue"] * (queues > 1))


def test_a_disk_behind_another_back_end(short_dir: Path, client: list[str], seen: Seen) -> None:
    """Legacy in front, legacy behind: memory that comes and goes is handed on."""
    with storage_daemon(64 << 20) as behind:
        target = Target.parse(f"vhost-user:{behind}?type=blk")
        path = short_dir / "s"
        with Server(target.open, str(path)):
            verified(client, path, 1)
        target.close()
    seen("clients", "libblkio", "blk", "qemu-storage-daemon", "split", "memory slots", "memory hotplug")
