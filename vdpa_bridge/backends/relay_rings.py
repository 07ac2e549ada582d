# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The thread that moves chains between the rings of a client and our own rings on the device behind.

Rules of this file: rings are touched under the lock alone, so that an operation that holds it sees them at rest; eventfds
are signalled without it, as whoever shares one can make that block. Eventfds are watched edge-triggered and never read.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..errors import reason
from ..eventfd import EventFd
from ..virtqueue import AGAIN, CALL, KICK, MOVED, DeviceQueue, DriverQueue, IovaMap, Relay

QUIET = 0.05
"""Seconds without a completion after which a device is taken to keep what it has, such as receive buffers."""
_PATIENCE = 5.0
"""Seconds that chains may stay open of which later ones are done."""


@dataclass(eq=False)
class Behind:
    """Our ring on the device, with eventfds of our own."""

    queue: DriverQueue[None]
    kick: EventFd
    call: EventFd

    def close(self) -> None:
        """The device no longer has them."""
        self.kick.close()
        self.call.close()


class RelayedRing:
    """A client's ring with ours behind it. The client's eventfds belong to the session."""

    def __init__(self, front: DeviceQueue, behind: Behind, places: IovaMap, kick: EventFd | None, call: EventFd | None) -> None:
        self.front = front
        self.behind = behind
        self.kick = kick
        self.call = call
        self.enabled = True
        self._relay = Relay(front, behind.queue, places)

    def move(self, take: bool) -> int:
        """One round; OSError EPROTO when either ring is broken, which says whose fault it is."""
        try:
            return self._relay.move(take)
        except OSError as error:
            if self.front.broken:
                raise
            raise OSError(error.errno, f"the device behind the relay: {reason(error)}") from None

    @property
    def open(self) -> int:
        """Chains that the client has not back yet."""
        return self._relay.open

    @property
    def resumable(self) -> bool:
        """Whether open chains are the last ones, so that the ring can go on before them."""
        return self._relay.base is not None

    @property
    def base(self) -> int:
        """Where the client's ring stands: behind what was given back."""
        base = self._relay.base
        return self.front.base if base is None else base


class RelayRunner:
    """All rings of one relay and their thread, from ``__init__`` to ``close``.

    *broken* is called, under the lock, with the index of a ring that cannot go on and why.
    Synchronization: everything but ``close`` is called with *lock* held.
    """

    def __init__(self, name: str, broken: Callable[[int, str], None]) -> None:
        self.lock = threading.RLock()
        self.rings: dict[int, RelayedRing] = {}
        self._broken = broken
        self._watched: dict[int, int] = {}
        self._pending: set[int] = set()
        self._signals: list[EventFd] = []
        self._closing = False
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name=f"relay of {name}", daemon=True)
        self._thread.start()

    def add(self, index: int, ring: RelayedRing) -> None:
        """A ring comes in, and is looked at without a kick."""
        self.rings[index] = ring
        self._watch(ring.kick, index)
        self._watch(ring.behind.call, index)
        self.look(index)

    def look(self, index: int) -> None:
        """See to a ring soon."""
        self._pending.add(index)
        os.eventfd_write(self._wake, 1)

    def remove(self, index: int) -> RelayedRing | None:
        """A ring goes."""
        ring = self.rings.pop(index, None)
        if ring is not None:
            self._unwatch(ring.kick)
            self._unwatch(ring.behind.call)
            self._pending.discard(index)
        return ring

    def rekick(self, index: int, kick: EventFd | None) -> None:
        """A ring gets another kick eventfd; the caller closes the old one afterwards."""
        ring = self.rings[index]
        self._unwatch(ring.kick)
        ring.kick = kick
        self._watch(kick, index)
        self.look(index)

    def signal(self, event: EventFd) -> None:
        """Signal *event* from the thread, once it holds no lock."""
        self._signals.append(event)
        os.eventfd_write(self._wake, 1)

    def clear(self) -> None:
        """Forget all rings."""
        for index in list(self.rings):
            self.remove(index)

    def settle(self, rings: Iterable[RelayedRing]) -> None:
        """Take nothing more, and wait until the device has given back what it has, or keeps it.

        Chains that it keeps must be the last ones of their ring: a ring of which others stay open is broken.
        """
        now = time.monotonic()
        quiet, end = now + QUIET, now + _PATIENCE
        with select.epoll() as finished:
            waiting = [ring for ring in rings if ring.open]
            for ring in waiting:
                finished.register(ring.behind.call.fd, select.EPOLLIN | select.EPOLLET)
            while now < end:
                for ring in waiting:
                    if self._move(ring, False) & (MOVED | AGAIN):
                        quiet = now + QUIET
                waiting = [ring for ring in waiting if ring.open and ring in self.rings.values()]
                if not waiting or (now >= quiet and all(ring.resumable for ring in waiting)):
                    break
                finished.poll(max(0.001, min(end, max(quiet, now)) - now))
                now = time.monotonic()
        for index, ring in list(self.rings.items()):
            if ring in waiting and not ring.resumable:
                self._break(index, f"the device behind the relay gave chains back, but not the {ring.open} before them within {_PATIENCE:g} s")
        os.eventfd_write(self._wake, 1)

    def finish(self) -> None:
        """The device has stopped: what it gave back before that is the client's."""
        for ring in list(self.rings.values()):
            while self._move(ring, False) & AGAIN:
                pass
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """End the thread; called without the lock. Harmless when done before."""
        with self.lock:
            if self._closing:
                return
            self.clear()
            self._signals.clear()
            self._closing = True
            os.eventfd_write(self._wake, 1)
        self._thread.join(_PATIENCE)
        self._epoll.close()
        os.close(self._wake)

    def _watch(self, event: EventFd | None, index: int) -> None:
        if event is not None:
            self._watched[event.fd] = index
            self._epoll.register(event.fd, select.EPOLLIN | select.EPOLLET)

    def _unwatch(self, event: EventFd | None) -> None:
        if event is not None:
            del self._watched[event.fd]
            self._epoll.unregister(event.fd)

    def _run(self) -> None:
        while True:
            events = self._epoll.poll(0 if self._pending else -1)
            with self.lock:
                if self._closing:
                    return
                for fd, _ in events:
                    if fd == self._wake:
                        os.eventfd_read(fd)
                    elif fd in self._watched:
                        self._pending.add(self._watched[fd])
                ready, self._pending = self._pending, set()
                for index in sorted(ready):
                    ring = self.rings.get(index)
                    if ring is not None and ring.enabled and self._move(ring, True) & AGAIN:
                        self._pending.add(index)
                signals, self._signals = self._signals, []
            for event in signals:
                event.signal()

    def _move(self, ring: RelayedRing, take: bool) -> int:
        try:
            due = ring.move(take)
        except OSError as error:
            for index in [index for index, other in self.rings.items() if other is ring]:
                self._break(index, reason(error))
            return 0
        if due & KICK:
            self._signals.append(ring.behind.kick)
        if due & CALL and ring.call is not None:
            self._signals.append(ring.call)
        return due

    def _break(self, index: int, why: str) -> None:
        self.remove(index)
        self._broken(index, why)
