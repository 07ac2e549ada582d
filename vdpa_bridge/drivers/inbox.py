# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Buffers that wait on a queue for what a device says on its own: received data, events.

Rule of this file: what waits to be taken is bounded by the buffers there are. While nobody takes it, the device gets none back.
"""

from __future__ import annotations

from collections import deque

from ..memory import Buffer
from .base import Driver
from .ring import Pending, Segments


class _Waiting(Pending):
    """A buffer that the device may fill."""

    __slots__ = ("buffer", "inbox")

    def __init__(self, inbox: Inbox, buffer: Buffer) -> None:
        super().__init__()
        self.inbox, self.buffer = inbox, buffer

    def complete(self, written: int) -> None:
        self.inbox.came.append(bytes(self.buffer.data[:written]))
        self.inbox._empty.append(self)
        super().complete(written)


class Inbox:
    """At most *depth* buffers of *size* bytes on *queue* of *driver*, which makes one in ``_ready`` and fills it in ``_replenish``."""

    def __init__(self, driver: Driver, queue: int, size: int, depth: int) -> None:
        self._driver, self._queue = driver, queue
        self.came: deque[bytes] = deque()
        """Messages that wait to be taken, oldest first."""
        depth = min(depth, driver.ring(queue).queue.free)
        self._empty = [_Waiting(self, driver._pool.take(size)) for _ in range(depth)]
        self.fill()

    def fill(self) -> None:
        """Give the device what buffers there are beyond the messages that wait."""
        count = max(len(self._empty) - len(self.came), 0)
        chains: list[tuple[Segments, Segments, Pending]] = []
        for waiting in self._empty[:count]:
            chains.append(([], [(waiting.buffer.iova, waiting.buffer.size)], waiting))  # noqa: PERF401 - mypy wants the type
        if chains:
            del self._empty[: self._driver._submit(self._driver.ring(self._queue), chains)]

    def take(self) -> bytes | None:
        """The oldest message, without waiting."""
        if not self.came:
            return None
        message = self.came.popleft()
        self.fill()
        return message

    def get(self, what: str, timeout: float | None = None) -> bytes:
        """The oldest message; TimeoutError that says *what* was waited for when none comes."""
        if not self.came:
            self._driver.wait(lambda: bool(self.came), what, timeout)
        message = self.take()
        assert message is not None
        return message
