# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""docs/performance.md from what ``tools/bench data`` measured, with pictures, and the figures beside them.

Rule of this file: prose is in the page, and what stands between ``<!-- measured: NAME -->`` and ``<!-- end -->`` is made here of
figures alone, so that the page says what was measured, whatever that was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from report import verdict
from rows import OURS, Row, trusted

Report = dict[str, Any]
Series = dict[str, Any]
DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, FIGURES, IMAGES = "performance.md", "performance.json", "images"
PART = re.compile(r"(?P<begin><!-- measured: (?P<name>\w+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
ABSENT = "Not measured in this run."


def number(value: float) -> str:
    """Four digits, with commas."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def share(value: float | None) -> str:
    """Of a CPU."""
    return "-" if value is None else f"{value:.0%}"


def table(head: Iterable[str], body: Iterable[Iterable[str]]) -> Iterator[str]:
    """A Markdown table."""
    head = list(head)
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    yield from ("| " + " | ".join(row) + " |" for row in body)


def loud(series: Series) -> bool:
    """Whether most of its turns were disturbed."""
    return bool(series["disturbed"] > 0.5)


def machine(report: Report) -> Iterator[str]:
    """Where, how long, and how quiet it was."""
    what, span, rows = report["machine"], report["span"], report["rows"]
    yield f"{what['cpu']}, {what['cpus']} CPUs, Linux {what['kernel']}, Python {what['python']}; servers on CPU {report['pinned'][0]}, clients on CPU {report['pinned'][1]}."
    yield f"A value takes {span['seconds']:g} s after {span['warmup']:g} s of warm-up; medians are of {span['turns']} turns at most."
    many = sum(not trusted(row) for row in rows)
    yield f"Others on the machine disturbed most turns of {many} of {len(rows)} rows" + ("." if not many else ": **those, marked below, say little, and none of them counts for a goal.**")


def ratio(row: Row) -> str:
    """To the best of the others; ours alone where there are none."""
    return f"{row['goal']['value']:,.2f}" if row["best"] else "-"


def judged(row: Row) -> str:
    """Whether the goal is reached; disturbed rows say so instead."""
    goal = row["goal"]
    if goal["least"] is None and goal["most"] is None:
        return "-"
    return verdict(goal).strip("(").replace(")", ":") if trusted(row) else "disturbed"


def summary(report: Report) -> Iterator[str]:
    """A line for each row."""

    def line(row: Row) -> tuple[str, ...]:
        ways, best = row["ways"], row["best"]
        theirs = f"{number(ways[best]['median'])} ({best})" if best else "-"
        return row["work"], f"{number(ways[OURS]['median'])} {row['unit']}", theirs, ratio(row), judged(row)

    yield from table(("work", OURS, "best of the others", "ratio", "result"), map(line, report["rows"])) if report["rows"] else (ABSENT,)


def behind(series: Series) -> Iterator[tuple[str, str, dict[str, Any], list[int]]]:
    """Each line of others with ours of the same mode, a measure, and the points at which ours is the worse one."""
    for name, line in series["lines"].items():
        who, _, how = name.partition(", ")
        mine = f"{OURS}, {how}" if how else OURS
        if who == OURS or mine not in series["lines"]:
            continue
        for panel in series["panels"]:
            pairs = zip(series["points"], series["lines"][mine][panel["key"]], line[panel["key"]], strict=True)
            yield mine, name, panel, [at for at, (ours, *_), (theirs, *_) in pairs if (ours < theirs if panel["more"] else ours > theirs)]


def lost(report: Report) -> Iterator[str]:
    """Goals that are missed, rows and points at which a peer is better."""
    said = False
    for row in report["rows"]:
        goal = row["goal"]
        missed = trusted(row) and verdict(goal).endswith("MISSED") if goal["least"] or goal["most"] else False
        worse = row["best"] and (goal["value"] > 1 if goal["most"] else goal["value"] < 1)
        if missed or worse:
            said = True
            against = f"{ratio(row)} of {row['best']}" if row["best"] else f"{number(goal['value'])} {row['unit']}"
            yield f"- [{row['work']}](#{ANCHORS[row['part']]}): {against}" + (f"; {judged(row)}" if judged(row) != "-" else "")
    for series in report["series"]:
        for mine, name, panel, points in behind(series):
            if points:
                said = True
                yield f"- [by {series['axis']}](#{ANCHORS[series['name']]}), {panel['label']}: {mine} behind {name} at {', '.join(map(str, points))}" + ("; disturbed" if loud(series) else "")
    if not said:
        yield "Nowhere in this run." if report["rows"] or report["series"] else ABSENT


def ways(part: str, report: Report) -> Iterator[str]:
    """All ways of the rows of a part, ours first."""

    def lines() -> Iterator[tuple[str, ...]]:
        for row in report["rows"]:
            if row["part"] != part:
                continue
            for name, facts in row["ways"].items():
                first = f"{row['work']}, {row['unit']}" if name == OURS else ""
                spread = f"{number(facts['min'])} .. {number(facts['max'])}"
                said = judged(row) if name == OURS else f"{ratio(row)} of this" if name == row["best"] else ""
                yield first, name, number(facts["median"]), spread, f"{share(facts['client'])} / {share(facts['server'])}", said

    body = list(lines())
    yield from table(("work", "", "median", "least .. most", "CPU client / server", "result"), body) if body else (ABSENT,)


def grown(name: str, report: Report) -> Iterator[str]:
    """The picture of a series, the ratios of its lines, its medians."""
    series: Series | None = next((one for one in report["series"] if one["name"] == name), None)
    if series is None:
        yield ABSENT
        return
    yield f"![{series['title']}, by {series['axis']}: {', '.join(series['lines'])}]({IMAGES}/{name}.svg)"
    yield ""
    for mine, other, panel, points in behind(series):
        if panel is series["panels"][0]:
            pairs = zip(series["lines"][mine]["rate"], series["lines"][other]["rate"], strict=True)
            ratios = sorted(ours[0] / theirs[0] for ours, theirs in pairs)
            yield f"- {mine} / {other}: {ratios[0]:.2f} at least, {ratios[-1]:.2f} at most" + (f"; behind at {', '.join(map(str, points))}" if points else "")
    little = ": **these say little**" if loud(series) else ""
    yield f"- {series['turns']} turns at each point; in {series['disturbed']:.0%} of all turns others took CPU time all the same{little}"
    yield ""
    shown = [panel["label"] for panel in series["panels"]]

    def cell(line: dict[str, list[list[float]]], at: int) -> str:
        figures = " / ".join(number(line[panel["key"]][at][0]) for panel in series["panels"])
        return f"{figures} ({share(line['client'][at][0])}, {share(line['server'][at][0])})"

    yield f"Medians: {' / '.join(shown)} (CPU of client, of server):"
    yield ""
    body = ((str(point), *(cell(line, at) for line in series["lines"].values())) for at, point in enumerate(series["points"]))
    yield from table((series["axis"], *series["lines"]), body)


def absent(report: Report) -> Iterator[str]:
    """What could not be measured, and why."""
    yield from (f"- {name}: {(why.strip().splitlines() or ['no reason given'])[-1]}" for name, why in report["left_out"].items())
    if not report["left_out"]:
        yield "Nothing was left out."


ROWS = {"blk": "disks", "net": "nics", "drivers": "drivers", "rings": "rings", "python": "models-in-python", "memory": "memory"}
SERIES = {"depth": "by-requests-in-flight", "queues": "by-queues", "block": "by-bytes-of-a-request", "devices": "by-devices"}
ANCHORS = ROWS | SERIES
"""The page's heading of each part."""
PARTS: dict[str, Callable[[Report], Iterable[str]]] = {
    "machine": machine,
    "summary": summary,
    "lost": lost,
    "absent": absent,
    **{name: partial(ways, name) for name in ROWS},
    **{name: partial(grown, name) for name in SERIES},
}


def fill(text: str, report: Report) -> str:
    """The page with these figures in it."""
    return PART.sub(lambda found: found["begin"] + "\n" + "\n".join(PARTS[found["name"]](report)).strip("\n") + "\n\n" + found["end"], text)


def write(report: Report, docs: Path) -> None:
    """Page, pictures and figures."""
    from pictures import picture

    (docs / IMAGES).mkdir(exist_ok=True)
    for series in report["series"]:
        (docs / IMAGES / f"{series['name']}.svg").write_text(picture(series))
    page = docs / PAGE
    page.write_text(fill(page.read_text(), report))
    (docs / FIGURES).write_text(json.dumps(report, indent=1) + "\n")
