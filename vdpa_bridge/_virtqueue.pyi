# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Types of the native rings; `vdpa_bridge.virtqueue` re-exports all of them.

Rule of the native module: it converts between Python values and the C core in `userspace/`, and holds no ring logic.
Sizes and offsets are bytes, IOVAs are addresses as the device sees them, addresses are those of this process. An
integer that its C type cannot hold is an OverflowError.
"""

from collections.abc import Iterable, Sequence
from types import GenericAlias
from typing import Generic, NoReturn, Self, TypeAlias, TypeVar, final

from typing_extensions import Buffer

from ._virtqueue_engine import BlkEngine as BlkEngine
from ._virtqueue_engine import BlkMemory as BlkMemory
from ._virtqueue_engine import Engine as Engine
from ._virtqueue_engine import Gate as Gate
from ._virtqueue_engine import Loop as Loop
from ._virtqueue_engine import NetEngine as NetEngine
from ._virtqueue_engine import NetFilter as NetFilter
from ._virtqueue_engine import TapEngine as TapEngine
from ._virtqueue_engine import Terms as Terms
from ._virtqueue_engine import header_agreed as header_agreed
from ._virtqueue_load import LARGEST_BATCH as LARGEST_BATCH
from ._virtqueue_load import LOAD_BROKEN as LOAD_BROKEN
from ._virtqueue_load import LOAD_DONE as LOAD_DONE
from ._virtqueue_load import LOAD_FAILED as LOAD_FAILED
from ._virtqueue_load import LOAD_MORE as LOAD_MORE
from ._virtqueue_load import LOAD_SILENT as LOAD_SILENT
from ._virtqueue_load import POLL_ALWAYS as POLL_ALWAYS
from ._virtqueue_load import SHORTEST_FRAME as SHORTEST_FRAME
from ._virtqueue_load import BlkLoad as BlkLoad
from ._virtqueue_load import Histogram as Histogram
from ._virtqueue_load import NetLoad as NetLoad
from ._virtqueue_load import check_pattern as check_pattern
from ._virtqueue_load import fill_pattern as fill_pattern

_T = TypeVar("_T")
_Segments: TypeAlias = Sequence[tuple[int, int]]
"""Buffers of one side of a chain: (iova, bytes) each, none of them empty."""

PERM_RO: int
"""1: the device may read (VHOST_ACCESS_RO)."""
PERM_WO: int
"""2: the device may write (VHOST_ACCESS_WO)."""
PERM_RW: int
"""3: both (VHOST_ACCESS_RW)."""

@final
class IovaMap:
    """What the device may touch: sorted, disjoint regions from IOVA to this process's memory.

    The map does not own the memory: whoever adds a region keeps it mapped until it is removed. Chains popped before a
    removal stay safe: they look their buffers up again, and raise OSError(EFAULT) where these are no longer mapped.
    Synchronization: the caller serialises all calls. A call that changes the map waits until I/O that runs without the
    GIL (`Chain.preadv`, `pwritev`) has left it, at most 5 s, then raises OSError(EBUSY).
    """

    def add(self, iova: int, size: int, address: int, perm: int) -> None:
        """Map [iova, iova + size) to `address`, for PERM_RO, PERM_WO or PERM_RW as seen by the device.

        OSError: EEXIST when it overlaps a region; EINVAL when the size is 0, a range wraps, or perm is none of the three.
        """
    def remove(self, iova: int, size: int) -> int:
        """Remove every region that lies wholly inside the range; return how many. OSError(EINVAL) for an empty range or one that wraps."""
    def clear(self) -> None:
        """Remove every region."""
    def read(self, iova: int, length: int) -> bytes:
        """Read as the device would. OSError(EFAULT) when a byte is unmapped or not readable by the device."""
    def write(self, iova: int, data: Buffer) -> None:
        """Write as the device would. OSError(EFAULT) when a byte is unmapped or not writable by the device."""
    def regions(self) -> list[tuple[int, int, int, int]]:
        """All regions by rising IOVA: (iova, size, address, perm)."""
    @property
    def poisoned(self) -> bool:
        """Whether the guard had to replace memory of a region (see `guard`)."""
    def __len__(self) -> int: ...

@final
class Chain:
    """One buffer of a driver: bytes the device reads, then bytes it writes (virtio 1.2, 2.6).

    Made by `DeviceQueue.pop_many` only, and handed back once by `push_many`; from then on every access is a ValueError.
    Each access raises OSError(EFAULT) when the memory was removed from the `IovaMap` meanwhile.
    Synchronization: one chain belongs to one thread at a time.
    """

    def __init__(self, *args: object, **kwargs: object) -> NoReturn:
        """TypeError: there is nothing to make a chain of."""
    @property
    def head(self) -> int:
        """Index of the first descriptor, or the buffer id on a packed ring; what a used entry carries."""
    @property
    def readable(self) -> int:
        """Bytes the device may read."""
    @property
    def writable(self) -> int:
        """Bytes the device may write."""
    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Gather up to `length` bytes (default: all) of the readable part from `offset`; short at its end."""
    def write(self, data: Buffer, offset: int = 0) -> int:
        """Scatter `data` into the writable part from `offset`; return the bytes stored, short at its end."""
    def copy_from(self, src: Chain, src_offset: int = 0, dst_offset: int = 0, length: int | None = None) -> int:
        """Copy from the readable part of `src` into the writable part of this chain; return the bytes copied, short at either end."""
    def zero(self, offset: int = 0, length: int | None = None) -> int:
        """Clear bytes of the writable part; return how many."""
    def preadv(self, fd: int, file_offset: int, skip: int = 0, length: int | None = None) -> int:
        """Read from a file into the writable part, `skip` bytes after its start; without the GIL.

        `file_offset` -1 uses read/readv (sockets, taps: one transfer, no loop). Returns the bytes transferred, short at end of file
        or of the chain. OSError carries the errno of the file, when nothing was transferred before it.
        """
    def pwritev(self, fd: int, file_offset: int, skip: int = 0, length: int | None = None) -> int:
        """Write the readable part, from `skip` on, to a file; without the GIL. As `preadv` otherwise."""

