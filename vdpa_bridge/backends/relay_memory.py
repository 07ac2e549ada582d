# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The memory of a relay: where the device behind it has what its client has elsewhere.

Rule of this file: every mapping of the client gets a place of its own among the addresses that the device can reach, and
is mapped for the device as soon as the client says it, so that a refusal is the client's. What a reset of the device takes
away is mapped anew for its next start.
"""

from __future__ import annotations

import errno
import os
from bisect import insort
from dataclasses import dataclass, replace

from ..device import Device
from ..flags import BackendFeature
from ..memory import INTERRUPTS, PAGE, IotlbTable, Region, SharedMapping
from ..virtqueue import IovaMap
from ..wire import IotlbInvalidate, IotlbUpdate, Iova, IovaRange

_HIGH, _WIDE = 1 << 32, 1 << 36
"""Where places begin if the device reaches that far, and how far: below, platforms keep addresses for themselves."""
_LOW = 1 << 20
"""Where they begin otherwise: 0 means nothing to some devices."""
_HUGE = 2 << 20
"""The granule for large mappings, which IOMMUs map in one piece then."""


class Room:
    """The addresses that a device can reach, but for what is taken."""

    def __init__(self, limits: IovaRange) -> None:
        self._first, self._last = max(limits.first, _HIGH if limits.last >= _WIDE else _LOW), limits.last
        self._taken = [INTERRUPTS]

    def take(self, size: int) -> Iova:
        """The lowest place for *size* bytes; ENOSPC when there is none."""
        grain = _HUGE if size >= _HUGE else PAGE
        at = self._first
        for first, last in [*self._taken, (self._last + 1, self._last)]:
            start = -(-at // grain) * grain
            if start + size <= min(first, self._last + 1):
                insort(self._taken, (start, start + size - 1))
                return Iova(start)
            at = max(at, last + 1)
        raise OSError(errno.ENOSPC, f"no room for {size:#x} bytes in the device's IOVA range [{self._first:#x}, {self._last:#x}]")

    def give(self, iova: int, size: int) -> None:
        """A place is free again."""
        self._taken.remove((iova, iova + size - 1))


@dataclass
class Piece:
    """One mapping of the client."""

    mapping: SharedMapping
    """Here, for rings and indirect tables."""
    update: IotlbUpdate
    """For the device, with a descriptor of ours."""
    there: bool = False
    """The device has it."""


class RelayMemory:
    """What the client has mapped, and our own memory for rings. Does not own the device."""

    def __init__(self, device: Device) -> None:
        self.table: IotlbTable[Piece] = IotlbTable()
        self.here = IovaMap()
        """The client's addresses in this process."""
        self.places = IovaMap()
        """The client's addresses as the device has them."""
        self._device = device
        self._room = Room(device.identify().iova_range)
        self._rings: Region | None = None
        self._rings_there = False

    def add(self, request: IotlbUpdate) -> None:
        """Map for the client what it asks for; EINVAL, EEXIST as of a table, else as the device has it."""
        self.table.check(request)
        mapping = SharedMapping(request.fd, request.size, request.offset, request.perm)
        place, fd = None, -1
        try:
            place = self._room.take(request.size)
            fd = os.dup(request.fd)
            update = replace(request, iova=place, asid=0, fd=fd)
            self._device.map([update])
        except BaseException:
            mapping.close()
            if place is not None:
                self._room.give(place, request.size)
            if fd >= 0:
                os.close(fd)
            raise
        self.table.enter(request, Piece(mapping, update, True))
        self.here.add(request.iova, request.size, mapping.address, request.perm)
        self.places.add(request.iova, request.size, place, request.perm)

    def remove(self, request: IotlbInvalidate) -> None:
        """Take the client's mappings inside *request* away."""
        gone = self.table.remove(request)
        for entry in gone:
            self.here.remove(entry.iova, entry.size)
            self.places.remove(entry.iova, entry.size)
        self._drop([entry.value for entry in gone])

    def clear(self) -> None:
        """Take all of the client's mappings away."""
        self.here.clear()
        self.places.clear()
        self._drop([entry.value for entry in self.table.clear()])

    def _drop(self, pieces: list[Piece]) -> None:
        try:
            self._device.unmap([piece.update for piece in pieces if piece.there])
        finally:
            for piece in pieces:
                self._room.give(piece.update.iova, piece.update.size)
                os.close(piece.update.fd)
                piece.mapping.close()

    def rings(self, size: int) -> Region:
        """At least *size* bytes for rings on the device, with nothing in them that counts."""
        if self._rings is not None and self._rings.size >= size:
            return self._rings
        self._drop_rings()
        place = self._room.take(-(-size // PAGE) * PAGE)
        try:
            self._rings = Region(place, size, "relay rings")
        except BaseException:
            self._room.give(place, -(-size // PAGE) * PAGE)
            raise
        return self._rings

    def _drop_rings(self) -> None:
        region, self._rings = self._rings, None
        if region is None:
            return
        try:
            if self._rings_there:
                self._device.unmap([region.update()])
        finally:
            self._rings_there = False
            self._room.give(region.iova, region.size)
            region.close()

    def missing(self) -> list[IotlbUpdate]:
        """What the device has to be given before it starts."""
        missing = [entry.value.update for entry in self.table if not entry.value.there]
        if self._rings is not None and not self._rings_there:
            missing.append(self._rings.update())
        return missing

    def is_there(self) -> None:
        """The device was given all that was missing."""
        for entry in self.table:
            entry.value.there = True
        self._rings_there = self._rings is not None

    def was_reset(self) -> None:
        """The device was reset, which may have taken its mappings away."""
        if not self._device.backend_features & BackendFeature.IOTLB_PERSIST:
            for entry in self.table:
                entry.value.there = False
            self._rings_there = False

    def close(self) -> None:
        """Give everything back; the device is closed, or has all unmapped."""
        self._rings_there = False
        for entry in self.table:
            entry.value.there = False
        self.clear()
        self._drop_rings()
