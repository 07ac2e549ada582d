# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""docs/performance.md and its pictures. All figures here are made up, but for those of the last two tests."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import page
import pytest
from pictures import COLOURS, GREY, binary, picture, short
from quiet import MOST, Turns, turns
from rows import OURS, Sample, Work

DOCS = Path(__file__).parents[2] / "docs"
LARGEST = 60 << 10
PEER = "peer 1.2"
SVG = "{http://www.w3.org/2000/svg}"
TEXT = "".join(f"# {name}\n<!-- measured: {name} -->\nold\n<!-- end -->\n" for name in page.PARTS)


def made_up(name: str, points: list[int], panels: list[str]) -> dict[str, Any]:
    """A series: ours is four times as good as the peer, but for the first point of the mode "event"."""
    lines = {}
    for who, factor in ((OURS, 4.0), (PEER, 1.0)):
        for how in ("event", "poll"):
            rates = [1000.0 * at * factor * (0.01 if who == OURS and how == "event" and at == points[0] else 1) for at in points]
            line = {key: [[2.0 / factor, 1.5 / factor, 4.0]] * len(points) for key in panels[1:]}
            lines[f"{who}, {how}"] = line | {"rate": [[rate, rate / 2, rate * 2] for rate in rates], "client": [[0.5, 0.4, 0.6]] * len(points), "server": [[1.0, 1.0, 1.0]] * len(points)}
    shown = [{"key": key, "label": f"what {key} is & means", "more": key == "rate"} for key in panels]
    return {"name": name, "title": f"made up: {name}", "axis": f"axis of {name}", "panels": shown, "points": points, "lines": lines, "turns": 3, "disturbed": 0.25}


def rows() -> list[dict[str, Any]]:
    """A row of each part: 1.25 times the peer, and twice as good as a goal; the last one without a peer."""
    made = [
        Work(part, f"work of {part}", "IOPS", least=0.6).row(Turns([{OURS: Sample(1250.0, 0.3, 0.9), PEER: Sample(1000.0)}] * 3, [0.0] * 3, 0)) for part in page.ROWS if part != "memory"
    ]
    return [*made, Work("memory", "work of memory", "MiB", most=2.0).row(Turns([{OURS: Sample(1.5)}], [0.0], 0))]


@pytest.fixture(scope="module", autouse=True)
def fonts() -> None:
    """matplotlib keeps the files of its fonts open once it has drawn."""
    picture(made_up("fonts", [1, 2], ["rate", "cpu"]))


@pytest.fixture
def report() -> dict[str, Any]:
    series = [made_up("devices", [1, 10, 200], ["rate", "trip", "memory", "start"])]
    series += [made_up(name, [1, 2, 256], ["rate", "cpu"]) for name in page.SERIES if name != "devices"]
    machine = {"cpu": "a made-up CPU", "cpus": 2, "kernel": "6.1", "python": "3.11"}
    return {"machine": machine, "span": {"seconds": 1.0, "warmup": 0.1, "turns": 3}, "pinned": [0, 1], "rows": rows(), "series": series, "left_out": {}, "goals": []}


def part(text: str, name: str) -> str:
    """What was filled in."""
    return text.partition(f"<!-- measured: {name} -->\n")[2].partition("<!-- end -->")[0].strip()


