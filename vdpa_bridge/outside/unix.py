# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""UNIX stream sockets of the host, as models use them.

Rule of this file: nothing blocks. Whoever would have to wait is told so: None for bytes, 0 for room.
"""

from __future__ import annotations

import contextlib
import socket

from ..service.listening import Listener

_BACKLOG = 128
"""Clients that wait to be accepted; further ones wait in connect."""


class UnixStream:
    """One connection."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._line = bytearray()

    @classmethod
    def connect(cls, path: str) -> UnixStream:
        """OSError when nobody listens at *path*, or too many wait to be accepted there."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.connect(path)
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    def fileno(self) -> int:
        """The descriptor; -1 once closed."""
        return self._sock.fileno()

    @property
    def source(self) -> int:
        """To read from."""
        return self.fileno()

    @property
    def sink(self) -> int:
        """To write to, and to wait for room."""
        return self.fileno()

    @property
    def idle(self) -> bool:
        """Whether nothing came that was not read."""
        try:
            return not self._sock.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def send(self, data: bytes | bytearray) -> int:
        """How many bytes there was room for. OSError when the other end takes no more."""
        try:
            return self._sock.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0

    def read_line(self, most: int) -> bytes | None:
        """The first line, and not a byte behind it; None while it is not complete. ValueError when it ends early or is longer than *most* bytes."""
        try:
            ahead = self._sock.recv(most - len(self._line), socket.MSG_PEEK)
            ahead = self._sock.recv(ahead.find(b"\n") + 1 or len(ahead))
        except BlockingIOError:
            return None
        self._line += ahead
        if self._line.endswith(b"\n"):
            return bytes(self._line)
        if not ahead or len(self._line) >= most:
            raise ValueError(f"{bytes(self._line)!r} is no line")
        return None

    def end_sending(self) -> None:
        """The other end meets the end of what was sent."""
        with contextlib.suppress(OSError):  # it has gone
            self._sock.shutdown(socket.SHUT_WR)

    def end_receiving(self) -> None:
        """The other end cannot send any more."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Harmless when done before."""
        self._sock.close()


class UnixListener:
    """A path to connect to, made anew over a dead one, for this user alone; it goes with ``close``."""

    def __init__(self, path: str) -> None:
        """OSError, as ``Listener.bind`` has it."""
        self._listener = Listener.bind(path)
        self._listener.sock.listen(_BACKLOG)
        self._listener.sock.setblocking(False)

    def fileno(self) -> int:
        """The descriptor."""
        return self._listener.sock.fileno()

    def accept(self) -> UnixStream | None:
        """The next client, None when there is none. OSError when there are no descriptors left."""
        try:
            sock, _ = self._listener.sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        return UnixStream(sock)

    def close(self) -> None:
        """Harmless when done before."""
        try:
            self._listener.close()
        except OSError:  # locked up by now; who listens there next replaces a dead socket
            self._listener.sock.close()
