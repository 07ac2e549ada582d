# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The threads whose native loops serve the rings that have an engine.

Rule of this file: rings come and go while the device's gate is held. A thread is outside of it whenever it runs Python,
and takes it like any other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..engines import Engine, Gate, Loop
from ..eventfd import EventFd
from ..virtqueue import DeviceQueue

DEFAULT_POLL = 50_000
"""Nanoseconds."""


def _fd(event: EventFd | None) -> int:
    return -1 if event is None else event.fd


class Workers:
    """Threads by the numbers that engines name, up to ``close``. *asked* is called in one for an engine that needs its model.

    Synchronization: everything but ``close`` is called with the gate held.
    """

    def __init__(self, gate: Gate, name: str, asked: Callable[[Engine], None], poll: int = DEFAULT_POLL) -> None:
        """*poll*: nanoseconds that they look for work before they sleep, at most."""
        self._poll = poll
        self._gate = gate
        self._name = name
        self._asked = asked
        self._loops: list[Loop] = []
        self._threads: list[threading.Thread] = []
        self._paused = False

    def grow(self, count: int) -> None:
        """Have at least *count* threads."""
        for number in range(len(self._loops), count):
            loop = Loop(self._gate, self._poll)
            loop.pause(self._paused)
            self._loops.append(loop)
            self._threads.append(threading.Thread(target=self._run, args=(loop,), name=f"engine {number} of {self._name}", daemon=True))
            self._threads[-1].start()

    def _run(self, loop: Loop) -> None:
        while (engine := loop.run()) is not None:
            self._asked(engine)

    def attach(self, engine: Engine, index: int, queue: DeviceQueue, kick: EventFd | None, call: EventFd | None) -> None:
        """A ring comes in, and is looked at."""
        self._loops[engine.thread].attach(engine, index, queue, _fd(kick), _fd(call))

    def detach(self, engine: Engine, index: int) -> None:
        """A ring goes."""
        self._loops[engine.thread].detach(engine, index)

    def recall(self, engine: Engine, index: int, call: EventFd | None) -> None:
        """A ring has another call eventfd from now on."""
        self._loops[engine.thread].set_call(engine, index, _fd(call))

    def look(self, engine: Engine) -> None:
        """Go on with an engine that asked, if it has rings still."""
        self._loops[engine.thread].look(engine)

    def pause(self, paused: bool) -> None:
        """Leave all rings alone, or serve them again."""
        self._paused = paused
        for loop in self._loops:
            loop.pause(paused)

    def close(self, patience: float) -> None:
        """End the threads, which may take as long as their requests; called without the gate."""
        with self._gate:
            for loop in self._loops:
                loop.close()
        for loop, thread in zip(self._loops, self._threads, strict=True):
            thread.join(patience)
            if not thread.is_alive():
                loop.free()
        self._loops.clear()
