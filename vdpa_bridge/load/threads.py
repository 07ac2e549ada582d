# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A thread for each generator, and the look at the device while they run.

Rule of this file: whatever happens to the device, all threads have ended when ``run_all`` returns or raises.
"""

from __future__ import annotations

import errno
import resource
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from .._virtqueue import LOAD_BROKEN, LOAD_DONE, LOAD_FAILED, LOAD_MORE, LOAD_SILENT, POLL_ALWAYS, Histogram
from ..drivers.base import LOOK, Driver
from ..errors import DeviceBroken

SLICE = 0.05
"""Seconds that a generator runs before its thread looks up."""
_BEAT = 0.1
"""Seconds between two calls of a Progress."""

Progress = Callable[[float, int], None]
"""Called every now and then with the seconds since the beginning and what was done in all."""


class Generator(Protocol):
    """A native load generator."""

    def run(self, nanoseconds: int) -> int:
        """Go on for so long."""

    def stop(self) -> None:
        """Start nothing new."""

    def forget(self) -> None:
        """Count from 0 on."""

    @property
    def in_flight(self) -> int:
        """What the device has."""


G = TypeVar("G", bound=Generator)


@dataclass(frozen=True)
class Timing:
    """How long: *duration* seconds after *warmup*, or *count* in all (then without a warm-up); 0 is no limit. *rate* is per second,
    0 for as fast as it goes. Count and rate are of all queues together. With *poll* the generators look at the rings all the time
    instead of sleeping until they are called; else for *poll_for* seconds at most before they sleep, and less where that is in vain."""

    duration: float = 10.0
    warmup: float = 0.0
    count: int = 0
    rate: float = 0.0
    poll: bool = False
    poll_for: float = 0.0

    def check(self) -> None:
        """ValueError when it never ends or cannot be."""
        if not self.duration and not self.count:
            raise ValueError("a load has a duration or a count, else it never ends")
        if self.warmup and self.count:
            raise ValueError("a count has no warm-up: some of what is counted would not be measured")
        if min(self.duration, self.warmup, self.count, self.rate, self.poll_for) < 0:
            raise ValueError("no time, count or rate is negative")

    @property
    def budget(self) -> int:
        """Nanoseconds of looking."""
        return POLL_ALWAYS if self.poll else round(1e9 * self.poll_for)

    def share(self, queues: int, queue: int) -> tuple[int, int]:
        """Nanoseconds from one to the next, and how many in all, for one of several queues."""
        interval = max(round(1e9 * queues / self.rate), 1) if self.rate else 0
        return interval, self.count // queues + (queue < self.count % queues)


@dataclass(frozen=True)
class Spent:
    """Seconds that were measured, and of CPU time of this process meanwhile."""

    seconds: float
    cpu: float


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class _Thread(threading.Thread):
    """Runs one generator to its end."""

    def __init__(self, generator: Generator, timing: Timing, abort: threading.Event) -> None:
        super().__init__(name="load", daemon=True)
        self.generator = generator
        self.state = LOAD_MORE
        self.error: BaseException | None = None
        self.began = self.ended = time.monotonic()
        self.cpu = _cpu()
        self._timing, self._aborted = timing, abort

    @property
    def bad(self) -> bool:
        """Whether it ended otherwise than it should."""
        return self.error is not None or self.state not in (LOAD_MORE, LOAD_DONE)

    def run(self) -> None:
        """To the end."""
        try:
            self._go()
        except BaseException as error:  # given to whoever waits
            self.error = error
        self.ended, self.cpu = time.monotonic(), _cpu() - self.cpu

    def _go(self) -> None:
        timing, self.began = self._timing, time.monotonic()
        warm = self.began + timing.warmup
        end = warm + timing.duration if timing.duration else float("inf")
        while self.state == LOAD_MORE and not self._aborted.is_set():
            now = time.monotonic()
            if self.began < warm <= now:
                self.generator.forget()
                self.began, self.cpu = now, _cpu()
            if now >= end:
                self.generator.stop()
            ahead = min([SLICE, *(at - now for at in (warm, end) if at > now)])
            self.state = self.generator.run(max(int(ahead * 1e9), 1000))


def run_all(
    driver: Driver,
    generators: Sequence[G],
    timing: Timing,
    failure: Callable[[G], Exception],
    done: Callable[[], int] = int,
    progress: Progress | None = None,
) -> Spent:
    """Run them together. *failure* makes an error of a generator that ended with LOAD_FAILED; *done* counts for *progress*.

    DeviceBroken when the device or a ring gave up, TimeoutError when it is silent for the driver's timeout. The driver is then good for
    a restart or its end only.
    """
    abort = threading.Event()
    threads = [_Thread(generator, timing, abort) for generator in generators]
    try:
        for thread in threads:
            thread.start()
        start = looked = time.monotonic()
        while any(thread.is_alive() for thread in threads) and not any(thread.bad for thread in threads):
            for thread in threads:
                thread.join(_BEAT / len(threads))
            now = time.monotonic()
            if progress:
                progress(now - start, done())
            if now - looked > LOOK:
                looked = now
                driver._status()
    except BaseException:
        abort.set()
        raise
    finally:
        if any(thread.bad for thread in threads):
            abort.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    for thread, generator in zip(threads, generators, strict=True):
        if thread.error is not None:
            raise thread.error
        if thread.state == LOAD_FAILED:
            raise failure(generator)
    for thread in threads:
        if thread.bad:
            raise _error(driver, thread)
    return Spent(max(thread.ended for thread in threads) - min(thread.began for thread in threads), max(thread.cpu for thread in threads))


def _error(driver: Driver, thread: _Thread) -> OSError:
    if thread.state == LOAD_BROKEN:
        return DeviceBroken(f"{driver.name}: {'; '.join(driver.broken_rings())}")
    assert thread.state == LOAD_SILENT, thread.state
    driver._status()  # which may say why
    driver.device.get_features()  # a peer that is gone does not answer, whoever keeps the status
    waiting = thread.generator.in_flight
    why = f"the device holds {waiting}" if waiting else "though the device took everything: does it give anything back?"
    return TimeoutError(errno.ETIMEDOUT, f"{driver.name}: nothing came back for {driver.timeout:g} s, {why}")


def latency(histogram: Histogram) -> dict[str, float]:
    """Microseconds: what half, 90 %, 99 % and 99.9 % do not exceed, the mean and the extremes. Empty for no values."""
    if not histogram.count:
        return {}
    parts = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
    values = {"min": histogram.least, "mean": histogram.total / histogram.count}
    values |= {name: histogram.quantile(part) for name, part in parts.items()} | {"max": histogram.most}
    return {name: round(value / 1e3, 3) for name, value in values.items()}


def merged(histograms: Sequence[Histogram]) -> Histogram:
    """All in one."""
    whole = Histogram()
    for histogram in histograms:
        whole.merge(histogram)
    return whole
