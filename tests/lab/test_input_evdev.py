# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The input model on input devices of the lab's kernel, which uinput makes: what they do arrives, lights come back, and nothing else."""

from __future__ import annotations

import os
import select
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from evdev import AbsInfo, UInput
from evdev import ecodes as e

from tests.support.driven import WAYS, in_way, opened, quiet
from tests.support.seen import Seen
from vdpa_bridge.drivers import InputDriver
from vdpa_bridge.models import make_model
from vdpa_bridge.virtio.input import EV_ABS, EV_KEY, EV_LED, EV_REL, REPORT, Event

pytestmark = pytest.mark.lab
__all__ = ["quiet"]  # an autouse fixture

KEYBOARD = {e.EV_KEY: [e.KEY_A, e.KEY_B, e.BTN_LEFT], e.EV_REL: [e.REL_X], e.EV_LED: [e.LED_CAPSL]}
TABLET = {e.EV_KEY: [e.BTN_LEFT], e.EV_ABS: [(e.ABS_X, AbsInfo(0, -5, 1000, 1, 2, 3)), (e.ABS_Y, AbsInfo(0, 0, 9, 0, 0, 0))]}
_EVENT = struct.Struct("qqHHi")


@contextmanager
def made(events: object, **options: object) -> Iterator[tuple[UInput, str]]:
    """A device of uinput's, and its node."""
    subprocess.run(["modprobe", "-a", "uinput", "evdev"], check=True, timeout=60)
    with UInput(events, max_effects=0, **options) as ui:
        yield ui, str(ui.device.path)


def do(ui: UInput, *update: tuple[int, int, int]) -> None:
    for event in update:
        ui.write(*event)
    ui.syn()


def heard(driver: InputDriver, count: int) -> list[Event]:
    return [driver.read(10) for _ in range(count)]


def told(ui: UInput) -> Event:
    """What the kernel lets the device know next."""
    assert select.select([ui.fd], [], [], 10)[0]
    return Event(*_EVENT.unpack(os.read(ui.fd, _EVENT.size))[2:])


@pytest.mark.parametrize("way", WAYS)
def test_a_keyboard(way: str, seen: Seen) -> None:
    with made(KEYBOARD, name="lab keyboard", bustype=3, vendor=0x12, product=0x34, version=5) as (ui, node):
        with in_way(way, make_model("input", {"evdev": node})) as device, InputDriver(device) as driver:
            info = driver.info
            assert (info.name, info.ids, info.events[EV_KEY], info.events[EV_LED]) == ("lab keyboard", (3, 0x12, 0x34, 5), (30, 48, 272), (1,))
            for turn in range(100):
                do(ui, (EV_KEY, 30, 1), (EV_REL, 0, turn + 1))
                do(ui, (EV_KEY, 30, 0))
                assert heard(driver, 5) == [Event(EV_KEY, 30, 1), Event(EV_REL, 0, turn + 1), REPORT, Event(EV_KEY, 30, 0), REPORT]
            for event in (Event(EV_KEY, 30, 1), Event(EV_LED, 0, 1), Event(EV_REL, 0, 7), Event(EV_LED, 1, 1)):
                driver.write(event)
            assert told(ui) == Event(EV_LED, 1, 1)
            do(ui, (EV_KEY, 48, 1))
            came = [event for event in heard(driver, 4) if event.type != EV_LED]  # the kernel repeats the light
            assert came == [REPORT, Event(EV_KEY, 48, 1), REPORT], "nothing that the driver wrote is an event"
            with pytest.raises(OSError, match="somebody has grabbed it; grab=off shares it"):
                make_model("input", {"evdev": node})
        with opened(make_model("input", {"evdev": node, "grab": "off"})) as device, InputDriver(device) as driver:
            do(ui, (EV_KEY, 48, 0))
            do(ui, (EV_KEY, 30, 1))
            assert ui.device.read_one() is not None, "others hear it as well"
            assert Event(EV_KEY, 48, 0) in heard(driver, 4), "the kernel may switch the light off before"
    seen("devices", "input", "input", "model", "split", *{way} & set(WAYS[1:]))


def test_a_tablet() -> None:
    with (
        made(TABLET, name="lab tablet", input_props=[e.INPUT_PROP_POINTER]) as (ui, node),
        opened(make_model("input", {"evdev": node})) as device,
        InputDriver(device) as driver,
    ):
        info = driver.info
        assert (info.properties, info.events[EV_ABS], info.axes) == ((0,), (0, 1), {0: (-5, 1000, 1, 2, 3), 1: (0, 9, 0, 0, 0)})
        do(ui, (EV_ABS, 0, 500), (EV_ABS, 1, 3))
        assert heard(driver, 3) == [Event(EV_ABS, 0, 500), Event(EV_ABS, 1, 3), REPORT]


def test_what_the_kernel_had_no_room_for() -> None:
    """Events are lost behind a driver that does not keep up, but not the state of a key."""
    with made(KEYBOARD) as (ui, node), opened(make_model("input", {"evdev": node})) as device, InputDriver(device) as driver:
        do(ui, (EV_KEY, 30, 1))
        assert heard(driver, 2) == [Event(EV_KEY, 30, 1), REPORT]
        for turn in range(5000):
            do(ui, (EV_REL, 0, turn + 1))
        do(ui, (EV_KEY, 30, 0))
        do(ui, (EV_KEY, 48, 1))
        came: list[Event] = []
        while Event(EV_KEY, 48, 1) not in came:
            came += heard(driver, 1)
        assert Event(EV_KEY, 30, 0) in came
        assert len(came) < 5000
        values = [event.value for event in came if event.type == EV_REL]
        assert values == sorted(set(values)), "what did come is in order"


def test_a_device_that_goes() -> None:
    """Its keys are released, and the model serves on."""
    with made(KEYBOARD) as (ui, node), opened(make_model("input", {"evdev": node})) as device, InputDriver(device) as driver:
        do(ui, (EV_KEY, 30, 1))
        assert heard(driver, 2) == [Event(EV_KEY, 30, 1), REPORT]
        ui.close()
        assert heard(driver, 2) == [Event(EV_KEY, 30, 0), REPORT]
        driver.write(Event(EV_LED, 1, 1))
        driver.restart()
        assert driver.info.name == "py-evdev-uinput"
