# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A GPIO driver (virtio 1.2, 5.18): lines by number, their names, direction, value and interrupts."""

from __future__ import annotations

import errno
import struct
import time
from typing import Unpack

from ..device import Device
from ..errors import DeviceBroken, FeatureError
from ..virtio.config import parse_config
from ..virtio.features import GpioFeature
from ..virtio.gpio import Direction, Irq
from ..virtio.ids import DeviceId
from .base import Driver, Options
from .ring import Posted

REQUESTS, EVENTS = 0, 1
GET_NAMES, GET_DIRECTION, SET_DIRECTION, GET_VALUE, SET_VALUE, SET_IRQ_TYPE = 1, 2, 3, 4, 5, 6
_REQUEST = struct.Struct("<HHI")
_LINE = struct.Struct("<H")
_INVALID, _VALID = b"\0", b"\1"
_CONFIG_BYTES = 8
_MOST_NAMES = 1 << 16
"""Bytes of names that are asked for; 65535 lines of two letters have that many and more."""


class GpioDriver(Driver):
    """A controller of lines."""

    device_id = DeviceId.GPIO
    table_entries = 2

    def __init__(self, device: Device, *, interrupts: bool = False, **options: Unpack[Options]) -> None:
        """See ``Driver``. *interrupts*: of lines are asked for; FeatureError when the device does not offer them."""
        options.setdefault("pool_size", 1 << 18)
        if interrupts and not device.identify().features & GpioFeature.IRQ:
            raise FeatureError(f"{device.name} has no interrupts: it does not offer IRQ")
        queues = (REQUESTS, EVENTS) if interrupts else (REQUESTS,)
        super().__init__(device, wanted=GpioFeature.IRQ * interrupts, queues=queues, **options)

    def _ready(self) -> None:
        self._irqs: set[int] = set()
        self._boxes: dict[int, Posted] = {}
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

    # Interrupts (5.18.6.8, 5.18.7) ---------------------------------------------------------------------------------------

    def set_interrupt(self, line: int, irq: Irq) -> None:
        """Enable the interrupt of a line that is no output, or disable it (NONE), which forgets what came. A line changes its type by way of NONE."""
        self._request(SET_IRQ_TYPE, self._line(line), irq)
        if irq != Irq.NONE:
            self._irqs.add(line)
            return
        self._irqs.discard(line)
        if (event := self._boxes.pop(line, None)) is not None:
            self.wait(lambda: event.written >= 0, f"the return of the event buffer of line {line}")

    def interrupt(self, timeout: float | None = None) -> int:
        """The line of the next interrupt, which is masked until the next call: see to its level before. TimeoutError when none comes."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while True:
            for line in sorted(self._irqs - self._boxes.keys()):
                self._boxes[line] = self.post(EVENTS, [_LINE.pack(line)], [1])
            self.wait(lambda: any(event.written >= 0 for event in self._boxes.values()), "an interrupt", max(deadline - time.monotonic(), 0))
            line = next(line for line, event in self._boxes.items() if event.written >= 0)
            event = self._boxes.pop(line)
            if event.written != 1 or event.data[0] not in (_INVALID, _VALID):
                raise DeviceBroken(f"{self.name}: the event buffer of line {line} comes back with {event.written} bytes, {event.data[0]!r}")
            if event.data[0] == _VALID:
                return line
            if time.monotonic() > deadline:  # a device that was suspended gives them back without an interrupt; one that goes on to do so is none
                raise TimeoutError(errno.ETIMEDOUT, f"{self.name}: no interrupt, event buffers come back without one")

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
