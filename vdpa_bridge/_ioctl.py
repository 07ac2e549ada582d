# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Typed entry to python-ioctl-opt, the only place that imports it (it carries no type information)."""

from __future__ import annotations

import struct

import ioctl_opt  # type: ignore[import-untyped]

VHOST = 0xAF
"""``VHOST_VIRTIO``, the ioctl type of all vhost (linux/vhost.h)."""

IOC_WRITE, IOC_READ = 1, 2


def io(nr: int, kind: int = VHOST) -> int:
    """``_IO``: no argument."""
    return int(ioctl_opt.IO(kind, nr))


def ior(nr: int, layout: struct.Struct, kind: int = VHOST) -> int:
    """``_IOR``: the kernel writes the argument."""
    return int(ioctl_opt.IOR(kind, nr, layout))


def iow(nr: int, layout: struct.Struct, kind: int = VHOST) -> int:
    """``_IOW``: the kernel reads the argument."""
    return int(ioctl_opt.IOW(kind, nr, layout))


def iowr(nr: int, layout: struct.Struct, kind: int = VHOST) -> int:
    """``_IOWR``: both."""
    return int(ioctl_opt.IOWR(kind, nr, layout))


def direction(number: int) -> int:
    """The direction bits of an ioctl number: IOC_WRITE, IOC_READ, both or 0."""
    return number >> 30 & 3


def size(number: int) -> int:
    """The argument size that an ioctl number carries."""
    return number >> 16 & 0x3FFF


def kind(number: int) -> int:
    """The type byte of an ioctl number; VHOST for everything of ours."""
    return number >> 8 & 0xFF