def test_the_page_has_all_that_was_measured(report: dict[str, Any]) -> None:
    text = page.fill(TEXT, report)
    assert "old" not in text
    assert page.ABSENT not in text
    assert "a made-up CPU" in part(text, "machine")
    assert "| work of blk | 1,250 IOPS | 1,000 (peer 1.2) | 1.25 | goal: at least 0.6: reached |" in part(text, "summary")
    assert "| work of memory | 1.5 MiB | - | - | goal: at most 2: reached |" in part(text, "summary")
    assert "| work of net, IOPS | vdpa_bridge | 1,250 | 1,250 .. 1,250 | 30% / 90% | goal: at least 0.6: reached |" in part(text, "net")
    assert f"|  | {PEER} | 1,000 | 1,000 .. 1,000 | - / - | 1.25 of this |" in part(text, "net")
    for series in report["series"]:
        filled = part(text, series["name"])
        assert f"(images/{series['name']}.svg)" in filled
        assert f"- {OURS}, poll / {PEER}, poll: 4.00 at least, 4.00 at most\n" in filled
        assert f"- {OURS}, event / {PEER}, event: 0.04 at least, 4.00 at most; behind at 1\n" in filled
        assert "25% of all turns" in filled
        for point in series["points"]:
            assert re.search(rf"^\| {point} \| .*\b{page.number(4000 * point)} / 0\.5\b.* \(50%, 100%\) \|$", filled, re.MULTILINE)
        assert "say little" not in filled
    assert part(text, "absent") == "Nothing was left out."


def test_it_says_where_we_lose(report: dict[str, Any]) -> None:
    """By what was measured, whatever that was."""
    behind = [f"- [by axis of {series['name']}](#{page.SERIES[series['name']]}), what rate is & means: {OURS}, event behind {PEER}, event at 1" for series in report["series"]]
    assert part(page.fill(TEXT, report), "lost").splitlines() == behind
    for series in report["series"]:
        series["lines"][f"{OURS}, event"] = series["lines"][f"{OURS}, poll"]
    assert part(page.fill(TEXT, report), "lost") == "Nowhere in this run."
    slow = Turns([{OURS: Sample(500.0), PEER: Sample(1000.0)}], [0.0], 0)
    report["rows"] = [Work("blk", "slow", "IOPS", least=1.5).row(slow), Work("rings", "long", "ns", most=3.0).row(Turns([{OURS: Sample(2.0), PEER: Sample(1.0)}], [0.0], 0))]
    report["rows"] += [Work("memory", "large", "MiB", most=2.0).row(Turns([{OURS: Sample(3.0)}], [0.0], 0))]
    assert part(page.fill(TEXT, report), "lost").splitlines() == [
        "- [slow](#disks): 0.50 of peer 1.2; goal: at least 1.5: MISSED",
        "- [long](#rings): 2.00 of peer 1.2; goal: at most 3: reached",
        "- [large](#memory): 3 MiB; goal: at most 2: MISSED",
    ]


def test_disturbed_rows_judge_nothing(report: dict[str, Any]) -> None:
    noisy = Turns([{OURS: Sample(900.0), PEER: Sample(1000.0)}] * 3, [2 * MOST] * 3, 4)
    report["rows"] = [Work("blk", "noisy", "IOPS", least=1.5).row(noisy)]
    report["series"][0]["disturbed"] = 0.6
    text = page.fill(TEXT, report)
    assert "most turns of 1 of 1 rows: **those" in part(text, "machine")
    assert "MISSED" not in text
    assert "60% of all turns others took CPU time all the same: **these say little**" in part(text, "devices")
    assert [line.endswith("; disturbed") for line in part(text, "lost").splitlines()][1:] == [True, False, False, False]
    assert part(text, "summary").endswith("| 0.90 | disturbed |")


def test_what_was_not_measured_is_said(report: dict[str, Any]) -> None:
    report |= {"rows": [], "series": [], "left_out": {"a peer": "warning\nno socket after 20 s\n"}}
    text = page.fill(TEXT, report)
    assert {name for name in page.PARTS if part(text, name) == page.ABSENT} == {*page.PARTS} - {"machine", "absent"}
    assert part(text, "absent") == "- a peer: no socket after 20 s"


def test_nobody_asks_for_an_unknown_part(report: dict[str, Any]) -> None:
    with pytest.raises(KeyError, match="speed"):
        page.fill("<!-- measured: speed -->\n<!-- end -->", report)


