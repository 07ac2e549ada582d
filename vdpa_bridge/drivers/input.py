# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""An input driver (virtio 1.2, 5.8): what the device is by its configuration selectors, and its events."""

from __future__ import annotations

from typing import Unpack

from ..device import Device
from ..errors import DeviceBroken
from ..virtio.ids import DeviceId
from ..virtio.input import (
    AXIS,
    DATA_AT,
    DATA_BYTES,
    EV_ABS,
    EV_MAX,
    EVENT,
    EVENTS,
    IDS,
    STATUS,
    Event,
    InputInfo,
    Select,
    unpack_bits,
)
from .base import Driver, Options
from .inbox import Inbox

_DEPTH = 64


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
        self._inbox = Inbox(self, EVENTS, EVENT.size, _DEPTH)

    def _replenish(self) -> None:
        self._inbox.fill()

    def select(self, selector: int, which: int = 0) -> bytes:
        """What the device says to *selector* and *which* (virtio 1.2, 5.8.4); nothing for what it does not have."""
        self.device.set_config(0, bytes((selector, which)))
        answer = self.device.get_config(0, DATA_AT + DATA_BYTES)
        if not answer[2]:
            return b""  # and what it repeats of the question then is not said (QEMU 7.2: zeroes)
        if answer[:2] != bytes((selector, which)):
            raise DeviceBroken(f"{self.name}: asked for {selector:#x}.{which:#x} of its configuration, it answers {answer[0]:#x}.{answer[1]:#x}")
        if answer[2] > DATA_BYTES:
            raise DeviceBroken(f"{self.name}: {answer[2]} bytes for selector {selector:#x}.{which:#x}, there is room for {DATA_BYTES}")
        return answer[DATA_AT : DATA_AT + answer[2]]

    @property
    def info(self) -> InputInfo:
        """Everything; a question for each event type and axis."""
        ids = self.select(Select.IDS)
        events = {kind: bits for kind in range(EV_MAX + 1) if (bits := unpack_bits(self.select(Select.EVENT_BITS, kind)))}
        axes = {code: self.select(Select.ABSOLUTE, code) for code in events.get(EV_ABS, ())}
        return InputInfo(
            name=_text(self.select(Select.NAME)),
            serial=_text(self.select(Select.SERIAL)),
            ids=IDS.unpack_from(ids) if len(ids) >= IDS.size else (),
            properties=unpack_bits(self.select(Select.PROPERTIES)),
            events=events,
            axes={code: AXIS.unpack_from(data) for code, data in axes.items() if len(data) >= AXIS.size},
        )

    def read(self, timeout: float | None = None) -> Event:
        """The next event; TimeoutError when none comes."""
        data = self._inbox.get("an event", timeout)
        if len(data) != EVENT.size:
            raise DeviceBroken(f"{self.name}: an event of {len(data)} bytes instead of {EVENT.size}")
        return Event(*EVENT.unpack(data))

    def write(self, event: Event, timeout: float | None = None) -> None:
        """Send an event to the device: a light on a keyboard, say."""
        self.ask(STATUS, [EVENT.pack(*event)], timeout=timeout)


def _text(data: bytes) -> str:
    return str(data.rstrip(b"\0"), "utf-8", "backslashreplace")
