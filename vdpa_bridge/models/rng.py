# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""An entropy source (virtio 1.2, 5.4): every writable byte of a chain is filled from the kernel's generator."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Self

from ..virtio.ids import DeviceId
from .base import Model, Queue
from .options import check_options

MOST = 1 << 16
"""Bytes that one chain gets at most; a driver that wants more asks again."""


class RngModel(Model):
    """One queue, no features, no configuration space."""

    device_id = DeviceId.RNG
    queue_count = 1
    features = 0

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """There are none."""
        check_options("rng", options, ())
        return cls()

    def config(self) -> bytes:
        """Empty: the device has none (virtio 1.2, 5.4.4)."""
        return b""

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        """Fill a batch of chains."""
        queue = queues[index]
        queue.push([(chain, chain.write(os.urandom(min(chain.writable, MOST)))) for chain in queue.pop(16)])
