# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""An export of an NBD server, on whatever connection there is to it.

Rule of this file: nobody waits for a server. A request has until its deadline, on any connection: when one is lost, all
that was under way on it is asked again on the next, which a thread makes meanwhile (names are looked up by waiting). A
server that does not answer in time loses its connection.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..libnbd import Connection
from ..outside.timer import Timer
from .image import Pending, Transfer
from .sources import Sources

if TYPE_CHECKING:
    from .base import Queue

_log = logging.getLogger(__name__)

CONNECT = 10.0
"""Seconds for a connection."""
_FULL = 32 << 20
"""Bytes under way, beyond which no more should be begun."""
_TICK, _AGAIN = 0.1, 1.0
"""Seconds after which deadlines are looked at, while there are any, and between two tries to connect."""
_PATIENCE = 5.0
"""Seconds that a ring may take to stop."""

Stage = Callable[[Connection], Iterator[int]]
"""Begins commands, and says which."""


class _Request(Pending):
    """Commands in *stages* one after the other, those of one at the same time; *finish* then writes into the chain."""

    def __init__(self, stages: Sequence[Stage], size: int, deadline: float, finish: Callable[[], int]) -> None:
        self.stages, self.size, self.deadline, self.finish = stages, size, deadline, finish
        self.restart()

    def restart(self) -> None:
        """As if nothing had been asked yet."""
        self.stage = 0
        self.left: set[int] = set()
        """Commands that have not ended."""
        self.error: OSError | None = None

    def outcome(self) -> int | OSError:
        """Of one that has ended."""
        try:
            return self.error or self.finish()
        except OSError as error:  # the driver's memory is gone
            return error


def _nothing() -> int:
    return 0


class _Coming:
    """A connection that a thread makes."""

    def __init__(self, uri: str) -> None:
        self.result: Connection | OSError | None = None
        self._given_up = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._make, args=(uri,), name="nbd connection", daemon=True)
        self._thread.start()

    def _make(self, uri: str) -> None:
        try:
            result: Connection | OSError = Connection(uri, CONNECT, self._given_up.is_set)
        except OSError as error:
            result = error
        with self._lock:
            if self._given_up.is_set() and isinstance(result, Connection):
                result.close()
            self.result = result

    def give_up(self) -> None:
        """It ends by itself, and soon but for a name server that is slow; harmless when done before."""
        with self._lock:
            self._given_up.set()
            if isinstance(self.result, Connection):
                self.result.close()
        self._thread.join(1)


