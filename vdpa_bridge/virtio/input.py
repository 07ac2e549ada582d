# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What input devices say of themselves, and their events (virtio 1.2, 5.8)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

EVENTS, STATUS = 0, 1
"""Queues."""
DATA_AT, DATA_BYTES = 8, 128
"""Where the configuration space has what was selected, and for how much of it there is room."""
EVENT = struct.Struct("<HHi")
IDS = struct.Struct("<HHHH")
AXIS = struct.Struct("<5i")
EV_SYN, EV_KEY, EV_REL, EV_ABS, EV_MSC, EV_SW, EV_LED, EV_SND = 0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x11, 0x12
"""Event types (linux/input-event-codes.h), of which a device may have any up to EV_MAX."""
EV_MAX = 0x1F


class Select(IntEnum):
    """Selectors of the configuration space (virtio 1.2, 5.8.4)."""

    NAME = 0x01
    SERIAL = 0x02
    IDS = 0x03
    PROPERTIES = 0x10
    EVENT_BITS = 0x11
    ABSOLUTE = 0x12


class Event(NamedTuple):
    """An event as linux/input.h has it; EV_SYN ends those that belong together."""

    type: int
    code: int
    value: int


REPORT = Event(EV_SYN, 0, 0)
"""The end of an update."""


@dataclass(frozen=True)
class InputInfo:
    """What a device says of itself."""

    name: str
    serial: str = ""
    ids: tuple[int, ...] = ()
    """Bus type, vendor, product, version; empty where it says nothing."""
    properties: tuple[int, ...] = ()
    events: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """The codes that it has of each event type."""
    axes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Minimum, maximum, fuzz, flat, resolution of absolute axes."""


def pack_bits(numbers: tuple[int, ...]) -> bytes:
    """Bytes in which the bits of these numbers are set."""
    return sum(1 << number for number in set(numbers)).to_bytes(max(numbers, default=-1) // 8 + 1, "little")


def unpack_bits(data: bytes) -> tuple[int, ...]:
    """The numbers of the bits that are set."""
    return tuple(at * 8 + bit for at, byte in enumerate(data) for bit in range(8) if byte >> bit & 1)
