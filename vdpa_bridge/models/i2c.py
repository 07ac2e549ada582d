# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""An I2C bus (virtio 1.2, 5.16) with simulated devices on it.

Rule of this file: the status is the last byte that a request has room for, whatever else is wrong with it, and a request without
room for one comes back as it is.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self

from ..virtio.features import I2cFeature as F
from ..virtio.ids import DeviceId
from ..virtqueue import Chain
from .base import Model, Queue
from .i2c_devices import BusDevice, NoAck, parse_device
from .options import check_options

DEFAULT = "eeprom@50"
LONGEST = 65535
"""Bytes of a segment, as in the kernel's struct i2c_msg."""

_HEADER = struct.Struct("<HHI")
_FAIL_NEXT, _READ = 1, 2
_OK, _ERR = b"\0", b"\1"


class I2cModel(Model):
    """Devices by address. A segment that fails takes those behind it in its group with it (FAIL_NEXT)."""

    device_id = DeviceId.I2C
    features = F.ZERO_LENGTH_REQUEST
    required = F.ZERO_LENGTH_REQUEST
    queue_count = 1

    def __init__(self, devices: Mapping[int, BusDevice]) -> None:
        """*devices* by their first address, to be closed with this; ValueError when two have the same."""
        self._devices = dict(devices)
        self._bus: dict[int, tuple[BusDevice, int]] = {}
        for first, device in devices.items():
            for block in range(device.addresses):
                if first + block in self._bus:
                    raise ValueError(f"two devices at address {first + block:02x}: one with {device.addresses} addresses begins at {first:02x}")
                self._bus[first + block] = device, block
        self._fails = False

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """``devices=eeprom@50:file=PATH;size=256,ram@51,thermometer@48:temperature=23.5``."""
        check_options("i2c", options, ("devices",))
        devices: dict[int, BusDevice] = {}
        with ExitStack() as made:
            for text in filter(None, options.get("devices", DEFAULT).split(",")):
                address, device = parse_device(text)
                made.callback(device.close)
                if address in devices:
                    raise ValueError(f"two devices at address {address:02x}")
                devices[address] = device
            model = cls(devices)
            made.pop_all()
        return model

    def reset(self) -> None:
        """The bus is free; devices on it keep what they have."""
        self._fails = False

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        """Serve a batch, one request after the other."""
        queue = queues[index]
        queue.push([(chain, self._serve(chain)) for chain in queue.pop(16)])

    def _serve(self, chain: Chain) -> int:
        """Bytes written."""
        header = chain.read(0, _HEADER.size)
        address, _, flags = _HEADER.unpack(header) if len(header) == _HEADER.size else (0, 0, 0)
        room = chain.writable - 1
        fails, answer = self._fails, b""
        try:
            if fails or len(header) != _HEADER.size or room < 0 or flags & ~(_FAIL_NEXT | _READ):
                raise NoAck
            answer = self._transfer(chain, address, room if flags & _READ else -1)
            fails = False
        except NoAck:
            fails = True
        self._fails = fails and bool(flags & _FAIL_NEXT)
        if room < 0:
            return 0
        return (chain.write(answer) if answer else 0) + chain.write(_ERR if fails else _OK, room)

    def _transfer(self, chain: Chain, address: int, count: int) -> bytes:
        """Read *count* bytes, or write if that is less than 0. NoAck, too, for what is no 7-bit address, or no such request."""
        if address & 0xFF01 or address >> 1 not in self._bus:
            raise NoAck
        device, block = self._bus[address >> 1]
        sent = chain.readable - _HEADER.size
        if max(sent, count) > LONGEST or (sent if count >= 0 else chain.writable - 1):
            raise NoAck
        if count >= 0:
            return device.read(block, count)
        device.write(block, chain.read(_HEADER.size))
        return b""

    def snapshot(self) -> dict[str, Any]:
        """The state of each device, by its first address, and whether the next request fails."""
        return {"fails": self._fails, "devices": {f"{address:02x}": device.state for address, device in self._devices.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """ValueError when other devices are on the bus."""
        if set(state["devices"]) != {f"{address:02x}" for address in self._devices}:
            raise ValueError(f"the bus had devices at {', '.join(state['devices'])}")
        for address, device in self._devices.items():
            device.state = state["devices"][f"{address:02x}"]
        self._fails = bool(state["fails"])

    def close(self) -> None:
        """Close the files."""
        super().close()
        for device in self._devices.values():
            device.close()
