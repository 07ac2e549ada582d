# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A UNIX stream socket as the other end: each frame behind its length in 32 bits, big-endian, as QEMU's ``-netdev stream`` and passt have it.

Rule of this file: whoever sends an impossible length has lost the thread, and is hung up on. The link is up as long as somebody is connected.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import struct

from ..outside.unix import UnixListener
from .base import LONGEST, PLAIN, SHORTEST, Netdev

_log = logging.getLogger(__name__)

_LENGTH = struct.Struct(">I")
_CHUNK = 1 << 18
"""Bytes read at once."""


class StreamNetdev(Netdev):
    """Frames over one connection at a time."""

    link = False

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._sock: socket.socket | None = None
        self._came = b""

    def __str__(self) -> str:
        return self._name

    def _take(self, sock: socket.socket) -> None:
        """Go on with a new connection."""
        sock.setblocking(False)
        self._sock = sock
        self.link = True

    def watched(self, queue: int) -> int:
        """The connection."""
        return self._sock.fileno() if self._sock is not None else -1

    def receive(self, queue: int) -> list[bytes]:
        """What one read brings; the rest of a frame comes with the next one."""
        if self._sock is None:
            return []
        try:
            data = self._sock.recv(_CHUNK)
        except BlockingIOError:
            return []
        except OSError as error:
            self._hang_up(str(error.strerror))
            return []
        if not data:
            self._hang_up("the other side closed the connection")
            return []
        return self._split(self._came + data)

    def _split(self, data: bytes) -> list[bytes]:
        packets: list[bytes] = []
        at = 0
        while at + _LENGTH.size <= len(data):
            (length,) = _LENGTH.unpack_from(data, at)
            if not SHORTEST <= length <= LONGEST:
                self._hang_up(f"a frame of {length} bytes: there are some of {SHORTEST} to {LONGEST}")
                return packets
            if at + _LENGTH.size + length > len(data):
                break
            at += _LENGTH.size
            packets.append(PLAIN + data[at : at + length])
            at += length
        self._came = data[at:]
        return packets

    def _form(self, packet: bytes) -> bytes:
        return _LENGTH.pack(len(packet) - len(PLAIN)) + packet[len(PLAIN) :]

    def _put(self, queue: int, packet: bytes) -> int:
        if self._sock is None:
            raise OSError(errno.ENOTCONN, "nobody is connected")
        try:
            return self._sock.send(packet)
        except BlockingIOError:
            raise
        except OSError as error:
            self._hang_up(str(error.strerror))
            raise

    def stop(self) -> None:
        """The rest of a frame that is under way still has to go: the other side counts on it."""

    def _hang_up(self, why: str) -> None:
        if self._sock is None:
            return
        _log.warning("%s: %s", self, self._ended(why))
        self.leaving(self._sock.fileno())
        self._sock.close()
        self._sock, self._came, self.link = None, b"", False
        self._held.clear()

    def _ended(self, why: str) -> str:
        return why

    def close(self) -> None:
        """Hang up."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None


class StreamClient(StreamNetdev):
    """Connected to *path*; again by ``refresh``, when the other side was gone."""

    def __init__(self, path: str) -> None:
        """OSError when nobody listens there."""
        super().__init__(f"stream to {path}")
        self._path = path
        self.reaches = (path,)
        self._connect()

    def _connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(5)
            sock.connect(self._path)
        except OSError as error:
            sock.close()
            raise OSError(error.errno, f"cannot connect to {self._path}: {error.strerror or error}") from None
        self._take(sock)

    def refresh(self) -> None:
        """Try again, if there is need to."""
        if self._sock is None:
            with contextlib.suppress(OSError):
                self._connect()


class StreamServer(StreamNetdev):
    """Listens at *path*, for one client after the other."""

    def __init__(self, path: str) -> None:
        """OSError when *path* cannot be listened on."""
        super().__init__(f"stream at {path}")
        self._listener = UnixListener(path)

    def watched(self, queue: int) -> int:
        """The connection, or what brings the next one."""
        return super().watched(queue) if self._sock is not None else self._listener.fileno()

    def receive(self, queue: int) -> list[bytes]:
        """Frames, or a client."""
        if self._sock is not None:
            return super().receive(queue)
        if (client := self._listener.accept()) is not None:
            self.leaving(self._listener.fileno())
            self._take(client)
        return []

    def close(self) -> None:
        """The file goes as well."""
        super().close()
        self._listener.close()
