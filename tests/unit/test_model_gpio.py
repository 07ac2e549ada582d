# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The GPIO model: lines, wires, interrupts by the rules of virtio 1.2 (5.18), the socket for commands, and what no request may do."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.driven import WAYS, in_way, opened, quiet
from tests.support.homes import socket_path
from tests.support.seen import Seen
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.device import Device
from vdpa_bridge.drivers import Driver, GpioDriver
from vdpa_bridge.drivers.base import RING_FEATURES, Posted
from vdpa_bridge.flags import Feature
from vdpa_bridge.models import Model, make_model
from vdpa_bridge.models.control import LONGEST, MOST_PEERS
from vdpa_bridge.virtio.features import GpioFeature
from vdpa_bridge.virtio.gpio import Direction

__all__ = ["quiet"]  # an autouse fixture

REQUESTS, EVENTS = 0, 1
NAMES, GET_DIRECTION, SET_DIRECTION, GET, SET, IRQ = range(1, 7)
NONE, OUT, IN = 0, 1, 2
RISING, FALLING, BOTH, HIGH, LOW = 1, 2, 3, 4, 8
INVALID, VALID = 0, 1


def board(**options: str) -> Model:
    return make_model("gpio", {"names": "led,button,,spare", "loop": "led:button", **options})


class Board:
    """A plain driver on a controller, in the words of the specification."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def ask(self, kind: int, line: int = 0, value: int = 0) -> int | None:
        """The value of the answer, None for an error."""
        written, (answer,) = self.driver.transact(REQUESTS, [struct.pack("<HHI", kind, line, value)], [2])
        assert written == 2
        assert answer in (b"\1\0", b"\0" + answer[1:])
        return None if answer[0] else answer[1]

    def event(self, line: int) -> Posted:
        return self.driver.post(EVENTS, [struct.pack("<H", line)], [1])

    def came(self, event: Posted) -> int:
        """The status of an event buffer that comes back."""
        self.driver.wait(lambda: event.written >= 0, "an event")
        assert event.written == 1
        return event.data[0][0]

    def waits(self, *events: Posted) -> bool:
        """Whether the device still has the buffers after it has answered another request."""
        self.ask(GET_DIRECTION)
        self.driver.transact(EVENTS, [b"\xff\xff"], [1])
        return all(event.written < 0 for event in events)


@contextmanager
def driven(model: Model, wanted: int = GpioFeature.IRQ, ring_features: int = RING_FEATURES, way: str = "here") -> Iterator[Board]:
    with in_way(way, model) as device, Driver(device, wanted=wanted, ring_features=ring_features) as driver:
        yield Board(driver)


# Options ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"line": "8"}, "no option line; there is: control, high, lines, loop, names"),
        ({"lines": "0"}, "from 1 to 4096"),
        ({"lines": "2", "names": "a,b,c"}, "3 names for 2 lines"),
        ({"names": "a,b,a"}, "two lines are called a"),
        ({"names": "a:b"}, "without a colon"),
        ({"names": "é"}, "printable ASCII"),
        ({"loop": "1"}, "LINE:LINE"),
        ({"loop": "1:8"}, "no line '8'; there are 8: none has a name"),
        ({"loop": "1:1"}, "from one line to another"),
        ({"loop": "1:2,2:3"}, "each has one at most"),
        ({"names": "a", "high": "b"}, "no line 'b'; there are 1: a"),
    ],
)
def test_wrong_options_are_named(options: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_model("gpio", options)


# Lines -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rings", ["split", "packed"])
def test_lines(way: str, rings: str, seen: Seen) -> None:
    """Our driver sees the names, sets an output, and senses it at the other end of the wire."""
    features = RING_FEATURES | (Feature.RING_PACKED if rings == "packed" else 0)
    with in_way(way, board(high="spare")) as device, GpioDriver(device, ring_features=features) as gpio:
        assert gpio.features & features == features
        assert (gpio.lines, gpio.names()) == (4, ["led", "button", "", "spare"])
        for _ in range(2):
            assert [gpio.direction(line) for line in range(4)] == [Direction.NONE] * 4
            gpio.set_value(0, True)
            gpio.set_direction(1, Direction.IN)
            assert gpio.value(1) is False, "not before it is an output"
            gpio.set_direction(0, Direction.OUT)
            gpio.set_direction(3, Direction.IN)
            assert [gpio.value(line) for line in (0, 1, 3)] == [True, True, True]
            gpio.set_value(0, False)
            assert [gpio.value(line) for line in (0, 1, 3)] == [False, False, True]
            with pytest.raises(OSError, match="request 4 for line 2"):
                gpio.value(2)
            gpio.restart()
    seen("devices", "gpio", "gpio", "model", rings, "restart", *{way} & set(WAYS[1:]))


def test_lines_without_names() -> None:
    with driven(make_model("gpio", {})) as board:
        assert board.driver.device.get_config(0, 8) == struct.pack("<HHI", 8, 0, 0)
        assert board.ask(NAMES) is None


def test_what_is_forgotten_with_the_direction() -> None:
    with driven(board()) as lines:
        for request in ((SET, 0, 1), (SET_DIRECTION, 0, OUT), (SET_DIRECTION, 1, IN)):
            assert lines.ask(*request) == 0
        assert lines.ask(GET, 1) == 1
        assert lines.ask(SET_DIRECTION, 0, NONE) == 0
        assert (lines.ask(GET, 0), lines.ask(GET, 1)) == (None, 0)
        assert lines.ask(SET_DIRECTION, 0, OUT) == 0
        assert lines.ask(GET, 0) == 0, "the value is forgotten as well"


@pytest.mark.parametrize("request_", [(0,), (7,), (SET, 0, 2), (SET_DIRECTION, 0, 3), (GET_DIRECTION, 4), (GET, 0xFFFF), (IRQ, 0, 5), (IRQ, 0, 1 << 31)])
def test_requests_that_are_none(request_: tuple[int, ...]) -> None:
    with driven(board()) as lines:
        assert lines.ask(*request_) is None
        assert lines.ask(GET_DIRECTION, 0) == 0


def test_room_that_is_not_what_it_should_be() -> None:
    with driven(board()) as lines:
        ask = lines.driver.transact
        names = b"\0led\0button\0\0spare\0"
        assert ask(REQUESTS, [struct.pack("<HHI", NAMES, 0, 0)], [5]) == (5, [names[:5]])
        assert ask(REQUESTS, [struct.pack("<HHI", NAMES, 0, 0)], [100]) == (len(names), [names.ljust(100, b"\0")])
        assert ask(REQUESTS, [struct.pack("<HHI", SET, 0, 1)])[0] == 0
        assert ask(REQUESTS, [bytes(7)], [2]) == (2, [b"\1\0"])
        assert ask(REQUESTS, [bytes(9)], [2]) == (2, [b"\1\0"])
        assert ask(REQUESTS, [], [2]) == (2, [b"\1\0"])
        assert ask(EVENTS, [bytes(2)])[0] == 0
        assert ask(EVENTS, [], [1]) == (1, [b"\0"])
        assert ask(EVENTS, [bytes(3)], [1]) == (1, [b"\0"])


# Interrupts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_edges(way: str) -> None:
    """Those that are asked for come once each; what comes while the interrupt is masked is latched, as one."""
    with driven(board(), way=way) as lines:
        lines.ask(SET_DIRECTION, 0, OUT)
        lines.ask(SET_DIRECTION, 1, IN)
        for kind, rises, falls in ((RISING, 1, 0), (FALLING, 0, 1), (BOTH, 1, 1)):
            assert lines.ask(IRQ, 1, kind) == 0
            event = lines.event(1)
            for level, due in ((1, rises), (0, falls)) * 2:
                lines.ask(SET, 0, level)
                if due:
                    assert lines.came(event) == VALID
                    event = lines.event(1)
                assert lines.waits(event)
            assert lines.ask(IRQ, 1, NONE) == 0
            assert lines.came(event) == INVALID
        assert lines.ask(IRQ, 1, BOTH) == 0
        for level in (1, 0, 1):
            lines.ask(SET, 0, level)
        assert lines.came(lines.event(1)) == VALID
        event = lines.event(1)
        assert lines.waits(event)
        lines.ask(SET, 0, 0)
        assert lines.came(event) == VALID


@pytest.mark.parametrize(("kind", "active"), [(HIGH, 1), (LOW, 0)])
def test_levels(kind: int, active: int) -> None:
    """An interrupt as often as it is unmasked, as long as the level lasts; nothing is latched."""
    with driven(board()) as lines:
        lines.ask(SET, 0, 1 - active)
        lines.ask(SET_DIRECTION, 0, OUT)
        assert lines.ask(IRQ, 1, kind) == 0
        event = lines.event(1)
        assert lines.waits(event)
        lines.ask(SET, 0, active)
        for _ in range(3):
            assert lines.came(event) == VALID
            event = lines.event(1)
        assert lines.came(event) == VALID
        lines.ask(SET, 0, 1 - active)
        event = lines.event(1)
        assert lines.waits(event)


def test_latched_interrupts_are_forgotten() -> None:
    with driven(board()) as lines:
        lines.ask(SET_DIRECTION, 0, OUT)
        for forget in ((IRQ, 1, NONE), (SET_DIRECTION, 1, NONE)):
            assert lines.ask(IRQ, 1, BOTH) == 0
            lines.ask(SET, 0, 1)
            lines.ask(SET, 0, 0)
            assert lines.ask(*forget) == 0
            assert lines.ask(IRQ, 1, BOTH) == 0
            event = lines.event(1)
            assert lines.waits(event)
            assert lines.ask(IRQ, 1, NONE) == 0
            assert lines.came(event) == INVALID


def test_what_the_driver_must_not_do_with_interrupts() -> None:
    with driven(board()) as lines:
        assert lines.came(lines.event(1)) == INVALID, "not enabled"
        assert lines.came(lines.event(4)) == INVALID, "no such line"
        assert lines.ask(IRQ, 1, RISING) == 0
        assert lines.ask(IRQ, 1, FALLING) is None, "disable it first"
        assert lines.ask(IRQ, 1, RISING) == 0
        first = lines.event(1)
        assert lines.came(lines.event(1)) == INVALID, "one is there"
        assert lines.waits(first)
        assert lines.ask(SET_DIRECTION, 1, OUT) is None, "outputs have none"
        lines.ask(SET_DIRECTION, 0, OUT)
        assert lines.ask(IRQ, 0, RISING) is None
        lines.ask(SET, 0, 1)
        assert lines.came(first) == VALID
    with driven(board(), wanted=0) as lines:
        assert lines.ask(IRQ, 1, RISING) is None, "not negotiated"
        assert lines.came(lines.event(1)) == INVALID


def test_event_buffers_come_back_when_the_device_stops_and_are_taken_again() -> None:
    with driven(board()) as lines:
        lines.ask(SET_DIRECTION, 0, OUT)
        for line in (1, 2):
            lines.ask(IRQ, line, RISING)
        events = [lines.event(1), lines.event(2)]
        assert lines.waits(*events)
        lines.driver.suspend()
        assert [lines.came(event) for event in events] == [INVALID, INVALID]
        event = lines.event(1)
        lines.driver.resume()
        assert lines.waits(event)
        lines.ask(SET, 0, 1)
        assert lines.came(event) == VALID


def test_a_successor_knows_the_lines() -> None:
    one, other = board(high="spare"), board()
    home = ModelDevice(one, "model:gpio")
    try:
        with Device(home.open()) as device, Driver(device, wanted=GpioFeature.IRQ) as driver:
            lines = Board(driver)
            for request in ((SET, 0, 1), (SET_DIRECTION, 0, OUT), (SET_DIRECTION, 3, IN), (IRQ, 1, FALLING)):
                assert lines.ask(*request) == 0
            event = lines.event(1)
            assert lines.waits(event)
            other.restore(one.snapshot())
            home.replace(lambda old: other)
            assert lines.came(event) == INVALID
            event = lines.event(1)
            assert (lines.ask(GET, 0), lines.ask(GET, 3), lines.waits(event)) == (1, 1, True)
            lines.ask(SET, 0, 0)
            assert lines.came(event) == VALID
    finally:
        home.close()


@settings(max_examples=150, deadline=None)
@given(
    turns=st.lists(
        st.tuples(
            st.sampled_from([REQUESTS, EVENTS]),
            st.one_of(
                st.binary(max_size=12),
                st.builds(lambda k, n, v: struct.pack("<HHI", k, n, v), st.integers(0, 7), st.integers(0, 4), st.integers(0, 9)),
                st.builds(lambda n: struct.pack("<H", n), st.integers(0, 4)),
            ),
            st.integers(0, 3),
        ),
        max_size=12,
    )
)
def test_any_request_is_answered_and_the_rings_go_on(turns: list[tuple[int, bytes, int]]) -> None:
    with driven(board()) as lines:
        posted = [lines.driver.post(queue, [data] if data else [], [room] if room else []) for queue, data, room in turns if data or room]
        for line in range(4):
            lines.ask(IRQ, line, NONE)
        lines.driver.wait(lambda: all(each.written >= 0 for each in posted), "all of them")
        lines.ask(SET_DIRECTION, 0, NONE)
        assert lines.ask(SET_DIRECTION, 0, OUT) == 0
        assert lines.ask(SET, 0, 1) == 0
        assert lines.ask(GET, 0) == 1


# From outside -------------------------------------------------------------------------------------------------------------


class Hand:
    """Somebody at the socket."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)  # waits its turn, as a connect with a timeout would not
        self.sock.settimeout(5)
        self.file = self.sock.makefile("r")

    def say(self, text: str) -> None:
        self.sock.sendall(text.encode() + b"\n")

    def hear(self) -> str:
        return self.file.readline().rstrip("\n")

    def ask(self, text: str) -> str:
        self.say(text)
        return self.hear()

    def close(self) -> None:
        self.file.close()
        self.sock.close()


