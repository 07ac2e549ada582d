# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The thread that serves the rings of a model: waits for kicks, hands batches to the model, signals calls. Rings that have
an engine are served by threads of their own (workers.py), which come here with what only the model can do.

Rules of this file: every touch of a ring happens under the device's lock, so that an operation that holds the lock sees
the rings at rest; calls are signalled without it, as a hostile driver can make that block. Kick eventfds are watched
edge-triggered and never read, as the kernel does with them: each write is an event, and a peer that reads its own
eventfd cannot make us block.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable

from ..engines import Engine, Gate
from ..eventfd import EventFd
from ..memory import PAGE
from ..models.base import Model
from ..models.sources import Sources
from ..virtqueue import Chain, DeviceQueue, Poll
from .workers import DEFAULT_POLL, Workers

_log = logging.getLogger(__name__)

_PATIENCE = 10.0
"""Seconds that the thread may need to end; a batch of file I/O may be under way."""


class ServedQueue:
    """One working ring: the native queue, and the eventfds to and from its driver, which it does not own."""

    def __init__(self, queue: DeviceQueue, kick: EventFd | None, call: EventFd | None) -> None:
        self.queue = queue
        self.kick = kick
        self.call = call
        self.engine: Engine | None = None
        """What serves it instead of the model, while it does."""
        self.call_due = False
        self.popped = False
        """Whether the model looked at the ring in this pass; receive buffers that it leaves alone are no work."""
        self.short = False
        """Whether it found fewer chains there than it asked for, and so waits for a kick."""
        self.missed = False
        """Whether the next one there has to wait for mappings, and nobody was told yet."""

    @property
    def waits(self) -> bool:
        """See ``models.base.Queue``."""
        return self.queue.waits

    def pop(self, limit: int = 64) -> list[Chain]:
        """See ``models.base.Queue``."""
        chains = self.queue.pop_many(limit)
        self.popped = True
        if len(chains) < limit:
            self.short = True
            self.missed = self.queue.waits
        return chains

    def put_back(self, chains: list[Chain]) -> None:
        """See ``models.base.Queue``."""
        self.queue.put_back(chains)

    def push(self, done: list[tuple[Chain, int]]) -> None:
        """See ``models.base.Queue``."""
        self.call_due |= self.queue.push_many(done)


