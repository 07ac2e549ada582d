# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The input model over real rings: what it says it is, scripts and lines as events, and drivers that ask for more than there is."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.driven import WAYS, in_way, opened, quiet
from tests.support.homes import socket_path
from tests.support.seen import Seen
from vdpa_bridge.drivers import Driver, InputDriver
from vdpa_bridge.drivers.base import RING_FEATURES
from vdpa_bridge.flags import Feature
from vdpa_bridge.models import InputModel, Model, Sources, make_model
from vdpa_bridge.models.input import KINDS, MOST
from vdpa_bridge.models.input_script import MOST_STEPS, parse_line
from vdpa_bridge.virtio.input import EV_ABS, EV_KEY, EV_LED, EV_REL, EV_SYN, EVENT, REPORT, Event, Select, pack_bits, unpack_bits

__all__ = ["quiet"]  # an autouse fixture

A, SHIFT, LEFT = 30, 42, 0x110


@pytest.fixture
def path() -> Iterator[str]:
    with socket_path() as path:
        yield path


@contextmanager
def talking(path: str) -> Iterator[TextIO]:
    """Somebody on the control socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(path)
        with sock.makefile("rw") as file:
            yield file


def tell(file: TextIO, line: str) -> str:
    file.write(line + "\n")
    file.flush()
    return file.readline().rstrip("\n")


def key(code: int, value: int) -> list[Event]:
    return [Event(EV_KEY, code, value), REPORT]


def heard(driver: InputDriver, count: int) -> list[Event]:
    return [driver.read(10) for _ in range(count)]


# What it is ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_it_says(kind: str) -> None:
    with opened(make_model("input", {"kind": kind, "name": "näme", "serial": "S1"})) as device, InputDriver(device) as driver:
        info = driver.info
    assert (info.name, info.serial) == ("näme", "S1")
    assert (info.ids, info.properties, info.events, info.axes) == (KINDS[kind].ids, KINDS[kind].properties, KINDS[kind].events, KINDS[kind].axes)


@given(st.sets(st.integers(0, 1023)))
def test_bits(numbers: set[int]) -> None:
    assert unpack_bits(pack_bits(tuple(numbers))) == tuple(sorted(numbers))


@given(st.lists(st.tuples(st.integers(0, 136), st.binary(max_size=136))))
def test_whatever_is_written_to_the_configuration_space(writes: list[tuple[int, bytes]]) -> None:
    """It has one size, and what it says is one of its answers, or none."""
    model = make_model("input", {"kind": "tablet"})
    try:
        for offset, data in writes:
            model.write_config(offset, data)
            space = model.config()
            assert len(space) == 136
            assert space[3:8] == bytes(5)
            assert space[2] <= 128
            assert not any(space[8 + space[2] :])
            if offset == 0 and len(data) > 1:
                assert space[:2] == data[:2]
            if space[0] not in set(Select) or (space[1] and space[0] < 0x11):
                assert space[2] == 0
    finally:
        model.close()


def test_qemu_writes_all_of_the_space() -> None:
    model = make_model("input", {})
    model.write_config(0, bytes((Select.NAME, 0, 99)) + b"\xff" * 133)
    assert model.config()[:29] == bytes((1, 0, 20, 0, 0, 0, 0, 0)) + b"vdpa_bridge keyboard\0"
    model.reset()
    assert model.config() == bytes(136)
    model.close()


# Events --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rings", ["split", "packed"])
def test_a_script_is_played_for_each_driver(tmp_path: Path, way: str, rings: str, seen: Seen) -> None:
    script = tmp_path / "script"
    script.write_text("# a comment\nkey leftshift press, key a press\n\nsleep 0.1\nkey KEY_A release, key leftshift release # both\nkey b\n")
    wanted = [Event(EV_KEY, SHIFT, 1), *key(A, 1), Event(EV_KEY, A, 0), *key(SHIFT, 0), *key(48, 1), *key(48, 0)]
    features = RING_FEATURES | (Feature.RING_PACKED if rings == "packed" else 0)
    with in_way(way, make_model("input", {"script": str(script)})) as device, InputDriver(device, ring_features=features) as driver:
        assert driver.features & features == features
        before = time.monotonic()
        assert heard(driver, len(wanted)) == wanted
        assert time.monotonic() - before > 0.05
        driver.restart()
        assert heard(driver, len(wanted)) == wanted
        with pytest.raises(TimeoutError):
            driver.read(timeout=0.05)
    seen("devices", "input", "input", "model", rings, "restart", *{way} & set(WAYS[1:]))


def test_lines_as_they_come(path: str) -> None:
    with opened(make_model("input", {"kind": "tablet", "control": path})) as device, talking(path) as file:
        assert tell(file, "key left") == "error no driver is ready"
        with InputDriver(device) as driver:
            assert tell(file, "abs x 0x7fff, abs y 0, key left press") == "ok"
            assert heard(driver, 4) == [Event(EV_ABS, 0, 32767), Event(EV_ABS, 1, 0), *key(LEFT, 1)]
            assert tell(file, f"event {EV_REL} 8 -1") == "ok"
            assert heard(driver, 2) == [Event(EV_REL, 8, -1), REPORT]
            assert tell(file, "") == "ok"
            assert tell(file, "sleep 0.2") == "ok"
            assert tell(file, "key btn_left release") == "ok"
            with pytest.raises(TimeoutError):
                driver.read(timeout=0.05)
            assert heard(driver, 2) == key(LEFT, 0)
            assert tell(file, "sleep 3600") == "ok"
            assert tell(file, "key left press") == "ok"
            driver.restart()
            assert tell(file, "key right press") == "ok", "what did not happen before the reset never does"
            assert heard(driver, 2) == key(LEFT + 1, 1)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("key", "a line is: key NAME"),
        ("key a b", "a line is: key NAME"),
        ("press a", "a line is: key NAME"),
        ("key nonsense", "there is no key NONSENSE; linux/input-event-codes.h has the names"),
        ("key KEY_MICMUTE_NOT", "there is no key"),
        ("rel x", "a line is"),
        ("rel x 1.5", "'1.5' is no number"),
        ("rel KEY_A 1", "there is no rel KEY_A"),
        ("rel z 1", "vdpa_bridge mouse has no z"),
        ("abs x 1", "vdpa_bridge mouse has no x"),
        ("rel x 2147483648", "is not within -2147483648 and 2147483647"),
        ("event 0 0 0", "vdpa_bridge mouse has no event 0 0 0"),
        ("event 1 30 1", "vdpa_bridge mouse has no event 1 30 1"),
        ("key left,", "a line is"),
        ("sleep", "a line is"),
        ("sleep 1 2", "a line is"),
        ("sleep -1", "no number of seconds from 0 to 86400"),
        ("sleep inf", "no number of seconds"),
        ("sleep nan", "no number of seconds"),
        ("sleep 1, key left", "a line is"),
    ],
)
def test_wrong_lines(tmp_path: Path, path: str, line: str, text: str) -> None:
    """On the socket they are answered, and the driver hears nothing; in a file they are named, and there is no device."""
    with pytest.raises(ValueError, match=text):
        parse_line(line, KINDS["mouse"])
    script = tmp_path / "script"
    script.write_text(f"rel x 1\n{line}\n")
    with pytest.raises(ValueError, match=rf"script, line 2: .*{text}"):
        make_model("input", {"kind": "mouse", "script": str(script)})
    with opened(make_model("input", {"kind": "mouse", "control": path})) as device, InputDriver(device) as driver, talking(path) as file:
        assert tell(file, line).startswith("error ")
        assert tell(file, "rel x 1") == "ok"
        assert heard(driver, 2) == [Event(EV_REL, 0, 1), REPORT]


def test_a_driver_that_does_not_keep_up_loses_nothing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates wait, so many and no more; meanwhile nothing goes round in circles."""
    passes: list[object] = []
    serve = Sources.serve

    def counting(sources: Sources, queues: object) -> None:
        passes.append(queues)
        serve(sources, queues)  # type: ignore[arg-type]

    monkeypatch.setattr(Sources, "serve", counting)
    with opened(make_model("input", {"kind": "mouse", "control": path})) as device, InputDriver(device) as driver, talking(path) as file:
        count = 0
        while (said := tell(file, f"rel x {count + 1}")) == "ok":
            count += 1
        assert said == f"error {MOST_STEPS} updates wait already"
        assert MOST_STEPS + MOST // 2 <= count <= MOST_STEPS + MOST
        time.sleep(0.05)
        before = len(passes)
        time.sleep(0.2)
        assert len(passes) - before <= 1
        assert heard(driver, 2 * count) == [event for number in range(1, count + 1) for event in (Event(EV_REL, 0, number), REPORT)]
        assert tell(file, "rel x 5") == "ok"
        assert heard(driver, 2) == [Event(EV_REL, 0, 5), REPORT]


