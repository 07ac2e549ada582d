# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Drivers of every type on devices whose answers are spoilt: nothing but an error that names the device, and soon."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.driven import opened, quiet
from tests.support.liars import Files, Liar
from tests.support.peripherals import Bus, EchoConsole, Keyboard, Lines, ScsiDisk, SocketHost
from vdpa_bridge.device import Device
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
from vdpa_bridge.errors import DeviceBroken
from vdpa_bridge.models import Model, RngModel
from vdpa_bridge.models.base import Queue
from vdpa_bridge.virtio.gpio import Direction
from vdpa_bridge.virtio.input import Event

__all__ = ["quiet"]  # an autouse fixture

TIMEOUT = 0.04


def rng(device: Device) -> None:
    with RngDriver(device, timeout=TIMEOUT) as driver:
        driver.read(40_000)


def console(device: Device) -> None:
    with ConsoleDriver(device, port="echo", timeout=TIMEOUT) as driver:
        driver.write(b"line\n" * 100)
        driver.read_until(b"\n")


def scsi(device: Device) -> None:
    with ScsiDriver(device, timeout=TIMEOUT) as driver:
        list(itertools.islice(driver.units(), 8))
        driver.serial(1, 2)
        blocks, size = driver.capacity(1, 2)
        driver.write(0, bytes(size * min(blocks, 8)), 1, 2)
        driver.read(0, size * min(blocks, 8), 1, 2)


def fs(device: Device) -> None:
    with FsDriver(device, timeout=TIMEOUT) as driver:
        driver.list("/dir")
        for _ in itertools.islice(driver.read("dir/file"), 100):
            pass
        driver.readlink("link")
        driver.stat("/")


def vsock(device: Device) -> None:
    with VsockDriver(device, timeout=TIMEOUT) as driver, driver.connect(7) as stream:
        stream.send(bytes(20_000))
        while stream.receive():
            pass


def keyboard(device: Device) -> None:
    with InputDriver(device, timeout=TIMEOUT) as driver:
        assert driver.info.events is not None
        for value in range(20):
            driver.write(Event(1, 30, value))
            driver.read()


def gpio(device: Device) -> None:
    with GpioDriver(device, timeout=TIMEOUT) as driver:
        driver.names()
        driver.set_direction(0, Direction.OUT)
        driver.direction(0)
        driver.set_value(0, True)
        driver.value(0)


def i2c(device: Device) -> None:
    with I2cDriver(device, timeout=TIMEOUT) as driver:
        driver.transfer(0x50)
        driver.transfer(0x50, b"\x10hello", 5)


def generic(device: Device) -> None:
    with GenericDriver(device, timeout=TIMEOUT) as driver:
        assert driver.info
        for _ in range(10):
            assert len(driver.ask(0, (), 100)) <= 100


@pytest.mark.parametrize(
    ("make", "drive"),
    [
        (RngModel, rng), (EchoConsole, console), (ScsiDisk, scsi), (Files, fs), (SocketHost, vsock), (Keyboard, keyboard),
        (Lines, gpio), (Bus, i2c), (RngModel, generic),
    ],
    ids=lambda each: each.__name__,
)  # fmt: skip
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_spoilt_answers(make: Callable[[], Model], drive: Callable[[Device], None], seed: int) -> None:
    start = time.monotonic()
    with opened(Liar(make(), seed)) as device:
        try:
            drive(device)
        except (OSError, LookupError) as error:
            got: Exception | None = error
        else:
            got = None
    assert got is None or "model:test" in str(got), f"the error does not name the device: {got!r}"
    assert time.monotonic() - start < 5


class Answers(RngModel):
    """Gives every chain the same bytes."""

    def __init__(self, kind: type[Model], data: bytes, config: bytes = b"") -> None:
        self.device_id = kind.device_id  # type: ignore[misc]
        self.features, self.queue_count = kind.features, kind.queue_count
        self._data, self._config = data, config

    def config(self) -> bytes:
        return self._config

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        queues[index].push([(chain, chain.write(self._data[: chain.writable])) for chain in queues[index].pop()])


@pytest.mark.parametrize(
    ("kind", "data", "config", "drive", "says"),
    [
        (RngModel, b"", b"", rng, "without a random byte"),
        (Lines, b"\0", b"\3\0\0\0\7\0\0\0", gpio, "an answer of 1 bytes instead of 8"),
        (Lines, b"\0out\0", b"\3\0\0\0\4\0\0\0", gpio, "1 names for 3 lines"),
        (Lines, b"", b"\3\0\0\0\xff\xff\xff\xff", gpio, "names take 4294967295 bytes"),
        (Bus, b"", b"", i2c, "0 bytes came instead of 1"),
        (Files, bytes(15), b"", fs, "15 bytes, less than its header"),
        (Files, b"\x10\0\0\0\0\0\0\0\2" + bytes(7), b"", fs, "answer 2 to request 1"),
        (ScsiDisk, b"", b"", scsi, "configuration space of 0 bytes, 36 belong to it"),
        (SocketHost, b"x", bytes(8), vsock, "a packet of 1 bytes, less than its header"),
    ],
)  # fmt: skip
def test_nonsense_is_named(kind: type[Model], data: bytes, config: bytes, drive: Callable[[Device], None], says: str) -> None:
    with opened(Answers(kind, data, config)) as device, pytest.raises(DeviceBroken, match=says) as broken:
        drive(device)
    assert "model:test" in str(broken.value)


def test_file_system_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that goes on for ever is given up."""

    class Endless(Files):
        def _answer(self, opcode: int, number: int, body: bytes, room: int) -> bytes | int:
            return b"\1".ljust(16, b"\0") + b"\1\0\0\0\4\0\0\0a".ljust(16, b"\0") if opcode == 28 else super()._answer(opcode, number, body, room)

    monkeypatch.setattr("vdpa_bridge.drivers.fs._MOST_ENTRIES", 100)
    with opened(Endless()) as device, FsDriver(device) as driver, pytest.raises(DeviceBroken, match="entry 101"):
        driver.list("/")
