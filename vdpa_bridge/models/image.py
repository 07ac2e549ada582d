# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What disks store their blocks in: a file, a block device, or memory, which is a file as well (a memfd).

Rule of this file: an image says what it can do and what it likes, and does nothing in another way than it says.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..virtqueue import Chain
from .needs import Needs
from .sources import Sources

if TYPE_CHECKING:
    from .base import Queue

Range = tuple[int, int]
"""Offset and length."""


class Pending:
    """A transfer under way, of an image that does not make its disk wait."""

    then: Callable[[int | OSError], None] = staticmethod(lambda outcome: None)
    """Called once it has ended, with the bytes written into the chain, or why it failed. Set by whoever began it."""


Transfer = int | Pending
"""Bytes written into the chain, or what is to write them yet."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
_ZEROES = bytes(1 << 20)
_BLKSSZGET, _BLKPBSZGET, _BLKIOMIN, _BLKIOOPT, _BLKALIGNOFF = 0x1268, 0x127B, 0x1278, 0x1279, 0x127A
"""linux/fs.h: the sizes of a block device."""


@dataclass(frozen=True)
class Limits:
    """Bytes, unless said otherwise."""

    block: int = 512
    """The logical block: no request is smaller, or begins within one."""
    physical: int = 4096
    """The block that the medium writes at once."""
    offset: int = 0
    """Where the first of these begins: physical blocks need not lie as logical ones do."""
    smallest: int = 4096
    """Requests that are no multiple of it are slow."""
    best: int = 128 << 10
    """Requests of this size, or a multiple, are fastest."""
    discard: int = 2 << 30
    """The longest range that is discarded at once; 0 if none is."""
    granule: int = 4096
    """What is discarded begins at a multiple of it, or is kept."""
    longest: int = 0
    """Of one transfer; 0 if there is no limit."""
    unmaps: bool = True
    """Whether zeroes can give storage back."""


class Image(ABC):
    """The blocks of a disk. Offsets and lengths are checked by whoever calls. *stable*: it is on the medium when it ends.

    What cannot even be begun is an OSError. Synchronization: as a model.
    """

    fd: int = -1
    """Of a file, which an engine can read and write itself; -1 if there is none."""
    limits: Limits = Limits()
    needs: Needs = Needs()
    """What it opens or connects to later."""
    sources: Sources | None = None
    """What brings about the end of transfers, and ``changed``."""
    changed: Callable[[], None] = staticmethod(lambda: None)
    """Called when ``measure`` may say something new."""
    served: Callable[[Mapping[int, Queue]], None] = staticmethod(lambda queues: None)
    """Called with the queues that work after transfers have ended."""
    full: bool = False
    """Whether so much is under way that no more should be begun before some of it has ended."""

    @abstractmethod
    def measure(self) -> int:
        """Bytes, as far as is known without waiting."""

    def renew(self) -> None:  # noqa: B027 - there is nothing that is not known
        """Find out whether ``measure`` has something new to say."""

    @abstractmethod
    def read(self, chain: Chain, offset: int, length: int) -> Transfer:
        """Fill the beginning of the writable part."""

    @abstractmethod
    def write(self, chain: Chain, offset: int, skip: int, length: int, stable: bool) -> Transfer:
        """Store the readable part from *skip* on."""

    @abstractmethod
    def flush(self) -> Transfer:
        """What was written lasts."""

    @abstractmethod
    def discard(self, ranges: Sequence[Range], stable: bool) -> Transfer:
        """What is there need not be kept."""

    @abstractmethod
    def zero(self, ranges: Sequence[Range], unmap: bool, stable: bool) -> Transfer:
        """Zeroes, by the cheapest way there is; with *unmap* they may go without storage."""

    def settle(self, transfers: Collection[Pending]) -> None:  # noqa: B027 - of an image that has none
        """Let these end within a few seconds, in one way or the other."""

    def abandon(self) -> None:  # noqa: B027
        """Nobody is interested in what is under way any more: nothing ``then``. What comes next comes after it."""

    @abstractmethod
    def close(self) -> None:
        """Harmless when done before."""


class FileImage(Image):
    """The file or block device behind *fd*, which belongs to it from now on."""

    def __init__(self, fd: int, *, holes: bool = False) -> None:
        """*holes* are taken for zeroes even where the driver wants these to have storage (memory)."""
        self.fd, self._holes = fd, holes
        if stat.S_ISBLK(os.fstat(fd).st_mode):
            self.limits = device_limits(fd)

    def measure(self) -> int:
        """The file's size."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    def read(self, chain: Chain, offset: int, length: int) -> int:
        """Without a copy of ours."""
        return _whole(chain.preadv(self.fd, offset, 0, length), length)

    def write(self, chain: Chain, offset: int, skip: int, length: int, stable: bool) -> int:
        """Without a copy of ours."""
        _whole(chain.pwritev(self.fd, offset, skip, length), length)
        return self._flushed(stable)

    def flush(self) -> int:
        """fdatasync(2)"""
        return self._flushed(True)

    def _flushed(self, really: bool) -> int:
        if really:
            os.fdatasync(self.fd)
        return 0

    def discard(self, ranges: Sequence[Range], stable: bool) -> int:
        """Holes, if the file system has such a thing."""
        for offset, length in ranges:
            fallocate(self.fd, _PUNCH_HOLE, offset, length)
        return self._flushed(stable)

    def zero(self, ranges: Sequence[Range], unmap: bool, stable: bool) -> int:
        """Holes, ranges that read as zeroes, or zeroes."""
        modes = (_PUNCH_HOLE, _ZERO_RANGE) if unmap or self._holes else (_ZERO_RANGE,)
        for start, length in ranges:
            if not any(fallocate(self.fd, mode, start, length) for mode in modes):
                offset, end = start, start + length
                while offset < end:
                    offset += os.pwrite(self.fd, _ZEROES[: end - offset], offset)
        return self._flushed(stable)

    def close(self) -> None:
        """Close the file."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _whole(moved: int, length: int) -> int:
    if moved != length:
        raise OSError(errno.EIO, f"{moved} of {length} bytes were moved: the file is shorter than it was")
    return length


def fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """Whether the file system could do it, the size of the file kept; OSError when it tried and failed."""
    while _libc.fallocate(fd, mode | _KEEP_SIZE, offset, length):
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
            return False
        if number != errno.EINTR:
            raise OSError(number, f"fallocate: {os.strerror(number)}")
    return True


def device_limits(fd: int) -> Limits:
    """What a block device says of itself, by ioctl and in sysfs; where that is not there, it discards nothing."""
    number = os.fstat(fd).st_rdev
    queue = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    queue = (queue.parent if (queue / "partition").exists() else queue) / "queue"

    def ask(request: int) -> int:
        return int.from_bytes(fcntl.ioctl(fd, request, bytes(4)), "little", signed=True)

    def look(name: str) -> int:
        try:
            return int((queue / name).read_text())
        except (OSError, ValueError):
            return 0

    return Limits(
        block=ask(_BLKSSZGET),
        physical=ask(_BLKPBSZGET),
        offset=max(ask(_BLKALIGNOFF), 0),  # -1: it does not know
        smallest=ask(_BLKIOMIN),
        best=ask(_BLKIOOPT),
        discard=min(look("discard_max_bytes"), Limits.discard),
        granule=look("discard_granularity"),
        unmaps=look("write_zeroes_max_bytes") > 0,
    )


def open_image(path: str, readonly: bool = False) -> int:
    """A descriptor of a file or block device. ValueError for anything else, OSError when it cannot be opened."""
    fd = os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
    if stat.S_ISREG(mode := os.fstat(fd).st_mode) or stat.S_ISBLK(mode):
        return fd
    os.close(fd)
    raise ValueError(f"{path} is neither a file nor a block device")


def memory_image(size: int) -> int:
    """A descriptor of *size* bytes of memory."""
    fd = os.memfd_create("vdpa-bridge-disk", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_memory(fd: int) -> bool:
    """Whether the file lives in memory (a memfd, tmpfs), so that nothing ever waits for it: such files alone have seals."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def open_direct(fd: int, readonly: bool = False) -> int:
    """Another descriptor of the same file, whose transfers pass by the page cache. OSError EINVAL where the file system has no such thing."""
    return os.open(f"/proc/self/fd/{fd}", (os.O_RDONLY if readonly else os.O_RDWR) | os.O_DIRECT | os.O_CLOEXEC)