def test_buffers_too_small_for_an_event_go_back(path: str) -> None:
    with opened(make_model("input", {"control": path})) as device, Driver(device, queues=(0, 1)) as driver, talking(path) as file:
        small, right = [driver.post(0, (), [7]) for _ in range(3)], [driver.post(0, (), [8]) for _ in range(4)]
        assert tell(file, "key a") == "ok"
        driver.wait(lambda: right[-1].written >= 0, "the last event")
        assert [box.written for box in small + right] == [0] * 3 + [8] * 4
        assert [Event(*EVENT.unpack(box.data[0])) for box in right] == key(A, 1) + key(A, 0)


# Lights --------------------------------------------------------------------------------------------------------------------


def test_lights(path: str) -> None:
    """What changes is told to those on the socket; what a keyboard has not, or an event cut short, is nothing."""
    with opened(make_model("input", {"control": path})) as device, InputDriver(device) as driver, talking(path) as file:
        assert tell(file, "") == "ok"
        for event in (Event(EV_LED, 1, 1), Event(EV_LED, 1, 1), Event(EV_KEY, A, 1), Event(EV_LED, 9, 1), Event(EV_SYN, 0, 0), Event(0xFFFF, 0xFFFF, -1)):
            driver.write(event)
        for length in (1, 7):
            driver.ask(1, [EVENT.pack(EV_LED, 0, 1)[:length]])
        driver.ask(1, [EVENT.pack(EV_LED, 1, 0) + b"more"])
        assert [file.readline(), file.readline()] == ["light 1 1\n", "light 1 0\n"]
        assert tell(file, "key a") == "ok"
        assert heard(driver, 4) == key(A, 1) + key(A, 0), "nothing of it came back as an event"


# Options -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "joystick"}, "kind=joystick; it is keyboard, mouse, tablet"),
        ({"name": "x" * 129}, "longer than 128 bytes"),
        ({"grab": "off"}, "grab= goes with evdev="),
        ({"evdev": "/dev/input/event0", "name": "x"}, "name= and evdev="),
        ({"evdev": "/dev/null", "grab": "maybe"}, "it is on or off"),
        ({"script": "/dev/null"}, "/dev/null is no regular file; control=PATH makes a socket"),
        ({"evdev-path": "x"}, "there is: control, evdev, grab, kind, name, script, serial"),
    ],
)
def test_wrong_options_are_named(options: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_model("input", options)


def test_what_cannot_be_opened() -> None:
    for options, text in (({"evdev": "/dev/null"}, "/dev/null: it is no input device"), ({"evdev": "/dev/no"}, "No such file"), ({"control": "/no/where"}, "cannot listen")):
        with pytest.raises(OSError, match=text):
            make_model("input", options)
    model: Model = make_model("input", {})
    assert isinstance(model, InputModel)
    model.close()