@final
class DeviceQueue:
    """The device's end of a split (virtio 1.2, 2.7) or packed (2.8) virtqueue, in memory the driver can write at any time.

    Whatever the driver writes there can only break this queue: `broken` then says why, and `pop_many` and `push_many` raise
    OSError(EPROTO). A device answers that with DEVICE_NEEDS_RESET (virtio 1.2, 2.1.2).
    Synchronization: one thread at a time.
    """

    def __new__(
        cls,
        memory: IovaMap,
        num: int,
        desc: int,
        avail: int,
        used: int,
        *,
        base: int | None = None,
        event_idx: bool = False,
        indirect: bool = True,
        packed: bool = False,
        wait: bool = False,
        in_order: bool = False,
    ) -> Self:
        """`num` entries (at most 32768; a power of 2 unless `packed`), the IOVAs of the three areas, and where to start.

        `packed` needs VIRTIO_F_RING_PACKED; `avail` and `used` are then the driver's and the device's event suppression
        structures. `base` is what SET_VRING_BASE carries: the available index, by default 0; for a packed ring the last
        available index in bits 0-14 and its wrap counter in bit 15, the last used ones in bits 16-30 and 31, by default
        0x80008000 (both indices 0, both counters 1).
        `wait`: memory that is not mapped does not break the queue, but makes it wait; see `misses`.
        `in_order` needs VIRTIO_F_IN_ORDER: chains may still be pushed in any order; those that come early are held until the ones
        before them are there.
        ValueError: num, base or alignment (16, 2 and 4 bytes; packed 16, 4 and 4) is wrong. OSError(EFAULT): an area is not
        mapped in one piece with the permission it needs (a packed ring's descriptors: both).
        """
    def pop_many(self, limit: int = 64) -> list[Chain]:
        """Take up to `limit` chains the driver made available, in ring order; an empty list when there is none, or it has to wait.

        When the ring turns out broken, chains before the fault are still returned; the next call raises OSError(EPROTO).
        """
    def push_many(self, completed: Iterable[tuple[Chain, int]]) -> bool:
        """Hand chains back, each with the bytes written to its writable part, all visible at once. True: a call is due.

        ValueError, before anything is pushed: a chain of another queue, one handed back already, or more bytes than writable.
        BlockingIOError: the ring itself waits for a mapping; nothing was pushed, do it again when it is there.
        """
    def put_back(self, chains: list[Chain]) -> None:
        """Undo the last pops: *chains*, in order of the pops, are available again, and no longer to be used. ValueError: those are others."""
    def enable_kick(self) -> bool:
        """Ask to be kicked for the next chain. True: chains are waiting already, so pop again before sleeping.

        Chains that were put back do not count: it is others behind them that are asked for.
        """
    def disable_kick(self) -> None:
        """Tell the driver that kicks are not needed (a hint: some may still come)."""
    @property
    def patient(self) -> bool:
        """Whether it was made with `wait`."""
    @property
    def waits(self) -> bool:
        """Whether the last call found memory missing; `misses` looks again."""
    def misses(self) -> list[tuple[int, int]]:
        """What is missing still, as (iova, permission), at most 64 at a time; empty when it is worth calling again.

        Only of a queue made with `wait`: the ring's areas, or the indirect table or buffers of the next chain.
        """
    def refuse(self, iova: int) -> None:
        """There will be no mapping for a miss: break the queue."""
    @property
    def num(self) -> int: ...
    @property
    def base(self) -> int:
        """What GET_VRING_BASE reports: the next available index to take (0 to 65535), or both places of a packed ring, as in the constructor."""
    @property
    def used_idx(self) -> int:
        """The used index as published (0 to 65535); packed: the next place to write, its wrap counter in bit 15."""
    @property
    def in_flight(self) -> int:
        """Chains popped and not handed back yet."""
    @property
    def broken(self) -> str | None:
        """Why the queue stopped for good, or None."""

