# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A virtio disk on a file or on memory (virtio 1.2, 5.2).

Rule of this file: a request is one run of readable and one of writable bytes, however the driver cut it into
descriptors (virtio 1.2, 2.7.4.1); the status is the last writable byte. Data goes between the driver's buffers and
the file without a copy of ours; memory is a file as well (a memfd), so there is one path. What is said here holds for
the engine, too, which serves plain reads, writes and flushes of a queue and leaves everything else to ``process``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import stat
import struct
from collections.abc import Mapping
from enum import IntEnum
from typing import Self

from ..engines import BlkEngine, BlkMemory, Engine
from ..virtio.features import BlockFeature as F
from ..virtio.ids import DeviceId
from ..virtqueue import Chain
from .base import Model, Queue
from .image import is_memory, memory_image, open_direct, open_image
from .needs import Needs
from .options import check_options, parse_count, parse_size, parse_switch

_log = logging.getLogger(__name__)

SECTOR = 512
DEFAULT_SIZE = "256M"
LARGEST = 1 << 62
"""Bytes; keeps every offset that passes the range check within a signed 64-bit file offset."""

_HEADER = struct.Struct("<IIQ")
_SEGMENT = struct.Struct("<QII")
_CONFIG = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3x")
_ID_BYTES = 20
_UNMAP = 1
_DISCARD_LIMITS = 1 << 22, 64
"""Sectors in a range (2 GiB), and ranges in a request."""
_ZERO_LIMITS = 1 << 17, 1
"""The same for WRITE_ZEROES: 64 MiB, as the zeroes may have to be written, and a reset waits for the request."""
_ZEROES = bytes(1 << 20)
_DIRECT_ALIGN = 4096
"""Bytes: what every file system and medium takes; requests that are not so aligned go through the page cache."""
ENGINES = "native", "python", "null"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16


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


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """Whether the file system could do it; OSError when it tried and failed."""
    while _libc.fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
            return False
        if number != errno.EINTR:
            raise OSError(number, f"fallocate: {os.strerror(number)}")
    return True