Hands = Callable[[], Hand]


@pytest.fixture
def control() -> Iterator[str]:
    with socket_path() as path:
        yield path


@pytest.fixture
def hands(control: str) -> Iterator[Hands]:
    made: list[Hand] = []

    def another() -> Hand:
        made.append(Hand(control))
        return made[-1]

    yield another
    for hand in made:
        hand.close()


def test_an_edge_from_outside(control: str, hands: Hands) -> None:
    with driven(board(control=control)) as lines:
        lines.ask(SET_DIRECTION, 3, IN)
        lines.ask(IRQ, 3, BOTH)
        hand = hands()
        for level in (1, 0):
            event = lines.event(3)
            assert hand.ask(f"set spare {level}") == "ok"
            assert lines.came(event) == VALID
            assert (lines.ask(GET, 3), hand.ask("get 3")) == (level, f"ok {level}")


def test_what_can_be_said(control: str, hands: Hands) -> None:
    with driven(board(control=control)) as lines:
        hand, other = hands(), hands()
        assert other.ask("watch") == "ok"
        lines.ask(SET_DIRECTION, 0, OUT)
        assert hand.ask("list") == "ok 4"
        assert [hand.hear() for _ in range(4)] == ["0 out 0 led", "1 none 0 button", "2 none 0", "3 none 0 spare"]
        lines.ask(SET, 0, 1)
        assert [other.hear(), other.hear()] == ["change led 1", "change button 1"]
        assert hand.ask("set led 0") == "error led is an output"
        assert hand.ask("set button 0") == "error button is wired to led, an output"
        assert hand.ask("set 2 1") == "ok"
        assert other.hear() == "change 2 1"
        assert hand.ask("set 4 1") == "error no line '4'; there are 4: led, button, spare"
        for wrong in ("set 2 2", "set 2", "set", "get", "", "lists", "\xff"):
            assert hand.ask(wrong).startswith("error not a command; there is: get LINE, set LINE 0|1")
        lines.driver.device.reset()
        assert [other.hear(), other.hear()] == ["change led 0", "change button 0"]
        hand.sock.sendall(b"get 2\nget led\nget")
        assert (hand.hear(), hand.hear()) == ("ok 1", "ok 0")
        assert hand.ask(" spare") == "ok 0"
        hand.sock.sendall(b"get 2\n")
        hand.sock.shutdown(socket.SHUT_WR)
        assert (hand.hear(), hand.file.read()) == ("ok 1", "")


