# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Eventfds that somebody else owns too, and may misuse.

A peer can fill the counter of an eventfd that it gave us, so that our write blocks. Hence ``signal`` is never called with
a device's lock held (``nudge`` may be), and ``close`` frees a writer that is stuck.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading

_PATIENCE = 0.05
"""Seconds that a writer may be stuck before its counter is drained."""


class EventFd:
    """Our own descriptor for an eventfd that *fd* lends. Synchronization: any thread."""

    def __init__(self, fd: int) -> None:
        """OSError EBADF when *fd* is not open, EINVAL when it is no eventfd, as the kernel's eventfd_fget says."""
        try:
            kind = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            raise OSError(errno.EBADF, f"descriptor {fd} is not open") from None
        if kind != "anon_inode:[eventfd]":  # files and memfds can have the word in their name
            raise OSError(errno.EINVAL, f"the descriptor is {kind}, not an eventfd")
        self.fd = os.dup(fd)
        self._lock = threading.Lock()

    @classmethod
    def borrow(cls, fd: int) -> EventFd | None:
        """None for -1, as "no eventfd" is written."""
        return None if fd == -1 else cls(fd)

    def signal(self) -> None:
        """Add 1; nothing happens once closed. Waits while the counter is full, or does nothing then if its owner made it so."""
        with self._lock:
            if self.fd >= 0:
                with contextlib.suppress(BlockingIOError):  # there is an event waiting
                    os.eventfd_write(self.fd, 1)

    def nudge(self) -> None:
        """``signal`` for callers that must not wait: nothing is added to a full counter, as there is an event waiting anyway.

        Whoever shares it may fill it just now, so a thread that can be freed does the write.
        """
        if self.fd < 0:
            return
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        if poll.poll(0):
            writer = threading.Thread(target=self.signal, name="nudge", daemon=True)
            writer.start()
            writer.join(_PATIENCE)
            while writer.is_alive():
                self.free()
                writer.join(_PATIENCE)

    def free(self) -> None:
        """Drain a counter that keeps a writer waiting; never waits itself, whoever else reads."""
        if self.fd >= 0:
            with contextlib.suppress(BlockingIOError):
                os.preadv(self.fd, [bytearray(8)], -1, os.RWF_NOWAIT)

    def close(self) -> None:
        """Close; harmless when done before."""
        while not self._lock.acquire(timeout=_PATIENCE):
            self.free()
        try:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1
        finally:
            self._lock.release()


def kick(fd: int) -> None:
    """``EventFd.nudge`` for a descriptor that is only lent. OSError as for ``EventFd``."""
    event = EventFd(fd)
    try:
        event.nudge()
    finally:
        event.close()


def was_kicked(fd: int) -> bool:
    """Whether there was a kick that nobody has read, as kernel devices never do."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


class Metronome:
    """Kicks for a driver that does not kick: a thread that adds 1 to each of its eventfds every *period* seconds.

    Synchronization: any thread.
    """

    def __init__(self, period: float = 1e-4) -> None:
        self.period = period
        self._fds: set[int] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self) -> int:
        """A new eventfd, kicked from now on until ``remove``; the caller owns it."""
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        with self._lock:
            self._fds.add(fd)
            if self._thread is None:
                self._end = threading.Event()
                self._thread = threading.Thread(target=self._run, name="metronome", daemon=True)
                self._thread.start()
        return fd

    def remove(self, fd: int) -> None:
        """Stop kicking *fd*, which may be closed afterwards; harmless for others."""
        with self._lock:
            self._fds.discard(fd)

    def _run(self) -> None:
        while not self._end.wait(self.period):
            with self._lock:
                for fd in self._fds:
                    try:
                        os.eventfd_write(fd, 1)
                    except BlockingIOError:
                        pass  # full after 2^64 kicks nobody read: there is an event waiting

    def close(self) -> None:
        """End the thread; harmless when done before."""
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            self._thread = None
