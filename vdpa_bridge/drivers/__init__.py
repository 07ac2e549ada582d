# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Virtio drivers in this process, above any Device: they do not know where it lives."""

from __future__ import annotations

from .base import Driver
from .blk import BlkDriver, BlkInfo, BlkRequest
from .net import NetDriver

__all__ = ["BlkDriver", "BlkInfo", "BlkRequest", "Driver", "NetDriver"]