class Export:
    """What *uri* names. Synchronization: as a model."""

    def __init__(
        self,
        uri: str,
        timeout: float,
        check: Callable[[Connection], None],
        changed: Callable[[], None],
        served: Callable[[Mapping[int, Queue]], None],
    ) -> None:
        """Requests have *timeout* seconds. *check*: OSError for a connection to something else than before. *changed* is called when
        the size has, *served* after requests have ended. OSError when there is no connection."""
        self.size = 0
        """Bytes."""
        self.sources = Sources(idle=True)
        self._uri, self._timeout, self._check, self._changed, self._served = uri, timeout, check, changed, served
        self._commands: dict[int, _Request] = {}
        self._waiting: list[_Request] = []
        self._orphans: set[_Request] = set()
        """Under way, but nobody's any more: all others wait for their end."""
        self._moving = 0
        self._server: Connection | None = None
        self._watched = -1
        self._coming: _Coming | None = None
        self._next: Connection | None = None
        """Takes over once nothing is under way."""
        self._retry = 0.0
        self._said = ""
        self._ticks = False
        self._timer = Timer()
        self.sources.add(self._timer.fileno(), self._on_tick)
        try:
            server = Connection(uri, min(timeout, CONNECT))
            try:
                check(server)
                self._use(server)
            except BaseException:
                server.close()
                raise
        except BaseException:
            self.close()
            raise

    def renew(self) -> None:
        """Connect anew: a server says its export's size once."""
        if self._coming is None:
            self._coming = _Coming(self._uri)
            self._watch()

    @property
    def full(self) -> bool:
        """Whether enough is under way."""
        return self._moving >= _FULL

    def ask(self, stages: Sequence[Stage], size: int = 0, finish: Callable[[], int] = _nothing) -> Transfer:
        """Begin a request as soon as it can be; OSError when it failed at once."""
        request = _Request(stages, size, time.monotonic() + self._timeout, finish)
        self._moving += size
        if self._busy:
            self._waiting.append(request)
        elif self._go_on(request):
            self._moving -= size
            if isinstance(outcome := request.outcome(), OSError):
                raise outcome
            return outcome
        self._watch()
        return request

    def settle(self, transfers: Collection[Pending]) -> None:
        """Those that do not end in time fail, and the connection is dropped, so that they do not go on."""
        end, poll = time.monotonic() + _PATIENCE, select.poll()
        poll.register(self.sources.fileno(), select.POLLIN)
        while self._under_way.intersection(transfers):
            if time.monotonic() > end:
                late = OSError(errno.ETIMEDOUT, f"no answer within {_PATIENCE:g} s, and the queue is to stop")
                self._lose(late)
                self._fail([request for request in self._waiting if request in transfers], late)
                break
            poll.poll(_TICK * 1000)
            self.sources.serve({})
        self._timer.start(_TICK)  # queues that go on were left alone meanwhile
        self._ticks = True

    def abandon(self) -> None:
        """The next driver's requests are begun when those of this one have ended."""
        self._orphans = set(self._commands.values())
        self._waiting.clear()
        self._moving = sum(request.size for request in self._orphans)
        for request in self._orphans:
            request.then, request.finish = Pending.then, _nothing

    def close(self) -> None:
        """Without a word to a server that does not answer."""
        if self._timer.fileno() < 0:
            return
        self.abandon()
        if self._coming is not None:
            self._coming.give_up()
        for server in (self._drop(), self._next):
            if server is not None:
                server.close()
        self._next = self._coming = None
        self._timer.close()
        self.sources.close()

    @property
    def _under_way(self) -> set[_Request]:
        return {*self._waiting, *self._commands.values()}

    @property
    def _busy(self) -> bool:
        """Whether nothing can be begun now."""
        return self._server is None or self._next is not None or bool(self._orphans)

    def _go_on(self, request: _Request) -> bool:
        """Begin what a request is to do next; whether it has ended. On a connection that turns out to be lost it waits for another."""
        while not request.left and request.error is None and request.stage < len(request.stages):
            if (server := self._server) is None:
                self._wait(request)
                return False
            try:
                for cookie in request.stages[request.stage](server):
                    request.left.add(cookie)
                    self._commands[cookie] = request
                request.stage += 1
            except OSError as error:
                request.error = error
                if not server.alive:
                    self._wait(request)
                    self._lose()
                    return False
        return not request.left

    def _wait(self, request: _Request) -> None:
        request.restart()
        if request not in self._waiting:
            self._waiting.append(request)

    def _end(self, request: _Request) -> None:
        self._moving -= request.size
        self._orphans.discard(request)
        request.then(request.outcome())

    def _fail(self, requests: Sequence[_Request], why: OSError) -> None:
        """End requests that wait."""
        for request in requests:
            self._waiting.remove(request)
            request.error = why
            self._end(request)

    # Connections ------------------------------------------------------------------------------------------------------------

    def _use(self, server: Connection) -> None:
        """Go on with this one. Its socket is watched by a descriptor of our own, as libnbd closes its own when it likes."""
        if (old := self._drop()) is not None:
            old.close()
        self._server, self._watched = server, os.dup(server.fileno())
        self.sources.add(self._watched, self._on_event, server.events)
        if (size := server.ask("get_size")) != self.size:
            self.size = size
            self._changed()

    def _drop(self) -> Connection | None:
        """Watch it no longer."""
        server, self._server = self._server, None
        if server is not None:
            self.sources.remove(self._watched)
            os.close(self._watched)
        return server

    def _lose(self, why: OSError | None = None) -> None:
        """What was under way waits for another connection. It is the server's doing if nobody says *why*."""
        if (server := self._drop()) is None:
            return
        server.close()
        self._say(why or OSError(errno.ECONNRESET, f"{self._uri}: the server ended the connection"))
        again = [request for request in dict.fromkeys(self._commands.values()) if request not in self._orphans]
        self._commands.clear()
        self._orphans.clear()
        for request in again:
            self._wait(request)
        self._moving = sum(request.size for request in self._waiting)

    def _say(self, why: OSError) -> None:
        """Once, until something else is wrong."""
        if str(why) != self._said:
            self._said = str(why)
            _log.warning("blk: %s; requests wait %g s at most", why, self._timeout)

    def _on_event(self, queues: Mapping[int, Queue], events: int) -> None:
        assert self._server is not None
        self._server.notify(events)
        self._reap(self._server)
        self._pump(queues)

    def _reap(self, server: Connection) -> None:
        """End what has ended; what failed with its connection has not."""
        for cookie, error in server.ended():
            if (error is None or server.alive) and (request := self._commands.pop(cookie, None)) is not None:
                request.left.discard(cookie)
                request.error = request.error or error
                if self._go_on(request):
                    self._end(request)
        if not server.alive and self._server is server:
            self._lose()

    def _on_tick(self, queues: Mapping[int, Queue], events: int) -> None:
        self._timer.stop()
        self._ticks = False
        if self._server is not None:
            self._reap(self._server)  # it may have been found dead when it was asked for something, which is no event
        now = time.monotonic()
        late = OSError(errno.ETIMEDOUT, f"{self._uri}: no answer within {self._timeout:g} s")
        if any(request.deadline <= now for request in self._commands.values()):
            self._lose(late)
        self._fail([request for request in self._waiting if request.deadline <= now], late)
        if self._coming is not None:
            self._arrive(self._coming)
        elif self._server is None and self._next is None and now >= self._retry:
            self._retry = now + _AGAIN
            self._coming = _Coming(self._uri)
        self._pump(queues)

    def _arrive(self, coming: _Coming) -> None:
        """Take a connection that was made, if it is one to the same disk."""
        found = coming.result
        if found is None:
            return
        self._coming = None
        if isinstance(found, Connection):
            try:
                self._check(found)
            except OSError as error:
                found.close()
                found = error
        if isinstance(found, OSError):
            self._say(found)
            return
        if self._said:
            _log.warning("blk: %s: connected again", self._uri)
        self._said, self._next = "", found

    def _pump(self, queues: Mapping[int, Queue]) -> None:
        """Begin what can be."""
        if self._next is not None and not self._commands:
            server, self._next = self._next, None
            try:
                self._use(server)
            except OSError as error:  # it is gone by now, or there are no descriptors left
                server.close()
                self._say(error)
        while self._waiting and not self._busy:
            if self._go_on(request := self._waiting.pop(0)):
                self._end(request)
        self._served(queues)
        self._watch()

    def _watch(self) -> None:
        """Wait for what can come next."""
        if self._server is not None:
            self.sources.await_events(self._watched, self._server.events)
        if not self._ticks and (self._server is None or self._coming is not None or self._commands or self._waiting):
            self._ticks = True
            self._timer.start(_TICK)
