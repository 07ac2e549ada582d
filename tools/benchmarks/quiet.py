# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Whether a measurement was left alone: what the machine's CPUs did meanwhile, less what the measured processes did.

Two processes that poll on two CPUs have no room for a third. Its share shows in the CPU time of others; a measurement that
it disturbed says nothing, and is dropped instead of averaged.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Generic, TypeVar

MOST = 0.06
"""Of one CPU, that others may use."""
TRIES = 3
"""How often a value is measured at most, until nobody disturbs."""
_TICKS = os.sysconf("SC_CLK_TCK")
_IDLE, _IOWAIT = 3, 4
Value = TypeVar("Value")


def _busy() -> float:
    """Seconds that all CPUs worked so far, or were stolen by other guests of the host."""
    with open("/proc/stat") as file:
        columns = [int(word) for word in file.readline().split()[1:9]]
    return (sum(columns) - columns[_IDLE] - columns[_IOWAIT]) / _TICKS


def used(pid: int) -> float:
    """Seconds that a process worked so far."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


class Watch:
    """From now on: the share of one CPU that went to others than this process, its ended children and *pids*."""

    def __init__(self, pids: Iterable[int] = ()) -> None:
        self._pids = tuple(pids)
        self._start = time.monotonic(), self._others()

    def _others(self) -> float:
        return _busy() - sum(os.times()[:4]) - sum(map(used, self._pids))

    def share(self) -> float:
        """0 when nobody else ran, 1 for one whole CPU."""
        start, others = self._start
        return max(self._others() - others, 0.0) / (time.monotonic() - start)


@dataclass(frozen=True)
class Turns(Generic[Value]):
    """What was measured, in turns of one value for each way, the largest share of others in each, and how many values were dropped."""

    results: list[dict[str, Value]]
    shares: list[float]
    dropped: int

    @property
    def disturbed(self) -> int:
        """How many turns nobody should trust."""
        return sum(share > MOST for share in self.shares)

    @property
    def note(self) -> str:
        """How far they can be trusted, in a sentence."""
        kept = f"{len(self.results)} turns" + (f", {self.disturbed} of them disturbed" if self.disturbed else "")
        return f"{kept}; others used at most {max(self.shares):.0%} of a CPU; {self.dropped} disturbed values dropped"


def turns(ways: Mapping[str, Callable[[], Value]], repeat: int, pids: Iterable[int] = (), patience: float = math.inf) -> Turns[Value]:
    """*repeat* turns of all *ways*. A value that others than this process and *pids* disturbed is measured again at once, TRIES times
    in all; then the least disturbed one counts. Nothing is measured again after *patience* seconds."""
    pids, end = tuple(pids), time.monotonic() + patience
    results: list[dict[str, Value]] = []
    shares: list[float] = []
    dropped = 0
    for _ in range(repeat):
        worst = 0.0
        turn: dict[str, Value] = {}
        for name, way in ways.items():
            tried: list[tuple[float, Value]] = []
            while not tried or (len(tried) < TRIES and tried[-1][0] > MOST and time.monotonic() < end):
                watch = Watch(pids)
                value = way()
                tried.append((watch.share(), value))
            share, turn[name] = min(tried, key=itemgetter(0))
            worst = max(worst, share)
            dropped += len(tried) - 1
        results.append(turn)
        shares.append(worst)
    return Turns(results, shares, dropped)