def test_lines_are_set_before_a_driver_is_there_and_while_none_is(control: str, hands: Hands) -> None:
    home = ModelDevice(board(control=control), "model:gpio")
    try:
        hand = hands()
        assert hand.ask("set spare 1") == "ok"
        for level in (1, 0):
            with Device(home.open()) as device, GpioDriver(device) as gpio:
                gpio.set_direction(3, Direction.IN)
                assert gpio.value(3) is bool(level)
            assert hand.ask("set spare 0") == "ok"
        with Device(home.open()) as device, GpioDriver(device) as gpio:
            device.suspend()
        assert hand.ask("get spare") == "ok 0", "a driver that went while the device was suspended takes nobody along"
    finally:
        home.close()
    assert not Path(control).exists()


def test_nobody_holds_a_driver_up(control: str, hands: Hands) -> None:
    """One who sends no end of a line, and too many of them: hung up on, and the driver goes on."""
    with driven(board(control=control)) as lines:
        endless = hands()
        endless.sock.sendall(b"x" * (LONGEST + 1))
        assert endless.hear() == f"error a line has at most {LONGEST} bytes"
        assert endless.hear() == ""
        crowd = [hands() for _ in range(MOST_PEERS)]
        assert [hand.ask("get led") for hand in crowd] == ["ok 0"] * MOST_PEERS
        late = hands()
        assert (late.hear(), late.hear()) == (f"error {MOST_PEERS} others are here already", "")
        assert lines.ask(SET, 0, 1) == 0


def test_one_who_never_reads_is_hung_up_on(control: str, hands: Hands) -> None:
    with opened(make_model("gpio", {"lines": "4096", "control": control})) as device, GpioDriver(device) as gpio:
        deaf, hand = hands(), hands()
        deaf.sock.setblocking(False)
        end = time.monotonic() + 30
        try:
            while time.monotonic() < end:
                try:
                    deaf.sock.send(b"list\n" * 20)
                except BlockingIOError:
                    time.sleep(0.001)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert time.monotonic() < end
        assert hand.ask("get 0") == "ok 0"
        gpio.set_direction(0, Direction.OUT)


def test_a_socket_that_cannot_be_had(control: str) -> None:
    with opened(board(control=control)), pytest.raises(OSError, match="listens there"):
        board(control=control)
    with pytest.raises(FileNotFoundError):
        board(control="/nonexistent/directory/s")