class Runner:
    """The rings of one device, and the thread that serves them from ``start`` to ``stop``.

    The thread lives from here to ``close``, so that a session costs none. *broken* is called, under the
    lock, with the index of a ring that cannot go on and why, *missed* when one waits for a mapping.
    Synchronization: everything public is called with *lock* held.
    """

    def __init__(self, model: Model, name: str, poll: int | None = None) -> None:
        """*poll*: nanoseconds that rings are looked at before a thread sleeps, at most; None for what is best for most: engines do, a model does not."""
        self._poll = Poll(poll) if poll else None
        self.lock = Gate()
        self.broken: Callable[[int, str], None] = lambda index, why: None
        self.missed: Callable[[], None] = lambda: None
        self.rings: dict[int, ServedQueue] = {}
        self.paused = False
        self.running = False
        self.held = False
        """Whether neither rings nor sources are served, whatever drivers say."""
        self.model = model
        self._name = name
        self._pending: set[int] = set()
        self._signals: list[EventFd] = []
        self._closing = False
        self._epoll = select.epoll()
        self._workers = Workers(self.lock, name, self._attend, DEFAULT_POLL if poll is None else poll)
        with self.lock:
            self._workers.grow(model.threads)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._watch_sources()
        self._thread = threading.Thread(target=self._run, name=f"rings of {name}", daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Begin to serve; what rings that are present already hold is served without a kick."""
        self.running = True
        self.resume()
        for index, ring in self.rings.items():
            self._watch(index, ring)

    def pause(self) -> None:
        """Leave rings and sources alone, once the model has given back what it keeps."""
        for index in list(self.rings):
            self.release(index)
        self.paused = True
        self._workers.pause(True)

    def resume(self) -> None:
        """Serve again."""
        self.paused = False
        self._workers.pause(self.held)
        self._await_sources()

    def hold(self, held: bool) -> None:
        """Serve nothing until further notice, or serve again. What was begun has been done."""
        self.held = held
        self._workers.pause(self._rests)
        if held:
            self.model.rest()
            self._settle()
            os.eventfd_write(self._wake, 1)
        else:
            if self.running:
                self._await_sources()
            else:
                self._mute_sources()
            for ring in self.rings.values():
                if ring.engine is not None:
                    self._workers.look(ring.engine)
            os.eventfd_write(self._wake, 1)

    @property
    def _rests(self) -> bool:
        return self.paused or self.held

    def replace(self, model: Model) -> None:
        """Go on with another model, by which every ring is looked at. No chain is in flight, and the old one's sources are open still."""
        if self.model.sources is not None:
            self._epoll.unregister(self.model.sources.fileno())
        self.model = model
        self._workers.grow(model.threads)
        self._watch_sources()
        if self.running:
            self._await_sources()
            for index, ring in self.rings.items():
                self._unwatch(index, ring)
                self._watch(index, ring)
            self._pending.update(self.rings)
            os.eventfd_write(self._wake, 1)

    def add(self, index: int, ring: ServedQueue) -> None:
        """A ring comes in."""
        self.rings[index] = ring
        if self.running:
            self._watch(index, ring)

    def remove(self, index: int) -> ServedQueue | None:
        """A ring goes."""
        ring = self.rings.pop(index, None)
        self._pending.discard(index)
        if ring is not None and self.running:
            self._unwatch(index, ring)
        return ring

    def release(self, index: int) -> None:
        """Let the model give back the chains that it keeps of a ring, which is about to stop."""
        ring = self.rings[index]
        try:
            self.model.release(ring, index)
        except Exception as error:  # as in the thread
            _log.exception("%s: queue %d: the model failed", self._name, index)
            self._break(index, str(error))
        if ring.call_due:
            ring.call_due = False
            if ring.call is not None:
                self.signal(ring.call)

    def rekick(self, index: int, kick: EventFd | None) -> None:
        """A working ring gets another kick eventfd; the caller closes the old one afterwards."""
        ring = self.rings[index]
        if self.running:
            self._unwatch(index, ring)
        ring.kick = kick
        if self.running:
            self._watch(index, ring)

    def recall(self, index: int, call: EventFd | None) -> None:
        """A working ring gets another call eventfd; the caller closes the old one afterwards."""
        ring = self.rings[index]
        ring.call = call
        if ring.engine is not None:
            self._workers.recall(ring.engine, index, call)

    def retry(self) -> None:
        """There are new mappings: rings that waited for them and no others are looked at again."""
        for index, ring in self.rings.items():
            if ring.queue.waits and not ring.queue.misses():
                self._pending.add(index)
                os.eventfd_write(self._wake, 1)

    def refuse(self, page: int, perm: int) -> None:
        """Break the rings that wait for this."""
        for index, ring in list(self.rings.items()):
            for iova, wanted in ring.queue.misses():
                if (iova & -PAGE, wanted) == (page, perm):
                    ring.queue.refuse(iova)
            if ring.queue.broken:
                self._break(index, ring.queue.broken)

    def signal(self, event: EventFd) -> None:
        """Signal *event* from the thread, once it holds no lock."""
        self._signals.append(event)
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """Forget the rings. Whoever holds the lock knows that no batch is in hand."""
        for index in list(self.rings):
            self.remove(index)
        self._pending.clear()
        self._signals.clear()
        self.running = self.paused = False
        self._mute_sources()

    def close(self) -> None:
        """End the thread; called without the lock. Harmless when done before."""
        with self.lock:
            if self._closing:
                return
            self.stop()
            self._closing = True
            os.eventfd_write(self._wake, 1)
        self._workers.close(_PATIENCE)
        self._thread.join(_PATIENCE)
        self._epoll.close()
        os.close(self._wake)

    def _watch(self, index: int, ring: ServedQueue) -> None:
        """Wait for kicks; the thread is woken for a ring that holds chains, is broken or not mapped, and sleeps on for one that holds none."""
        ring.engine = None if ring.queue.patient else self.model.engine(index)  # an engine does not wait for mappings
        if ring.engine is not None:
            self._workers.attach(ring.engine, index, ring.queue, ring.kick, ring.call)
            return
        if ring.kick is not None:
            self._epoll.register(ring.kick.fd, select.EPOLLIN | select.EPOLLET)
        try:
            idle = not ring.queue.enable_kick() and not ring.queue.waits
        except OSError:
            idle = False
        if idle:
            return
        self._pending.add(index)
        os.eventfd_write(self._wake, 1)

    def _watch_sources(self) -> None:
        """Know the model's sources; they are waited for one event at a time, so that what is not served now does not keep the thread awake."""
        if self.model.sources is not None:
            self._epoll.register(self.model.sources.fileno(), 0)
            self._mute_sources()

    def _await_sources(self) -> None:
        if self.model.sources is not None:
            self._epoll.modify(self.model.sources.fileno(), select.EPOLLIN | select.EPOLLONESHOT)

    def _mute_sources(self) -> None:
        """There is no driver; sources that do not need one are waited for still."""
        if self.model.sources is not None:
            self._epoll.modify(self.model.sources.fileno(), select.EPOLLIN | select.EPOLLONESHOT if self.model.sources.idle else 0)

    def _unwatch(self, index: int, ring: ServedQueue) -> None:
        if ring.engine is not None:
            self._workers.detach(ring.engine, index)
            ring.engine = None
            self.model.rests(index)
        elif ring.kick is not None:
            self._epoll.unregister(ring.kick.fd)

    def _attend(self, engine: Engine) -> None:
        """Let the model serve a batch of the queues of an engine that has met what it does not do itself, in the engine's thread."""
        with self.lock:
            served = [index for index in engine.served if index in self.rings and self.rings[index].engine is engine]
            if not self._rests:
                for index in served:
                    self._serve(index, self.rings[index])
                self._settle()
                self._workers.look(engine)
                self._pending.difference_update(served)
            signals, self._signals = self._signals, []
        for event in signals:
            event.signal()

    def _run(self) -> None:
        wake = self._wake
        served = False
        while True:
            if served and self._poll is not None:
                self._linger(self._poll)
            began = time.monotonic_ns()
            events = self._epoll.poll(0 if self._pending and not self._rests else -1)
            with self.lock:
                if self._closing:
                    return
                kicked = {fd for fd, _ in events}
                if wake in kicked:
                    os.eventfd_read(wake)
                elif self._poll is not None and not self._pending:
                    self._poll.slept(time.monotonic_ns() - began)
                self._pending.update(i for i, ring in self.rings.items() if ring.kick is not None and ring.kick.fd in kicked)
                served = bool(self._pending)
                if not self._rests:
                    self._serve_pending()
                    if (sources := self.model.sources) is not None and sources.fileno() in kicked and (self.running or sources.idle):
                        self._serve_sources(sources)
                    self._settle()
                signals, self._signals = self._signals, []
            for event in signals:
                event.signal()

    def _linger(self, poll: Poll) -> None:
        """Look at the rings for a while, as whoever has just been served may have more. Who waits for the lock ends that."""
        with self.lock:
            if self._pending or self._rests:
                return
            rings = {ring.queue: index for index, ring in self.rings.items() if ring.engine is None and ring.kick is not None}
            self._pending.update(rings[queue] for queue in poll.look(list(rings), self.lock))

    def _serve_pending(self) -> None:
        ready, self._pending = self._pending, set()
        for index in sorted(ready):
            if (ring := self.rings.get(index)) is not None and ring.engine is None:
                self._serve(index, ring)

    def _serve(self, index: int, ring: ServedQueue) -> None:
        """Let the model serve a batch of one queue."""
        try:
            for other in self.rings.values():
                other.popped = other.short = False
            ring.queue.disable_kick()
            self.model.process(self.rings, index)
            if ring.queue.enable_kick() and ring.popped:
                self._pending.add(index)
            self._pending.update(i for i, other in self.rings.items() if other.short and other is not ring and other.queue.enable_kick())
        except Exception as error:  # a model or a driver at fault must not take the process down
            if not any(other.queue.broken for other in self.rings.values()):  # those end below, whichever queue was looked at
                _log.exception("%s: queue %d: the model failed", self._name, index)
                self._break(index, str(error))

    def _serve_sources(self, sources: Sources) -> None:
        """Let the model serve what is ready outside, and watch the queues that it found too little in."""
        for ring in self.rings.values():
            ring.popped = ring.short = False
        try:
            sources.serve(self.rings)
            self._pending.update(i for i, ring in self.rings.items() if ring.popped and ring.queue.enable_kick() and ring.short)
        except Exception as error:  # as above
            if not any(ring.queue.broken for ring in self.rings.values()):
                _log.exception("%s: the model failed at what came from outside", self._name)
                for index in list(self.rings):
                    self._break(index, str(error))
        if self.running or sources.idle:
            self._await_sources()

    def _settle(self) -> None:
        """Note what is to be signalled, and take broken rings away."""
        for index, ring in list(self.rings.items()):
            if ring.call_due:
                ring.call_due = False
                if ring.call is not None:
                    self._signals.append(ring.call)
            if ring.missed:
                ring.missed = False
                self.missed()
            if ring.queue.broken:
                self._break(index, ring.queue.broken)

    def _break(self, index: int, why: str) -> None:
        if self.remove(index) is not None:
            self.broken(index, why)
