# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Drivers of every type but blk and net, on devices written from the specification, in three homes: here and behind our server."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import pytest

from tests.support.driven import WAYS, in_way, opened, quiet
from tests.support.liars import Files
from tests.support.peripherals import Bus, EchoConsole, Keyboard, Lines, ScsiDisk, SocketHost
from tests.support.seen import Seen
from vdpa_bridge import Device
from vdpa_bridge.drivers import (
    ConsoleDriver,
    FsDriver,
    GenericDriver,
    GpioDriver,
    I2cDriver,
    InputDriver,
    RngDriver,
    ScsiDriver,
    VsockDriver,
)
from vdpa_bridge.drivers.base import RING_FEATURES
from vdpa_bridge.drivers.scsi import Inquiry, ScsiError
from vdpa_bridge.errors import FeatureError
from vdpa_bridge.flags import Feature
from vdpa_bridge.models import Model, RngModel
from vdpa_bridge.virtio.gpio import Direction
from vdpa_bridge.virtio.input import EV_KEY, Event

__all__ = ["quiet"]  # an autouse fixture

Homes = Callable[[Model], AbstractContextManager[Device]]


@pytest.fixture(params=WAYS)
def home(request: pytest.FixtureRequest) -> Homes:
    """Opens a model where it is, or behind a server and a socket."""
    return partial(in_way, request.param)


@pytest.mark.parametrize("rings", ["split", "packed"])
def test_rng(home: Homes, request: pytest.FixtureRequest, rings: str, seen: Seen) -> None:
    features = RING_FEATURES | (Feature.RING_PACKED if rings == "packed" else 0)
    with home(RngModel()) as device, RngDriver(device, ring_features=features) as rng:
        assert rng.features & features == features
        assert rng.read(0) == b""
        data = rng.read(100_000)
        assert len(data) == 100_000
        assert set(data) == set(range(256))
    seen("devices", "rng", "rng", "model", rings, *set(WAYS[1:]) & set(request.node.callspec.params.values()))


def test_generic(home: Homes) -> None:
    with home(ScsiDisk()) as device, GenericDriver(device) as driver:
        assert driver.info["device"] == "scsi"
        assert driver.info["queues"] == 3
        assert driver.config()["max_target"] == 2
        header = b"\1\1\x40\2" + bytes(15) + b"\x12\0\0\0\x24\0".ljust(32, b"\0")
        written, (answer, data) = driver.transact(2, [header], [108, 36])
        assert (written, answer[11], data[8:12]) == (144, 0, b"VDPA")


def test_generic_without_a_layout() -> None:
    class Unknown(RngModel):
        device_id = 77  # type: ignore[assignment]

        def config(self) -> bytes:
            return b"\1\2\3"

    with opened(Unknown()) as device, GenericDriver(device) as driver:
        assert driver.config() == {"bytes": "010203"}
        assert driver.info["device"] == "device 77"


# Console ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", [None, 0, 1, "echo"])
def test_console(home: Homes, port: int | str | None) -> None:
    rng = random.Random(4)
    with home(EchoConsole()) as device, ConsoleDriver(device, port=port) as console:
        assert console.info.get("cols") == 80
        for _ in range(2):
            for length in (1, 4096, 5000):
                data = rng.randbytes(length)
                console.write(data)
                back = b""
                while len(back) < length:
                    back += console.read()
                assert back == data
            console.write(b"first\nsecond\nrest")
            assert [console.read_until(b"\n") for _ in range(2)] == [b"first\n", b"second\n"]
            with pytest.raises(TimeoutError, match="arrival of bytes"):
                console.read_until(b"\n", timeout=0.05)
            assert console.read() == b"rest"
            console.restart()


def test_console_reader_that_does_not_read() -> None:
    """What comes waits in buffers of a fixed number; the device is held up, and nothing is lost."""
    with opened(EchoConsole()) as device, ConsoleDriver(device) as console:
        for number in range(100):
            console.write(b"%04d" % number * 100)
        assert len(console._inboxes[0].came) <= 32
        text = b""
        while len(text) < 100 * 400:
            text += console.read()
        assert text == b"".join(b"%04d" % number * 100 for number in range(100))


