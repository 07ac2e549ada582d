# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A server whose device is behind another socket: new clients before old back-ends, and old clients before new servers.

The servers are processes of their own, the block client of the last tests has none of our code.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vdpa_bridge import RemoteProtocolError
from vdpa_bridge.drivers import BlkDriver, NetDriver

from ..support.bridge import REFUSED, WRONG_DATA, Bridge, bridging, run_client, start_client
from ..support.seen import Seen
from ..support.sockets import listens

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not shutil.which("qemu-storage-daemon"), reason="needs qemu-storage-daemon: run tools/setup peers"),
]

SIZE = 16 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture
def old(image: Path) -> Iterator[str]:
    """A legacy back-end that is not ours."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(_directory()))
        path = directory / "q"
        export = f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={path},writable=on"
        command = ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=d,filename={image}", "--export", export]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        stack.callback(process.wait, 10)
        stack.callback(process.terminate)
        end = time.monotonic() + 10
        while not listens(path):
            assert process.poll() is None, "qemu-storage-daemon ended"
            assert time.monotonic() < end, "qemu-storage-daemon does not start"
            time.sleep(0.02)
        yield str(path)


def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="vb")


def test_vdpa_mode_before_a_legacy_back_end(old: str, image: Path, seen: Seen) -> None:
    """The upgrade: a client that requires vDPA mode on qemu-storage-daemon, which has never heard of it."""
    with bridging(f"vhost-user:{old}?type=blk") as upgrade:
        with upgrade.device("blk", "require") as device, BlkDriver(device) as disk:
            assert disk.read(0, SIZE) == image.read_bytes()
            for turn in range(3):
                disk.write(turn * 4096, bytes([turn + 1]) * 4096)
                disk.flush()
                disk.restart()
        assert image.read_bytes()[: 3 * 4096] == b"".join(bytes([turn + 1]) * 4096 for turn in range(3))
        run_client(upgrade.path, "--requests", 200, "--turns", 2)
    seen("clients", "vdpa_bridge", "blk", "qemu-storage-daemon", "split", "restart", "vDPA mode")
    seen("clients", "vhost-blk-client", "blk", "qemu-storage-daemon", "split", "restart", "memory slots", "legacy")


@pytest.fixture
def new() -> Iterator[Bridge]:
    """A server that takes vDPA-mode clients only."""
    with bridging("model:blk?size=4M", "--vdpa", "require") as bridge:
        yield bridge


def test_legacy_before_a_vdpa_mode_server(new: Bridge, seen: Seen) -> None:
    """The way back: a client that knows stock vhost-user only, with a server that refuses it when it comes directly."""
    assert re.search("hung up|reset by peer|Broken pipe", run_client(new.path, status=REFUSED)["error"])
    with bridging(f"vhost-user:{new.path}?type=blk&vdpa=require") as bridge:
        for options in ((), ("--mem-table", "--grow"), ("--turns", 3, "--keep-index")):
            run_client(bridge.path, "--requests", 300, *options)
        assert "sector 0" in run_client(bridge.path, "--read-only", "--seed", 2, status=WRONG_DATA)["error"]
    words = ("split", "restart", "pause", "memory table", "memory slots", "memory hotplug", "legacy")
    seen("clients", "vhost-blk-client", "blk", "vDPA-mode server", *words)


def test_three_hops(old: str) -> None:
    """vDPA mode, legacy mode and a back-end that is not ours: descriptors and eventfds go all the way."""
    with bridging(f"vhost-user:{old}?type=blk") as near, bridging(f"vhost-user:{near.path}?type=blk&vdpa=require") as far:
        run_client(far.path, "--requests", 300, "--turns", 2)
        with far.device("blk", "require") as device, BlkDriver(device) as disk:
            disk.read(0, 4096)
            before = near.rest(), far.rest()
            for _ in range(200):
                disk.read(0, 4096)
            assert (near.expenses(), far.expenses()) == before, "requests do not pass through the servers"


def test_client_killed_at_work_before_a_legacy_back_end(old: str, seen: Seen) -> None:
    with bridging(f"vhost-user:{old}?type=blk") as bridge:
        with start_client(bridge.path, "--requests", 10_000_000, "--depth", 32) as client:
            time.sleep(0.3)
            assert client.poll() is None
            client.kill()
        run_client(bridge.path, "--requests", 100)
    seen("clients", "vhost-blk-client", "blk", "qemu-storage-daemon", "successor")


def test_far_end_dies(new: Bridge) -> None:
    """The client is told, and the next one too, until there is somebody again."""
    with bridging(f"vhost-user:{new.path}?type=blk&vdpa=require") as bridge, bridge.device("blk", "require") as device:
        device.get_features()
        new.process.kill()
        new.process.wait()
        with pytest.raises(OSError, match="GET_FEATURES"):
            device.get_features()
        device.close()
        with pytest.raises(RemoteProtocolError):
            bridge.device("blk", "require")
        assert "cannot open the device" in bridge.said()


def test_frames_through_a_chain() -> None:
    frames = [b"\xff" * 6 + bytes([at]) * 60 for at in range(50)]
    with (
        bridging("model:net", "--vdpa", "off") as legacy,
        bridging(f"vhost-user:{legacy.path}?type=net") as upgrade,
        upgrade.device("net", "require") as device,
        NetDriver(device) as nic,
    ):
        nic.send_many(frames)
        assert nic.receive_many(50) == frames
