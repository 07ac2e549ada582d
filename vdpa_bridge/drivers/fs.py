# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A file system driver (virtio 1.2, 5.11) that reads without mounting: FUSE requests (linux/fuse.h) for a path at a time.

Rule of this file: nothing is cached and every node looked up is forgotten again, so the device keeps nothing for us. Symbolic
links are not followed; where they lead is for the caller to decide.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Unpack

from ..device import Device
from ..errors import DeviceBroken, ProtocolError
from ..virtio.ids import DeviceId
from .base import Driver, Options

HIPRIO, REQUESTS = 0, 1
"""Queues: FORGET goes to the first, everything else to the second."""
ROOT = 1
LOOKUP, FORGET, GETATTR, READLINK, OPEN, READ, RELEASE, INIT, OPENDIR, READDIR, RELEASEDIR, DESTROY = 1, 2, 3, 5, 14, 15, 18, 26, 27, 28, 29, 38

_IN = struct.Struct("<IIQQIIII")
_OUT = struct.Struct("<IiQ")
_INIT_IN = struct.Struct("<IIII")
_INIT_OUT = struct.Struct("<IIIIHHI")
_ATTR = struct.Struct("<6Q10I")
_ENTRY = struct.Struct("<4QII")
_ATTR_OUT = struct.Struct("<QII")
_OPEN = struct.Struct("<QII")
_READ = struct.Struct("<QQIIQII")
_RELEASE = struct.Struct("<QIIQ")
_DIRENT = struct.Struct("<QQII")
_VERSION = (7, 31)
_CHUNK = 64 << 10
_MOST_ENTRIES = 1 << 20
_LONGEST_NAME = 4096


@dataclass(frozen=True)
class Attributes:
    """What a node is; times in seconds."""

    inode: int
    size: int
    mode: int
    links: int
    uid: int
    gid: int
    mtime: float


