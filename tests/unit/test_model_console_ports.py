# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Consoles with several ports: control messages, by our driver and by hand, in and out of their place; bytes without a queue."""

from __future__ import annotations

import random
import socket
import struct
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.driven import opened, quiet
from tests.support.ends import PATIENCE, client, read, take, terminal
from tests.support.homes import socket_path
from vdpa_bridge.drivers import ConsoleDriver, Driver
from vdpa_bridge.drivers.base import Posted
from vdpa_bridge.errors import FeatureError
from vdpa_bridge.models import Model, make_model
from vdpa_bridge.virtio.features import ConsoleFeature as F

__all__ = ["quiet"]  # an autouse fixture


@pytest.fixture
def path() -> Iterator[str]:
    with socket_path() as path:
        yield path


# Several ports -----------------------------------------------------------------------------------------------------------------


def test_ports_by_number_and_name(path: str) -> None:
    """Each goes its own way; a port that the driver has not opened gets nothing, and its client's words wait."""
    ports = f"listen:path={path}0,listen:path={path}1;name=org.example.agent,listen:path={path}2;name=two"
    model = make_model("console", {"ports": ports})
    with opened(model) as device, client(f"{path}1") as one, client(f"{path}2") as two:
        two.sendall(b"waits for its turn")
        with ConsoleDriver(device, port="org.example.agent") as driver:
            assert driver.ports[1] == "org.example.agent"
            assert driver.info["max_nr_ports"] == 3
            driver.write(b"to the agent")
            assert take(one, 12) == b"to the agent"
            one.sendall(b"from it")
            assert read(driver, 7) == b"from it"
        with ConsoleDriver(device, port=2) as driver:
            assert read(driver, 18) == b"waits for its turn"
        with pytest.raises(LookupError, match=r"no port 'three'; there is: 0 '', 1 'org\.example\.agent', 2 'two'"):
            ConsoleDriver(device, port="three", timeout=0.2)
        with ConsoleDriver(device) as driver, client(f"{path}0") as zero:
            driver.write(b"without MULTIPORT")
            assert take(zero, 17) == b"without MULTIPORT"
    with opened(make_model("console", {"ports": f"listen:path={path}"})) as device, pytest.raises(FeatureError, match="one port only"):
        ConsoleDriver(device, port=0)


