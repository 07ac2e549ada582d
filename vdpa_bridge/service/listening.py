# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Sockets to serve on: made at an exact path, or taken over.

Rule of this file: nobody can connect before owner, group and mode are right; a socket file is removed only if it is dead,
or ours.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BACKLOG = 8
"""Clients that may wait while one is served."""
_LOCK_PATIENCE = 2.0
"""Seconds to wait for others of our kind who make a socket in the same directory."""


_UCRED = struct.Struct("3i")


class PeerCredentials(NamedTuple):
    """Who is at the other end, as the kernel knows it (SO_PEERCRED, unix(7)): of the moment of connect, or of listen."""

    pid: int
    uid: int
    gid: int

    @classmethod
    def of(cls, sock: socket.socket) -> PeerCredentials:
        """OSError when *sock* is not connected."""
        return cls(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


class SocketFile:
    """The file at *path*, which this process has just made by bind(2). Whoever has it keeps this object."""

    def __init__(self, path: str) -> None:
        self._path: str | None = path
        self._identity = _identity(path)
        _MADE.add(self)

    def leave(self) -> None:
        """Let somebody else remove it."""
        self._path = None

    def remove(self) -> None:
        """Take it away if it is still this one; harmless when done before."""
        if self._path is not None and self._identity == _identity(self._path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        self._path = None


_MADE: weakref.WeakSet[SocketFile] = weakref.WeakSet()


def files_made() -> list[SocketFile]:
    """Those that are kept, those of models among them."""
    return [*_MADE]


class Listener:
    """A Unix socket that is listened on, or one that was taken over with its client. *place* is how to call it."""

    def __init__(self, sock: socket.socket, place: str, path: str | None = None) -> None:
        self.sock = sock
        self.place = place
        self._file = SocketFile(path) if path is not None else None

    @classmethod
    def bind(cls, path: str, mode: int = 0o600, group: int | None = None) -> Listener:
        """Listen at exactly *path*; clients are refused until the file is as it should be. A stale socket file is replaced.

        OSError: EADDRINUSE that names the holder when somebody listens there, or says that something else is there; EPERM when
        the group cannot be given. The umask is another one meanwhile: no other thread may make files.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _directory_lock(path):
                _clear(path)
                mask = os.umask(0o777)
                try:
                    sock.bind(path)
                finally:
                    os.umask(mask)
                made = cls(sock, path, path)
                try:
                    if group is not None:
                        os.chown(path, -1, group, follow_symlinks=False)
                    os.chmod(path, mode)
                    sock.listen(BACKLOG)
                except BaseException:
                    made.close()
                    raise
        except OSError as error:
            sock.close()
            raise OSError(error.errno, f"cannot listen on {path}: {error.strerror or error}") from None
        return made

    @classmethod
    def adopt(cls, fd: int, origin: str) -> Listener:
        """Take over descriptor *fd*, to be closed here from now on; ValueError, and it stays open, unless it is a Unix stream socket that listens or is connected, or a connected SOCK_SEQPACKET."""
        try:
            sock = socket.socket(fileno=fd)
        except OSError as error:
            raise ValueError(f"{origin}: {error.strerror}; it must be a Unix socket that listens or is connected") from None
        kind = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        known = _is_connected(sock) or (_listens(sock) and kind == socket.SOCK_STREAM)
        if sock.family != socket.AF_UNIX or kind not in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET) or not known:
            sock.detach()
            raise ValueError(f"{origin} is no Unix stream socket that listens or is connected")
        os.set_inheritable(fd, False)
        sock.setblocking(True)
        return cls(sock, origin)

    @property
    def bound_to(self) -> str:
        """The path that the socket was bound to, by whomever; empty for none, @NAME for an abstract one."""
        name = self.sock.getsockname()
        return "@" + os.fsdecode(name[1:]) if isinstance(name, bytes) else str(name)

    @property
    def has_client(self) -> bool:
        """Whether the socket was taken over with its only client, or with the only one who brings clients."""
        return not _listens(self.sock)

    def remove(self) -> None:
        """Remove the socket file, if there is one and it is still ours; harmless when done before."""
        if self._file is not None:
            self._file.remove()

    def close(self) -> None:
        """Remove the file and close; harmless when done before."""
        self.remove()
        self.sock.close()


def _listens(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _identity(path: str) -> tuple[int, int] | None:
    """What tells one file at *path* from the next one."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _clear(path: str) -> None:
    """Remove a stale socket; EADDRINUSE for anything else that is there."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EADDRINUSE, f"{os.strerror(errno.EADDRINUSE)}: what is there is no socket, and stays")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:  # it listens, and too many clients wait already
            raise OSError(errno.EADDRINUSE, f"{os.strerror(errno.EADDRINUSE)}: somebody listens there{_inode_holder(path)}") from None
        holder = PeerCredentials.of(probe).pid
    raise OSError(errno.EADDRINUSE, f"{os.strerror(errno.EADDRINUSE)}: {_process(holder)} listens there")


def _process(pid: int) -> str:
    """``process 42 (qemu-system-x86)``"""
    try:
        return f"process {pid} ({Path(f'/proc/{pid}/comm').read_text().strip()})"
    except OSError:
        return f"process {pid}" if pid else "a process outside of this PID namespace"


def _inode_holder(path: str) -> str:
    """Who has the socket of that path open, by /proc/net/unix and the descriptors that we may see; empty if unknown."""
    with contextlib.suppress(OSError):
        rows = (line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines()[1:])
        links = {f"socket:[{row[6]}]" for row in rows if len(row) == 8 and row[7] == path and int(row[3], 16) & 0x10000}  # __SO_ACCEPTCON
        for fd in Path("/proc").glob("[0-9]*/fd/*"):
            with contextlib.suppress(OSError):
                if os.readlink(fd) in links:
                    return f": {_process(int(fd.parts[2]))}"
    return ""


@contextlib.contextmanager
def _directory_lock(path: str) -> Iterator[None]:
    """One of our kind at a time looks whether a socket is stale; whoever else holds the lock for long is passed by."""
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + _LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < end:
                    time.sleep(0.01)
                    continue
            break
        yield
    finally:
        os.close(fd)
