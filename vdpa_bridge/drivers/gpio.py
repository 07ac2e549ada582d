# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A GPIO driver (virtio 1.2, 5.18): lines by number, their names, direction and value."""

from __future__ import annotations

import errno
import struct
from enum import IntEnum
from typing import Unpack

from ..device import Device
from ..errors import DeviceBroken
from ..virtio.config import parse_config
from ..virtio.ids import DeviceId
from .base import Driver, Options

REQUESTS = 0
GET_NAMES, GET_DIRECTION, SET_DIRECTION, GET_VALUE, SET_VALUE = 1, 2, 3, 4, 5
_REQUEST = struct.Struct("<HHI")
_CONFIG_BYTES = 8
_MOST_NAMES = 1 << 16
"""Bytes of names that are asked for; 65535 lines of two letters have that many and more."""


class Direction(IntEnum):
    """Of a line."""

    NONE = 0
    OUT = 1
    IN = 2


class GpioDriver(Driver):
    """A controller of lines."""

    device_id = DeviceId.GPIO
    table_entries = 2

    def __init__(self, device: Device, **options: Unpack[Options]) -> None:
        """See ``Driver``. Interrupts are not asked for."""
        options.setdefault("pool_size", 1 << 18)
        super().__init__(device, queues=(REQUESTS,), **options)

    def _ready(self) -> None:
        config = parse_config(DeviceId.GPIO, self.features, self.read_config(_CONFIG_BYTES))
        if "gpio_names_size" not in config:
            raise DeviceBroken(f"{self.name} has a configuration space too short for the number of its lines")
        self.lines, self._names_size = int(config["ngpio"]), int(config["gpio_names_size"])
        """How many lines there are."""

    def names(self) -> list[str]:
        """The name of each line, empty where it has none; no names at all where the device names none."""
        if not self._names_size:
            return []
        if self._names_size > _MOST_NAMES:
            raise DeviceBroken(f"{self.name} says that its names take {self._names_size} bytes")
        names = self._request(GET_NAMES, 0, 0, self._names_size).split(b"\0")
        if len(names) != self.lines + 1 or names[-1]:
            raise DeviceBroken(f"{self.name} has {len(names) - 1} names for {self.lines} lines")
        return [str(name, "utf-8", "backslashreplace") for name in names[:-1]]

    def direction(self, line: int) -> Direction:
        """Whether the line is an input, an output, or neither."""
        (value,) = self._request(GET_DIRECTION, self._line(line))
        if value not in set(Direction):
            raise DeviceBroken(f"{self.name}: line {line} has direction {value}")
        return Direction(value)

    def set_direction(self, line: int, direction: Direction) -> None:
        """Make the line an input, an output, or neither."""
        self._request(SET_DIRECTION, self._line(line), direction)

    def value(self, line: int) -> bool:
        """Whether the line is high."""
        (value,) = self._request(GET_VALUE, self._line(line))
        if value > 1:
            raise DeviceBroken(f"{self.name}: line {line} has value {value}")
        return bool(value)

    def set_value(self, line: int, high: bool) -> None:
        """Set the line, an output or one that becomes an output later with this value."""
        self._request(SET_VALUE, self._line(line), int(high))

    def _line(self, line: int) -> int:
        if not 0 <= line < self.lines:
            raise ValueError(f"{self.name} has {self.lines} lines, there is no line {line}")
        return line

    def _request(self, kind: int, line: int, value: int = 0, room: int = 1) -> bytes:
        answer = self.ask(REQUESTS, [_REQUEST.pack(kind, line, value)], 1 + room)
        if answer and answer[0]:
            raise OSError(errno.EIO, f"{self.name}: request {kind} for line {line}: the device reports status {answer[0]}")
        if len(answer) != 1 + room:
            raise DeviceBroken(f"{self.name}: request {kind} for line {line}: an answer of {len(answer)} bytes instead of {1 + room}")
        return answer[1:]
