# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Queues and control messages of consoles (virtio 1.2, 5.3.2 and 5.3.6.2)."""

from __future__ import annotations

import struct
from enum import IntEnum

CONTROL_RX, CONTROL_TX = 2, 3
"""Queues of control messages, with MULTIPORT."""
CONTROL = struct.Struct("<IHH")
"""Port, event, value; a name or a size may follow."""
SIZE = struct.Struct("<HH")
"""Columns and rows."""
EMERGENCY_AT = 8
"""Where the configuration space takes a byte without any queue."""


class Event(IntEnum):
    """What a control message is about."""

    DEVICE_READY = 0
    DEVICE_ADD = 1
    DEVICE_REMOVE = 2
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7


def port_queues(port: int) -> tuple[int, int]:
    """Its queues of buffers to be filled, and of bytes that are sent."""
    return (2 * port + 2, 2 * port + 3) if port else (0, 1)
