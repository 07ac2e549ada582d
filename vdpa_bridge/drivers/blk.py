# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A block driver (virtio 1.2, 5.2): bytes in and out, requests cut to what the device takes and kept in flight together.

Rule of this file: offsets and lengths are bytes in the interface and sectors of 512 in requests. A request holds its
memory until the device gives it back, whatever happened to its caller.
"""

from __future__ import annotations

import errno
import struct
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Unpack

from ..device import Device
from ..errors import DeviceBroken
from ..memory import Buffer
from ..virtio.config import parse_config
from ..virtio.features import BlockFeature as F
from ..virtio.features import feature_names
from ..virtio.ids import DeviceId
from .base import Driver, Options
from .ring import Pending, Ring, Segments

SECTOR = 512
WANTED = F.SIZE_MAX | F.SEG_MAX | F.RO | F.BLK_SIZE | F.FLUSH | F.TOPOLOGY | F.MQ | F.DISCARD | F.WRITE_ZEROES

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
"""Request types (virtio 1.2, 5.2.6)."""
OK, IOERR, UNSUPP = 0, 1, 2
"""Status bytes."""

_VERBS = {IN: "read", OUT: "write", FLUSH: "flush", GET_ID: "get_id", DISCARD: "discard", WRITE_ZEROES: "write_zeroes"}
_STATUS = {IOERR: "the device reports an I/O error (status 1)", UNSUPP: "the device does not support the request (status 2)"}
_NO_STATUS = 0xFF
_HEADER = struct.Struct("<IIQ")
_RANGE = struct.Struct("<QII")
_ROOM = 64
"""Bytes before the data of a request: header, status, and room to keep the data aligned."""
_STATUS_AT = _HEADER.size
_CHUNK = 128 << 10
"""Bytes that a read or write request carries at most."""
_ID_BYTES = 20
_CONFIG_BYTES = 72


_AS_THEY_ARE = (
    "size_max",
    "seg_max",
    "alignment_offset",
    "max_discard_sectors",
    "max_discard_seg",
    "discard_sector_alignment",
    "max_write_zeroes_sectors",
    "max_write_zeroes_seg",
)


@dataclass(frozen=True)
class BlkInfo:
    """What the device says of itself; sizes in bytes where not said otherwise, 0 where it says nothing."""

    capacity: int
    """Sectors of 512 bytes."""
    block_size: int
    readonly: bool
    size_max: int
    seg_max: int
    physical_block_size: int
    alignment_offset: int
    min_io_size: int
    """Bytes that are written without a penalty."""
    opt_io_size: int
    queues: int
    max_discard_sectors: int
    max_discard_seg: int
    discard_sector_alignment: int
    max_write_zeroes_sectors: int
    max_write_zeroes_seg: int
    write_zeroes_may_unmap: bool
    features: tuple[str, ...]
    """Names of the bits agreed on."""

    @property
    def size(self) -> int:
        """Bytes of the whole disk."""
        return self.capacity * SECTOR


def blk_info(features: int, config: bytes) -> BlkInfo:
    """Decode; fields that *features* do not bring are 0. KeyError when even the capacity is missing."""
    values: dict[str, Any] = parse_config(DeviceId.BLOCK, features, config)
    block = values.get("blk_size", SECTOR)
    return BlkInfo(
        capacity=values["capacity"],
        block_size=block,
        readonly=bool(features & F.RO),
        physical_block_size=block << min(values.get("physical_block_exp", 0), 32),
        min_io_size=values.get("min_io_size", 0) * block,
        opt_io_size=values.get("opt_io_size", 0) * block,
        queues=values.get("num_queues", 1),
        write_zeroes_may_unmap=bool(values.get("write_zeroes_may_unmap", 0)),
        features=tuple(feature_names(DeviceId.BLOCK, features)),
        **{name: values.get(name, 0) for name in _AS_THEY_ARE},
    )


@dataclass(eq=False)
class BlkRequest:
    """One request for ``submit``: *payload* goes to the device, *length* bytes (or what *into* holds) come from it."""

    type: int
    sector: int = 0
    payload: bytes | memoryview = b""
    length: int = 0
    into: memoryview | None = None
    status: int = -1
    """The device's status byte once done; -1 before."""
    data: bytes = b""
    """What came, unless it went to *into*."""

    def __str__(self) -> str:
        sectors = max(len(self.payload), self.length) // SECTOR if self.type in (IN, OUT) else 0
        if self.type in (DISCARD, WRITE_ZEROES) and len(self.payload) >= _RANGE.size:
            start, sectors, _ = _RANGE.unpack_from(self.payload)
            return f"{_VERBS[self.type]} of {sectors} sectors at sector {start}"
        name = _VERBS.get(self.type, f"request of type {self.type}")
        return f"{name} of {sectors} sectors at sector {self.sector}" if sectors else name

    def check(self, where: str) -> None:
        """Raise what the device reported, if it reported anything."""
        if self.status == OK:
            return
        number = errno.EOPNOTSUPP if self.status == UNSUPP else errno.EIO
        why = f"the device left no status ({self.status})" if self.status == _NO_STATUS else f"the device reports status {self.status}"
        raise OSError(number, f"{self} on {where}: {_STATUS.get(self.status, why)}")