def test_pictures_show_every_line(report: dict[str, Any]) -> None:
    for series in report["series"]:
        drawn = picture(series)
        root = ElementTree.fromstring(drawn)
        texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
        assert {series["title"], *series["lines"]} <= {*texts}
        assert texts.count(series["axis"]) == len(series["panels"])
        for panel in series["panels"]:
            assert f"{panel['label']} ({'more' if panel['more'] else 'less'} is better)" in texts
            for name in series["lines"]:
                (line,) = (found for found in root.iter(f"{SVG}g") if found.get("id") == f"{panel['key']}: {name}")
                assert sum(1 for _ in line.iter(f"{SVG}use")) == len(series["points"])
        assert {*map(str, series["points"])} <= {*texts}
        assert len(drawn) < LARGEST


def test_pictures_follow_the_figures(report: dict[str, Any]) -> None:
    series = report["series"][0]
    other = copy.deepcopy(series)
    other["lines"][f"{PEER}, poll"]["rate"][1][0] *= 1.5
    assert picture(series) != picture(other)


def test_written_again_nothing_changes(tmp_path: Path, report: dict[str, Any]) -> None:
    (tmp_path / page.PAGE).write_text(TEXT)
    states = []
    for _ in range(2):
        page.write(report, tmp_path)
        states.append({path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()})
        report = json.loads(states[-1][page.FIGURES])
    assert states[0] == states[1]
    assert set(states[0]) == {page.PAGE, page.FIGURES, *(f"{name}.svg" for name in page.SERIES)}


@pytest.mark.parametrize("background", ["#ffffff", "#0d1117"], ids=["light", "dark"])
@pytest.mark.parametrize("colour", [*COLOURS, GREY])
def test_colours_stand_out(colour: str, background: str) -> None:
    """By at least 3 to 1, as WCAG 2 (1.4.11) wants it of graphics."""

    def luminance(text: str) -> float:
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (int(text[at : at + 2], 16) / 255 for at in (1, 3, 5))]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, (colour, background)))
    assert (high + 0.05) / (low + 0.05) >= 3


@pytest.mark.parametrize(("value", "decimal", "power"), [(0.05, "0.05", "0.05"), (512, "512", "512"), (1024, "1.024k", "1Ki"), (1 << 20, "1.04858M", "1Mi"), (2e6, "2M", "2e+06")])
def test_numbers_of_axes(value: float, decimal: str, power: str) -> None:
    assert (short(value), binary(value)) == (decimal, power)


def test_turns_keep_what_was_measured() -> None:
    """Whatever a way returns, in the order of turns."""
    counts = iter(range(4))
    taken = turns({"a": lambda: {"rate": next(counts)}, "b": lambda: {"rate": next(counts)}}, 2, patience=0)
    assert taken.results == [{"a": {"rate": 0}, "b": {"rate": 1}}, {"a": {"rate": 2}, "b": {"rate": 3}}]


def test_every_part_and_heading_is_on_the_page() -> None:
    text = (DOCS / page.PAGE).read_text()
    headings = {re.sub(r"[^a-z -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    assert sorted(found["name"] for found in page.PART.finditer(text)) == sorted(page.PARTS)
    assert {*page.ANCHORS.values()} <= headings


def test_the_page_is_what_was_measured() -> None:
    """Nobody edits figures by hand: they are those of docs/performance.json, with a picture for each series."""
    report = json.loads((DOCS / page.FIGURES).read_text())
    text = (DOCS / page.PAGE).read_text()
    assert page.fill(text, report) == text
    for series in report["series"]:
        drawn = (DOCS / page.IMAGES / f"{series['name']}.svg").read_text()
        found = {group.get("id") for group in ElementTree.fromstring(drawn).iter(f"{SVG}g")}
        assert {f"{panel['key']}: {name}" for panel in series["panels"] for name in series["lines"]} <= found
        assert len(drawn) < LARGEST
