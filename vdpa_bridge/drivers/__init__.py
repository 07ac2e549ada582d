# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Virtio drivers in this process, above any Device: they do not know where it lives."""

from __future__ import annotations

from .base import Driver
from .blk import BlkDriver, BlkInfo, BlkRequest
from .console import ConsoleDriver
from .fs import FsDriver
from .generic import GenericDriver
from .gpio import GpioDriver
from .i2c import I2cDriver
from .input import InputDriver
from .net import NetDriver
from .rng import RngDriver
from .scsi import ScsiDriver
from .vsock import VsockDriver

__all__ = [
    "BlkDriver",
    "BlkInfo",
    "BlkRequest",
    "ConsoleDriver",
    "Driver",
    "FsDriver",
    "GenericDriver",
    "GpioDriver",
    "I2cDriver",
    "InputDriver",
    "NetDriver",
    "RngDriver",
    "ScsiDriver",
    "VsockDriver",
]
