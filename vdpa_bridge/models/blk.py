# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A virtio disk (virtio 1.2, 5.2).

Rule of this file: a request is one run of readable and one of writable bytes, however the driver cut it into
descriptors (virtio 1.2, 2.7.4.1); the status is the last writable byte. Blocks are the image's business, which may be
a file, memory or somewhere else. What is said here holds for the engine, too, which serves plain reads, writes and
flushes of a queue on a file and leaves everything else to ``process``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import replace
from enum import IntEnum
from typing import Any, Self

from ..engines import BlkEngine, BlkMemory, Engine
from ..virtio.features import BlockFeature as F
from ..virtio.ids import DeviceId
from ..virtqueue import Chain
from .base import Model, Queue
from .blk_image import IMAGE_OPTIONS, LARGEST, SECTOR, open_disk
from .image import Image, Pending, Transfer, is_memory, open_direct
from .options import check_options, parse_count, parse_switch

_log = logging.getLogger(__name__)

_HEADER = struct.Struct("<IIQ")
_SEGMENT = struct.Struct("<QII")
_CONFIG = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3x")
_ID_BYTES = 20
_UNMAP = 1
_DISCARD_RANGES = 64
"""Of a request."""
_ZERO_LIMIT = 64 << 20
"""Bytes that WRITE_ZEROES takes at once: they may have to be written, and a reset waits for the request."""
_WRITEBACK = 32
"""Where the cache mode is in the configuration space."""
_BATCH = 16
_DIRECT_ALIGN = 4096
"""Bytes: what every file system and medium takes; requests that are not so aligned go through the page cache."""
ENGINES = "native", "python", "null"
_OPTIONS = *IMAGE_OPTIONS, "readonly", "serial", "queues", "threads", "direct", "io_uring", "engine"


class BlkType(IntEnum):
    """Request types (virtio 1.2, 5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    GET_LIFETIME = 10
    DISCARD = 11
    WRITE_ZEROES = 13
    SECURE_ERASE = 14


class BlkStatus(IntEnum):
    """Status byte of a request."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


class _Refused(Exception):
    """A request ends with *status*, nothing (more) done."""

    def __init__(self, status: BlkStatus) -> None:
        super().__init__(status.name)
        self.status = status


