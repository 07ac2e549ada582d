# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The second socket of legacy vhost-user, on which the back-end speaks first (SET_BACKEND_REQ_FD), from both ends.

Two messages are spoken: CONFIG_CHANGE_MSG, the configuration space changed, and IOTLB_MSG, a mapping is missing (by our
back-end's end alone). The specification lets the front-end answer only when asked to, which a miss does.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import stat
import struct
import threading

from ..errors import RemoteProtocolError
from ..eventfd import EventFd
from .framing import HEADER, NEED_REPLY, REPLY_FLAGS, VERSION, VERSION_MASK, frame
from .messages import BACKEND_CONFIG_CHANGE, BACKEND_IOTLB

_log = logging.getLogger(__name__)

_LARGEST = 4096
"""Bytes of a message from a back-end; all that are specified are far smaller."""
_ANSWER = struct.Struct("=IIIQ")
"""A whole acknowledgement."""
_NAME = f"IOTLB_MSG ({BACKEND_IOTLB}) to the client"


class BackendEnd:
    """Our end as a back-end. Owns the socket *fd*, and two eventfds for a device to signal: ``changed`` configuration, ``missed`` mappings.

    ``event`` is readable when there is something to do: an eventfd was signalled, or the front-end answered.
    """

    def __init__(self, fd: int) -> None:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            os.close(fd)
            raise ValueError("the descriptor is no socket")
        try:
            self._sock = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)  # O_PATH: the name of a socket, and no way into it
            raise
        self.changed = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.missed = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self.changed, select.EPOLLIN)
        self._epoll.register(self.missed, select.EPOLLIN)
        self.over = False
        """The front-end closed its end."""
        self._buffer = b""
        self._asked = False

    @property
    def event(self) -> int:
        """A descriptor to wait for."""
        return self._epoll.fileno()

    def announce(self) -> None:
        """Pass a change on, if there was one. A front-end that does not read loses the message, not we our time."""
        if not _drained(self.changed):
            return
        try:
            self._sock.send(frame(BACKEND_CONFIG_CHANGE), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            _log.warning("the front-end missed a configuration change: %s", error.strerror)

    def ask(self, payload: bytes) -> None:
        """Send an IOTLB message whose answer is wanted. RemoteProtocolError when the front-end does not take it."""
        message = frame(BACKEND_IOTLB, payload, VERSION | NEED_REPLY)
        if not self._asked and not self.over:
            self._asked = True
            self._epoll.register(self._sock, select.EPOLLIN)
        try:
            sent = self._sock.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            raise RemoteProtocolError(f"{_NAME}: the client does not take the message: {error.strerror}") from None
        if sent < len(message):
            raise RemoteProtocolError(f"{_NAME}: the client took {sent} of {len(message)} bytes")

    def answers(self) -> list[int]:
        """What came back since, in the order of the questions; 0 is success. RemoteProtocolError when it is nothing of the kind."""
        _drained(self.missed)
        if not self._asked:
            return []
        try:
            more = self._sock.recv(_LARGEST, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            more = b""
        if not more:
            self.over = True
            self._epoll.unregister(self._sock)
            self._asked = False
            return []
        self._buffer += more
        found = []
        while len(self._buffer) >= _ANSWER.size:
            request, flags, size, value = _ANSWER.unpack_from(self._buffer)
            if (request, flags, size) != (BACKEND_IOTLB, REPLY_FLAGS, 8):
                raise RemoteProtocolError(f"{_NAME}: the answer is request {request}, flags {flags:#x}, {size} bytes, not {BACKEND_IOTLB}, {REPLY_FLAGS:#x}, 8")
            found.append(value)
            self._buffer = self._buffer[_ANSWER.size :]
        return found

    def close(self) -> None:
        """Close all."""
        self._epoll.close()
        self._sock.close()
        os.close(self.changed)
        os.close(self.missed)


def _drained(event: int) -> bool:
    """Whether an eventfd of ours was signalled, and is not any more."""
    try:
        os.eventfd_read(event)
    except BlockingIOError:
        return False
    return True


class FrontEnd:
    """Our end as a front-end: a thread that signals *event* for every configuration change. Owns both."""

    def __init__(self, sock: socket.socket, event: EventFd, name: str) -> None:
        self._sock = sock
        self._event = event
        self._name = name
        self._thread = threading.Thread(target=self._listen, name=f"back-end channel of {name}", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        buffer = b""
        while True:
            try:
                more = self._sock.recv(_LARGEST)
            except OSError:
                return
            if not more:
                return
            buffer += more
            while len(buffer) >= HEADER.size:
                request, flags, size = HEADER.unpack_from(buffer)
                if flags & VERSION_MASK != VERSION or size > _LARGEST:
                    _log.warning("%s: the back-end's channel carries flags %#x, %d bytes: closed", self._name, flags, size)
                    return
                if len(buffer) < HEADER.size + size:
                    break
                buffer = buffer[HEADER.size + size :]
                self._take(request, bool(flags & NEED_REPLY))

    def _take(self, request: int, need_reply: bool) -> None:
        known = request == BACKEND_CONFIG_CHANGE
        if known:
            self._event.signal()
        if need_reply:
            try:
                answer = int(not known).to_bytes(8, "little")
                self._sock.send(frame(request, answer, REPLY_FLAGS), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError as error:
                _log.warning("%s: the back-end does not read its channel: %s", self._name, error.strerror)

    def close(self) -> None:
        """End the thread; harmless when done before."""
        if self._sock.fileno() >= 0:
            try:
                self._sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the back-end hung up first
            while self._thread.is_alive():
                self._thread.join(0.05)
                self._event.free()
            self._sock.close()
            self._event.close()
