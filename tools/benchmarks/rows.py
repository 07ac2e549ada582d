# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rows of ``tools/bench data``: one kind of work done in several ways, in turns; ours next to the best of the others.

Rule of this file: it knows rates, CPU time and goals, and nothing of what is measured.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from control import running
from quiet import Turns, turns
from report import Goal

Row = dict[str, Any]
OURS = "vdpa_bridge"


@dataclass(frozen=True)
class Span:
    """How long: seconds that are measured after *warmup* in each of *turns*."""

    seconds: float
    warmup: float
    turns: int

    def patience(self, ways: int) -> float:
        """For how many seconds disturbed values of so many *ways* are measured again: as long as all take twice."""
        return 2 * self.turns * ways * (self.seconds + self.warmup)


@dataclass(frozen=True)
class Sample:
    """One value, and the share of a CPU that its two sides used (None: nobody knows)."""

    rate: float
    client: float | None = None
    server: float | None = None


def usual(samples: Iterable[Sample], side: str) -> float | None:
    """The median share of a CPU that a side used."""
    known = [value for sample in samples if (value := getattr(sample, side)) is not None]
    return round(statistics.median(known), 3) if known else None


@dataclass(frozen=True)
class Work:
    """What is measured, the goal of the ratio of ours to the best of the others, and whether a lower value is the better one."""

    part: str
    name: str
    unit: str
    least: float | None = None
    most: float | None = None

    def row(self, taken: Turns[Sample]) -> Row:
        """The figures: medians, ranges, CPU time, and the median over turns of the ratio to the best of the others."""
        samples = {name: [turn[name] for turn in taken.results] for name in taken.results[0]}
        rates = {name: [one.rate for one in many] for name, many in samples.items()}
        medians = {name: statistics.median(many) for name, many in rates.items()}
        others = [name for name in medians if name != OURS]
        best = (min if self.most else max)(others, key=medians.__getitem__) if others else None
        value = statistics.median(turn[OURS].rate / turn[best].rate for turn in taken.results) if best else medians[OURS]
        facts = {
            name: {"median": medians[name], "min": min(many), "max": max(many), "client": usual(samples[name], "client"), "server": usual(samples[name], "server")}
            for name, many in rates.items()
        }
        return {
            "part": self.part,
            "work": self.name,
            "unit": self.unit,
            "ways": facts,
            "best": best,
            "goal": {"value": value, "least": self.least, "most": self.most},
            "turns": len(taken.results),
            "disturbed": taken.disturbed,
            "note": taken.note,
        }

    def take(self, ways: Mapping[str, Callable[[], Sample]], span: Span, pids: Iterable[int] = ()) -> Row:
        """Measure in turns."""
        say(f"{self.part}: {self.name}")
        return self.row(turns(ways, span.turns, pids, span.patience(len(ways))))


def trusted(row: Row) -> bool:
    """Whether most of its turns were left alone."""
    return bool(2 * row["disturbed"] < row["turns"])


def goals(rows: Iterable[Row]) -> list[Goal]:
    """What the project holds itself to; of rows that say something."""
    told = [row for row in rows if trusted(row) and (row["goal"]["least"] or row["goal"]["most"])]
    return [Goal(f"{row['work']}: {OURS}{' / ' + row['best'] if row['best'] else ''}", **row["goal"]) for row in told]


def say(what: str) -> None:
    """What goes on, for whoever waits."""
    print(f"bench: {what}", file=sys.stderr, flush=True)


class Meter:
    """From now on: the share of one CPU that goes into *clock*, which says seconds of CPU time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._began, self._before = clock, time.monotonic(), clock()

    def share(self) -> float:
        """1 for one whole CPU."""
        return (self._clock() - self._before) / (time.monotonic() - self._began)


def of_children() -> float:
    """Seconds that ended children of this process worked."""
    return sum(os.times()[2:4])


class Servers(contextlib.ExitStack):
    """Servers that run side by side on one CPU, by name; one that does not start is left out, and *left_out* says why."""

    def __init__(self, cpu: int, left_out: dict[str, str]) -> None:
        super().__init__()
        self.cpu, self._left_out = cpu, left_out
        self.pids: dict[str, int] = {}

    def start(self, name: str, command: list[str], path: Path) -> int:
        """Start one that listens on *path*: its pid, 0 for none."""
        try:
            process = self.enter_context(running(["taskset", "-c", str(self.cpu), *command], path))
        except SystemExit as error:
            if name == OURS:
                raise
            self._left_out[name] = str(error)
            return 0
        self.pids[name] = process.pid
        return process.pid
