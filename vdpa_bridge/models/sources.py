# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a model waits for besides its queues: descriptors of taps, sockets, terminals and timers.

Rule of this file: a source that is ready and not served is ready again at once, so whoever has no room for what it brings
(no receive buffer) mutes it until there is some.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Queue

Ready = Callable[["Mapping[int, Queue]", int], None]
"""Called with the queues that work now, and the events (select.EPOLLIN ...) that came."""

_MOST = 64
"""Sources served in one pass, so that none of them keeps rings from being served."""


class Sources:
    """Descriptors that are watched while the driver is ready. They belong to the model, and leave before they are closed.

    *idle*: they are watched without a driver as well; no queue works then.
    Synchronization: as the model's: one thread at a time.
    """

    def __init__(self, idle: bool = False) -> None:
        self.idle = idle
        self._epoll = select.epoll()
        self._ready: dict[int, Ready] = {}
        self._events: dict[int, int] = {}

    def fileno(self) -> int:
        """Readable while a source is ready."""
        return self._epoll.fileno()

    def add(self, fd: int, ready: Ready, events: int = select.EPOLLIN) -> None:
        """Call *ready* whenever one of *events* comes, or an error or the end of the other side. FileExistsError when *fd* is there."""
        self._epoll.register(fd, events)
        self._ready[fd], self._events[fd] = ready, events

    def await_events(self, fd: int, events: int) -> None:
        """Wait for other *events*; 0 mutes the source, its errors and its end, too."""
        if self._events[fd] == events:
            return
        if not events:
            self._epoll.unregister(fd)
        elif not self._events[fd]:
            self._epoll.register(fd, events)
        else:
            self._epoll.modify(fd, events)
        self._events[fd] = events

    def remove(self, fd: int) -> None:
        """Forget a source; harmless when it is not there."""
        if self._ready.pop(fd, None) is not None and self._events.pop(fd):
            self._epoll.unregister(fd)

    def serve(self, queues: Mapping[int, Queue]) -> None:
        """Call for what is ready."""
        for fd, events in self._epoll.poll(0, _MOST):
            if (ready := self._ready.get(fd)) is not None:  # an earlier one of this pass may have removed it
                ready(queues, events)

    def close(self) -> None:
        """Forget all. Harmless when done before."""
        self._ready.clear()
        self._events.clear()
        self._epoll.close()
