# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the data path costs, next to the best of what there is in C, in the same run: disks, NICs, drivers, rings, models, memory; and how it grows.

Peers are started beside our servers, pinned alike, and take turns with them: A B A B. Figures are medians of turns; a value that
others on the machine disturbed is measured again, and rows where that did not help say so. Ratios are the point: absolute figures
are this machine's. --plot writes docs/performance.md, its pictures and the figures themselves, docs/performance.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from disks import clients, file_disks, null_disks
from growth import GROWTH, Series
from insides import memory, python, rings
from nics import back_ends, drivers
from page import DOCS, write
from report import deliver, verdict
from rows import Row, Span, goals, say, trusted

Part = Callable[[Span, tuple[int, int], dict[str, str]], Iterator[Row]]
PARTS: dict[str, tuple[Part, ...]] = {
    "blk": (null_disks, file_disks),
    "net": (back_ends,),
    "drivers": (clients, drivers),
    "rings": (rings,),
    "python": (python,),
    "memory": (memory,),
}
SERIES = "growth"
"""The part that is no rows but series."""
QUICK, FULL = Span(0.4, 0.1, 3), Span(1.0, 0.2, 5)


def _cpu() -> str:
    with open("/proc/cpuinfo") as file:
        return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), platform.machine())


def measure(parts: list[str], span: Span, cpus: tuple[int, int]) -> dict[str, Any]:
    """All figures."""
    left_out: dict[str, str] = {}
    rows: list[Row] = []
    series: list[Series] = []
    for name in parts:
        for part in GROWTH if name == SERIES else PARTS[name]:
            try:
                (series if name == SERIES else rows).extend(part(span, cpus, left_out))
            except SystemExit as error:
                left_out[f"what comes of {part.__module__}.{part.__name__}"] = str(error)
    machine = {"cpu": _cpu(), "cpus": len(os.sched_getaffinity(0)), "kernel": platform.release(), "python": platform.python_version()}
    told = [asdict(goal) for goal in goals(rows)]
    return {"machine": machine, "span": asdict(span), "pinned": cpus, "rows": rows, "series": series, "left_out": left_out, "goals": told}


def cells(row: Row, name: str) -> tuple[str, ...]:
    """One way of a row: rate, range, CPU time of client and server."""
    facts = row["ways"][name]
    digits = 0 if facts["median"] >= 1000 else 2
    cpu = [f"{facts[side]:.0%}" if facts[side] is not None else "" for side in ("client", "server")]
    return (*(f"{facts[key]:,.{digits}f}" for key in ("median", "min", "max")), *cpu)


def result(row: Row) -> str:
    """The ratio, its goal, and whether it is reached; for disturbed rows that they are."""
    goal = row["goal"]
    if goal["least"] is None and goal["most"] is None:
        return ""
    said = f"{goal['value']:,.2f} {verdict(goal)}"
    return said if trusted(row) else f"{said}, DISTURBED"


def show(report: dict[str, Any]) -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150)
    table = Table("work", "way", "unit", "median", "least", "most", "client", "server", title="client and server: share of a CPU")
    for row in report["rows"]:
        for at, name in enumerate(row["ways"]):
            table.add_row(row["work"] if not at else "", name, row["unit"], *cells(row, name))
        table.add_section()
    console.print(table)
    for row in report["rows"]:
        against = f" / {row['best']}" if row["best"] else ""
        console.print(f"{row['work']}{against}: {result(row)}; {row['note']}")
    for one in report["series"]:
        console.print(f"{one['title']}, by {one['axis']}: {one['turns']} turns, {one['disturbed']:.0%} of them disturbed")
        for panel, (name, line) in itertools.product(one["panels"], one["lines"].items()):
            figures = (f"{at}: {three[0]:,.{0 if three[0] >= 100 else 2}f}" for at, three in zip(one["points"], line[panel["key"]], strict=True))
            console.print(f"  {panel['label']}, {name}: {', '.join(figures)}")
    for name, why in report["left_out"].items():
        console.print(f"left out: {name}: {why}")


def main() -> None:
    """Measure, print, write."""
    known = [*PARTS, SERIES]
    parser = argparse.ArgumentParser(prog="tools/bench data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(known), metavar="PART,...", help=f"which ones of: {', '.join(known)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="a rough look, in under 10 minutes instead of under 20")
    parser.add_argument("--seconds", type=float, help=f"of one value (default {FULL.seconds}, quick {QUICK.seconds})")
    parser.add_argument("--turns", type=int, help=f"of which the median counts (default {FULL.turns}, quick {QUICK.turns})")
    parser.add_argument("--json", metavar="FILE", help="write the figures there ('-': standard output) instead of a table")
    parser.add_argument("--plot", action="store_true", help=f"write {DOCS.name}/performance.md, .json and pictures")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="measure nothing: take the figures from what --json or --plot wrote")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(known):
        parser.error(f"no part {', '.join(sorted(unknown))}; there is: {', '.join(known)}")
    usual = QUICK if arguments.quick else FULL
    span = Span(arguments.seconds or usual.seconds, usual.warmup, arguments.turns or usual.turns)
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        say("there is one CPU for both sides: figures for two say nothing")
    report = json.loads(arguments.source.read_text()) if arguments.source else measure(parts, span, (cpus[0], cpus[-1]))
    deliver(report, arguments.json, show)
    if arguments.plot:
        write(report, DOCS)


if __name__ == "__main__":
    main()