class BlkModel(Model):
    """A disk on *image*, which the model owns from now on. Its size is taken in whole blocks, when made and by ``refresh``."""

    device_id = DeviceId.BLOCK

    def __init__(
        self,
        image: Image,
        *,
        readonly: bool = False,
        serial: str = "vdpa_bridge",
        queues: int = 1,
        engine: str = "native",
        threads: int = 1,
        direct: bool = False,
        io_uring: bool = True,
    ) -> None:
        """*engine* is one of ENGINES: with "null" reads give zeroes and writes are forgotten, for measurements. Queues take turns on
        *threads*. *direct* transfers pass by the page cache. Without *io_uring*, a thread waits for each transfer that has to wait.

        ValueError when *serial* is longer than 20 bytes, the image too large, or no file and *direct* or *engine* are for files;
        OSError when it has no direct transfers. The image is the caller's then."""
        self._serial = serial.encode()
        if len(self._serial) > _ID_BYTES:
            raise ValueError(f"serial {serial!r} is longer than {_ID_BYTES} bytes")
        self.image = image
        self.capacity = self._measure()
        """Sectors of 512 bytes."""
        if self.capacity * SECTOR > LARGEST:
            raise ValueError(f"a disk of {self.capacity * SECTOR} bytes is larger than {LARGEST}")
        self._native = engine != "python" and image.fd >= 0
        if image.fd < 0 and (direct or threads > 1 or engine == "null"):
            raise ValueError("direct=on, threads= and engine=null are for files, block devices and memory")
        self._medium = "null" if engine == "null" else "direct" if direct else "resident" if self._native and is_memory(image.fd) else "cached"
        self.threads = threads if self._native else 0
        self._direct = open_direct(image.fd, readonly) if direct else -1
        self._io_uring = io_uring and self._native and self._medium in ("cached", "direct")
        self.needs = replace(image.needs, io_uring=self._io_uring)
        self.sources = image.sources
        image.changed, image.served = self._on_changed, self._go_on
        self._readonly = readonly
        self._engines: dict[int, BlkEngine] = {}
        self._memory: BlkMemory | None = None
        if self._native and self._medium == "resident":
            with contextlib.suppress(OSError):  # then by system calls: it is small, or larger than all addresses
                self._memory = BlkMemory(image.fd, self.capacity * SECTOR, not readonly)
        self.writeback = True
        """Whether writes may wait for a flush: what the driver chose, or else has to live with."""
        self._flushes = True
        self._kept: dict[Pending, tuple[int, Queue, Chain]] = {}
        """Requests under way."""
        self._late: list[tuple[Queue, Chain, int]] = []
        """Those that ended while their ring waits for mappings."""
        self._stalled: set[int] = set()
        """Queues that the image has no room for."""
        self._complained = False
        self.queue_count = queues
        self.features = F.SEG_MAX | F.BLK_SIZE | F.FLUSH | F.TOPOLOGY
        self.features |= F.RO if readonly else F.WRITE_ZEROES | F.CONFIG_WCE
        if image.limits.discard and not readonly:
            self.features |= F.DISCARD
        if image.limits.longest:
            self.features |= F.SIZE_MAX
        if queues > 1:
            self.features |= F.MQ

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """``file=PATH``, ``size=256M`` or ``nbd=URI``, and what docs/models.md says of the rest."""
        check_options("blk", options, _OPTIONS)
        readonly = parse_switch("readonly", options.get("readonly", "off"))
        queues = parse_count("queues", options.get("queues", "1"), 1, 64)
        threads = parse_count("threads", options.get("threads", "1"), 1, queues)
        direct = parse_switch("direct", options.get("direct", "off"))
        io_uring = parse_switch("io_uring", options.get("io_uring", "on"))
        engine = options.get("engine", "native")
        if engine not in ENGINES:
            raise ValueError(f"engine={engine}; there is: {', '.join(ENGINES)}")
        if engine != "native" and (direct or threads > 1):
            raise ValueError(f"engine={engine} has one thread, and no direct=on: those are of engine=native")
        image = open_disk(options, readonly)
        try:
            return cls(
                image,
                readonly=readonly,
                serial=options.get("serial", "vdpa_bridge"),
                queues=queues,
                engine=engine,
                threads=threads,
                direct=direct,
                io_uring=io_uring,
            )
        except BaseException:
            image.close()
            raise

    def config(self) -> bytes:
        """``struct virtio_blk_config`` up to write zeroes: 60 bytes. Fields without their feature are 0."""
        limits, has, segments = self.image.limits, self.features, self.queue_size - 2  # header and status take a descriptor each
        block = limits.block
        discard = (limits.discard // SECTOR, _DISCARD_RANGES, limits.granule // SECTOR) if has & F.DISCARD else (0, 0, 0)
        zeroes = (_ZERO_LIMIT // SECTOR, 1, limits.unmaps) if has & F.WRITE_ZEROES else (0, 0, 0)
        return _CONFIG.pack(
            self.capacity,
            limits.longest // segments // 4096 * 4096,  # size_max: what has as many segments as there are does not pass the limit
            segments,
            0, 0, 0,  # geometry: not offered
            block,
            (limits.physical // block).bit_length() - 1, limits.offset // block, limits.smallest // block, limits.best // block,
            self.writeback if has & F.CONFIG_WCE else 0,
            self.queue_count,
            *discard,
            *zeroes,
        )  # fmt: skip

    def write_config(self, offset: int, data: bytes) -> None:
        """The cache mode, which takes effect at once (virtio 1.2, 5.2.5); all else stays as it is."""
        if self.features & F.CONFIG_WCE and offset <= _WRITEBACK < offset + len(data):
            self._set_writeback(bool(data[_WRITEBACK - offset]) and self._flushes)
            if not self.writeback:
                try:
                    self.image.flush()
                except OSError as error:
                    self._complain(error)

    def _set_writeback(self, writeback: bool) -> None:
        self.writeback = writeback
        for engine in self._engines.values():
            engine.stable_writes = not writeback

    def start(self, features: int) -> None:
        """A driver that does not know FLUSH expects its writes to be stable when they end, and has no cache (virtio 1.2, 5.2.5.2)."""
        self._flushes = bool(features & F.FLUSH)
        self._engines.clear()
        self._set_writeback(self.writeback and self._flushes)

    def reset(self) -> None:
        """The next driver begins with a cache; what this one has under way ends without an answer."""
        self.writeback = self._flushes = True
        self._kept.clear()
        self._late.clear()
        self._stalled.clear()
        self.image.abandon()

    def engine(self, index: int) -> Engine | None:
        """One for each queue; none for a class of somebody's own, which may do anything otherwise."""
        if not self._native or type(self) is not BlkModel:
            return None
        if index not in self._engines:
            self._engines[index] = BlkEngine(
                index,
                self.image.fd,
                self.capacity,
                medium=self._medium,
                memory=self._memory,
                direct=self._direct,
                align=max(_DIRECT_ALIGN, self.image.limits.block),
                block=self.image.limits.block // SECTOR,
                readonly=self._readonly,
                stable_writes=not self.writeback,
                io_uring=self._io_uring,
                depth=self.queue_size,
                thread=index % self.threads,
            )
        return self._engines[index]

    def refresh(self) -> str:
        """Take the size of the image anew; one that has to be asked for comes later."""
        self.image.renew()
        return self._resized()

    def _resized(self) -> str:
        before, self.capacity = self.capacity, min(self._measure(), LARGEST // SECTOR)
        for engine in self._engines.values():
            engine.capacity = self.capacity
        return f"{before} sectors before, {self.capacity} now" if self.capacity != before else ""

    def resize(self, size: int) -> str:
        """The file, or the memory, gets that size."""
        if self._readonly:
            raise ValueError("it is read-only")
        block, fd = self.image.limits.block, self.image.fd
        if size % block or not block <= size <= LARGEST:
            raise ValueError(f"a disk has {block} bytes to {LARGEST}, and a multiple of {block}")
        if fd < 0 or not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("it is no file: others change its size, and reload takes it anew")
        os.ftruncate(fd, size)
        if self._memory is not None:
            self._memory.forget(min(size, self.capacity * SECTOR), abs(size - self.capacity * SECTOR))
        return self._resized()

    def _on_changed(self) -> None:
        if changed := self._resized():
            _log.info("blk: %s", changed)
            self.config_changed()

    def _measure(self) -> int:
        block = self.image.limits.block
        return self.image.measure() // block * (block // SECTOR)

    def snapshot(self) -> dict[str, Any]:
        """The cache mode."""
        return {"writeback": self.writeback}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The same; a predecessor of another class has none."""
        self.writeback = bool(state.get("writeback", True))

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        """Serve a batch of requests. What takes its time is under way then; ``_go_on`` is called when some of it has ended."""
        if index in self._engines and (failure := self._engines[index].failure):
            self._complain(OSError(failure, os.strerror(failure)))
        if self._late:
            self._give_late()
        if self.image.full:
            self._stalled.add(index)
        else:
            self._batch(queues[index], index)

    def _batch(self, queue: Queue, index: int) -> int:
        """How many there were."""
        chains, done = queue.pop(_BATCH), []
        for chain in chains:
            if isinstance(ended := self._serve(chain), Pending):
                self._kept[ended] = index, queue, chain
            else:
                done.append((chain, ended))
        queue.push(done)
        return len(chains)

    def _go_on(self, queues: Mapping[int, Queue]) -> None:
        """There may be room again for queues that waited for it."""
        for index in sorted(self._stalled & set(queues)):
            while not self.image.full:
                if self._batch(queues[index], index) < _BATCH:
                    self._stalled.discard(index)
                    break

    def _give_late(self) -> None:
        late, self._late = self._late, []
        for queue, chain, written in late:
            try:
                queue.push([(chain, written)])
            except BlockingIOError:  # process is called when the ring's memory is mapped again
                self._late.append((queue, chain, written))
            except OSError as error:  # the ring broke meanwhile
                _log.debug("blk: an answer is lost: %s", error)

    def release(self, queue: Queue, index: int) -> None:
        """What is under way ends."""
        self._stalled.discard(index)
        self.image.settle([pending for pending, kept in self._kept.items() if kept[0] == index])

    def rest(self) -> None:
        """The same for all queues."""
        self.image.settle(list(self._kept))

    def close(self) -> None:
        """Close the image."""
        super().close()
        self._engines.clear()
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        self.image.close()
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1

    # Requests --------------------------------------------------------------------------------------------------------

    def _serve(self, chain: Chain) -> int | Pending:
        """Carry out one request, or begin it; return the bytes written, which is 0 for a chain that has no place for a status."""
        if not chain.writable:
            return 0
        try:
            transfer = self._request(chain)
        except _Refused as refused:
            return self._answer(chain, 0, refused.status)
        except OSError as error:
            return self._answer(chain, 0, self._complain(error))
        if isinstance(transfer, int):
            return self._answer(chain, transfer, BlkStatus.OK)
        transfer.then = lambda outcome: self._ended(transfer, outcome)
        return transfer

    def _ended(self, transfer: Pending, outcome: int | OSError) -> None:
        _, queue, chain = self._kept.pop(transfer)
        written, status = (0, self._complain(outcome)) if isinstance(outcome, OSError) else (outcome, BlkStatus.OK)
        try:
            written = self._answer(chain, written, status)
        except OSError:  # the driver took the memory away
            written = 0
        self._late.append((queue, chain, written))
        self._give_late()

    def _answer(self, chain: Chain, written: int, status: BlkStatus) -> int:
        return written + chain.write(bytes([status]), chain.writable - 1)

    def _complain(self, error: OSError) -> BlkStatus:
        if not self._complained:  # a driver can bring errors about as fast as it likes
            self._complained = True
            _log.warning("blk: request answered with IOERR, as will be all others like it: %s", error)
        return BlkStatus.IOERR

    def _request(self, chain: Chain) -> Transfer:
        if chain.readable < _HEADER.size:
            raise _Refused(BlkStatus.IOERR)
        kind, _, sector = _HEADER.unpack(chain.read(0, _HEADER.size))
        if kind == BlkType.IN:
            length = chain.writable - 1
            return self.image.read(chain, self._offset(sector, length), length)
        if kind == BlkType.OUT:
            self._need_writable()
            length = chain.readable - _HEADER.size
            return self.image.write(chain, self._offset(sector, length), _HEADER.size, length, not self.writeback)
        if kind == BlkType.FLUSH:
            return self.image.flush()
        if kind == BlkType.GET_ID:
            return chain.write(self._serial.ljust(_ID_BYTES, b"\0")[: chain.writable - 1])
        if kind in (BlkType.DISCARD, BlkType.WRITE_ZEROES):
            self._need_writable()
            return self._ranges(chain, discard=kind == BlkType.DISCARD)
        raise _Refused(BlkStatus.UNSUPP)

    def _need_writable(self) -> None:
        if self._readonly:
            raise _Refused(BlkStatus.IOERR)

    def _offset(self, sector: int, length: int) -> int:
        """Where in the image [sector, sector + length bytes) begins, if it lies on the disk and is whole blocks."""
        block = self.image.limits.block
        if length % block or sector * SECTOR % block or sector > self.capacity or length // SECTOR > self.capacity - sector:
            raise _Refused(BlkStatus.IOERR)
        return sector * SECTOR

    def _ranges(self, chain: Chain, discard: bool) -> Transfer:
        """DISCARD and WRITE_ZEROES: check every range before the first is touched (virtio 1.2, 5.2.6.2)."""
        length = chain.readable - _HEADER.size
        most, most_ranges = (self.image.limits.discard, _DISCARD_RANGES) if discard else (_ZERO_LIMIT, 1)
        if not most:
            raise _Refused(BlkStatus.UNSUPP)
        if not length or length % _SEGMENT.size or length // _SEGMENT.size > most_ranges:
            raise _Refused(BlkStatus.IOERR)
        segments = list(_SEGMENT.iter_unpack(chain.read(_HEADER.size)))
        for sector, count, flags in segments:
            if flags & ~_UNMAP or (discard and flags):
                raise _Refused(BlkStatus.UNSUPP)
            self._offset(sector, count * SECTOR)
            if count * SECTOR > most:
                raise _Refused(BlkStatus.IOERR)
        ranges = [(sector * SECTOR, count * SECTOR) for sector, count, _ in segments if count]
        if discard:
            transfer = self.image.discard(ranges, not self.writeback)
        else:
            transfer = self.image.zero(ranges, bool(segments[0][2] & _UNMAP), not self.writeback)
        if self._memory is not None:
            for start, size in ranges:
                self._memory.forget(start, size)
        return transfer
