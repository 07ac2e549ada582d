# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What models wait for besides queues, over a driver's life; another model in the place of one."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.driven import quiet as quiet
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.device import Device
from vdpa_bridge.drivers import GenericDriver
from vdpa_bridge.errors import DeviceBroken
from vdpa_bridge.models import Field, Model, Queue, Sources


class Mail(Model):
    """Puts each datagram of a socket into a buffer of queue 0, and sends what queue 1 brings."""

    device_id = 77
    queue_count = 2
    layout = (Field("received", "I"), Field("name", "text"))
    name = "mail"

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = 0
        self.looks = 0
        self.sources = Sources()
        self.sources.add(sock.fileno(), self.receive)

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        if index == 1:
            for chain in queues[1].pop():
                self.sock.send(chain.read())
                queues[1].push([(chain, 0)])
        elif self.sources is not None:
            self.sources.await_events(self.sock.fileno(), select.EPOLLIN)

    def receive(self, queues: Mapping[int, Queue], events: int) -> None:
        self.looks += 1
        assert self.sources is not None
        if not (chains := queues[0].pop(1) if 0 in queues else []):
            self.sources.await_events(self.sock.fileno(), 0)
            return
        data = self.sock.recv(4096)
        if data == b"crash":
            raise RuntimeError("told to")
        self.received += 1
        queues[0].push([(chains[0], chains[0].write(data))])
        self.config_changed()

    def close(self) -> None:
        super().close()
        self.sock.close()


