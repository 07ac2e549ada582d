# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The second socket of legacy vhost-user, on which the back-end speaks first (SET_BACKEND_REQ_FD), from both ends.

One message is spoken: CONFIG_CHANGE_MSG, the configuration space changed. The specification lets the front-end answer
only when asked to, and nobody asks.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import threading

from ..eventfd import EventFd
from .framing import HEADER, NEED_REPLY, REPLY_FLAGS, VERSION, VERSION_MASK, frame
from .messages import BACKEND_CONFIG_CHANGE

_log = logging.getLogger(__name__)

_LARGEST = 4096
"""Bytes of a message from a back-end; all that are specified are far smaller."""


class BackendEnd:
    """Our end as a back-end. Owns the socket *fd*, and ``event``, an eventfd for a device to signal its changes with."""

    def __init__(self, fd: int) -> None:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            os.close(fd)
            raise ValueError("the descriptor is no socket")
        try:
            self._sock = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)  # O_PATH: the name of a socket, and no way into it
            raise
        self.event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def announce(self) -> None:
        """Pass a change on, if there was one. A front-end that does not read loses the message, not we our time."""
        try:
            os.eventfd_read(self.event)
        except BlockingIOError:
            return
        try:
            self._sock.send(frame(BACKEND_CONFIG_CHANGE), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            _log.warning("the front-end missed a configuration change: %s", error.strerror)

    def close(self) -> None:
        """Close both."""
        self._sock.close()
        os.close(self.event)


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
