# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A series as SVG, by matplotlib: a panel for each of its measures, side by side, and a legend below.

Rule of this file: the same series gives the same bytes (of one version of matplotlib). Text stays text; the background is the
reader's, light or dark, so colours are those that stand out from both.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from rows import OURS

COLOURS = ("#2f81d8", "#c9601a", "#8f62c9", "#2f8f57")
"""Ours first."""
GREY = "#7a7a7a"
DASHED = "poll"
PANEL = (4.3, 2.9)
"""Inches."""
WIDE = 8
"""From so many times the least value on an axis is logarithmic."""
LONG = re.compile(r"(?<![\d.>])\d+\.\d{4,}")
"""A coordinate, not the beginning of a text."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vdpa_bridge",
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GREY,
    "grid.alpha": 0.25,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
}


def short(value: float) -> str:
    """With a suffix of thousands."""
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def binary(value: float) -> str:
    """With a suffix of powers of 1024, where it is one."""
    for size, suffix in ((1 << 20, "Mi"), (1 << 10, "Ki")):
        if value >= size and value % size == 0:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def _across(axes: Axes, points: Sequence[int]) -> None:
    """The points, each with a mark; evenly distant where they double."""
    if points[-1] >= WIDE * points[0]:
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(points)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: binary(value)))


def _up(axes: Axes, least: float, most: float) -> None:
    """From 0, or logarithmic where values differ by much."""
    if least > 0 and most >= WIDE * least:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if most < 100 * least else (1.0,), numticks=12))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(least / 1.3, most * 1.3)
    else:
        axes.set_ylim(0, 1.08 * most or 1)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def _panel(axes: Axes, series: dict[str, Any], panel: dict[str, Any]) -> list[Line2D]:
    """One measure of all lines: medians, and what lies between least and most as a shade."""
    points, drawn = series["points"], []
    _across(axes, points)
    colours: dict[str, str] = {}
    values = [value for line in series["lines"].values() for three in line[panel["key"]] for value in three]
    _up(axes, min(values), max(values))
    for name, line in series["lines"].items():
        who, _, how = name.partition(", ")
        colour = colours.setdefault(who, COLOURS[len(colours) % len(COLOURS)])
        medians, least, most = zip(*line[panel["key"]], strict=True)
        style = "--" if how == DASHED else "-"
        width = 2.0 if who == OURS else 1.4
        (made,) = axes.plot(points, medians, style, color=colour, linewidth=width, marker="s" if how == DASHED else "o", markersize=3.5, label=name)
        made.set_gid(f"{panel['key']}: {name}")
        axes.fill_between(points, least, most, color=colour, alpha=0.15, linewidth=0)
        drawn.append(made)
    better = "more" if panel["more"] else "less"
    axes.set_title(f"{panel['label']} ({better} is better)", loc="left", fontsize=9)
    axes.set_xlabel(series["axis"])
    return drawn


def picture(series: dict[str, Any]) -> str:
    """The SVG."""
    panels = series["panels"]
    high = -(-len(panels) // 2)
    with rc_context(STYLE):
        figure = Figure(figsize=(2 * PANEL[0], high * PANEL[1] + 0.4), layout="constrained")
        places = figure.subplots(high, 2, squeeze=False).flat
        drawn = [_panel(axes, series, panel) for axes, panel in zip(places, panels, strict=True)]
        figure.suptitle(series["title"], fontsize=11)
        figure.legend(handles=drawn[0], loc="outside lower center", ncols=4, frameon=False)
        out = io.StringIO()
        unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=unsaid | {"Title": series["title"]})
    return LONG.sub(lambda found: f"{float(found[0]):.2f}", out.getvalue())
