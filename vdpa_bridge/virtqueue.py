# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Virtqueues: both ends of a ring, and the memory a device may touch.

Rule: rings are written and read by the native core alone, which has the atomic stores and fences that Python lacks
(`struct.pack_into` on shared memory lets the other side see zeros). Everything here works on batches: a call per chain
costs more than the ring does.

A driver adds, publishes, kicks if told so, and reaps::

    layout = RingLayout.contiguous(256)
    queue = DriverQueue(address, layout.size, iova, 256)
    queue.add_many([([(header_iova, 16)], [(data_iova, 4096)], "a token")])
    if queue.publish():
        kick.signal()
    for token, written in queue.reap():
        ...

A device pops chains, fills them, and pushes them back; before it sleeps it re-arms the kick, and pops again when told
that chains came in between::

    while chains := queue.pop_many():
        if queue.push_many([(chain, chain.write(answer(chain.read()))) for chain in chains]):
            call.signal()
    if queue.enable_kick():
        ...  # pop again
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from ._virtqueue import (
    AGAIN,
    CALL,
    KICK,
    MOVED,
    PERM_RO,
    PERM_RW,
    PERM_WO,
    Chain,
    DeviceQueue,
    DriverQueue,
    IovaMap,
    Poll,
    Relay,
    Slots,
    guard,
    poisoned,
    ring_layout,
    unguard,
)

__all__ = [
    "AGAIN",
    "CALL",
    "KICK",
    "MOVED",
    "PACKED_BEGIN",
    "PERM_RO",
    "PERM_RW",
    "PERM_WO",
    "Chain",
    "DeviceQueue",
    "DriverQueue",
    "IovaMap",
    "Poll",
    "Relay",
    "RingLayout",
    "Slots",
    "guard",
    "poisoned",
    "ring_layout",
    "unguard",
]


PACKED_BEGIN = 0x80008000
"""Base of a packed ring at its beginning: both indices 0, both wrap counters 1 (drivers/vhost/vhost.c, VHOST_SET_VRING_BASE)."""


@dataclass(frozen=True)
class RingLayout:
    """Where the areas of a ring lie in one piece of memory; offsets and size in bytes (virtio 1.2, 2.7 and 2.8)."""

    num: int
    table_entries: int
    desc: int
    avail: int
    used: int
    tables: int
    size: int
    packed: bool = False

    @classmethod
    def contiguous(cls, num: int, table_entries: int = 0, packed: bool = False) -> Self:
        """The layout `DriverQueue` uses for `num` entries, with an indirect table of `table_entries` for each.

        Of a packed ring, `avail` and `used` are the event suppression structures. ValueError when `num` is no size of such a
        ring (a power of 2 up to 32768; packed: any up to that), or `table_entries` is more than 1024.
        """
        return cls(num, table_entries, *ring_layout(num, table_entries, packed), packed)
