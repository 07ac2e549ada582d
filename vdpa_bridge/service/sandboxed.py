# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A service in a sandbox: the process that was started opens everything, forks, and keeps what a sandbox must not have.

    in the sandbox     models at work, clients, the log
    outside            socket files and their end, the service manager, who clients are; signals are handed in

Rule of this file: what comes out of the sandbox is hostile. Two kinds of messages are understood, a few words go to the
service manager, and nothing is ever waited for.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import gc
import json
import logging
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence

from ..errors import signal_name
from ..sandbox.policy import Policy
from ..sandbox.preload import preload
from ..sandbox.process import Lack, Outside, check_threads, split
from .journal import Journal, event
from .listening import Listener, PeerCredentials, files_made
from .manager import Notifier
from .service import GRACE, STOP, Service, Signals

_TELL, _WHO = b"tell ", b"who"
_LONGEST = 4096
_TOLD = (b"READY=1", b"STOPPING=1", b"RELOADING=1", b"STATUS=", b"MONOTONIC_USEC=")
"""What the service manager may hear from a sandbox: no descriptors, no other main process."""
_PATIENCE = 1.0
"""Seconds for the answer to who a client is."""
_KILLED_AFTER = GRACE + 1
"""Seconds from a signal, or from the end of the only client, to the end of a process that does not end by itself."""
_UCRED = struct.Struct("=3i")
_HANDED_IN = (*STOP, signal.SIGHUP, signal.SIGUSR1)


