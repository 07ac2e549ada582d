# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Disks on NBD servers: every byte checked in the driver and in the server's image; servers that die, come back, change or say nothing."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.driven import quiet
from tests.support.nbd import NbdServer, nbdkit, qemu_nbd
from tests.support.programs import program
from tests.support.sockets import listens
from vdpa_bridge import ops
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.device import Device
from vdpa_bridge.drivers import BlkDriver, BlkRequest
from vdpa_bridge.load import BlkWork, Timing, load_blk
from vdpa_bridge.models import make_model
from vdpa_bridge.targets import connect
from vdpa_bridge.wire import VringState

__all__ = ["quiet"]  # an autouse fixture
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not shutil.which("qemu-nbd") or not shutil.which("nbdkit"), reason="needs qemu-nbd and nbdkit: run tools/setup peers"),
]

MIB = 1 << 20
SIZE = 16 * MIB
PATIENCE = 10.0


@pytest.fixture
def image(short_dir: Path) -> Path:
    path = short_dir / "disk"
    path.write_bytes(random.Random(3).randbytes(SIZE))
    return path


@pytest.fixture
def server(short_dir: Path, image: Path) -> Iterator[NbdServer]:
    with qemu_nbd(short_dir / "n", image) as server:
        yield server


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_every_byte(server: NbdServer, image: Path) -> None:
    mirror, dice = bytearray(image.read_bytes()), random.Random(5)
    with connect(server.target(queues="2")) as device, BlkDriver(device, queues=(0, 1)) as disk:
        assert disk.read(0, SIZE) == mirror
        for _ in range(200):
            length = 512 * dice.randint(1, 256)
            offset = 512 * dice.randint(0, (SIZE - length) // 512)
            match dice.randint(0, 3):
                case 0:
                    assert disk.read(offset, length) == mirror[offset : offset + length]
                case 1:
                    disk.write_zeroes(offset, length, unmap=dice.random() < 0.5)
                    mirror[offset : offset + length] = bytes(length)
                case _:
                    data = dice.randbytes(length)
                    disk.write(offset, data)
                    mirror[offset : offset + length] = data
        disk.discard(MIB, MIB)
        mirror[MIB : 2 * MIB] = disk.read(MIB, MIB)
        disk.flush()
        assert image.read_bytes() == mirror
    assert image.stat().st_blocks * 512 < SIZE, "nothing was given back"


def test_load_with_many_requests_in_flight(server: NbdServer) -> None:
    with connect(server.target(queues="2")) as device, BlkDriver(device, queues=(0, 1)) as disk:
        found = load_blk(disk, BlkWork(Timing(duration=0, count=4000), reads=50, depth=64, verify=True))
    assert found.compared > 100
    assert found.read_back > 100


def test_more_than_fits_under_way(server: NbdServer, image: Path) -> None:
    """Requests of 8 MiB: some wait in the ring until others have ended."""
    with connect(server.target()) as device, BlkDriver(device, pool_size=160 * MIB) as disk:
        data = disk.read(0, SIZE)
        batch = disk.submit([BlkRequest(0, 0, length=8 * MIB) for _ in range(12)])
        done = disk.complete(batch)
        while len(done) < 12:
            done += disk.complete(batch)
        assert all(bytes(request.data) == data[: 8 * MIB] for request in done)
    assert data == image.read_bytes()


@pytest.mark.parametrize(("without", "asked"), [([], "fua=1"), (["--filter=fua"], " Flush ")], ids=["FUA", "flush"])
def test_a_disk_without_a_cache(short_dir: Path, without: list[str], asked: str) -> None:
    """A driver without FLUSH: each write is stable when it ends, by FUA or by a flush. nbdkit's log filter has what the server was asked."""
    log, file = short_dir / "log", short_dir / "f"
    file.write_bytes(bytes(MIB))
    with nbdkit(short_dir / "n", *without, "--filter=log", "file", str(file), f"logfile={log}") as server:
        with connect(server.target()) as device, BlkDriver(device) as disk:
            disk.write(0, b"s" * 4096)
        assert asked not in log.read_text(), "nobody asked for it"
        with connect(server.target()) as device, BlkDriver(device, wanted=0) as disk:
            disk.write(0, b"s" * 4096)
            assert disk.read(0, 4096) == b"s" * 4096
    assert asked in log.read_text()


def test_an_export_that_is_for_reading(short_dir: Path, image: Path) -> None:
    with qemu_nbd(short_dir / "n", image, "--read-only") as server:
        with pytest.raises(OSError, match="is for reading alone: write readonly=on"):
            connect(server.target())
        with connect(server.target(readonly="on")) as device, BlkDriver(device) as disk:
            assert disk.info.readonly
            assert disk.read(SIZE - 4096, 4096) == image.read_bytes()[-4096:]


def test_blocks_of_the_servers_size_and_requests_in_pieces(short_dir: Path) -> None:
    policy = ["--filter=blocksize-policy", "memory", "8M", "blocksize-minimum=4096", "blocksize-preferred=64K", "blocksize-maximum=128K", "blocksize-error-policy=error"]
    with nbdkit(short_dir / "n", *policy) as server, connect(server.target()) as device, BlkDriver(device) as disk:
        data = random.Random(9).randbytes(MIB + 4096)
        disk.write(8192, data)
        assert disk.read(8192, len(data)) == data
        with pytest.raises(OSError, match="I/O error"):
            disk.read(512, 4096, unchecked=True)


def test_a_server_that_comes_back(server: NbdServer, image: Path, short_dir: Path) -> None:
    """What was under way is asked again; the disk has the size of what came back."""
    with connect(server.target()) as device, BlkDriver(device) as disk:
        server.stop(True)
        batch = disk.submit([BlkRequest(1, sector, b"w" * 512) for sector in range(20)])
        server.kill()
        with image.open("r+b") as file:
            file.truncate(2 * SIZE)
        with qemu_nbd(short_dir / "n", image):
            assert all(request.status == 0 for request in disk.complete(batch, 20))
            until(lambda: disk.refresh().size == 2 * SIZE)
            disk.write(2 * SIZE - 512, b"e" * 512)
            disk.flush()
    data = image.read_bytes()
    assert data[: 20 * 512] == b"w" * 20 * 512
    assert data[-512:] == b"e" * 512


def test_a_server_that_dies_while_it_is_asked(server: NbdServer, image: Path, short_dir: Path) -> None:
    """A connection that turns out to be dead as a request is begun brings no event: it is found all the same."""
    with connect(server.target(nbd_timeout="8")) as device, BlkDriver(device) as disk, ExitStack() as stack:
        for turn in range(6):
            over = threading.Event()

            def ask(turn: int = turn, over: threading.Event = over) -> None:
                while not over.is_set():
                    disk.write(0, bytes([turn + 1]) * 4096)

            with ThreadPoolExecutor(1) as pool:
                asking = pool.submit(ask)
                time.sleep(0.05 + turn * 0.01)
                server.kill()
                server = stack.enter_context(qemu_nbd(short_dir / "n", image))
                time.sleep(0.05)
                over.set()
                asking.result(20)


def test_a_server_that_comes_back_with_less(server: NbdServer, image: Path, short_dir: Path) -> None:
    """A smaller disk is a smaller disk; one that cannot be written is none."""
    with connect(server.target(nbd_timeout="2")) as device, BlkDriver(device) as disk:
        server.kill()
        with qemu_nbd(short_dir / "n", image, "--read-only"), pytest.raises(OSError, match="I/O error"):
            disk.write(0, b"x" * 512)
        with image.open("r+b") as file:
            file.truncate(SIZE // 2)
        with qemu_nbd(short_dir / "n", image):
            until(lambda: disk.refresh().size == SIZE // 2)
            disk.write(SIZE // 2 - 512, b"x" * 512)
            with pytest.raises(OSError, match="I/O error"):
                disk.read(SIZE // 2, 512, unchecked=True)


def test_a_size_that_is_asked_for(short_dir: Path) -> None:
    """nbdkit's file plugin looks at its file for each connection: ``refresh`` makes one, under a running driver."""
    file = short_dir / "f"
    file.write_bytes(bytes(MIB))
    with nbdkit(short_dir / "n", "file", str(file)) as server:
        home = ModelDevice(make_model("blk", {"nbd": server.uri}), "disk")
        try:
            with Device(home.open()) as device, BlkDriver(device) as disk:
                with file.open("r+b") as opened:
                    opened.truncate(4 * MIB)
                assert disk.refresh().size == MIB
                home.refresh()
                until(lambda: disk.refresh().size == 4 * MIB)
                disk.write(3 * MIB, b"n" * 512)
        finally:
            home.close()
    assert file.read_bytes()[3 * MIB :][:512] == b"n" * 512


def test_a_server_that_says_nothing(server: NbdServer) -> None:
    """Requests fail when their time is over; reset and close do not wait for it; the next driver's disk works when it speaks again."""
    home = ModelDevice(make_model("blk", {"nbd": server.uri, "nbd-timeout": "1"}), "disk")
    try:
        with Device(home.open()) as device, BlkDriver(device) as disk:
            server.stop(True)
            start = time.monotonic()
            with pytest.raises(OSError, match="I/O error"):
                disk.read(0, 4096)
            assert 0.9 < time.monotonic() - start < 3
            disk.submit([BlkRequest(1, 0, b"old" + bytes(509))])
            start = time.monotonic()
            assert device.get_status() & 4, "operations wait for nobody"
            assert time.monotonic() - start < 0.5
            start = time.monotonic()
        assert time.monotonic() - start < 1, "the reset waited"
        server.stop(False)
        with Device(home.open()) as device, BlkDriver(device) as disk:
            disk.write(0, b"new" + bytes(509))
            assert disk.read(0, 3 * 512)[:3] == b"new"
            server.stop(True)
    finally:
        start = time.monotonic()
        home.close()
        assert time.monotonic() - start < 2, "the end waited"


def test_the_next_drivers_requests_come_after_those_of_the_last(short_dir: Path) -> None:
    """A slow server has the old write still to do when the new one comes: it is not done after it."""
    with nbdkit(short_dir / "n", "--filter=delay", "memory", "1M", "delay-write=500ms") as server:
        home = ModelDevice(make_model("blk", {"nbd": server.uri}), "disk")
        try:
            with Device(home.open()) as device, BlkDriver(device) as disk:
                disk.submit([BlkRequest(1, 0, b"old".ljust(512, b"."))])
                time.sleep(0.2)
            with Device(home.open()) as device, BlkDriver(device) as disk:
                disk.write(0, b"new".ljust(512, b"."))
                time.sleep(0.6)
                assert disk.read(0, 512)[:3] == b"new"
        finally:
            home.close()


def test_suspending_takes_what_is_under_way_along(short_dir: Path) -> None:
    with nbdkit(short_dir / "n", "--filter=delay", "memory", "1M", "delay-write=300ms") as server, connect(server.target()) as device, BlkDriver(device) as disk:
        batch = disk.submit([BlkRequest(1, 0, b"x" * 512)])
        time.sleep(0.1)
        device.suspend()
        assert [request.status for request in disk.complete(batch, timeout=0.2)] == [0]


def test_a_disk_at_rest_has_done_what_it_began(short_dir: Path) -> None:
    """``stop`` of a monitor: nothing reaches the server from then on, and drivers have their answers."""
    with nbdkit(short_dir / "n", "--filter=delay", "memory", "1M", "delay-write=300ms") as server:
        home = ModelDevice(make_model("blk", {"nbd": server.uri}), "disk")
        try:
            with Device(home.open()) as device, BlkDriver(device) as disk:
                begun = disk.submit([BlkRequest(1, 0, b"x" * 512)])
                time.sleep(0.1)
                home.hold(True)
                assert [request.status for request in disk.complete(begun, timeout=0.2)] == [0]
                later = disk.submit([BlkRequest(1, 0, b"y" * 512)])
                time.sleep(0.5)
                assert later.left == 1
                home.hold(False)
                assert [request.status for request in disk.complete(later)] == [0]
        finally:
            home.close()


def test_stopping_one_queue_leaves_the_others_alone(short_dir: Path) -> None:
    """What ends meanwhile in another queue is answered there, though that queue is not looked at while the first one stops."""
    slow = ["--filter=delay", "memory", "1M", "delay-write=300ms"]
    with nbdkit(short_dir / "n", *slow) as server, connect(server.target(queues="2")) as device, BlkDriver(device, queues=(0, 1)) as disk:
        batch = disk.submit([BlkRequest(1, sector, b"z" * 512) for sector in range(16)])
        time.sleep(0.1)
        device.backend.call(ops.SET_VRING_ENABLE, VringState(0, 0))
        assert [request.status for request in disk.complete(batch, 16, timeout=2)] == [0] * 16


def test_a_server_that_is_silent_when_a_queue_stops(server: NbdServer) -> None:
    """It has a few seconds; then the request fails, and the queue stops."""
    with connect(server.target()) as device, BlkDriver(device) as disk:
        server.stop(True)
        batch = disk.submit([BlkRequest(0, 0, length=512)])
        time.sleep(0.1)
        start = time.monotonic()
        device.suspend()
        assert 4 < time.monotonic() - start < 7
        assert [request.status for request in disk.complete(batch, timeout=1)] == [1]


def test_errors_of_the_server_are_errors_of_the_disk(short_dir: Path) -> None:
    failing = ["--filter=error", "memory", "1M", "error=ENOSPC", "error-pwrite-rate=100%"]
    with nbdkit(short_dir / "n", *failing) as server, connect(server.target()) as device, BlkDriver(device) as disk:
        with pytest.raises(OSError, match="I/O error"):
            disk.write(0, bytes(512))
        assert disk.read(0, 512) == bytes(512)


def test_tls(short_dir: Path) -> None:
    """By a shared key; without it there is no disk."""
    keys = short_dir / "keys"
    keys.write_text("guest:" + "5a" * 32 + "\n")
    with nbdkit(short_dir / "n", "--tls=require", f"--tls-psk={keys}", "memory", "1M") as server:
        with pytest.raises(OSError, match="TLS"):
            connect(server.target())
        uri = f"nbds+unix://guest@/?socket={server.path}&tls-psk-file={keys}"
        home = ModelDevice(make_model("blk", {"nbd": uri}), "disk")
        try:
            with Device(home.open()) as device, BlkDriver(device) as disk:
                disk.write(0, b"secret".ljust(512))
                assert disk.read(0, 512) == b"secret".ljust(512)
        finally:
            home.close()


@pytest.mark.parametrize(
    ("uri", "error"),
    [("nbd+unix:///?socket=/nonexistent", "No such file"), ("nbd://127.0.0.1:1/x", "refused"), ("nbd+unix:///nosuch", "socket"), ("http://x/", "an NBD server is at")],
)
def test_what_cannot_be_had_is_said(uri: str, error: str) -> None:
    with pytest.raises((OSError, ValueError), match=error):
        make_model("blk", {"nbd": uri})


def test_the_program_in_its_sandbox(server: NbdServer, image: Path, short_dir: Path) -> None:
    """It may connect again, and to nothing else."""
    path = short_dir / "s"
    with program("blk", "--socket-path", str(path), "--nbd", server.uri, "--blk-size", "4K", "--sandbox", "on", "-v") as served:
        until(lambda: listens(path))
        with connect(f"vhost-user:{path}?type=blk") as device, BlkDriver(device) as disk:
            disk.write(4096, b"boxed".ljust(4096, b"."))
            server.kill()
            with qemu_nbd(short_dir / "n", image):
                assert disk.read(4096, 4096) == b"boxed".ljust(4096, b".")
                served.logs("connected again")
    assert image.read_bytes()[4096:8192] == b"boxed".ljust(4096, b".")
