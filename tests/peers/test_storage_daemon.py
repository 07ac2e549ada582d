# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Our block driver on qemu-storage-daemon: every byte checked, in the driver and in the image; and what a death looks like."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.seen import Seen
from tests.support.sockets import listens
from vdpa_bridge import Device, ProtocolError, RemoteProtocolError, Target
from vdpa_bridge.drivers.blk import BlkDriver
from vdpa_bridge.load import BlkWork, Timing, load_blk

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not shutil.which("qemu-storage-daemon"), reason="needs qemu-storage-daemon: run tools/setup peers"),
]

SIZE = 16 << 20


class Daemon:
    """A qemu-storage-daemon with one vhost-user-blk export."""

    def __init__(self, directory: Path) -> None:
        self.image = directory / "disk"
        self.image.write_bytes(random.Random(1).randbytes(SIZE))
        self.path = directory / "s"
        export = f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={self.path},writable=on,num-queues=2"
        blockdev = f"driver=file,node-name=d,filename={self.image},discard=unmap"
        self.process = subprocess.Popen(
            ["qemu-storage-daemon", "--blockdev", blockdev, "--export", export], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        end = time.monotonic() + 10
        while not listens(self.path):
            assert self.process.poll() is None, "qemu-storage-daemon ended"
            assert time.monotonic() < end, "qemu-storage-daemon does not start"
            time.sleep(0.02)

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="vb") as name:
        started = Daemon(Path(name))
        try:
            yield started
        finally:
            started.close()


def target(daemon: Daemon, more: str = "") -> Target:
    return Target.parse(f"vhost-user:{daemon.path}?type=blk{more}")


def test_data(daemon: Daemon, seen: Seen) -> None:
    rng = random.Random(2)
    mirror = bytearray(daemon.image.read_bytes())
    with Device(target(daemon).open()) as device, BlkDriver(device) as disk:
        assert disk.info.size == SIZE
        assert disk.read(0, SIZE) == mirror
        for _ in range(40):
            length = 512 * rng.choice([1, 2, 7, 8, 64, 255, 2048])
            offset = 512 * rng.randrange((SIZE - length) // 512 + 1)
            data = rng.randbytes(length)
            disk.write(offset, data)
            mirror[offset : offset + length] = data
        disk.flush()
        assert disk.read(0, SIZE) == mirror
        disk.write_zeroes(1 << 20, 1 << 16)
        mirror[1 << 20 : (1 << 20) + (1 << 16)] = bytes(1 << 16)
        assert disk.read(1 << 20, 1 << 17) == mirror[1 << 20 : (1 << 20) + (1 << 17)]
    assert daemon.image.read_bytes() == mirror
    seen("devices", "blk", "blk", "qemu-storage-daemon", "split", "legacy")


def test_sessions_follow_one_another(daemon: Daemon) -> None:
    for turn in range(5):
        with Device(target(daemon).open()) as device, BlkDriver(device) as disk:
            disk.write(turn * 512, bytes([turn + 1]) * 512)
    assert daemon.image.read_bytes()[: 5 * 512] == b"".join(bytes([turn + 1]) * 512 for turn in range(5))


def test_vdpa_mode_is_not_offered(daemon: Daemon) -> None:
    with pytest.raises(RemoteProtocolError, match="does not offer VHOST_USER_PROTOCOL_F_VDPA"):
        target(daemon, "&vdpa=require").open()


def test_death_is_an_error(daemon: Daemon) -> None:
    with Device(target(daemon).open()) as device:
        device.own()
        os.kill(daemon.process.pid, signal.SIGKILL)
        daemon.process.wait(5)
        with pytest.raises(ProtocolError, match="closed the connection"):
            device.get_features()
        with pytest.raises(ProtocolError, match="dead"):
            device.get_features()


@pytest.mark.parametrize("poll", [False, True])
def test_load_is_borne_and_verified(daemon: Daemon, poll: bool) -> None:
    with Device(target(daemon).open()) as device, BlkDriver(device, queues=(0, 1)) as disk:
        work = BlkWork(Timing(duration=0, count=4000, poll=poll), reads=60, verify=True, length=4 << 20)
        result = load_blk(disk, work)
        assert result.reads.count + result.writes.count == 4000
        assert min(result.compared, result.read_back) > 0
        assert disk.read(8 << 20, 1 << 20) == daemon.image.read_bytes()[8 << 20 : 9 << 20], "beyond the range"


@pytest.mark.parametrize("poll", [False, True])
@pytest.mark.parametrize(("sent", "error"), [(signal.SIGKILL, ProtocolError), (signal.SIGSTOP, TimeoutError)])
def test_load_on_a_disk_that_dies_or_stops_ends(daemon: Daemon, sent: signal.Signals, error: type[Exception], poll: bool) -> None:
    def strike(seconds: float, done: int) -> None:
        if done and not struck:
            struck.append(seconds)
            os.kill(daemon.process.pid, sent)

    struck: list[float] = []
    with Device(target(daemon, "&timeout=1").open()) as device, BlkDriver(device, timeout=1) as disk:
        start = time.monotonic()
        with pytest.raises(error, match=f"vhost-user:{daemon.path}"):
            load_blk(disk, BlkWork(Timing(duration=30, poll=poll)), strike)
        assert struck
        assert time.monotonic() - start < 10


def test_silence_is_an_error(daemon: Daemon) -> None:
    with Device(target(daemon, "&timeout=0.3").open()) as device:
        device.own()
        os.kill(daemon.process.pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=r"no answer to GET_FEATURES \(1\) within 0.3 s"):
            device.get_features()
        assert time.monotonic() - start < 3
