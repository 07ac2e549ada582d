# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""An entropy driver (virtio 1.2, 5.4)."""

from __future__ import annotations

from typing import Unpack

from ..device import Device
from ..errors import DeviceBroken
from ..virtio.ids import DeviceId
from .base import Driver, Options

_CHUNK = 16 << 10
"""Bytes asked for at once."""


class RngDriver(Driver):
    """A source of random bytes."""

    device_id = DeviceId.RNG
    table_entries = 1

    def __init__(self, device: Device, **options: Unpack[Options]) -> None:
        """See ``Driver``."""
        options.setdefault("pool_size", 4 * _CHUNK)
        super().__init__(device, queues=(0,), **options)

    def read(self, length: int, timeout: float | None = None) -> bytes:
        """*length* random bytes; TimeoutError when none come for *timeout* seconds. Devices may be slow, and give few at a time."""
        data = bytearray()
        while len(data) < length:
            more = self.ask(0, (), min(length - len(data), _CHUNK), timeout)
            if not more:
                raise DeviceBroken(f"{self.name} gave a buffer back without a random byte in it")
            data += more
        return bytes(data)