class Control:
    """Control messages by hand."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._boxes: list[Posted] = []
        self.give()

    def give(self, count: int = 8, size: int = 64) -> None:
        self._boxes += [self._driver.post(2, (), [size]) for _ in range(count)]

    def tell(self, port: int, event: int, value: int = 1) -> None:
        self._driver.transact(3, [struct.pack("<IHH", port, event, value)])

    def next(self) -> tuple[int, int, int, bytes]:
        """The next message: port, event, value and more."""
        box = self._boxes[0]
        self._driver.wait(lambda: box.written >= 0, "a control message")
        self._boxes.pop(0)
        self.give(1)
        data = box.data[0][: box.written]
        return (*struct.unpack_from("<IHH", data), data[8:])

    def expect(self, port: int, event: int) -> None:
        while self.next()[:2] != (port, event):
            pass

    @property
    def quiet(self) -> bool:
        time.sleep(0.03)
        self._driver.poll()
        return self._boxes[0].written < 0


@contextmanager
def by_hand(device: object) -> Iterator[tuple[Driver, Control]]:
    with Driver(device, wanted=int(sum(F)), timeout=PATIENCE) as driver:  # type: ignore[arg-type]
        control = Control(driver)
        control.tell(0xFFFFFFFF, 0)
        yield driver, control


def test_control_messages(path: str) -> None:
    """What is said, and when; clients that come and go are told of, for ports that the driver knows."""
    with opened(make_model("console", {"ports": f"listen:path={path}0,listen:path={path}1;name=näme"})) as device, by_hand(device) as (driver, control):
        assert [control.next(), control.next()] == [(0, 1, 0, b""), (1, 1, 0, b"")]
        control.tell(0, 3)
        assert [control.next(), control.next()] == [(0, 4, 1, b""), (0, 6, 1, b"")]
        control.tell(1, 3)
        assert control.next() == (1, 7, 0, "näme".encode())
        with client(f"{path}1") as sock:
            assert control.next() == (1, 6, 1, b"")
            control.tell(1, 6)
            driver.transact(5, [b"hello"])
            assert take(sock, 5) == b"hello"
            buffer = driver.post(4, (), [100])
            control.tell(1, 6, 0)
            sock.sendall(b"kept")
            assert control.quiet
            assert buffer.written < 0
            control.tell(1, 6)
            driver.wait(lambda: buffer.written >= 0, "what was kept")
            assert buffer.data[0][:4] == b"kept"
            control.tell(1, 6, 0)
        assert control.next() == (1, 6, 0, b"")
        for port, event, value in ((7, 3, 1), (0xFFFFFFFF, 6, 1), (0, 99, 1), (1, 7, 1), (0xFFFFFFFF, 0, 0)):
            control.tell(port, event, value)
        for length in (1, 7):
            driver.transact(3, [bytes(length)])
        assert control.quiet, "nonsense has no answer"
        with client(f"{path}1"):
            assert control.next() == (1, 6, 1, b"")


def test_questions_without_buffers_do_not_pile_up(path: str) -> None:
    """A driver asks thousands of times; it gets each answer once. Buffers too small go back empty."""
    with opened(make_model("console", {"ports": f"listen:path={path}0,listen:path={path}1;name=x"})) as device, by_hand(device) as (driver, control):
        assert control.next()[:2] == (0, 1)
        assert control.next()[:2] == (1, 1)
        for _ in range(8):
            control.tell(0, 3, 1)
            control.expect(0, 6)
        for box in control._boxes:
            assert box.written < 0
        boxes = control._boxes
        control._boxes = []
        for _ in range(2000):
            control.tell(0xFFFFFFFF, 0)
            control.tell(0, 3)
        small = [driver.post(2, (), [7]) for _ in range(3)]
        driver.wait(lambda: all(box.written >= 0 for box in small + boxes), "the buffers", PATIENCE)
        assert [box.written for box in small] == [0] * 3 or len(boxes) >= 4


def test_a_byte_without_a_queue(path: str) -> None:
    """EMERG_WRITE: before the driver is ready, and whatever else is written to the configuration space."""
    model = make_model("console", {"ports": f"listen:path={path}"})
    with opened(model) as device, client(path) as sock:
        assert device.identify().features & F.EMERG_WRITE
        for data in (b"o\0\0\0", b"k", b"!\0"):
            device.set_config(8, data)
        device.set_config(0, b"x")
        device.set_config(9, b"x")
        device.set_config(0, bytes(12))
        assert take(sock, 3) == b"ok!"
        sock.setblocking(False)
        time.sleep(0.05)
        with pytest.raises(BlockingIOError):
            sock.recv(1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(20, 150))
def test_whatever_comes_the_device_goes_on(seed: int, count: int) -> None:
    """Messages, bytes and buffers at random, clients that come and go: no queue breaks, and a good driver is served then."""
    rng = random.Random(seed)
    with socket_path() as path:
        model: Model = make_model("console", {"ports": f"listen:path={path}0;console=off,listen:path={path}1,pty:name=x"})
        with opened(model) as device:
            clients: list[socket.socket] = []
            with Driver(device, wanted=int(sum(F)), pool_size=1 << 20, timeout=PATIENCE) as driver:
                for _ in range(count):
                    driver.poll()
                    with _full():
                        match rng.randrange(6):
                            case 0 | 1:
                                driver.post(3, [struct.pack("<IHH", rng.choice((0, 1, 2, 3, 0xFFFFFFFF)), rng.randrange(9), rng.randrange(2))[: rng.choice((8, 8, 8, 5))]])
                            case 2:
                                driver.post(rng.choice((0, 2, 4, 6)), (), [rng.choice((1, 8, 12, 500))])
                            case 3:
                                driver.post(rng.choice((1, 5, 7)), [rng.randbytes(rng.choice((1, 3000)))])
                            case 4:
                                clients.append(socket.socket(socket.AF_UNIX))
                                clients[-1].setblocking(False)
                                clients[-1].connect(f"{path}{rng.randrange(2)}")
                                clients[-1].send(rng.randbytes(rng.choice((1, 5000))))
                            case _ if clients:
                                clients.pop(rng.randrange(len(clients))).close()
            for sock in clients:
                sock.close()
            with ConsoleDriver(device, port=1) as good:
                deadline = time.monotonic() + PATIENCE
                while time.monotonic() < deadline:
                    with client(f"{path}1") as sock:
                        sock.sendall(b"the end")
                    data = good.read(PATIENCE)
                    if data.endswith(b"the end"):
                        break
                assert data.endswith(b"the end")


@contextmanager
def _full() -> Iterator[None]:
    """A ring or a backlog may have no room."""
    try:
        yield
    except (MemoryError, BlockingIOError):
        pass


def test_a_change_of_size_is_told(path: str) -> None:
    """By the configuration interrupt; with MULTIPORT by a message, too."""
    with opened(make_model("console", {"ports": f"pty:link={path},listen:path={path}2"})) as device, by_hand(device) as (_, control):
        control.expect(1, 1)
        control.tell(0, 3)
        assert control.next() == (0, 4, 1, b"")
        assert control.next() == (0, 5, 0, struct.pack("<HH", 80, 24))
        assert control.next() == (0, 6, 1, b"")
        with terminal(path) as fd:
            termios.tcsetwinsize(fd, (50, 100))
            assert control.next() == (0, 5, 0, struct.pack("<HH", 100, 50))
