# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Words of a GPIO controller (virtio 1.2, 5.18) that both its ends speak."""

from __future__ import annotations

from enum import IntEnum


class Direction(IntEnum):
    """Of a line: VIRTIO_GPIO_DIRECTION_*."""

    NONE = 0
    OUT = 1
    IN = 2


class Irq(IntEnum):
    """What is an interrupt of a line: VIRTIO_GPIO_IRQ_TYPE_*."""

    NONE = 0
    RISING = 1
    FALLING = 2
    BOTH = 3
    HIGH = 4
    LOW = 8
