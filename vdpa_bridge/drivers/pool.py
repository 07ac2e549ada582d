# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Where a driver's memory lies in the device's address space, and how buffers are taken from it and given back."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from ..memory import INTERRUPTS, PAGE, Buffer, Region
from ..wire import IotlbUpdate, Iova, IovaRange, ProcessAddress

LINE = 64
"""Bytes of a cache line, which no two buffers share."""
_LOW = 1 << 20


def place(limits: IovaRange, size: int) -> Iova:
    """A page-aligned IOVA for *size* bytes within *limits*, off 0 and off the interrupt window; ValueError when there is none."""
    for start in (_LOW, PAGE, INTERRUPTS[1] + 1):
        iova = -(-max(start, limits.first) // PAGE) * PAGE
        last = iova + size - 1
        if last <= limits.last and (last < INTERRUPTS[0] or iova > INTERRUPTS[1]):
            return Iova(iova)
    raise ValueError(f"no room for {size:#x} bytes in the IOVA range [{limits.first:#x}, {limits.last:#x}]; ask for a smaller pool")


class Pool:
    """First-fit allocator over one buffer, which it does not own; free pieces are kept sorted and merged."""

    def __init__(self, whole: Buffer) -> None:
        self._whole = whole
        self._free: list[tuple[int, int]] = [(0, whole.size)]
        self._taken: dict[int, int] = {}

    def take(self, size: int) -> Buffer:
        """A buffer of *size* bytes, aligned to LINE, with whatever was there before; MemoryError when no piece is large enough."""
        need = -(-size // LINE) * LINE
        for at, (start, length) in enumerate(self._free):
            if length >= need:
                if length == need:
                    del self._free[at]
                else:
                    self._free[at] = (start + need, length - need)
                self._taken[start] = need
                whole = self._whole
                return Buffer(Iova(whole.iova + start), ProcessAddress(whole.address + start), whole.data[start : start + size])
        raise MemoryError(f"the pool of {self._whole.size} bytes has no piece of {size} bytes free")

    def give(self, buffer: Buffer) -> None:
        """Take a buffer back; KeyError when it is not out."""
        start = buffer.iova - self._whole.iova
        length = self._taken.pop(start)
        at = bisect.bisect(self._free, (start, length))
        if at < len(self._free) and self._free[at][0] == start + length:
            length += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == start:
            start, before = self._free[at - 1]
            length += before
            at -= 1
            del self._free[at]
        self._free.insert(at, (start, length))

    @property
    def size(self) -> int:
        """Bytes, taken or not."""
        return self._whole.size

    @property
    def free(self) -> int:
        """Bytes that are not taken, in however many pieces."""
        return sum(length for _, length in self._free)


class Space:
    """A driver's memory in address space *asid* of the device: the rings of *queues*, and *pool* for what they carry."""

    def __init__(self, iova: Iova, ring_size: int, queues: Sequence[int], pool_size: int, asid: int = 0) -> None:
        self.asid = asid
        self.region = Region(iova, self.span(ring_size, queues, pool_size))
        self.rings = {index: self.region.allocate(ring_size, PAGE) for index in queues}
        self._area = self.region.allocate(pool_size, PAGE)
        self.pool = Pool(self._area)

    @staticmethod
    def span(ring_size: int, queues: Sequence[int], pool_size: int) -> int:
        """Bytes that it takes; sizes are whole pages."""
        return ring_size * len(queues) + pool_size

    def renew(self) -> None:
        """The device was reset: whatever it had is free."""
        self.pool = Pool(self._area)

    def update(self) -> IotlbUpdate:
        """The request that lets the device at it."""
        return self.region.update(asid=self.asid)
