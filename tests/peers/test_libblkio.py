# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""libblkio as a client of disks that we serve: a program of its own, with data that is checked."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.support.homes import storage_daemon
from tests.support.seen import Seen
from tests.support.tally import tallied
from vdpa_bridge import Target
from vdpa_bridge.models import BlkModel
from vdpa_bridge.models.blk import BlkType
from vdpa_bridge.models.image import Pending
from vdpa_bridge.vhost_user.server import Server
from vdpa_bridge.virtqueue import Chain

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


@pytest.mark.parametrize("polled", [False, True], ids=["events", "polled"])
@pytest.mark.parametrize("queues", [1, 3])
def test_a_disk_with_an_engine(short_dir: Path, client: list[str], queues: int, polled: bool, monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    """On a file that is not in the page cache; the model has to do no more than what is not plain."""
    image, path, asked = short_dir / "disk", short_dir / "s", Counter[str]()
    image.write_bytes(bytes(64 << 20))
    with image.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    serve = BlkModel._serve

    def counted(model: BlkModel, chain: Chain) -> int | Pending:
        asked[BlkType(chain.read(0, 4)[0]).name] += 1
        return serve(model, chain)

    monkeypatch.setattr(BlkModel, "_serve", counted)
    target = Target.parse(f"model:blk?file={image}&queues={queues}&threads={queues}&engine=native")
    with Server(target.open, str(path)):
        verified(client, path, queues, *["poll"] * polled)
    target.close()
    assert set(asked) == {"DISCARD", "WRITE_ZEROES"}, asked
    seen("clients", "libblkio", "blk", "model", "split", "memory slots", "memory hotplug", *["multi-queue"] * (queues > 1))


def test_a_disk_behind_another_back_end(short_dir: Path, client: list[str], seen: Seen) -> None:
    """Legacy in front, legacy behind: memory that comes and goes is handed on."""
    with storage_daemon(64 << 20) as behind:
        target = Target.parse(f"vhost-user:{behind}?type=blk")
        path = short_dir / "s"
        with Server(target.open, str(path)):
            verified(client, path, 1)
        target.close()
    seen("clients", "libblkio", "blk", "qemu-storage-daemon", "split", "memory slots", "memory hotplug")
