# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Virtio device ids (virtio 1.2, 5) and the short names used in targets."""

from __future__ import annotations

from enum import IntEnum


class DeviceId(IntEnum):
    """Virtio device id."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    RNG = 4
    BALLOON = 5
    RPMSG = 7
    SCSI = 8
    P9 = 9
    GPU = 16
    INPUT = 18
    VSOCK = 19
    CRYPTO = 20
    IOMMU = 23
    MEM = 24
    SOUND = 25
    FS = 26
    PMEM = 27
    SCMI = 32
    I2C = 34
    GPIO = 41


_SHORT = {"blk": DeviceId.BLOCK, "9p": DeviceId.P9}


def device_name(number: int) -> str:
    """``block``, ``net``; ``device 77`` for an id without a name."""
    try:
        return DeviceId(number).name.lower()
    except ValueError:
        return f"device {number}"


def parse_device_id(text: str) -> int:
    """The id for ``blk``, ``block``, ``net``, ``2``; ValueError with the choices otherwise."""
    if text.isdigit():
        return int(text)
    if text in _SHORT:
        return _SHORT[text]
    try:
        return DeviceId[text.upper()]
    except KeyError:
        choices = ", ".join(sorted([*_SHORT, *(d.name.lower() for d in DeviceId)]))
        raise ValueError(f"unknown device type {text!r}; use a number or one of {choices}") from None