class Link:
    """The sandbox's way to ask and tell what it cannot do itself. Synchronization: any thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", int(_PATIENCE), 0))

    def tell(self, data: bytes) -> None:
        """For the service manager; lost when it takes nothing more."""
        with contextlib.suppress(OSError):
            self._sock.send(_TELL + data, socket.MSG_DONTWAIT)

    def who(self, client: socket.socket) -> PeerCredentials:
        """Who is at the other end, by the numbers of the system outside; zeroes when there was no answer."""
        with self._lock, contextlib.suppress(OSError, struct.error):
            with contextlib.suppress(BlockingIOError):  # an answer that came too late for the one before
                self._sock.recv(_LONGEST, socket.MSG_DONTWAIT)
            socket.send_fds(self._sock, [_WHO], [client.fileno()])
            return PeerCredentials(*_UCRED.unpack(self._sock.recv(_UCRED.size)))
        return PeerCredentials(0, 0, 0)


class _Told(Notifier):
    """The service manager, as it is heard of in the sandbox."""

    def __init__(self, link: Link, heard: bool) -> None:
        self._link, self._heard = link, heard

    @property
    def heard(self) -> bool:
        """As outside."""
        return self._heard

    def send(self, *lines: str) -> None:
        """By way of the process outside."""
        if self._heard:
            self._link.tell("\n".join(lines).encode())

    def close(self) -> None:
        """Say no more."""
        self._heard = False


def enter(service: Service, notifier: Notifier, journal: Journal, wish: str) -> int | list[Lack]:
    """Go on in a sandbox; what could not be closed there, where *wish* is ``degrade``. Outside: the status to exit with, once all is over.

    Errors as of ``Service.make`` and ``listen``; OSError in the sandbox that says what is lacking where *wish* is ``on``.
    """
    with Signals() as signals:
        try:
            policy = Policy.of(service.make(signals))
            policy.check_paths()
            listeners = service.listen()
            check_threads()
        except BaseException:
            service.stop()
            raise
        preload(policy.needs.modules)
        gc.freeze()  # what both have stays one copy
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDED_IN)
        side = split(policy.needs.network)
        if isinstance(side, Outside):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDED_IN)
            try:
                with side.link, journal:
                    side.go()
                    return Supervisor(side, signals, notifier, listeners).run()
            finally:
                for file in files_made():
                    file.remove()
    for file in files_made():
        file.leave()
    link = Link(side.link)
    service.confide(_Told(link, notifier.heard), link.who)
    faulthandler.enable()  # the last words of a model that crashes
    lacks = side.close(policy)
    if lacks and wish == "on":
        service.stop()
        raise OSError(errno.EPERM, f"the sandbox cannot be closed: {'; '.join(map(str, lacks))}; or --sandbox=degrade, to go on without")
    return lacks


def show(service: Service) -> dict[str, object]:
    """What the sandbox of *service* leaves open, and what cannot be closed here, which is found out by trying."""
    with Signals() as signals:
        policy = Policy.of(service.make(signals))
    check_threads()
    side = split(policy.needs.network)
    if isinstance(side, Outside):
        with side.link as link:
            side.go()
            said = link.recv(1 << 16)
            os.waitpid(side.pid, 0)
        return policy.facts() | {"lacking_here": json.loads(said or '["the process in the sandbox died"]')}
    try:
        side.link.send(json.dumps([str(lack) for lack in side.close(policy)]).encode())
    finally:
        os._exit(0)


class Supervisor:
    """The process outside. ``run`` lasts as long as the one in the sandbox."""

    def __init__(self, inner: Outside, signals: Signals, notifier: Notifier, listeners: Sequence[Listener]) -> None:
        self._pid, self._link = inner.pid, inner.link
        self._signals = signals
        self._notifier = notifier
        self._listeners = listeners
        self._end: float | None = None
        self._why = ""

    def run(self) -> int:
        """The status to exit with."""
        process = os.pidfd_open(self._pid)
        watch = select.poll()
        watch.register(self._signals, select.POLLIN)
        watch.register(self._link, select.POLLIN)
        watch.register(process, select.POLLIN)
        if all(listener.has_client for listener in self._listeners):  # who are the only ones
            for listener in self._listeners:
                watch.register(listener.sock, 0)
        left = len(self._listeners)
        try:
            while True:
                patience = None if self._end is None else max(0.0, self._end - time.monotonic()) * 1000
                ready = [fd for fd, _ in watch.poll(patience)]
                if process in ready:
                    while self._answer():  # its last words
                        pass
                    return self._status(os.waitpid(self._pid, 0)[1])
                if not ready:
                    self._kill(process)
                for fd in ready:
                    if fd == self._signals.fileno():
                        self._hand_in(process, self._signals.wait())
                    elif fd == self._link.fileno():
                        if self._answer() is False:
                            watch.unregister(fd)
                    else:  # a client hung up
                        watch.unregister(fd)
                        left -= 1
                        if not left:
                            self._ends("its only client is gone")
        finally:
            os.close(process)

    def _hand_in(self, process: int, number: int) -> None:
        if number in _HANDED_IN:
            signal.pidfd_send_signal(process, number)
        if number in STOP:
            for file in files_made():
                file.remove()
            self._ends(signal_name(number))

    def _ends(self, why: str) -> None:
        if self._end is None:
            self._end, self._why = time.monotonic() + _KILLED_AFTER, why

    def _kill(self, process: int) -> None:
        event(logging.CRITICAL, "killed", f"the process in the sandbox did not end within {_KILLED_AFTER:g} s after {self._why}")
        signal.pidfd_send_signal(process, signal.SIGKILL)
        self._end = None

    def _answer(self) -> bool | None:
        """Take one message; None when there is none now, False when there will be none any more."""
        try:
            data, fds, _, _ = socket.recv_fds(self._link, _LONGEST, 1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            return False
        try:
            if data.startswith(_TELL):
                lines = [line for line in data.removeprefix(_TELL).split(b"\n") if line.startswith(_TOLD)]
                if lines:
                    self._notifier.send(*(line.decode(errors="replace") for line in lines))
            elif data == _WHO and fds:
                with contextlib.suppress(OSError):
                    self._link.send(_credentials(fds[0]), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        finally:
            for fd in fds:
                os.close(fd)
        return bool(data)

    def _status(self, waited: int) -> int:
        status = os.waitstatus_to_exitcode(waited)
        if status >= 0:
            return status
        if not self._why:
            event(logging.CRITICAL, "died", f"the process in the sandbox died of {signal_name(-status)}")
        return 128 - status


def _credentials(fd: int) -> bytes:
    """Of the peer of a socket, as bytes; OSError for anything else. The descriptor stays open."""
    sock = socket.socket(fileno=fd)
    try:
        return _UCRED.pack(*PeerCredentials.of(sock))
    finally:
        sock.detach()
