# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The device IOTLB of a legacy client whose guest has an IOMMU (ACCESS_PLATFORM), for devices that can wait for mappings.

Rule of this file: it is a cache. The client may take any translation away at any time and gets asked again, by a miss on
the back-end channel; so do we with all of them when a memory region goes, the device is reset, or the cache is full.
Translations lead from IOVA through the client's user address into one of its memory regions.
"""

from __future__ import annotations

from collections import deque

from .. import ops
from ..backends.base import Backend, DeviceIotlb, Miss
from ..device import first_error
from ..errors import RemoteProtocolError
from ..memory import PAGE, U64_MAX, Entry, IotlbTable
from ..ops import Call
from ..wire import IotlbInvalidate, IotlbUpdate, Iova
from . import messages as m
from .backend_channel import BackendEnd
from .legacy_memory import ClientMemory

AT_ONCE = 128
"""Misses whose answers a client may owe us before it is asked more: what two rings note, and what fits into any socket."""
MOST = 6144
"""Translations that are kept: more than the longest chains of two rings need, so that rings that wait do not starve each other."""


class ClientIotlb:
    """The translations of one client, and what it was asked for. Synchronization: the server's thread."""

    def __init__(self, backend: Backend, device: DeviceIotlb, memory: ClientMemory) -> None:
        self._backend = backend
        self._device = device
        self._memory = memory
        self._table: IotlbTable[IotlbUpdate] = IotlbTable()
        self._asked: deque[Miss | None] = deque()
        """In the order of the answers to come; None: whatever the answer, it is of no interest any more."""
        self._doubtful: set[Miss] = set()
        """Misses that were answered with success, and no mapping came."""

    # What the client says ----------------------------------------------------------------------------------------------

    def message(self, request: m.IotlbMessage, running: bool) -> None:
        """UPDATE or INVALIDATE. ValueError when it makes no sense; OSError when the device has no room."""
        if request.type == m.UPDATE:
            self._update(request, running)
        elif request.type == m.INVALIDATE:
            self._invalidate(request)
        else:
            raise ValueError(f"type {request.type} is neither UPDATE ({m.UPDATE}) nor INVALIDATE ({m.INVALIDATE})")

    def _update(self, request: m.IotlbMessage, running: bool) -> None:
        """What overlaps goes: the client knows better by now. A device that does not run asks again when it does."""
        update = self._translated(request)
        touched = self._table.touched(IotlbInvalidate(update.iova, update.size))
        if running and update not in [entry.value for entry in touched]:
            if len(self._table) >= MOST:
                touched = list(self._table)
            self._carry_out(touched, [(ops.IOTLB_UPDATE, update)])
            self._table.add(update, update)
        self._answered(update)

    def _translated(self, request: m.IotlbMessage) -> IotlbUpdate:
        """The mapping that an UPDATE stands for."""
        if request.perm not in (1, 2, 3):
            raise ValueError(f"permission is {request.perm}, not 1 (RO), 2 (WO) or 3 (RW)")
        if not request.size or max(request.iova, request.uaddr) + request.size - 1 > U64_MAX:
            raise ValueError(f"{request.size:#x} bytes at {request.iova:#x}, user address {request.uaddr:#x}, are empty or wrap around")
        held = self._memory.find(request.uaddr)
        if held is None or not held.holds(request.uaddr + request.size - 1):
            raise ValueError(f"user addresses from {request.uaddr:#x}, {request.size:#x} bytes, lie in no memory region")
        offset = request.uaddr - held.region.user_addr + held.region.mmap_offset
        if request.iova % PAGE or request.size % PAGE or offset % PAGE:
            raise ValueError(f"{request.size:#x} bytes at {request.iova:#x} for user address {request.uaddr:#x} are not whole pages")
        return IotlbUpdate(Iova(request.iova), request.size, held.fd, offset, request.perm)

    def _invalidate(self, request: m.IotlbMessage) -> None:
        """As far as entries reach that are touched: it is a cache. Size 0 at 0 is everything, which has no other name in 64 bits."""
        size = request.size or (U64_MAX + 1 if not request.iova else 0)
        if not size or request.iova + size - 1 > U64_MAX:
            raise ValueError(f"{size:#x} bytes at {request.iova:#x} are empty or wrap around")
        self._carry_out(self._table.touched(IotlbInvalidate(Iova(request.iova), size)))

    def flush(self) -> None:
        """Forget all translations."""
        self._carry_out(list(self._table))

    def reset(self) -> None:
        """The device was: answers to what it asked before are not for the rings to come."""
        self.flush()
        self._asked = deque([None] * len(self._asked))
        self._doubtful.clear()

    def _carry_out(self, gone: list[Entry[IotlbUpdate]], calls: list[Call] | None = None) -> None:
        """Take neighbours away, all that lies between them too, and go on with *calls*."""
        calls = calls or []
        if gone:
            whole = IotlbInvalidate(gone[0].iova, gone[-1].last + 1 - gone[0].iova)
            self._table.remove(whole)
            calls = [(ops.IOTLB_INVALIDATE, whole), *calls]
        if calls and (error := first_error(self._backend.call_many(calls))):
            raise error

    # What the client is asked ------------------------------------------------------------------------------------------

    def listen(self, channel: BackendEnd | None) -> None:
        """Let the rings of a device that starts now wait, with the misses to be asked on *channel*; None: let them break."""
        self._device.enable(-1 if channel is None else channel.missed)

    def new_channel(self, channel: BackendEnd | None) -> None:
        """No answer will come to what was asked on the one before."""
        self._asked.clear()
        self.listen(channel)
        if channel is not None:
            self.converse(channel)

    def converse(self, channel: BackendEnd) -> None:
        """Read answers, and ask what is not asked already."""
        for value in channel.answers():
            if not self._asked:
                raise RemoteProtocolError(f"IOTLB_MSG ({m.BACKEND_IOTLB}) to the client: answered {value}, and nothing was asked")
            miss = self._asked.popleft()
            if miss is None:
                continue
            if value or miss in self._doubtful:
                self._doubtful.discard(miss)
                self._device.refuse(miss)
            else:
                self._doubtful.add(miss)
        if channel.over and any(self._asked):
            raise RemoteProtocolError(f"IOTLB_MSG ({m.BACKEND_IOTLB}) to the client: it closed the back-end channel and left {len(self._asked)} unanswered")
        misses = self._device.misses()
        self._doubtful.intersection_update(misses)
        for miss in misses:
            if len(self._asked) < AT_ONCE and miss not in self._asked:
                self._asked.append(miss)
                channel.ask(m.IotlbMessage(miss.iova, 0, 0, miss.perm, m.MISS).pack())

    def _answered(self, update: IotlbUpdate) -> None:
        """Misses that the mapping puts an end to."""

        def served(miss: Miss) -> bool:
            return update.iova <= miss.iova < update.iova + update.size and miss.perm & update.perm == miss.perm

        self._asked = deque(None if miss is not None and served(miss) else miss for miss in self._asked)
        self._doubtful = {miss for miss in self._doubtful if not served(miss)}
