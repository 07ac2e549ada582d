# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The vhost-user server's socket: one listening socket, client after client, or one that is connected already; one thread.

Rule of this file: a client that misbehaves, stalls in the middle of a message or disappears costs itself the connection
and nobody else anything. Waiting for the next message of a client has no limit (an idle client is a good client);
everything else has.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from typing import Self

from ..backends.base import Backend
from ..errors import PeerClosed, ProtocolError, RemoteProtocolError, reason
from .framing import MAX_FDS, Receiver, close_all
from .messages import message_name
from .recvmsg import CHUNK, receive
from .session import Session
from .vdpa_mode import MAX_PAYLOAD, fds_wanted

_log = logging.getLogger(__name__)

_PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED, errno.EINTR}
"""What can be wrong with accept today and right tomorrow: other devices and their clients share our limits."""
_PAUSE = 0.1
"""Seconds before accept is tried again."""
_SILENCE = 1.0
"""Seconds after which a client whose rings cannot work yet is taken to have forgotten something."""


class Server:
    """Serves the device that *open_device* opens, to whoever connects to *path* (or to the listening socket *sock*).

    A *sock* that is connected already brings the only client, or one after the other as descriptors (SOCK_SEQPACKET).

    Each connection opens the device anew and closes it at its end. *timeout* in seconds: how long a client may stop
    in the middle of a message, or leave replies unread. *relay*: see ``Session``.
    """

    def __init__(
        self,
        open_device: Callable[[], Backend],
        path: str = "",
        *,
        sock: socket.socket | None = None,
        vdpa: str = "prefer",
        timeout: float = 5.0,
        relay: bool = True,
    ) -> None:
        self.path = path
        self._open_device = open_device
        self._vdpa = vdpa
        self._relay = relay
        self._timeout = timeout
        self._send_limit, self._silence = _time_limit(timeout), _time_limit(_SILENCE)
        self._own_path = sock is None
        self._listener = sock if sock is not None else _listen(path)
        self._listens = bool(self._listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        self._brings = self._listener.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_SEQPACKET
        self._client: socket.socket | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.session: Session | None = None
        """That of the client that is being served."""
        self.served = 0
        """Connections that ended so far."""

    def start(self) -> Self:
        """Serve in a thread of its own."""
        self._thread = threading.Thread(target=self.run, name=f"vhost-user server {self.path}", daemon=True)
        self._thread.start()
        return self

    def run(self) -> None:
        """Serve until ``stop``, or until the only client is gone."""
        if not self._listens and not self._brings:
            self._serve_and_close(self._listener)
            return
        waits = False
        while not self._stopping.is_set():
            try:
                client = self._brought() if self._brings else self._listener.accept()[0]
            except OSError as error:
                if self._stopping.is_set():
                    return
                if error.errno not in _PASSING:
                    raise
                if not waits:
                    _log.warning("%s: a client has to wait: %s", self.path, reason(error))
                waits = True
                self._stopping.wait(_PAUSE)
                continue
            waits = False
            if client is None:
                return
            self._serve_and_close(client)

    def _brought(self) -> socket.socket | None:
        """The next client that whoever is at the other end of our socket passes; None when nobody is any more."""
        while True:
            data, fds, _, _ = socket.recv_fds(self._listener, 64, 1)
            if not data:
                return None
            if fds:
                return socket.socket(fileno=fds[0])

    def _serve_and_close(self, client: socket.socket) -> None:
        with client:
            self._client = client
            if not self._stopping.is_set():
                self._serve(client)
            self._client = None
        self.served += 1

    # For those who watch, in the thread of the server --------------------------------------------------------------------

    def attend(self, client: socket.socket | None) -> None:
        """From now on *client* is served; None: it is gone, and its device is closed."""

    def tell(self, level: int, name: str, why: str = "", **more: object) -> None:
        """What happened to the client: ``refuse`` (no device could be opened), ``connect``, ``wait``, ``disconnect`` or ``drop``, and why; *more* when it ends."""
        _log.log(level, "%s: %s: %s", self.path, name, why)

    def stop(self) -> None:
        """End the current connection, if any, and stop listening; harmless when done before. Any thread."""
        self._stopping.set()
        for sock in (self._listener, self._client):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(self._timeout + 5)
        self._listener.close()
        if self._own_path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
            self._own_path = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    # One connection -----------------------------------------------------------------------------------------------------

    def _serve(self, client: socket.socket) -> None:
        receiver = Receiver(fds_wanted, MAX_PAYLOAD, message_name)
        try:
            self.attend(client)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, self._send_limit)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, self._silence)
            self.session = self._open()
            if self.session is not None:
                self._until_end(client, self.session, receiver)
        except Exception:  # a model's, for one; the next client may have more luck
            _log.exception("%s: a defect of this server", self.path)
        finally:
            receiver.close()
            self._close()
            self.attend(None)

    def _open(self) -> Session | None:
        try:
            return Session(self._open_device(), self._vdpa, self._relay)
        except (OSError, ProtocolError, ValueError) as error:
            self.tell(logging.ERROR, "refuse", f"cannot open the device: {reason(error)}")
            return None

    def _close(self) -> None:
        session, self.session = self.session, None
        try:
            if session is not None:
                session.close()
        except (OSError, ProtocolError) as error:
            _log.warning("%s: closing the device: %s", self.path, reason(error))
        except Exception:
            _log.exception("%s: closing the device failed", self.path)

    def _until_end(self, client: socket.socket, session: Session, receiver: Receiver) -> None:
        start = time.monotonic()
        level, name, why = logging.WARNING, "drop", "a defect of this server"
        self.tell(logging.INFO, "connect")
        try:
            self._converse(client, session, receiver)
        except PeerClosed as error:
            level, name, why = logging.INFO, "disconnect", str(error)
        except RemoteProtocolError as error:
            why = str(error)
            with contextlib.suppress(OSError):
                client.send(session.last_words(error), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except OSError as error:
            why = reason(error)
        finally:
            if self._stopping.is_set():
                level, name, why = logging.INFO, "disconnect", "this server stops"
            self.tell(level, name, why, mode=session.mode, seconds=round(time.monotonic() - start, 3))

    def _converse(self, client: socket.socket, session: Session, receiver: Receiver) -> None:
        sock = client.fileno()
        while True:
            if receiver.partial and not _readable([sock], self._timeout):
                raise RemoteProtocolError(f"a message did not end within {self._timeout:g} s")
            if (event := session.event) >= 0:
                sources = [sock, event]
                ready = _readable(sources, _SILENCE) or self._silent(session, sources)
                if event in ready:
                    session.on_event()
                if sock not in ready:
                    continue
            try:
                data, fds, lost = receive(sock, MAX_FDS)
            except BlockingIOError:
                self._silent(session, [sock])
                continue
            except ConnectionResetError:
                data, fds, lost = b"", [], False
            if lost:
                close_all(fds)
                if len(fds) < MAX_FDS:
                    raise OSError(errno.EMFILE, f"descriptors were lost, {len(fds)} came: this process has no room for more (RLIMIT_NOFILE)")
                raise RemoteProtocolError(f"more than {MAX_FDS} descriptors with one message")
            if not data:
                close_all(fds)
                if receiver.partial:
                    raise RemoteProtocolError("the client hung up in the middle of a message")
                raise PeerClosed("the client hung up")
            receiver.feed(data, fds, cut=len(data) == CHUNK)
            replies = b""
            try:
                while (message := receiver.next()) is not None:
                    replies += session.handle(message)
            except RemoteProtocolError:
                with contextlib.suppress(RemoteProtocolError):
                    _send(client, replies)  # what came before the wrong message has its answer
                raise
            _send(client, replies)

    def _silent(self, session: Session, sources: list[int]) -> set[int]:
        """Nothing came for a while: tell what the client owes its rings, and wait on, which has no limit."""
        if owed := session.waits_for:
            self.tell(logging.WARNING, "wait", owed)
        return _readable(sources)


def _readable(fds: list[int], timeout: float | None = None) -> set[int]:
    """Which of *fds* can be read without waiting, after *timeout* seconds at most. With poll: select ends at descriptor 1023."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(None if timeout is None else timeout * 1000)}


def _time_limit(seconds: float) -> bytes:
    """A ``struct timeval`` for SO_SNDTIMEO and SO_RCVTIMEO, which take 0 for no limit."""
    microseconds = max(1, int(seconds * 1e6))
    return struct.pack("@ll", microseconds // 1_000_000, microseconds % 1_000_000)


def _send(client: socket.socket, data: bytes) -> None:
    sent = 0
    while sent < len(data):
        try:
            sent += client.send(data[sent:], socket.MSG_NOSIGNAL)
        except BlockingIOError:
            raise RemoteProtocolError("the client does not read its replies") from None
        except (BrokenPipeError, ConnectionResetError):
            raise PeerClosed("the client hung up without reading its replies") from None


def _listen(path: str) -> socket.socket:
    """A listening socket at exactly *path*; a stale socket file is replaced, a live one is EADDRINUSE."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _stale(path):
                raise OSError(error.errno, f"cannot listen on {path}: {error.strerror or error}") from None
            os.unlink(path)
            sock.bind(path)
        sock.listen(8)
    except BaseException:
        sock.close()
        raise
    return sock


def _stale(path: str) -> bool:
    """Whether *path* is a socket that nobody listens on."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
