# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A model that counts what its queues carry: for tests that have to know which queue served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.models import make_model
from vdpa_bridge.models.base import Queue
from vdpa_bridge.targets import Target
from vdpa_bridge.virtqueue import Chain

from .homes import Opener


class _Tallied:
    """A queue that counts the chains given back."""

    def __init__(self, index: int, queue: Queue, count: Counter[int]) -> None:
        self._index, self._queue, self._count = index, queue, count

    @property
    def waits(self) -> bool:
        return self._queue.waits

    def pop(self, limit: int = 64) -> list[Chain]:
        return self._queue.pop(limit)

    def put_back(self, chains: list[Chain]) -> None:
        self._queue.put_back(chains)

    def push(self, done: list[tuple[Chain, int]]) -> None:
        self._count[self._index] += len(done)
        self._queue.push(done)


@contextmanager
def tallied(text: str) -> Iterator[tuple[Opener, Counter[int]]]:
    """The model of a target, as something to open, and how many chains each of its queues gave back."""
    target = Target.parse(text)
    model, count = make_model(target.place, target.options), Counter[int]()
    process = model.process

    def counted(queues: Mapping[int, Queue]) -> dict[int, Queue]:
        return {at: _Tallied(at, queue, count) for at, queue in queues.items()}

    model.process = lambda queues, index: process(counted(queues), index)  # type: ignore[method-assign]
    if (sources := model.sources) is not None:
        serve = sources.serve
        sources.serve = lambda queues: serve(counted(queues))  # type: ignore[method-assign]
    model.engine = lambda index: None  # type: ignore[method-assign]  # it would serve beside the tally
    device = ModelDevice(model, text)
    try:
        yield device.open, count
    finally:
        device.close()
