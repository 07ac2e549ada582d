# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What all measurements end with: goals, and figures for people or for machines."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Report = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A figure and the most it should be."""

    what: str
    value: float
    most: float


def show_goals(console: Console, report: Report) -> None:
    """A line for each, and whether it was reached."""
    for goal in report.get("goals", []):
        mark = "reached" if goal["value"] <= goal["most"] else "MISSED"
        console.print(f"{goal['what']}: {goal['value']:.2f} (goal: at most {goal['most']:g}) {mark}")


def deliver(report: Report, place: str | None, show: Callable[[Report], None]) -> None:
    """*report* as JSON into the file *place*, to standard output for ``-``; as *show* prints it for None."""
    text = json.dumps(report, indent=1)
    if place == "-":
        print(text)
    elif place:
        Path(place).write_text(text)
    else:
        show(report)
