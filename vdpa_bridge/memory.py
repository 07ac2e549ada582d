# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Memory that a driver shares with a device, and the table of what is mapped where.

Rules of this file: an IOVA and a process address never mix (they are different types); every mapping of a descriptor
into this process is owned by one object that unmaps it once; the checks that the kernel makes on an IOTLB message are
made here, for every home alike, since the kernel answers them all with one EFAULT (drivers/vhost/vdpa.c,
vhost_vdpa_process_iotlb_msg under vhost_chr_write_iter).
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, Self, TypeVar

from . import _virtqueue
from .flags import BackendFeature
from .wire import RO, RW, IotlbBatchBegin, IotlbBatchEnd, IotlbInvalidate, IotlbPayload, IotlbUpdate, Iova, ProcessAddress

PAGE = 4096
"""The granule of every mapping. Devices that pin memory map whole pages (kernel: vhost_vdpa_pa_map)."""

U64_MAX = (1 << 64) - 1
INTERRUPTS = 0xFEE00000, 0xFEEFFFFF
"""x86 takes writes to these addresses for interrupts, and an IOMMU reserves them: first and last."""
MAX_MAPPINGS = 8192
"""Mappings in one address space: far more than a VMM makes, far less than a process can hold (vm.max_map_count)."""

VDUSE_DOMAIN = "anon_inode:[vduse-domain]"
"""The memory that the kernel's virtio drivers share with a VDUSE device: the one kind of file that has no size (vduse_dev.c)."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value


def _grain(block: int) -> int:
    """What a mapping of a file with blocks of *block* bytes is cut by: huge pages can be mapped, unmapped and replaced only as a whole."""
    return block if block > PAGE and not block & (block - 1) else PAGE


def check_room(fd: int, end: int) -> os.stat_result:
    """What *fd* is; OSError EINVAL when it does not hold *end* bytes. The rest of its last page is there too, as zeroes."""
    status = os.fstat(fd)
    if end > -(-status.st_size // PAGE) * PAGE and os.readlink(f"/proc/self/fd/{fd}") != VDUSE_DOMAIN:
        raise OSError(errno.EINVAL, f"the descriptor holds {status.st_size:#x} bytes of memory, the mapping needs {end:#x}: is it a memfd, and large enough?")
    return status


class SharedMapping:
    """*size* bytes of *fd* from *offset* on, mapped MAP_SHARED into this process. Does not keep the descriptor.

    A file that its owner shrinks later does not kill this process: the mapping is guarded (SIGBUS becomes zero pages
    and ``poisoned`` turns True).
    """

    def __init__(self, fd: int, size: int, offset: int = 0, perm: int = RW) -> None:
        status = check_room(fd, offset + size)
        grain = _grain(status.st_blksize)
        head = offset % grain
        self._whole = -(-(head + size) // grain) * grain
        try:
            self._start = _virtqueue.map_guarded(fd, self._whole, offset - head, perm != RO)
        except OSError as error:
            raise OSError(error.errno, f"mmap of {size:#x} bytes at offset {offset:#x}: {error.strerror}") from None
        self.address = ProcessAddress(self._start + head)
        self.size = size

    @property
    def poisoned(self) -> bool:
        """True once the memory behind the mapping went away under us."""
        return bool(self.address) and _virtqueue.poisoned(self._start)

    def close(self) -> None:
        """Unmap; harmless when done before."""
        if self.address:
            self.address = ProcessAddress(0)
            _virtqueue.unmap_guarded(self._start, self._whole)


class Doorbell:
    """A page of a device by which queue *index* is kicked with one store; *fd* is the device's, and is not kept."""

    def __init__(self, fd: int, index: int) -> None:
        page = _libc.mmap(None, mmap.PAGESIZE, mmap.PROT_WRITE, mmap.MAP_SHARED, fd, index * mmap.PAGESIZE)
        if page == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), f"no doorbell page for queue {index}")
        self.index = index
        self._page: int = page

    @property
    def address(self) -> int:
        """Where the page is mapped; 0 when closed."""
        return self._page

    def ring(self, offset: int | None = None) -> None:
        """Kick, and say how far the ring is (NOTIFICATION_DATA) unless *offset* is None. ValueError when closed."""
        if not self._page:
            raise ValueError(f"the doorbell of queue {self.index} is closed")
        _virtqueue.ring_doorbell(self._page, self.index, offset)

    def close(self) -> None:
        """Unmap; harmless when done before."""
        page, self._page = self._page, 0
        if page:
            _libc.munmap(page, mmap.PAGESIZE)


