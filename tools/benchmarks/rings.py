# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a chain costs in the ring core, next to a bare loop in the same program (userspace/tests/bench.c and bare.h).

One thread does both ends' work: add, publish, pop, push, reap. The bare loop checks every descriptor against one region of
memory and knows nothing else; it and the core take turns. Figures are medians in nanoseconds per chain.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from report import Goal, deliver, show_goals

CORE = Path(__file__).resolve().parents[2] / "userspace"
MOST = 1.3


def measure(cpu: int) -> list[dict[str, Any]]:
    """One run of the bench on *cpu*: a row for each form of ring, chain and batch."""
    with tempfile.TemporaryDirectory(prefix="vbb") as directory:
        program = f"{directory}/plain/bench"
        subprocess.run(["make", "-s", "-C", str(CORE), f"OUT={directory}", program], check=True, timeout=300)
        done = subprocess.run(["taskset", "-c", str(cpu), program, "--json"], check=True, capture_output=True, text=True, timeout=300)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """For batches of direct chains, where there is nothing but the ring."""
    return [
        Goal(f"{row['layout']}, chain of {row['chain']}, batch of {row['batch']}, core / bare loop", row["core"] / row["bare"], MOST)
        for row in rows
        if row["batch"] > 1 and row["tables"] == "direct" and row["events"] == "event_idx"
    ]


def show(report: dict[str, Any]) -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110)
    heads = ("layout", "events", "tables", "chain", "batch", "core", "bare loop", "ratio")
    table = Table(*heads, title=f"nanoseconds per chain, both ends on CPU {report['cpu']}")
    for row in report["rows"]:
        figures = (f"{row['core']:.1f}", f"{row['bare']:.1f}", f"{row['core'] / row['bare']:.2f}")
        table.add_row(row["layout"], row["events"], row["tables"], str(row["chain"]), str(row["batch"]), *figures)
    console.print(table)
    show_goals(console, report)


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(prog="tools/bench rings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", type=int, default=0, help="where to run (default 0)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as JSON; - is standard output")
    options = parser.parse_args()
    rows = measure(options.cpu)
    deliver({"cpu": options.cpu, "rows": rows, "goals": [vars(goal) for goal in goals(rows)]}, options.json, show)


if __name__ == "__main__":
    main()
