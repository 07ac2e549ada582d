# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The driver's end of one virtqueue, and what becomes of the chains that come back on it.

Rule of this file: a ring knows its queue and its eventfds, not the device. Memory under way belongs to the chain.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..device import RingSetup
from ..memory import Buffer, Doorbell
from ..virtqueue import DriverQueue, Slots
from .pool import Pool

Segments = list[tuple[int, int]]


class Pending:
    """A chain that the device has. Subclasses say what happens when it comes back."""

    __slots__ = ("written",)

    def __init__(self) -> None:
        self.written = -1
        """Bytes that the device says it wrote; -1 as long as it has the chain."""

    def complete(self, written: int) -> None:
        """The device gave the chain back."""
        self.written = written


class Posted(Pending):
    """A chain of ``Driver.post``, with what the device wrote."""

    __slots__ = ("_buffers", "_pool", "data", "queue")

    def __init__(self, queue: int, pool: Pool, readable: list[Buffer], writable: list[Buffer]) -> None:
        super().__init__()
        self.queue = queue
        self.data: list[bytes] = []
        self._pool, self._buffers = pool, (readable, writable)

    def complete(self, written: int) -> None:
        """Keep what was written; the memory is free again."""
        readable, writable = self._buffers
        self.data = [bytes(buffer.data) for buffer in writable]
        for buffer in readable + writable:
            self._pool.give(buffer)
        super().complete(written)


@dataclass
class Ring:
    """The driver's end of one virtqueue, with the ways to call and be called, which it borrows."""

    index: int
    queue: DriverQueue[Pending]
    kick: int
    call: int
    base: int = 0
    doorbell: Doorbell | None = None
    """Where to kick instead of *kick*."""
    slots: Slots[Pending] | None = None
    """Buffers that are posted again and again; then all that comes back comes through them."""
    take_slots: Callable[[], int] | None = None
    """Takes slots that came back; returns how many. Goes with *slots*."""

    def lend(self, buffer: Buffer, stride: int, writable: bool, take: Callable[[], int] | None = None) -> Slots[Pending]:
        """Make slots of *stride* bytes of *buffer*. *take* takes those that come back (default: only makes them idle)."""
        slots = Slots(self.queue, buffer.address, buffer.iova, stride, buffer.size // stride, writable=writable, owner=buffer)
        self.slots, self.take_slots = slots, take or slots.collect
        return slots

    def close(self) -> None:
        """The memory under the ring goes or is used anew: let go of the queue."""
        self.slots = self.take_slots = None
        del self.queue

    @property
    def signals(self) -> tuple[int, int, int, int]:
        """What a native loop needs to kick and to be called: eventfds, the address of the doorbell or 0, index of the queue."""
        return self.kick, self.call, self.doorbell.address if self.doorbell else 0, self.index

    def submit(self, requests: Sequence[tuple[Segments, Segments, Pending]]) -> int:
        """Post as many as fit, tell the device; return how many. OSError EPROTO when the ring is broken."""
        added = self.queue.add_many(requests)
        if added:
            self.publish()
        return added

    def publish(self) -> None:
        """Let the device see what was added, and tell it if it wants to be told."""
        if self.queue.publish():
            self.notify()

    def take_back(self) -> bool:
        """Take what the device has finished; True when there was something. OSError EPROTO when the ring is broken."""
        found = False
        while True:
            slots = self.take_slots() if self.take_slots else 0
            done = self.slots.take_others() if self.slots else self.queue.reap()
            for pending, written in done:
                pending.complete(written)
            if not slots and not done:
                return found
            found = True

    def notify(self) -> None:
        """Let the device look at the ring."""
        if self.doorbell is not None:
            self.doorbell.ring(self.queue.offset)
        else:
            os.eventfd_write(self.kick, 1)

    def setup(self) -> RingSetup:
        """The ring as the device is told about it."""
        queue = self.queue
        return RingSetup(self.index, queue.num, queue.desc, queue.avail, queue.used, self.kick, self.call, self.base)


def segments(buffers: Sequence[Buffer]) -> Segments:
    """Buffers as a queue takes them."""
    return [(buffer.iova, buffer.size) for buffer in buffers]


def drain(fd: int) -> None:
    """Take what an eventfd holds, if anything."""
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(fd)