@dataclass(frozen=True)
class Buffer:
    """A piece of a Region: where the device finds it, and where we do. *data* is valid while the Region is open."""

    iova: Iova
    address: ProcessAddress
    data: memoryview

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.data)


class Region:
    """A memfd, mapped here and to be mapped for a device at *iova*; buffers are carved from it and go with it.

    Synchronization: allocate from one thread at a time.
    """

    def __init__(self, iova: Iova, size: int, name: str = "vdpa-bridge") -> None:
        self.iova = iova
        self.size = -(-size // PAGE) * PAGE
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.size)
            self.mapping = SharedMapping(self.fd, self.size)
        except BaseException:
            os.close(self.fd)
            raise
        self._used = 0

    def allocate(self, size: int, align: int = 64) -> Buffer:
        """Carve *size* bytes, zeroed when never used before; MemoryError when the region is full."""
        start = -(-self._used // align) * align
        if start + size > self.size:
            raise MemoryError(f"region of {self.size} bytes has {self.size - self._used} left, {size} wanted")
        self._used = start + size
        address = ProcessAddress(self.mapping.address + start)
        view = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
        return Buffer(Iova(self.iova + start), address, view)

    def update(self, perm: int = RW, asid: int = 0) -> IotlbUpdate:
        """The request that lets a device at this region."""
        return IotlbUpdate(self.iova, self.size, self.fd, 0, perm, asid)

    def close(self) -> None:
        """Unmap and close; its buffers are dead afterwards."""
        if self.fd >= 0:
            self.mapping.close()
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


V = TypeVar("V")


class Entry(NamedTuple, Generic[V]):
    """One mapping of an address space; *value* is whatever the back-end keeps for it."""

    iova: Iova
    size: int
    perm: int
    asid: int
    value: V

    @property
    def last(self) -> int:
        """Last address, inclusive."""
        return self.iova + self.size - 1


M = TypeVar("M", bound=IotlbPayload)


def as_seen(request: M, backend_features: int) -> M:
    """*request* as the device understands it: without IOTLB_ASID acknowledged the address space is padding, and is 0."""
    if request.asid and not backend_features & BackendFeature.IOTLB_ASID:
        return replace(request, asid=0)  # type: ignore[type-var]
    return request


def _first_behind(space: Sequence[Entry[Any]], iova: int) -> int:
    """Index of the first entry that does not end before *iova*."""
    return bisect.bisect_left(space, iova, key=lambda entry: entry.last)


def _refuse(number: int, why: str) -> OSError:
    return OSError(number, why)


class IotlbTable(Generic[V]):
    """What is mapped, per address space, with the kernel's rules and with errors that say which one was broken.

    errno: EINVAL range, size, permission, alignment, address space, batch; EEXIST overlap.
    """

    def __init__(self, spaces: int = 1, first: int = 0, last: int = U64_MAX) -> None:
        self.first, self.last = first, last
        self.batch: int | None = None
        self._spaces: list[list[Entry[V]]] = [[] for _ in range(spaces)]

    def _space(self, asid: int) -> list[Entry[V]]:
        if asid >= len(self._spaces):
            raise _refuse(errno.EINVAL, f"address space {asid} does not exist, the device has {len(self._spaces)}")
        if self.batch is not None and self.batch != asid:
            raise _refuse(errno.EINVAL, f"a batch is open for address space {self.batch}, this message is for {asid}")
        return self._spaces[asid]

    def check(self, update: IotlbUpdate) -> None:
        """Raise what is wrong with *update*, if anything."""
        space = self._space(update.asid)
        iova, size = update.iova, update.size
        if size <= 0:
            raise _refuse(errno.EINVAL, "size is 0")
        if update.perm not in (1, 2, 3):
            raise _refuse(errno.EINVAL, f"permission is {update.perm}, not 1 (RO), 2 (WO) or 3 (RW)")
        if iova < self.first or iova + size - 1 > self.last:
            raise _refuse(errno.EINVAL, f"[{iova:#x}, {iova + size - 1:#x}] leaves the IOVA range [{self.first:#x}, {self.last:#x}]")
        if (iova | size | update.offset) % PAGE:
            name = "iova" if iova % PAGE else "size" if size % PAGE else "offset"
            raise _refuse(errno.EINVAL, f"{name} {getattr(update, name):#x} is not a multiple of {PAGE}")
        if len(space) >= MAX_MAPPINGS:
            raise _refuse(errno.ENOSPC, f"address space {update.asid} holds {MAX_MAPPINGS} mappings, which is the limit")
        at = _first_behind(space, iova)
        if at < len(space) and space[at].iova <= iova + size - 1:
            there = space[at]
            raise _refuse(errno.EEXIST, f"[{iova:#x}, {iova + size - 1:#x}] overlaps [{there.iova:#x}, {there.last:#x}], which is mapped")

    def add(self, update: IotlbUpdate, value: V) -> Entry[V]:
        """Enter a mapping; checks first."""
        self.check(update)
        return self.enter(update, value)

    def enter(self, update: IotlbUpdate, value: V) -> Entry[V]:
        """Enter a mapping that ``check`` has let pass, with nothing entered since."""
        entry = Entry(update.iova, update.size, update.perm, update.asid, value)
        bisect.insort(self._spaces[update.asid], entry, key=lambda e: e.iova)
        return entry

    def _touched(self, request: IotlbInvalidate) -> tuple[list[Entry[V]], int, slice]:
        """The address space, the last address of *request*, and the entries that share an address with it."""
        space = self._space(request.asid)
        if request.size <= 0:
            raise _refuse(errno.EINVAL, "size is 0")
        last = request.iova + request.size - 1
        if last > U64_MAX:
            raise _refuse(errno.EINVAL, f"[{request.iova:#x}, {last:#x}] wraps around")
        return space, last, slice(_first_behind(space, request.iova), bisect.bisect_right(space, last, key=lambda entry: entry.iova))

    def touched(self, request: IotlbInvalidate) -> list[Entry[V]]:
        """The mappings that share an address with *request*, whole or in part."""
        space, _, hit = self._touched(request)
        return space[hit]

    def _hit(self, request: IotlbInvalidate) -> tuple[list[Entry[V]], slice]:
        """The address space, and the entries of it that *request* takes away; EINVAL when it would cut one in two."""
        space, last, hit = self._touched(request)
        for e in space[hit][:1] + space[hit][-1:]:
            if e.iova < request.iova or e.last > last:
                raise _refuse(
                    errno.EINVAL,
                    f"[{request.iova:#x}, {last:#x}] cuts the mapping [{e.iova:#x}, {e.last:#x}]: invalidate exactly what was mapped",
                )
        return space, hit

    def inside(self, request: IotlbInvalidate) -> list[Entry[V]]:
        """The mappings that *request* takes away; EINVAL when it would cut one in two."""
        space, hit = self._hit(request)
        return space[hit]

    def remove(self, request: IotlbInvalidate) -> list[Entry[V]]:
        """Take the mappings inside *request* out, and return them."""
        space, hit = self._hit(request)
        gone = space[hit]
        del space[hit]
        return gone

    def begin(self, request: IotlbBatchBegin) -> None:
        """Open a batch; opening it again for the same address space is allowed, as in the kernel."""
        self._space(request.asid)
        self.batch = request.asid

    def end(self, request: IotlbBatchEnd) -> bool:
        """Close the batch; without one nothing happens, and False is returned."""
        self._space(request.asid)
        was_open, self.batch = self.batch is not None, None
        return was_open

    def clear(self) -> list[Entry[V]]:
        """Forget everything, and return it."""
        entries = list(self)
        for space in self._spaces:
            space.clear()
        self.batch = None
        return entries

    def space(self, asid: int) -> list[Entry[V]]:
        """The mappings of one address space, by IOVA."""
        return list(self._spaces[asid])

    def __iter__(self) -> Iterator[Entry[V]]:
        return iter([entry for space in self._spaces for entry in space])

    def __len__(self) -> int:
        return sum(map(len, self._spaces))
