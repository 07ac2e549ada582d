# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""An input driver (virtio 1.2, 5.8): what the device is by its configuration selectors, and its events."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple, Unpack

from ..device import Device
from ..errors import DeviceBroken
from ..virtio.ids import DeviceId
from .base import Driver, Options
from .inbox import Inbox

EVENTS, STATUS = 0, 1
"""Queues."""
NAME, SERIAL, IDS, PROPERTIES, EVENT_BITS, ABSOLUTE = 0x01, 0x02, 0x03, 0x10, 0x11, 0x12
"""Selectors of the configuration space."""
EV_SYN, EV_KEY, EV_ABS = 0x00, 0x01, 0x03
"""Event types (linux/input-event-codes.h), of which the device may have any up to EV_MAX."""
_EV_MAX = 0x1F

_EVENT = struct.Struct("<HHi")
_IDS = struct.Struct("<HHHH")
_AXIS = struct.Struct("<5i")
_DATA_AT, _DATA_BYTES = 8, 128
_DEPTH = 64


class Event(NamedTuple):
    """An event as linux/input.h has it; EV_SYN ends those that belong together."""

    type: int
    code: int
    value: int


@dataclass(frozen=True)
class InputInfo:
    """What the device says of itself."""

    name: str
    serial: str
    ids: tuple[int, ...]
    """Bus type, vendor, product, version; empty where it says nothing."""
    properties: tuple[int, ...]
    events: dict[int, tuple[int, ...]]
    """The codes that it has of each event type."""
    axes: dict[int, tuple[int, ...]]
    """Minimum, maximum, fuzz, flat, resolution of absolute axes."""


class InputDriver(Driver):
    """A keyboard, mouse, tablet or the like."""

    device_id = DeviceId.INPUT
    table_entries = 1
    overstated = True  # QEMU (7.2) counts what it read, too

    def __init__(self, device: Device, **options: Unpack[Options]) -> None:
        """See ``Driver``."""
        options.setdefault("pool_size", 1 << 16)
        super().__init__(device, queues=(EVENTS, STATUS), **options)

    def _ready(self) -> None:
        self._inbox = Inbox(self, EVENTS, _EVENT.size, _DEPTH)

    def _replenish(self) -> None:
        self._inbox.fill()

    def select(self, selector: int, which: int = 0) -> bytes:
        """What the device says to *selector* and *which* (virtio 1.2, 5.8.4); nothing for what it does not have."""
        self.device.set_config(0, bytes((selector, which)))
        answer = self.device.get_config(0, _DATA_AT + _DATA_BYTES)
        if not answer[2]:
            return b""  # and what it repeats of the question then is not said (QEMU 7.2: zeroes)
        if answer[:2] != bytes((selector, which)):
            raise DeviceBroken(f"{self.name}: asked for {selector:#x}.{which:#x} of its configuration, it answers {answer[0]:#x}.{answer[1]:#x}")
        if answer[2] > _DATA_BYTES:
            raise DeviceBroken(f"{self.name}: {answer[2]} bytes for selector {selector:#x}.{which:#x}, there is room for {_DATA_BYTES}")
        return answer[_DATA_AT : _DATA_AT + answer[2]]

    @property
    def info(self) -> InputInfo:
        """Everything; a question for each event type and axis."""
        ids = self.select(IDS)
        events = {kind: bits for kind in range(_EV_MAX + 1) if (bits := _bits(self.select(EVENT_BITS, kind)))}
        axes = {code: self.select(ABSOLUTE, code) for code in events.get(EV_ABS, ())}
        return InputInfo(
            name=_text(self.select(NAME)),
            serial=_text(self.select(SERIAL)),
            ids=_IDS.unpack_from(ids) if len(ids) >= _IDS.size else (),
            properties=_bits(self.select(PROPERTIES)),
            events=events,
            axes={code: _AXIS.unpack_from(data) for code, data in axes.items() if len(data) >= _AXIS.size},
        )

    def read(self, timeout: float | None = None) -> Event:
        """The next event; TimeoutError when none comes."""
        data = self._inbox.get("an event", timeout)
        if len(data) != _EVENT.size:
            raise DeviceBroken(f"{self.name}: an event of {len(data)} bytes instead of {_EVENT.size}")
        return Event(*_EVENT.unpack(data))

    def write(self, event: Event, timeout: float | None = None) -> None:
        """Send an event to the device: a light on a keyboard, say."""
        self.ask(STATUS, [_EVENT.pack(*event)], timeout=timeout)


def _bits(data: bytes) -> tuple[int, ...]:
    """The numbers of the bits that are set."""
    return tuple(at * 8 + bit for at, byte in enumerate(data) for bit in range(8) if byte >> bit & 1)


def _text(data: bytes) -> str:
    return str(data.rstrip(b"\0"), "utf-8", "backslashreplace")
