# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A console driver (virtio 1.2, 5.3): a stream of bytes each way, on the first port or on another by number or name.

Rule of this file: ports beyond the first need MULTIPORT, which is taken only when a port is asked for.
"""

from __future__ import annotations

import time
from typing import Unpack

from ..device import Device
from ..errors import DeviceBroken, FeatureError
from ..virtio.config import Value, parse_config
from ..virtio.console import CONTROL, CONTROL_RX, CONTROL_TX, Event, port_queues
from ..virtio.features import ConsoleFeature as F
from ..virtio.ids import DeviceId
from .base import Driver, Options
from .inbox import Inbox

_CHUNK = 4096
_DEPTH = 32
_CONFIG_BYTES = 12
_LONGEST_LINE = 1 << 20


class ConsoleDriver(Driver):
    """One port of a console device."""

    device_id = DeviceId.CONSOLE
    table_entries = 1

    def __init__(self, device: Device, *, port: int | str | None = None, **options: Unpack[Options]) -> None:
        """See ``Driver``. *port*: None for the only one there is without MULTIPORT, or one of several by number or name.

        FeatureError when the device has one port only, LookupError when it has no such port.
        """
        options.setdefault("pool_size", 512 << 10)
        self._port = port
        self.ports: dict[int, str] = {}
        """Numbers and names of all ports, with MULTIPORT; a port need not have a name."""
        if port is not None and not device.identify().features & F.MULTIPORT:
            raise FeatureError(f"{device.name} has one port only: it does not offer MULTIPORT")
        several = port is not None
        super().__init__(device, wanted=F.SIZE | F.MULTIPORT * several, queues=None if several else (0, 1), **options)

    def _ready(self) -> None:
        self._rest = b""
        self._inboxes: list[Inbox] = []
        number = 0
        if self._port is not None:
            self._inboxes.append(Inbox(self, CONTROL_RX, _CHUNK, _DEPTH))
            number = self._find(self._port)
            self._tell(number, Event.PORT_OPEN)
        rx, self._tx = port_queues(number)
        self._inboxes.append(Inbox(self, rx, _CHUNK, _DEPTH))

    def _replenish(self) -> None:
        for inbox in self._inboxes:
            inbox.fill()

    @property
    def info(self) -> dict[str, Value]:
        """Columns and rows where the device tells them, and the number of ports where there are several."""
        return parse_config(DeviceId.CONSOLE, self.features, self.read_config(_CONFIG_BYTES))

    # Ports -----------------------------------------------------------------------------------------------------------

    def _tell(self, port: int, event: int, value: int = 1) -> None:
        self.ask(CONTROL_TX, [CONTROL.pack(port, event, value)])

    def _find(self, wanted: int | str) -> int:
        """Let the device name its ports, until the one that is wanted has come."""
        (control,) = self._inboxes
        most = (self.device.identify().queues - 2) // 2
        self.ports = {}
        self._tell(0xFFFFFFFF, Event.DEVICE_READY)
        deadline = time.monotonic() + self.timeout
        while True:
            if wanted in self.ports:
                return int(wanted)
            for number, name in self.ports.items():
                if wanted == name:
                    return number
            try:
                message = control.get(f"port {wanted!r}", max(deadline - time.monotonic(), 0))
            except TimeoutError:
                known = ", ".join(f"{number} {name!r}" for number, name in self.ports.items()) or "none"
                raise LookupError(f"{self.name} has no port {wanted!r}; there is: {known}") from None
            if len(message) < CONTROL.size:
                raise DeviceBroken(f"{self.name}: a control message of {len(message)} bytes, shorter than its header")
            number, event, _ = CONTROL.unpack_from(message)
            if number >= most and event in (Event.DEVICE_ADD, Event.PORT_NAME):
                raise DeviceBroken(f"{self.name} names a port {number}, but has queues for {most} ports")
            if event == Event.DEVICE_ADD:
                self.ports[number] = ""
                self._tell(number, Event.PORT_READY)
            elif event == Event.PORT_NAME:
                self.ports[number] = str(message[CONTROL.size :].rstrip(b"\0"), "utf-8", "backslashreplace")
            elif event == Event.DEVICE_REMOVE:
                self.ports.pop(number, None)

    # Bytes -----------------------------------------------------------------------------------------------------------

    def write(self, data: bytes, timeout: float | None = None) -> None:
        """Send *data*; returns when the device has taken it, TimeoutError when it takes nothing for *timeout* seconds."""
        for at in range(0, len(data), _CHUNK):
            self.ask(self._tx, [data[at : at + _CHUNK]], timeout=timeout)

    def read(self, timeout: float | None = None) -> bytes:
        """What has come, some bytes at least; TimeoutError when none do."""
        data, self._rest = self._rest, b""
        while not data:
            data = self._inboxes[-1].get("the arrival of bytes", timeout)
        while (more := self._inboxes[-1].take()) is not None:
            data += more
        return data

    def read_until(self, end: bytes, timeout: float | None = None) -> bytes:
        """What comes up to and with *end*; TimeoutError when it does not come, and what did come is kept."""
        data = bytearray()
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while end not in data:
            if len(data) > _LONGEST_LINE:
                raise ValueError(f"{self.name}: {len(data)} bytes came without {end!r} among them")
            try:
                data += self.read(max(deadline - time.monotonic(), 0))
            except TimeoutError:
                self._rest = bytes(data)
                raise
        line, found, self._rest = bytes(data).partition(end)
        return line + found