@final
class DriverQueue(Generic[_T]):
    """The driver's end of a split or packed virtqueue, with a token of type T per chain.

    The ring area is one contiguous piece laid out by `ring_layout`; the constructor clears it, and `owner` is kept alive with it.
    A hostile device can only break the queue: `broken` then says why, and every call raises OSError(EPROTO).
    Synchronization: one thread at a time.
    """

    def __new__(
        cls,
        address: int,
        size: int,
        iova: int,
        num: int,
        *,
        table_entries: int = 0,
        event_idx: bool = False,
        base: int | None = None,
        owner: object = None,
        packed: bool = False,
        overstated: bool = False,
        in_order: bool = False,
        notification_data: bool = False,
    ) -> Self:
        """Put a ring of `num` (at most 32768; a power of 2 unless `packed`) at `address`, which the device sees at `iova`.

        `table_entries` > 0 uses indirect descriptors for chains of 2 to that many buffers (needs VIRTIO_F_INDIRECT_DESC), `event_idx` needs
        VIRTIO_F_EVENT_IDX, `packed` VIRTIO_F_RING_PACKED. `base` is as for `DeviceQueue`; both halves of a packed one are the same,
        for nothing is in flight yet. `overstated` forgives a device that counts more bytes written than there is room for.
        `in_order` needs VIRTIO_F_IN_ORDER: chains that the device skips in the used ring count as written completely.
        `notification_data`: VIRTIO_F_NOTIFICATION_DATA was accepted, so all kicks carry `offset`.
        ValueError: num, base, alignment (16 bytes, both addresses), or `size` smaller than `ring_layout` says.
        """
    def __class_getitem__(cls, item: object, /) -> GenericAlias: ...
    def add_many(self, requests: Sequence[tuple[_Segments, _Segments, _T]]) -> int:
        """Add chains of (readable buffers, writable buffers, token), without telling the device; return how many fitted (add the rest after a reap).

        ValueError: a chain without buffers, with an empty one, or longer than the ring; chains before it stay added.
        """
    def publish(self) -> bool:
        """Make the added chains available to the device, all at once. True: a kick is due."""
    def reap(self, limit: int = 64) -> list[tuple[_T, int]]:
        """Take up to `limit` completed chains: (token, bytes the device claims to have written)."""
    def enable_call(self) -> bool:
        """Ask for a call at the next completion. True: some are waiting already, so reap again before sleeping."""
    def disable_call(self) -> None:
        """Tell the device that calls are not needed (a hint: some may still come)."""
    @property
    def num(self) -> int: ...
    @property
    def desc(self) -> int:
        """IOVA of the descriptor area."""
    @property
    def avail(self) -> int:
        """IOVA of the driver area (available ring; packed: driver event suppression)."""
    @property
    def used(self) -> int:
        """IOVA of the device area (used ring; packed: device event suppression)."""
    @property
    def offset(self) -> int | None:
        """How far the ring is published, as kicks say it with NOTIFICATION_DATA: the available index; packed: a place, its wrap counter
        in bit 15. None without."""
    @property
    def free(self) -> int:
        """Descriptors that can still be added."""
    @property
    def in_flight(self) -> int:
        """Chains added and not reaped yet."""
    @property
    def broken(self) -> str | None:
        """Why the queue stopped for good, or None."""

