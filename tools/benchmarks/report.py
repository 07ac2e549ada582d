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
    """A figure and the most it should be, or the least."""

    what: str
    value: float
    most: float | None = None
    least: float | None = None


def verdict(goal: Report) -> str:
    """What it should be, and whether it is."""
    bound, reached = (f"at most {goal['most']:g}", goal["value"] <= goal["most"]) if goal["most"] is not None else (f"at least {goal['least']:g}", goal["value"] >= goal["least"])
    return f"(goal: {bound}) {'reached' if reached else 'MISSED'}"


def show_goals(console: Console, report: Report) -> None:
    """A line for each, and whether it was reached."""
    for goal in report.get("goals", []):
        console.print(f"{goal['what']}: {goal['value']:.2f} {verdict(goal)}")


def deliver(report: Report, place: str | None, show: Callable[[Report], None]) -> None:
    """*report* as JSON into the file *place*, to standard output for ``-``; as *show* prints it for None."""
    text = json.dumps(report, indent=1)
    if place == "-":
        print(text)
    elif place:
        Path(place).write_text(text)
    else:
        show(report)
