# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The front-end's socket: sends messages, receives replies, never waits for ever.

The socket stays in blocking mode with kernel timeouts (SO_RCVTIMEO): a poll before every call would cost as much as the
call itself.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Sequence

from ..errors import LocalProtocolError, PeerClosed, PeerTimeout, RemoteProtocolError, device_error
from .framing import HEADER, MAX_FDS, NEED_REPLY, REPLY, VERSION, VERSION_MASK, frame
from .messages import message_name

_CHUNK = 65536
_NOSIGNAL = socket.MSG_NOSIGNAL
_REPLY_MASK = VERSION_MASK | REPLY
_OPEN_HINTS = {
    errno.ENOENT: "nothing has made this socket; is the back-end running?",
    errno.ECONNREFUSED: "the socket is there but nobody listens: its back-end is gone",
    errno.EACCES: "connecting needs write permission on the socket",
    errno.ENOTSOCK: "this is not a UNIX socket",
    errno.EAGAIN: "the back-end does not accept the connection; most serve one client at a time",
}

class Connection:
    """A connected vhost-user socket. *name* and *timeout* (seconds for each answer) go into every error.

    Synchronization: one thread at a time.
    """

    def __init__(self, sock: socket.socket, name: str, timeout: float = 5.0) -> None:
        self.name = name
        self.timeout = timeout
        self._sock = sock
        self._buffer = b""
        self._dead: RemoteProtocolError | None = None
        limit = struct.pack("@ll", int(timeout), int(timeout % 1 * 1e6))
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    @classmethod
    def open(cls, path: str, name: str, timeout: float) -> Connection:
        """Connect to *path*; OSError that says what to do when nobody is there."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect(path)
            return cls(sock, name, timeout)
        except TimeoutError:
            sock.close()
            raise device_error(errno.ETIMEDOUT, "connect", name, _OPEN_HINTS[errno.EAGAIN]) from None
        except OSError as error:
            sock.close()
            number = error.errno or errno.EIO
            if "too long" in str(error):
                raise device_error(errno.ENAMETOOLONG, "connect", name, "a UNIX socket path has at most 107 bytes") from None
            raise device_error(number, "connect", name, _OPEN_HINTS.get(number, "")) from None
        except BaseException:
            sock.close()
            raise

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._sock.fileno()

    def _fail(self, error: RemoteProtocolError) -> RemoteProtocolError:
        self._dead = error
        return error

    def send(self, data: bytes, fds: Sequence[int] = (), what: str = "") -> bool:
        """Send all of *data*; the descriptors go with its first byte. False, with nothing sent, when one of them is not open."""
        if self._dead is not None:
            raise type(self._dead)(f"{self.name}: the connection is dead: {self._dead}")
        try:
            sent = socket.send_fds(self._sock, [data], list(fds)) if fds else self._sock.send(data, _NOSIGNAL)
            if sent == len(data):
                return True
            while sent < len(data):
                sent += self._sock.send(data[sent:], socket.MSG_NOSIGNAL)
        except BlockingIOError:
            raise self._fail(PeerTimeout(f"{self.name}: the peer did not read {what or 'a message'} for {self.timeout:g} s")) from None
        except (BrokenPipeError, ConnectionResetError):
            raise self._fail(PeerClosed(f"{self.name}: the peer closed the connection before {what or 'a message'}")) from None
        except OSError as error:
            if error.errno == errno.EBADF and fds:
                return False
            if error.errno == errno.ETOOMANYREFS:
                raise LocalProtocolError(f"{self.name}: {what}: too many descriptors are under way: {error.strerror}") from None
            raise
        return True

    def message(self, what: str) -> bytes:
        """The next whole message from the peer, its header included. *what* we wait for goes into errors."""
        buffer = self._buffer
        deadline = 0.0
        while True:
            have = len(buffer)
            if have >= HEADER.size:
                request, flags, size = HEADER.unpack_from(buffer)
                end = HEADER.size + size
                if flags & _REPLY_MASK != VERSION | REPLY or size > _CHUNK:
                    raise self._fail(
                        RemoteProtocolError(f"{self.name}: {what}: answered by {message_name(request)}, flags {flags:#x}, {size} bytes: not a reply")
                    )
                if have == end:
                    self._buffer = b""
                    return buffer
                if have > end:
                    self._buffer = buffer[end:]
                    return buffer[:end]
            try:
                more = self._sock.recv(_CHUNK)
            except BlockingIOError:
                raise self._fail(PeerTimeout(f"{self.name}: no answer to {what} within {self.timeout:g} s")) from None
            except ConnectionResetError:
                more = b""
            if not more:
                where = f"in the middle of its answer to {what}" if buffer else f"instead of answering {what}"
                raise self._fail(PeerClosed(f"{self.name}: the peer closed the connection {where}"))
            if buffer:
                if deadline and time.monotonic() > deadline:
                    raise self._fail(PeerTimeout(f"{self.name}: the answer to {what} did not end within {self.timeout:g} s"))
                deadline = deadline or time.monotonic() + self.timeout
                buffer += more
            else:
                buffer = more

    def ask(self, number: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0) -> bytes:
        """One legacy message that has a reply; returns the reply's payload."""
        what = message_name(number)
        self.send(frame(number, payload, VERSION | flags), fds, what)
        answer = self.message(what)
        request, got, _ = HEADER.unpack_from(answer)
        if request != number or got & ~NEED_REPLY != VERSION | REPLY:  # libvhost-user echoes NEED_REPLY (QEMU 10.0)
            raise self._fail(RemoteProtocolError(f"{self.name}: {what}: answered by {message_name(request)} with flags {got:#x}"))
        return answer[HEADER.size :]

    def close(self) -> None:
        """Close; harmless when done before."""
        self._sock.close()
        self._dead = self._dead or PeerClosed("closed by this side")

    def __repr__(self) -> str:
        return f"<Connection {self.name} pid {os.getpid()}>"


__all__ = ["MAX_FDS", "Connection"]