class FsDriver(Driver):
    """A shared directory. Paths are from its root, with or without a slash first."""

    device_id = DeviceId.FS
    table_entries = 4

    def __init__(self, device: Device, **options: Unpack[Options]) -> None:
        """See ``Driver``; ready when the file system has answered FUSE_INIT."""
        options.setdefault("pool_size", 1 << 20)
        self._unique = 0
        self._alive = False
        super().__init__(device, queues=(HIPRIO, REQUESTS), **options)

    def _ready(self) -> None:
        answer = self._request(INIT, 0, _INIT_IN.pack(*_VERSION, _CHUNK, 0), 256, least=_INIT_OUT.size)
        self.version = _INIT_OUT.unpack_from(answer)[:2]
        """Of the protocol, major and minor."""
        if self.version[0] != _VERSION[0]:
            raise DeviceBroken(f"{self.name} speaks FUSE {self.version[0]}.{self.version[1]}; {_VERSION[0]}.{_VERSION[1]} is wanted")
        self._alive = True

    def close(self) -> None:
        """See ``Driver``; ends the session before."""
        alive, self._alive = self._alive, False
        if alive:
            with contextlib.suppress(OSError, ProtocolError, ValueError):  # ValueError: there are no rings any more
                self._request(DESTROY, 0, b"", 0, timeout=1)
        super().close()

    # Requests ----------------------------------------------------------------------------------------------------------

    def _request(self, opcode: int, node: int, data: bytes, room: int, path: str = "", least: int = 0, timeout: float | None = None) -> bytes:
        """What the file system answers, from *least* to *room* bytes; its error as OSError."""
        self._unique += 1
        header = _IN.pack(_IN.size + len(data), opcode, self._unique, node, os.getuid(), os.getgid(), os.getpid(), 0)
        answer = self.ask(REQUESTS, [header + data], _OUT.size + room, timeout)
        what = f"{self.name}: request {opcode} for {path or '/'}"
        if len(answer) < _OUT.size:
            raise DeviceBroken(f"{what}: an answer of {len(answer)} bytes, less than its header")
        length, error, unique = _OUT.unpack_from(answer)
        if unique != self._unique or not _OUT.size <= length <= len(answer) or not -4096 < error <= 0:
            raise DeviceBroken(f"{what}: answer {unique} to request {self._unique} with error {error} says it has {length} of {len(answer)} bytes")
        if error:
            raise OSError(-error, f"{what}: {os.strerror(-error)}")
        if length - _OUT.size < least:
            raise DeviceBroken(f"{what}: an answer of {length} bytes where {_OUT.size + least} belong")
        return answer[_OUT.size : length]

    @contextlib.contextmanager
    def _node(self, path: str) -> Iterator[tuple[int, Attributes | None]]:
        """The node at *path* and its attributes (None for the root), forgotten afterwards."""
        node, attributes, known = ROOT, None, list[int]()
        try:
            for name in filter(None, path.split("/")):
                raw = os.fsencode(name)
                if name in (".", "..") or b"\0" in raw or len(raw) > _LONGEST_NAME:
                    raise ValueError(f"{path!r}: {name!r} is not a name to look up")
                answer = self._request(LOOKUP, node, raw + b"\0", _ENTRY.size + _ATTR.size, path, _ENTRY.size + _ATTR.size)
                node = _ENTRY.unpack_from(answer)[0]
                if not node:
                    raise FileNotFoundError(errno.ENOENT, f"{self.name}: {path}: {os.strerror(errno.ENOENT)}")
                known.append(node)
                attributes = _attributes(answer[_ENTRY.size :])
            yield node, attributes
        finally:
            for each in known:
                self._post(FORGET, each, struct.pack("<Q", 1), HIPRIO, 0)

    def _post(self, opcode: int, node: int, data: bytes, queue: int, room: int) -> None:
        """A request whose answer nobody waits for; while the device takes none, it is not sent."""
        self._unique += 1
        header = _IN.pack(_IN.size + len(data), opcode, self._unique, node, 0, 0, 0, 0)
        with contextlib.suppress(MemoryError, OSError, ValueError):  # ValueError: the driver was closed meanwhile
            self.post(queue, [header + data], [room] if room else [])

    @contextlib.contextmanager
    def _opened(self, node: int, path: str, directory: bool) -> Iterator[int]:
        """A handle, released afterwards."""
        opcode, release = (OPENDIR, RELEASEDIR) if directory else (OPEN, RELEASE)
        answer = self._request(opcode, node, struct.pack("<II", os.O_RDONLY, 0), _OPEN.size, path, _OPEN.size)
        handle = int(_OPEN.unpack_from(answer)[0])
        try:
            yield handle
        finally:
            self._post(release, node, _RELEASE.pack(handle, os.O_RDONLY, 0, 0), REQUESTS, _OUT.size)

    # Files -------------------------------------------------------------------------------------------------------------

    def stat(self, path: str) -> Attributes:
        """What is at *path*. OSError ENOENT and the like as the file system says."""
        with self._node(path) as (node, attributes):
            if attributes is not None:
                return attributes
            answer = self._request(GETATTR, node, bytes(16), _ATTR_OUT.size + _ATTR.size, path, _ATTR_OUT.size + _ATTR.size)
            return _attributes(answer[_ATTR_OUT.size :])

    def read(self, path: str) -> Iterator[bytes]:
        """The content of a file, piece by piece."""
        with self._node(path) as (node, _), self._opened(node, path, directory=False) as handle:
            offset = 0
            while piece := self._request(READ, node, _READ.pack(handle, offset, _CHUNK, 0, 0, os.O_RDONLY, 0), _CHUNK, path):
                yield piece
                offset += len(piece)

    def list(self, path: str) -> dict[str, int]:
        """The names in a directory, each with its type (the upper four bits of a mode)."""
        found: dict[str, int] = {}
        with self._node(path) as (node, _), self._opened(node, path, directory=True) as handle:
            offset, entries = 0, 0
            while answer := self._request(READDIR, node, _READ.pack(handle, offset, _CHUNK, 0, 0, os.O_RDONLY, 0), _CHUNK, path):
                at = 0
                while at < len(answer):
                    if at + _DIRENT.size > len(answer):
                        raise DeviceBroken(f"{self.name}: {path}: the directory ends within an entry")
                    _, offset, length, kind = _DIRENT.unpack_from(answer, at)
                    name = answer[at + _DIRENT.size : at + _DIRENT.size + length]
                    entries += 1
                    if len(name) < length or not length or entries > _MOST_ENTRIES:
                        raise DeviceBroken(f"{self.name}: {path}: entry {entries} has a name of {length} bytes, {len(name)} are there")
                    if name not in (b".", b".."):
                        found[os.fsdecode(name)] = kind
                    at += -(-(_DIRENT.size + length) // 8) * 8
        return found

    def readlink(self, path: str) -> str:
        """Where a symbolic link leads."""
        with self._node(path) as (node, _):
            return os.fsdecode(self._request(READLINK, node, b"", _LONGEST_NAME, path))


def _attributes(data: bytes) -> Attributes:
    inode, size, _, _, mtime, _, _, nanoseconds, _, mode, links, uid, gid, *_ = _ATTR.unpack_from(data)
    return Attributes(inode, size, mode, links, uid, gid, mtime + nanoseconds / 1e9)