@final
class Slots(Generic[_T]):
    """Chains of one buffer each on a queue, from an array of `count` buffers of one size that are posted again and again.

    An idle slot is the driver's, to write or to read; the one given back last goes next. Other chains may be on the queue; what is
    reaped is reaped here. Synchronization: that of the queue.
    """

    def __new__(
        cls, queue: DriverQueue[_T], address: int, iova: int, stride: int, count: int, *, writable: bool = False, owner: object = None
    ) -> Self:
        """Slot i lies at `address + i * stride`, for the device at `iova + i * stride`; `writable` by the device. `owner` is kept alive.

        ValueError: no slots, more than 32768, or none of any size.
        """
    def __class_getitem__(cls, item: object, /) -> GenericAlias: ...
    def upcoming(self, count: int) -> list[int]:
        """The next `count` slots, or all that are idle."""
    def add(self, lengths: Iterable[int]) -> int:
        """Add the upcoming slots, of that many bytes each, without telling the device; return how many had a slot and room in the ring.

        ValueError: a length that is 0 or above the stride; slots before it stay added.
        """
    def fill(self, length: int) -> int:
        """Add all idle slots, of `length` bytes each; return how many had room in the ring."""
    def copy(self, data: Sequence[Buffer], first: int = 0, skip: int = 0) -> int:
        """Copy items of `data` from number `first` on into slots, behind `skip` zeroes each, and add them; return how many had room.

        ValueError: an item that is empty or larger than a slot; those before it stay added.
        """
    def reap(self) -> list[tuple[int, int]]:
        """Take up to 64 completed chains: (slot, bytes the device claims to have written). What was written is there until the slot is added."""
    def collect(self) -> int:
        """Take all completed chains; return how many."""
    def read(self, done: Sequence[tuple[int, int]], skip: int = 0) -> list[bytes]:
        """The content of reaped slots, without the first `skip` bytes. ValueError when one has fewer."""
    def take_others(self) -> list[tuple[_T, int]]:
        """Chains of others that were reaped since the last call: (token, bytes written)."""
    @property
    def idle(self) -> int:
        """Slots that can be added."""

@final
class Poll:
    """Looks at rings for a while instead of sleeping, at most `budget` nanoseconds at a time, and less the less it helps.

    Synchronization: as for the queues, which nobody else uses meanwhile.
    """

    def __new__(cls, budget: int) -> Self: ...
    def look(self, queues: list[DeviceQueue], gate: Gate) -> list[DeviceQueue]:
        """Spin, without the GIL, until one of (the first 64 of) `queues` has a new chain, or somebody waits for `gate`, which is held; those
        that have one, or are broken.

        Kicks are enabled before and after. Queues that hold chains from the start are not looked at.
        """
    def slept(self, nanoseconds: int) -> None:
        """A kick came after sleeping so long."""
    @property
    def window(self) -> int:
        """How long the next look takes at most, in nanoseconds."""

KICK: int
CALL: int
AGAIN: int
MOVED: int

@final
class Relay:
    """Moves chains from a driver's ring (`source`) to a ring of ours on another device (`to`), and back what was done; data stays where it is.

    `places` maps the driver's IOVAs to those under which the device has the same memory, which stand where addresses do.
    Neither queue is used by others as long as the relay is. Synchronization: one thread at a time, and no change of a map meanwhile.
    """

    def __new__(cls, source: DeviceQueue, to: DriverQueue[None], places: IovaMap) -> Self:
        """ValueError: the ring behind is smaller than the one in front."""
    def move(self, take: bool = True) -> int:
        """Hand back what is done, post what is available unless not `take`, ask both sides for the next notification. Without the GIL.

        Returns bits: KICK the device, CALL the driver, AGAIN: there is more to do at once, MOVED: the device gave something back.
        OSError(EPROTO): a queue is broken, which its `broken` says.
        """
    @property
    def open(self) -> int:
        """Chains taken from the driver and not handed back."""
    @property
    def base(self) -> int | None:
        """Where the driver's ring goes on once the device has stopped: behind what was handed back; None when a chain before that is open."""

def guard(address: int, size: int) -> None:
    """Survive SIGBUS in this mapping: should its file shrink under it, it becomes zeroed private memory and counts as poisoned.

    ValueError: not page aligned, empty, or overlapping another guarded mapping. Synchronization: any thread.
    """

def unguard(address: int) -> None:
    """Stop guarding the mapping that starts at `address`; before munmap(). ValueError when there is none."""

def map_guarded(fd: int, size: int, offset: int, writable: bool) -> int:
    """Map whole pages of `fd` shared, guarded as by `guard`; where they are. OSError as mmap() has it."""

def unmap_guarded(address: int, size: int) -> None:
    """Undo `map_guarded`. ValueError when there is no such mapping."""

def poisoned(address: int) -> bool:
    """Whether the guarded mapping that starts at `address` was replaced. ValueError when there is none."""

def ring_doorbell(page: int, queue: int, offset: int | None = None) -> None:
    """Store the index of a queue at the start of a doorbell page that is mapped at `page`: a kick. With NOTIFICATION_DATA `offset`
    is `DriverQueue.offset`, and the store has 32 bits (virtio 1.2, 2.9)."""

def ring_layout(num: int, table_entries: int = 0, packed: bool = False) -> tuple[int, int, int, int, int]:
    """Offsets of (desc, avail, used, indirect tables) in one contiguous 16-byte aligned area, and its whole size.

    Of a packed ring `avail` and `used` are the event suppression structures of driver and device.
    """