class BlkModel(Model):
    """A disk on the file behind *fd*, which the model owns from now on. Its size is taken in whole sectors, when made and by ``refresh``."""

    device_id = DeviceId.BLOCK

    def __init__(
        self,
        fd: int,
        *,
        readonly: bool = False,
        serial: str = "vdpa_bridge",
        queues: int = 1,
        holes: bool = False,
        engine: str = "native",
        threads: int = 1,
        direct: bool = False,
        io_uring: bool = True,
    ) -> None:
        """*holes* are taken for zeroes even where the driver wants these to stay allocated (memory).

        *engine* is one of ENGINES: with "null" reads give zeroes and writes are forgotten, for measurements. Queues take turns on
        *threads*. *direct* transfers pass by the page cache. Without *io_uring*, a thread waits for each transfer that has to wait.

        ValueError when *serial* is longer than 20 bytes or the file too large, OSError when the file has no direct transfers; *fd* is
        the caller's then."""
        self._serial = serial.encode()
        if len(self._serial) > _ID_BYTES:
            raise ValueError(f"serial {serial!r} is longer than {_ID_BYTES} bytes")
        size = os.lseek(fd, 0, os.SEEK_END)
        if size > LARGEST:
            raise ValueError(f"a disk of {size} bytes is larger than {LARGEST}")
        memory = is_memory(fd)
        self._medium = "null" if engine == "null" else "direct" if direct else "resident" if memory else "cached"
        self._native = engine != "python"
        self.threads = threads if self._native else 0
        self._direct = open_direct(fd, readonly) if direct else -1
        self._io_uring = io_uring and self._native and self._medium in ("cached", "direct")
        self.needs = Needs(io_uring=self._io_uring)
        self._engines: dict[int, BlkEngine] = {}
        self._memory: BlkMemory | None = None
        self._fd = fd
        self._holes = holes
        self.capacity = size // SECTOR
        """Sectors of 512 bytes."""
        self._readonly = readonly
        if self._native and self._medium == "resident":
            with contextlib.suppress(OSError):  # then by system calls: it is small, or larger than all addresses
                self._memory = BlkMemory(fd, self.capacity * SECTOR, not readonly)
        self._sync_writes = False
        self._complained = False
        self.queue_count = queues
        self.features = F.SEG_MAX | F.BLK_SIZE | F.FLUSH | F.TOPOLOGY
        self.features |= F.RO if readonly else F.DISCARD | F.WRITE_ZEROES
        if queues > 1:
            self.features |= F.MQ

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """``file=PATH`` or ``size=256M``; ``readonly=on``, ``serial=TEXT``, ``queues=N``, ``threads=N``, ``direct=on``, ``io_uring=off``, ``engine=null``."""
        check_options("blk", options, ("file", "size", "readonly", "serial", "queues", "threads", "direct", "io_uring", "engine"))
        if "file" in options and "size" in options:
            raise ValueError("a disk has file= or size=, not both: a file brings its size")
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
        size = parse_size(options.get("size", DEFAULT_SIZE))
        if size < SECTOR or size > LARGEST:
            raise ValueError(f"size={options['size']}; a disk has {SECTOR} bytes to {LARGEST}")
        fd = open_image(options["file"], readonly) if "file" in options else memory_image(size // SECTOR * SECTOR)
        try:
            return cls(
                fd,
                readonly=readonly,
                serial=options.get("serial", "vdpa_bridge"),
                queues=queues,
                holes="file" not in options,
                engine=engine,
                threads=threads,
                direct=direct,
                io_uring=io_uring,
            )
        except BaseException:
            os.close(fd)
            raise

    def config(self) -> bytes:
        """``struct virtio_blk_config`` up to write zeroes: 60 bytes."""
        writable = not self._readonly
        return _CONFIG.pack(
            self.capacity,
            0,  # size_max: not offered
            self.queue_size - 2,  # seg_max: header and status take a descriptor each
            0, 0, 0,  # geometry: not offered
            SECTOR,
            3, 0, 8, 256,  # topology: physical blocks of 4 KiB, 128 KiB is optimal
            0,  # writeback: not offered
            self.queue_count,
            *(_DISCARD_LIMITS if writable else (0, 0)), 8,  # alignment of 4 KiB
            *(_ZERO_LIMITS if writable else (0, 0)), int(writable),
        )  # fmt: skip

    def start(self, features: int) -> None:
        """A driver that does not know FLUSH expects its writes to be stable when they end (virtio 1.2, 5.2.6.2)."""
        self._sync_writes = not features & F.FLUSH
        self._engines.clear()

    def engine(self, index: int) -> Engine | None:
        """One for each queue; none for a class of somebody's own, which may do anything otherwise."""
        if not self._native or type(self) is not BlkModel:
            return None
        if index not in self._engines:
            self._engines[index] = BlkEngine(
                index,
                self._fd,
                self.capacity,
                medium=self._medium,
                memory=self._memory,
                direct=self._direct,
                align=_DIRECT_ALIGN,
                readonly=self._readonly,
                stable_writes=self._sync_writes,
                io_uring=self._io_uring,
                depth=self.queue_size,
                thread=index % self.threads,
            )
        return self._engines[index]

    def refresh(self) -> str:
        """Take the size of the file anew."""
        before, self.capacity = self.capacity, min(os.lseek(self._fd, 0, os.SEEK_END), LARGEST) // SECTOR
        for engine in self._engines.values():
            engine.capacity = self.capacity
        return f"{before} sectors before, {self.capacity} now" if self.capacity != before else ""

    def resize(self, size: int) -> str:
        """The file, or the memory, gets that size."""
        if self._readonly:
            raise ValueError("it is read-only")
        if size % SECTOR or not SECTOR <= size <= LARGEST:
            raise ValueError(f"a disk has {SECTOR} bytes to {LARGEST}, and a multiple of {SECTOR}")
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            raise ValueError("it is a block device, whose size others change; reload takes it anew")
        os.ftruncate(self._fd, size)
        if self._memory is not None:
            self._memory.forget(min(size, self.capacity * SECTOR), abs(size - self.capacity * SECTOR))
        return self.refresh()

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        """Serve a batch of requests."""
        if index in self._engines and (failure := self._engines[index].failure):
            self._complain(OSError(failure, os.strerror(failure)))
        queue = queues[index]
        queue.push([(chain, self._serve(chain)) for chain in queue.pop(16)])

    def close(self) -> None:
        """Close the file."""
        super().close()
        self._engines.clear()
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1

    # Requests --------------------------------------------------------------------------------------------------------

    def _serve(self, chain: Chain) -> int:
        """Carry out one request; return the bytes written, which is 0 for a chain that has no place for a status."""
        if not chain.writable:
            return 0
        written, status = 0, BlkStatus.OK
        try:
            written = self._request(chain)
        except _Refused as refused:
            status = refused.status
        except OSError as error:
            self._complain(error)
            status = BlkStatus.IOERR
        return written + chain.write(bytes([status]), chain.writable - 1)

    def _complain(self, error: OSError) -> None:
        if not self._complained:  # a driver can bring errors about as fast as it likes
            self._complained = True
            _log.warning("blk: request answered with IOERR, as will be all others like it: %s", error)

    def _request(self, chain: Chain) -> int:
        if chain.readable < _HEADER.size:
            raise _Refused(BlkStatus.IOERR)
        kind, _, sector = _HEADER.unpack(chain.read(0, _HEADER.size))
        if kind == BlkType.IN:
            length = chain.writable - 1
            if chain.preadv(self._fd, self._offset(sector, length), 0, length) != length:
                raise _Refused(BlkStatus.IOERR)
            return length
        if kind == BlkType.OUT:
            self._need_writable()
            length = chain.readable - _HEADER.size
            if chain.pwritev(self._fd, self._offset(sector, length), _HEADER.size, length) != length:
                raise _Refused(BlkStatus.IOERR)
            if self._sync_writes:
                os.fdatasync(self._fd)
        elif kind == BlkType.FLUSH:
            os.fdatasync(self._fd)
        elif kind == BlkType.GET_ID:
            return chain.write(self._serial.ljust(_ID_BYTES, b"\0")[: chain.writable - 1])
        elif kind in (BlkType.DISCARD, BlkType.WRITE_ZEROES):
            self._need_writable()
            self._ranges(chain, discard=kind == BlkType.DISCARD)
        else:
            raise _Refused(BlkStatus.UNSUPP)
        return 0

    def _need_writable(self) -> None:
        if self._readonly:
            raise _Refused(BlkStatus.IOERR)

    def _offset(self, sector: int, length: int) -> int:
        """Where in the file [sector, sector + length bytes) begins, if it lies on the disk and is whole sectors."""
        if length % SECTOR or sector > self.capacity or length // SECTOR > self.capacity - sector:
            raise _Refused(BlkStatus.IOERR)
        return sector * SECTOR

    def _ranges(self, chain: Chain, discard: bool) -> None:
        """DISCARD and WRITE_ZEROES: check every range before the first is touched (virtio 1.2, 5.2.6.2)."""
        length = chain.readable - _HEADER.size
        most_sectors, most_ranges = _DISCARD_LIMITS if discard else _ZERO_LIMITS
        if not length or length % _SEGMENT.size or length // _SEGMENT.size > most_ranges:
            raise _Refused(BlkStatus.IOERR)
        segments = list(_SEGMENT.iter_unpack(chain.read(_HEADER.size)))
        for sector, count, flags in segments:
            if flags & ~_UNMAP or (discard and flags):
                raise _Refused(BlkStatus.UNSUPP)
            self._offset(sector, count * SECTOR)
            if count > most_sectors:
                raise _Refused(BlkStatus.IOERR)
        for sector, count, flags in segments:
            if discard:
                if count:
                    _fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, sector * SECTOR, count * SECTOR)
            else:
                self._zero(sector * SECTOR, count * SECTOR, bool(flags & _UNMAP))
            if self._memory is not None:
                self._memory.forget(sector * SECTOR, count * SECTOR)
        if self._sync_writes:
            os.fdatasync(self._fd)

    def _zero(self, offset: int, length: int, unmap: bool) -> None:
        """Zeroes, by the cheapest way that the file system has."""
        if not length:
            return
        for mode in (_PUNCH_HOLE, _ZERO_RANGE) if unmap or self._holes else (_ZERO_RANGE,):
            if _fallocate(self._fd, mode | _KEEP_SIZE, offset, length):
                return
        end = offset + length
        while offset < end:
            offset += os.pwrite(self._fd, _ZEROES[: end - offset], offset)