def test_console_ports_that_are_not_there() -> None:
    class OnePort(EchoConsole):
        features = 0

    with opened(EchoConsole()) as device, pytest.raises(LookupError, match=r"no port 'x'; there is: 0 '', 1 'echo'"):
        ConsoleDriver(device, port="x", timeout=0.1)
    with opened(OnePort()) as device, pytest.raises(FeatureError, match="one port only"):
        ConsoleDriver(device, port=1)


# SCSI ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [512, 4096])
def test_scsi(home: Homes, block: int) -> None:
    rng = random.Random(5)
    disk = ScsiDisk(block)
    with home(disk) as device, ScsiDriver(device) as host:
        assert list(host.units()) == [(1, 2, Inquiry(0, "VDPA", "TEST DISK", "1.0"))]
        assert host.serial(1, 2) == "SERIAL"
        assert host.capacity(1, 2) == (524288 // block, block)
        data = rng.randbytes(200 << 10)
        host.write(8192, data, 1, 2)
        host.flush(1, 2)
        assert disk.data[8192 : 8192 + len(data)] == data
        assert host.read(8192, len(data), 1, 2) == data
        assert host.read(0, 0, 1, 2) == b""
        with pytest.raises(ValueError, match=f"not multiples of {block}"):
            host.read(1, block, 1, 2)
        with pytest.raises(ValueError, match="leaves the disk, which has 524288 bytes"):
            host.read(524288, block, 1, 2)
        with pytest.raises(OSError, match="no such target") as refused:
            host.inquiry(0)
        assert refused.value.errno == errno.ENODEV
        with pytest.raises(ScsiError, match="ILLEGAL REQUEST") as failed:
            host.command(b"\xf7" + bytes(5), target=1, lun=2)
        assert (failed.value.key, failed.value.status) == (5, 2)


# Sockets ---------------------------------------------------------------------------------------------------------------------


def test_vsock_stream(home: Homes) -> None:
    rng = random.Random(6)
    with home(SocketHost()) as device, VsockDriver(device) as sockets:
        assert sockets.cid == 42
        with sockets.connect(7) as one, sockets.connect(7) as other:
            sent = rng.randbytes(700_000)
            got = bytearray()
            for at in range(0, len(sent), 70_000):
                one.send(sent[at : at + 70_000])
                other.send(b"%8d" % at)
                while len(got) < at + 70_000:
                    got += one.receive()
            assert got == sent
            assert b"".join(other.receive(8) for _ in range(10)) == b"".join(b"%8d" % at for at in range(0, 700_000, 70_000))
            one.shutdown()
            assert one.receive() == b""
            with pytest.raises(BrokenPipeError):
                one.send(b"x")
        with pytest.raises(OSError, match="is closed"):
            other.receive()


def test_vsock_refusal_and_reset(home: Homes) -> None:
    host = SocketHost()
    with home(host) as device, VsockDriver(device) as sockets:
        with pytest.raises(ConnectionRefusedError, match=r"connection from port \d+ to 2:8 was refused"):
            sockets.connect(8)
        stream = sockets.connect(7)
        stream.send(b"last words")
        assert stream.receive(4) == b"last"
        host.tell(stream.ends.port, 3)
        sockets.connect(7).close()
        assert stream.receive() == b" words"
        with pytest.raises(ConnectionResetError):
            stream.receive()
        old = sockets.connect(7)
        sockets.restart()
        with pytest.raises(ConnectionResetError, match="ended with the transport"):
            old.receive()
        with sockets.connect(7) as new:
            new.send(b"again")
            assert new.receive() == b"again"


def test_vsock_accepts() -> None:
    host = SocketHost()
    with opened(host) as device, VsockDriver(device) as sockets:
        sockets.listen(99)
        host.tell(99, 1, source=1000)
        host.tell(98, 1, source=1001)
        sockets.connect(7).close()
        stream = sockets.accept(99)
        assert stream.ends == (99, 2, 1000)
        assert host.resets == [1001] or 98 in host.resets
        with pytest.raises(TimeoutError, match="connection to port 99"):
            sockets.accept(99, timeout=0.05)


def test_vsock_other_end_without_room() -> None:
    class Full(SocketHost):
        ROOM = 10

        def hear(self, queue: int, data: bytes) -> None:
            if self.HEADER.unpack_from(data)[6] == 1:
                super().hear(queue, data)

    with opened(Full()) as device, VsockDriver(device) as sockets:
        stream = sockets.connect(7)
        with pytest.raises(TimeoutError, match="room at the other end of the connection"):
            stream.send(bytes(11), timeout=0.1)


def test_vsock_more_than_it_may() -> None:
    host = SocketHost()
    with opened(host) as device, VsockDriver(device) as sockets:
        stream = sockets.connect(7)
        for _ in range(65):
            host.tell(stream.ends.port, 5, bytes(4096))
        sockets.connect(7)
        sockets.wait(lambda: stream._ended, "the end of it")
        assert len(b"".join(iter(lambda: stream.receive(4096) if stream._data else b"", b""))) == 256 << 10
        with pytest.raises(ConnectionAbortedError, match=r"given up: operation 5 with 4096 bytes"):
            stream.receive()


# Input -----------------------------------------------------------------------------------------------------------------------


def test_input(home: Homes) -> None:
    with home(Keyboard()) as device, InputDriver(device) as keyboard:
        info = keyboard.info
        assert (info.name, info.serial, info.ids, info.events) == ("test keyboard", "K1", (3, 0x1234, 0x5678, 1), {EV_KEY: (30, 32)})
        for turn in range(200):
            keyboard.write(Event(EV_KEY, 30, -turn))
            assert keyboard.read() == (EV_KEY, 30, -turn)
        with pytest.raises(TimeoutError, match=r"an event within 0\.05 s"):
            keyboard.read(timeout=0.05)




# Lines and buses -------------------------------------------------------------------------------------------------------------


def test_gpio(home: Homes) -> None:
    with home(Lines()) as device, GpioDriver(device) as gpio:
        assert gpio.lines == 3
        assert gpio.names() == ["out", "", "in"]
        gpio.set_direction(0, Direction.OUT)
        gpio.set_direction(2, Direction.IN)
        assert [gpio.direction(line) for line in range(3)] == [Direction.OUT, Direction.NONE, Direction.IN]
        for high in (True, False):
            gpio.set_value(0, high)
            assert (gpio.value(0), gpio.value(2)) == (high, high)
        with pytest.raises(OSError, match="request 4 for line 1: the device reports status 1"):
            gpio.value(1)
        with pytest.raises(ValueError, match="no line 3"):
            gpio.value(3)


def test_i2c(home: Homes) -> None:
    with home(Bus()) as device, I2cDriver(device) as bus:
        assert bus.transfer(0x50) == b""
        assert bus.transfer(0x50, b"\x10hello") == b""
        assert bus.transfer(0x50, b"\x10", 5) == b"hello"
        assert bus.transfer(0x50, count=2) == b"he"
        for data, count in ((b"", 0), (b"x", 0), (b"x", 3), (b"", 3)):
            with pytest.raises(OSError, match="transfer to address 0x51 failed: status 1"):
                bus.transfer(0x51, data, count)
        assert bus.transfer(0x50, b"\x12", 3) == b"llo"
        with pytest.raises(ValueError, match="more than 7 bits"):
            bus.transfer(0x80)


# Files -----------------------------------------------------------------------------------------------------------------------


def test_fs(home: Homes) -> None:
    """Every node looked up is forgotten, and every file opened is closed again, errors or not."""
    files = Files()
    with home(files) as device, FsDriver(device) as fs:
        assert fs.list("/") == {"dir": 4, "link": 10}
        assert fs.list("dir") == {"file": 8}
        assert b"".join(fs.read("/dir//file")) == Files.CONTENT
        assert (fs.stat("dir/file").size, fs.stat("/").mode, fs.stat("dir").mtime) == (len(Files.CONTENT), 0o40755, 6.5)
        assert fs.readlink("link") == "dir/file"
        for path, number in (("dir/no", errno.ENOENT), ("dir", errno.EISDIR)):
            with pytest.raises(OSError, match="request") as refused:
                list(fs.read(path))
            assert refused.value.errno == number
        next(iter(fs.read("dir/file")))
        fs.wait(lambda: not files.opened and not any(files.known), "the last RELEASE and FORGET")
