# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Packets of socket devices (virtio 1.2, 5.10.6)."""

from __future__ import annotations

import struct
from enum import IntEnum

RX, TX, EVENT = 0, 1, 2
"""Queues."""
HOST = 2
"""The host's context id."""
STREAM = 1
"""The type of packets that is served here."""
NO_RECEIVE, NO_SEND = 1, 2
"""Flags of SHUTDOWN: what its sender will not do any more."""
COUNTER = (1 << 32) - 1
"""Counters of bytes have 32 bits and wrap."""
HEADER = struct.Struct("<QQIIIHHIII")
"""Context ids and then ports of source and destination, length, type, operation, flags, size of the sender's buffer, bytes it took from there."""


class Op(IntEnum):
    """Operations."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7
