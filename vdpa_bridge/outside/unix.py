# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""UNIX stream sockets of the host, as models use them.

Rule of this file: nothing blocks. Whoever would have to wait is told so: None for bytes and clients, 0 for room.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket

from ..errors import reason
from ..service.listening import Listener
from .timer import Timer

_log = logging.getLogger(__name__)

_BACKLOG = 128
"""Clients that wait to be accepted; further ones wait in connect."""
_PAUSE = 0.25
"""Seconds before a client that could not be accepted is tried again."""


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

    def receive(self, most: int) -> bytes | None:
        """What came, up to *most* bytes; empty at the end, None when nothing is there. OSError when the other end broke it off."""
        try:
            return self._sock.recv(most)
        except BlockingIOError:
            return None

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
    """A path to connect to, made anew over a dead one, for this user alone; it goes with ``close``.

    A socket whose client cannot be accepted, as no descriptor is left, stays readable. So what is waited for here is an epoll
    descriptor, behind which a timer takes the place of the socket for a while; both are had from the beginning.
    """

    def __init__(self, path: str) -> None:
        """OSError, as ``Listener.bind`` has it, and when there are no descriptors left."""
        with contextlib.ExitStack() as undo:
            self._epoll = undo.enter_context(select.epoll())
            self._timer = undo.enter_context(contextlib.closing(Timer()))
            self._listener = undo.enter_context(contextlib.closing(Listener.bind(path)))
            self._listener.sock.listen(_BACKLOG)
            self._listener.sock.setblocking(False)
            self._epoll.register(self._listener.sock.fileno(), select.EPOLLIN)
            self._epoll.register(self._timer.fileno(), select.EPOLLIN)
            undo.pop_all()
        self._pauses = self._complained = False

    def fileno(self) -> int:
        """Readable when ``accept`` is worth calling; -1 once closed."""
        return -1 if self._epoll.closed else self._epoll.fileno()

    def accept(self) -> socket.socket | None:
        """The next client, as a socket that does not block; None when there is none, or none can be had now."""
        if self._pauses:
            self._pause(False)
        try:
            sock, _ = self._listener.sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:  # no descriptor or memory: as likely as not there is some soon
            if not self._complained:
                _log.warning("%s: a client has to wait: %s", self._listener.place, reason(error))
            self._complained = True
            self._pause(True)
            return None
        self._complained = False
        sock.setblocking(False)
        return sock

    def _pause(self, pauses: bool) -> None:
        self._pauses = pauses
        self._epoll.modify(self._listener.sock.fileno(), 0 if pauses else select.EPOLLIN)
        if pauses:
            self._timer.start(_PAUSE)
        else:
            self._timer.stop()

    def close(self) -> None:
        """Harmless when done before."""
        self._epoll.close()
        self._timer.close()
        try:
            self._listener.close()
        except OSError:  # locked up by now; who listens there next replaces a dead socket
            self._listener.sock.close()