@contextmanager
def mail() -> Iterator[tuple[Mail, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    with theirs:
        yield Mail(ours), theirs


def test_layout_is_the_configuration() -> None:
    with mail() as (model, _):
        assert model.config() == bytes(4) + b"mail".ljust(36, b"\0")
        model.received = 7
        assert model.config()[:4] == b"\7\0\0\0"
        model.close()


@pytest.mark.parametrize(("code", "value"), [("H", 65536), ("B", -1), ("text", "x" * 37), ("mac", "no address"), ("I", "text")])
def test_values_that_do_not_fit_the_layout(code: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"field|address"):
        Field("field", code).encode(value)


@pytest.fixture
def served() -> Iterator[tuple[ModelDevice, Mail, socket.socket]]:
    """A mail device that nobody has opened, and the other end of its socket."""
    with mail() as (model, theirs):
        home = ModelDevice(model, "model:mail")
        try:
            yield home, model, theirs
        finally:
            home.close()


@contextmanager
def driven(home: ModelDevice) -> Iterator[GenericDriver]:
    with Device(home.open()) as device, GenericDriver(device, timeout=5) as driver:
        yield driver


def still(model: Mail, seconds: float = 0.2) -> bool:
    """Whether the model's source was left alone meanwhile."""
    before = model.looks
    time.sleep(seconds)
    return model.looks == before


def test_outside_speaks_first(served: tuple[ModelDevice, Mail, socket.socket]) -> None:
    home, _, theirs = served
    with driven(home) as driver:
        buffers = [driver.post(0, [], [64]) for _ in range(3)]
        for number in range(3):
            theirs.send(b"letter %d" % number)
        driver.wait(lambda: all(buffer.written >= 0 for buffer in buffers), "letters")
        assert [buffer.data[0][: buffer.written] for buffer in buffers] == [b"letter 0", b"letter 1", b"letter 2"]
        assert driver.read_config(40)[:4] == b"\3\0\0\0"
        driver.transact(1, [b"an answer"])
        assert theirs.recv(100) == b"an answer"


def test_a_muted_source_wakes_nobody_until_there_is_room(served: tuple[ModelDevice, Mail, socket.socket]) -> None:
    home, model, theirs = served
    with driven(home) as driver:
        theirs.send(b"early")
        time.sleep(0.1)
        assert model.looks == 1
        assert still(model)
        assert driver.ask(0, room=64) == b"early"


def test_nothing_is_taken_from_outside_without_a_driver(served: tuple[ModelDevice, Mail, socket.socket]) -> None:
    home, model, theirs = served
    theirs.send(b"before")
    assert still(model)
    for round_ in range(2):
        with driven(home) as driver:
            assert driver.ask(0, room=64) == (b"before", b"between")[round_]
        looks = model.looks
        theirs.send(b"between")
        assert still(model)
        assert model.looks == looks


def test_nothing_is_taken_from_outside_while_suspended(served: tuple[ModelDevice, Mail, socket.socket]) -> None:
    home, model, theirs = served
    with driven(home) as driver:
        buffer = driver.post(0, [], [64])
        driver.suspend()
        theirs.send(b"meanwhile")
        assert still(model)
        driver.resume()
        driver.wait(lambda: buffer.written >= 0, "the letter")
        assert buffer.data[0][: buffer.written] == b"meanwhile"


def test_a_restart_keeps_sources(served: tuple[ModelDevice, Mail, socket.socket]) -> None:
    home, _, theirs = served
    with driven(home) as driver:
        for number in range(3):
            theirs.send(b"%d" % number)
            assert driver.ask(0, room=8) == b"%d" % number
            driver.restart()


def test_a_model_that_fails_at_a_source_breaks_its_device_and_no_more(served: tuple[ModelDevice, Mail, socket.socket]) -> None:
    home, _, theirs = served
    theirs.send(b"crash")
    with driven(home) as driver, pytest.raises(DeviceBroken):
        driver.ask(0, room=64)
    with driven(home) as driver:
        theirs.send(b"again")
        assert driver.ask(0, room=64) == b"again"


def test_sources_that_come_and_go_in_one_pass() -> None:
    calls: list[int] = []
    pipes = [os.pipe() for _ in range(3)]
    sources = Sources()

    def ready(number: int) -> Any:
        def call(queues: Mapping[int, Queue], events: int) -> None:
            calls.append(number)
            for other in range(3):
                if other != number:
                    sources.remove(pipes[other][0])

        return call

    for number, (reader, writer) in enumerate(pipes):
        sources.add(reader, ready(number))
        os.write(writer, b"x")
    sources.serve({})
    assert len(calls) == 1, "the others were removed before their turn"
    sources.await_events(pipes[calls[0]][0], 0)
    sources.serve({})
    assert len(calls) == 1
    sources.await_events(pipes[calls[0]][0], select.EPOLLIN)
    sources.serve({})
    assert len(calls) == 2
    sources.remove(pipes[calls[0]][0])
    sources.remove(pipes[calls[0]][0])
    sources.close()
    sources.close()
    for pair in pipes:
        os.close(pair[0])
        os.close(pair[1])


# Another model in the place of one -------------------------------------------------------------------------------------


class Louder(Mail):
    """The next version."""

    name = "louder"

    def receive(self, queues: Mapping[int, Queue], events: int) -> None:
        if chains := queues[0].pop(1):
            queues[0].push([(chains[0], chains[0].write(self.sock.recv(4096).upper()))])


def louder(old: Model) -> Louder:
    assert isinstance(old, Mail)
    new = Louder(old.sock.dup())
    new.received = old.received
    return new


def test_a_driver_goes_on_with_another_model(served: tuple[ModelDevice, Mail, socket.socket]) -> None:
    home, model, theirs = served
    with driven(home) as driver:
        theirs.send(b"one")
        assert driver.ask(0, room=8) == b"one"
        waiting = driver.post(0, [], [8])
        home.replace(louder)
        assert model.sock.fileno() == -1, "the old one is closed"
        theirs.send(b"two")
        driver.wait(lambda: waiting.written >= 0, "a letter in a buffer that the old one had not taken")
        assert waiting.data[0][:3] == b"TWO"
        assert driver.read_config(40) == b"\1\0\0\0" + b"louder".ljust(36, b"\0")


def test_before_a_driver_comes(served: tuple[ModelDevice, Mail, socket.socket]) -> None:
    home, _, theirs = served
    home.replace(louder)
    with driven(home) as driver:
        theirs.send(b"quiet")
        assert driver.ask(0, room=8) == b"QUIET"


def test_requests_in_flight_keep_the_old_one(served: tuple[ModelDevice, Mail, socket.socket]) -> None:
    home, model, theirs = served
    with driven(home) as driver:
        driver.post(0, [], [8])
        with home.runner.lock:
            (chain,) = home.runner.rings[0].pop(1)
        with pytest.raises(TimeoutError, match=r"queue 0 has 1 requests in flight after 0\.1 s"):
            home.replace(louder, patience=0.1)
        with home.runner.lock:
            home.runner.rings[0].push([(chain, 0)])
        theirs.send(b"same")
        assert driver.ask(0, room=8) == b"same"
        assert home.model is model


@pytest.mark.parametrize(("what", "value"), [("queue_count", 3), ("device_id", 78), ("address_spaces", 2), ("queue_size", 128)])
def test_another_device_is_refused(served: tuple[ModelDevice, Mail, socket.socket], what: str, value: int) -> None:
    home, model, theirs = served

    def other(old: Model) -> Model:
        new = louder(old)
        setattr(new, what, value)
        return new

    with driven(home) as driver:
        with pytest.raises(ValueError, match=f"{what} was .* and would be {value}"):
            home.replace(other)
        assert home.model is model
        theirs.send(b"same")
        assert driver.ask(0, room=8) == b"same"


def test_features_in_use_cannot_go(served: tuple[ModelDevice, Mail, socket.socket]) -> None:
    home, model, _ = served
    model.features = 1 << 5
    with Device(home.open()) as device, GenericDriver(device, wanted=1 << 5) as driver:
        assert driver.features & 1 << 5
        with pytest.raises(ValueError, match="the driver uses features 0x20, which would be gone"):
            home.replace(louder)