@dataclass(eq=False)
class Batch:
    """Requests submitted together."""

    left: int
    """How many have not come back."""
    done: list[BlkRequest] = field(default_factory=list)
    """Those that came back since the last ``complete``."""
    failed: BlkRequest | None = None
    """The first that came back with a status other than 0."""
    strict: bool = False
    """Whether requests that the device has not seen yet are dropped once one failed."""
    abandoned: bool = False
    """Whether nobody wants the data any more."""

    def at_most(self, count: int) -> bool:
        """Whether *count* requests or fewer have not come back."""
        return self.left <= count


class _InFlight(Pending):
    """A request that the device has."""

    __slots__ = ("batch", "buffer", "driver", "request")

    def __init__(self, driver: BlkDriver, request: BlkRequest, batch: Batch, buffer: Buffer) -> None:
        super().__init__()
        self.driver, self.request, self.batch, self.buffer = driver, request, batch, buffer

    def complete(self, written: int) -> None:
        self.driver._completed(self)
        super().complete(written)


class BlkDriver(Driver):
    """A disk. ``read``, ``write`` and the like wait; ``submit`` and ``complete`` keep many requests in flight.

    Every wait ends after *timeout* seconds without progress. A request that fails is an OSError, EIO or EOPNOTSUPP.
    """

    device_id = DeviceId.BLOCK
    table_entries = 64
    overstated = True  # libvhost-user's disk (7.2) counts what it read, too; how a request ended says its last byte

    def __init__(self, device: Device, *, wanted: int = WANTED, queues: Sequence[int] = (0,), **options: Unpack[Options]) -> None:
        """See ``Driver``; requests are spread over *queues*."""
        self._backlog: deque[tuple[BlkRequest, Batch]] = deque()
        super().__init__(device, wanted=wanted, queues=queues, **options)

    def _ready(self) -> None:
        self._backlog.clear()
        self.refresh()

    def refresh(self) -> BlkInfo:
        """Read the configuration space again (a disk may have grown)."""
        config = self.read_config(_CONFIG_BYTES)
        if len(config) < 8:
            raise DeviceBroken(f"{self.name} has a configuration space of {len(config)} bytes, too short for a capacity")
        self.info = info = blk_info(self.features, config)
        self.segment = info.size_max or 1 << 32
        """Bytes that one buffer may have."""
        segments = min(info.seg_max or 1, self._num - 2)
        chunk = min(_CHUNK, self._pool.size // 4, self.segment * max(segments, 1))
        self._chunk = chunk // SECTOR * SECTOR
        if not self._chunk:
            raise DeviceBroken(f"{self.name} takes {segments} segments of {self.segment} bytes: less than one sector")
        return info

    # Bytes -------------------------------------------------------------------------------------------------------------

    def _extent(self, offset: int, length: int, unchecked: bool) -> range:
        """The sectors of [offset, offset + length); ValueError unless whole and, if checked, on the disk."""
        if offset % SECTOR or length % SECTOR or offset < 0 or length < 0:
            raise ValueError(f"offset {offset} and length {length} are not multiples of {SECTOR}")
        if not unchecked and offset + length > self.info.size:
            raise ValueError(f"[{offset}, {offset + length}) leaves the disk, which has {self.info.size} bytes")
        return range(offset // SECTOR, (offset + length) // SECTOR)

    def read(self, offset: int, length: int, *, unchecked: bool = False) -> bytes:
        """*length* bytes from *offset*. *unchecked* leaves the range check to the device."""
        data = bytearray(length)
        self.read_into(offset, data, unchecked=unchecked)
        return bytes(data)

    def read_into(self, offset: int, data: bytearray | memoryview, *, unchecked: bool = False) -> None:
        """Fill *data* from *offset*."""
        view = memoryview(data).cast("B")
        start = self._extent(offset, len(view), unchecked).start
        chunk = self._chunk
        self._run(BlkRequest(IN, start + at // SECTOR, into=view[at : at + chunk]) for at in range(0, len(view), chunk))

    def write(self, offset: int, data: bytes | bytearray | memoryview, *, unchecked: bool = False) -> None:
        """Write *data* at *offset*; it is stable after ``flush``."""
        view = memoryview(data).cast("B")
        start = self._extent(offset, len(view), unchecked).start
        chunk = self._chunk
        self._run(BlkRequest(OUT, start + at // SECTOR, view[at : at + chunk]) for at in range(0, len(view), chunk))

    def flush(self) -> None:
        """Make completed writes stable. Nothing to do where FLUSH is not agreed on: such a disk writes through (5.2.6.2)."""
        if self.features & F.FLUSH:
            self._run([BlkRequest(FLUSH)])

    def discard(self, offset: int, length: int, *, unchecked: bool = False) -> None:
        """Tell the device that the content is not needed; what is read there afterwards is undefined."""
        self._need(F.DISCARD)
        self._over(DISCARD, self._extent(offset, length, unchecked), self.info.max_discard_sectors, 0)

    def write_zeroes(self, offset: int, length: int, unmap: bool = False, *, unchecked: bool = False) -> None:
        """Let zeroes be read there; with *unmap* the device may give the space back."""
        self._need(F.WRITE_ZEROES)
        self._over(WRITE_ZEROES, self._extent(offset, length, unchecked), self.info.max_write_zeroes_sectors, int(unmap))

    def get_id(self) -> str:
        """The serial, up to 20 characters."""
        request = BlkRequest(GET_ID, length=_ID_BYTES)
        self._run([request])
        return str(request.data.split(b"\0")[0], "ascii", "backslashreplace")

    def _need(self, bit: F) -> None:
        if not self.features & bit:
            raise OSError(errno.EOPNOTSUPP, f"{self.name}: {bit.name} is not among the features agreed on")

    def _over(self, kind: int, sectors: range, most: int, flags: int) -> None:
        step = most or 1 << 22
        pieces = (sectors[at : at + step] for at in range(0, len(sectors), step))
        self._run(BlkRequest(kind, payload=_RANGE.pack(piece.start, len(piece), flags)) for piece in pieces)

    def _run(self, requests: Iterable[BlkRequest]) -> None:
        """Submit, wait for all, raise the first failure; after one the rest is not sent any more."""
        batch = self.submit(requests, strict=True)
        try:
            self.complete(batch)
        except BaseException:
            batch.abandoned = True
            self._drop(batch)
            raise
        if batch.failed:
            batch.failed.check(self.name)

    # Requests ------------------------------------------------------------------------------------------------------------

    def submit(self, requests: Iterable[BlkRequest], *, strict: bool = False) -> Batch:
        """Hand requests over, as many as fit at once and the others as those come back. Nothing about them is checked, so that
        wrong ones can be sent. ValueError when one is larger than the pool."""
        self._need_open()
        todo = list(requests)
        most = self._pool.size - _ROOM
        for request in todo:
            if request.into is not None:
                request.length = len(request.into)
            if len(request.payload) + request.length > most or self._descriptors(request) > self._num:
                raise ValueError(f"{request} fits neither a pool of {most} bytes nor a ring of {self._num} entries")
        batch = Batch(len(todo), strict=strict)
        self._backlog.extend((request, batch) for request in todo)
        self._replenish()
        return batch

    def complete(self, batch: Batch, count: int | None = None, timeout: float | None = None) -> list[BlkRequest]:
        """Wait for *count* requests of *batch* (default: all that are left), and return those done, in order of completion.

        TimeoutError when nothing of the batch comes back for *timeout* seconds.
        """
        goal = max(batch.left + len(batch.done) - (1 << 62 if count is None else count), 0)
        while batch.left > goal:
            self.wait(partial(batch.at_most, batch.left - 1), f"{batch.left} requests", timeout)
        done, batch.done = batch.done, []
        return done

    def _replenish(self) -> None:
        """Give the device what waits, as far as memory and rings go."""
        for ring in sorted(self._rings.values(), key=lambda ring: -ring.queue.free):
            if not self._backlog:
                return
            self._fill(ring)

    def _fill(self, ring: Ring) -> None:
        chains: list[tuple[Segments, Segments, _InFlight]] = []
        room = ring.queue.free
        while self._backlog:
            request, batch = self._backlog[0]
            if batch.failed is not None and batch.strict:
                self._backlog.popleft()
                batch.left -= 1
                continue
            room -= self._descriptors(request)
            if room < 0:
                break
            try:
                buffer = self._pool.take(_ROOM + len(request.payload) + request.length)
            except MemoryError:
                break
            self._backlog.popleft()
            chains.append(self._chain(request, batch, buffer))
        if chains and (posted := self._submit(ring, chains)) < len(chains):
            raise AssertionError(f"{self.name}: queue {ring.index} took {posted} of {len(chains)} chains that had room")

    def _descriptors(self, request: BlkRequest) -> int:
        """How many entries of the ring the request takes."""
        most = self.segment
        count = 2 + -(-len(request.payload) // most) + -(-request.length // most)
        return 1 if self._indirect and count <= self.table_entries else count

    def _chain(self, request: BlkRequest, batch: Batch, buffer: Buffer) -> tuple[Segments, Segments, _InFlight]:
        """Header, payload; data, status."""
        sent, data, iova = len(request.payload), buffer.data, buffer.iova
        _HEADER.pack_into(data, 0, request.type, 0, request.sector)
        data[_STATUS_AT] = _NO_STATUS
        readable: Segments = [(iova, _HEADER.size)]
        writable: Segments = []
        if sent:
            data[_ROOM : _ROOM + sent] = request.payload
            readable += self._cut(iova + _ROOM, sent)
        if request.length:
            writable += self._cut(iova + _ROOM + sent, request.length)
        writable.append((iova + _STATUS_AT, 1))
        return readable, writable, _InFlight(self, request, batch, buffer)

    def _cut(self, iova: int, length: int) -> Segments:
        """Segments no longer than the device takes."""
        most = self.segment
        if length <= most:
            return [(iova, length)]
        return [(iova + at, min(most, length - at)) for at in range(0, length, most)]

    def _completed(self, flight: _InFlight) -> None:
        request, batch, buffer = flight.request, flight.batch, flight.buffer
        request.status = buffer.data[_STATUS_AT]
        if request.length and not batch.abandoned:
            came = buffer.data[buffer.size - request.length :]
            if request.into is None:
                request.data = bytes(came)
            elif request.status == OK:
                request.into[:] = came
        self._pool.give(buffer)
        if request.status != OK and batch.failed is None:
            batch.failed = request
        batch.left -= 1
        batch.done.append(request)

    def _drop(self, batch: Batch) -> None:
        kept = [(request, of) for request, of in self._backlog if of is not batch]
        batch.left -= len(self._backlog) - len(kept)
        self._backlog = deque(kept)
