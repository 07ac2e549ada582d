# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""An I2C driver (virtio 1.2, 5.16): transfers to and from devices on its bus."""

from __future__ import annotations

import errno
import struct
from typing import Unpack

from ..device import Device
from ..errors import DeviceBroken
from ..virtio.features import I2cFeature as F
from ..virtio.ids import DeviceId
from .base import Driver, Options
from .ring import Posted

REQUESTS = 0
FAIL_NEXT, READ = 1, 2
"""Flags of a request: the next one fails if this does; it reads."""
_HEADER = struct.Struct("<HHI")


class I2cDriver(Driver):
    """A bus. Addresses have 7 bits."""

    device_id = DeviceId.I2C
    table_entries = 3

    def __init__(self, device: Device, *, wanted: int = F.ZERO_LENGTH_REQUEST, **options: Unpack[Options]) -> None:
        """See ``Driver``; ZERO_LENGTH_REQUEST is required, as devices must offer it and drivers take it (5.16.3)."""
        options["required"] = options.get("required", 0) | F.ZERO_LENGTH_REQUEST
        options.setdefault("pool_size", 1 << 18)
        super().__init__(device, wanted=wanted, queues=(REQUESTS,), **options)

    def transfer(self, address: int, data: bytes = b"", count: int = 0, timeout: float | None = None) -> bytes:
        """Write *data* to the device at *address*, then read *count* bytes, in one transaction; return them.

        With neither, only ask whether it is there. OSError EIO when it is not, or does not take or give what it should.
        """
        if not 0 <= address < 0x80:
            raise ValueError(f"{self.name}: address {address:#x} has more than 7 bits")
        parts: list[tuple[int, Posted]] = []
        if data or not count:
            header = _HEADER.pack(address << 1, 0, FAIL_NEXT if count else 0)
            parts.append((0, self.post(REQUESTS, [header, data] if data else [header], [1])))
        if count:
            parts.append((count, self.post(REQUESTS, [_HEADER.pack(address << 1, 0, READ)], [count, 1])))
        self.wait(lambda: all(part.written >= 0 for _, part in parts), f"a transfer to address {address:#x}", timeout)
        for room, part in parts:
            if part.data[-1][0]:
                raise OSError(errno.EIO, f"{self.name}: a transfer to address {address:#x} failed: status {part.data[-1][0]}")
            if part.written != room + 1:
                raise DeviceBroken(f"{self.name}: a transfer to address {address:#x}: {part.written} bytes came instead of {room + 1}")
        return parts[-1][1].data[0] if count else b""
