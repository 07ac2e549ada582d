# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The tables of what was seen working: what tests say is kept, and nothing is kept that no test says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.seen import HEADS, KEPT, WORDS, Record, Seen, Sight, rows

REPO = Path(__file__).parents[2]

SUITE = """
import pytest

@pytest.mark.parametrize("packed", ["split", "packed"])
def test_one(seen, packed):
    seen("clients", "Somebody", "blk", "model", packed)
    seen.version("Somebody", "1.2")

def test_two(seen):
    seen("clients", "Somebody", "blk", "model", "reboot")
    assert not ANSWER

def test_none():
    pass
"""
ONE, TWO = "test_it.py::test_one[{}]", "test_it.py::test_two"


def run(directory: Path, suite: str, *options: str) -> subprocess.CompletedProcess[str]:
    """The suite as tests of the project, in a process of its own."""
    (directory / "test_it.py").write_text(suite)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir", str(directory)]
    return subprocess.run(
        [*command, *options, str(directory / "test_it.py")],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def sight(word: str) -> Sight:
    return Sight("clients", "Somebody", "blk", "model", word)


def test_what_passing_tests_saw_is_written(tmp_path: Path) -> None:
    done = run(tmp_path, SUITE.replace("ANSWER", "True"), "--seen", str(tmp_path / "seen"))
    assert "1 failed, 3 passed" in done.stdout, done.stdout + done.stderr
    record = Record.load(tmp_path / "seen")
    assert record.tests == {ONE.format("split"): {sight("split")}, ONE.format("packed"): {sight("packed")}, "test_it.py::test_none": set()}
    assert record.versions == {"Somebody": "1.2"}


def test_what_is_not_kept_fails(tmp_path: Path) -> None:
    """A test that sees more than the file has, here anything at all, fails and says what to do."""
    done = run(tmp_path, SUITE.replace("ANSWER", "False"))
    assert "3 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "Run it with --seen FILE" in done.stdout
    assert "word='reboot'" in done.stdout


def test_what_is_not_seen_any_more_is_dropped() -> None:
    kept = Record({"a": {sight("split"), sight("reboot")}, "b": {sight("packed")}, "c": {sight("pause")}}, {"Somebody": "1", "Gone": "7"})
    kept.merge(Record({"a": {sight("split")}, "b": set()}, {"Somebody": "2"}))
    assert kept == Record({"a": {sight("split")}, "c": {sight("pause")}}, {"Somebody": "2"})
    assert list(rows("clients", kept)) == [["Somebody 2", "blk", "model", "split, pause", "`a`, `c`"]]


def test_only_known_things_are_seen() -> None:
    with pytest.raises(ValueError, match="teleport"):
        Seen()("clients", "Somebody", "blk", "model", "split", "teleport")
    with pytest.raises(ValueError, match="nothing"):
        Seen()("clients", "Somebody", "blk", "model")
    with pytest.raises(ValueError, match="planets"):
        Seen()("planets", "Somebody", "blk", "model", "split")


def test_file_is_canonical(tmp_path: Path) -> None:
    kept = Record.load()
    kept.save(tmp_path / "again")
    assert (tmp_path / "again").read_text() == KEPT.read_text()
    assert {s.table for sights in kept.tests.values() for s in sights} <= set(HEADS)
    assert {s.word for sights in kept.tests.values() for s in sights} <= set(WORDS)


def test_every_test_that_saw_something_exists() -> None:
    kept = Record.load()
    assert kept.gone() == [], "tools/render --seen FILE takes them out, for any FILE that pytest --seen made"
    invented = ["tests/unit/test_nothing.py::test_it", "tests/unit/test_seen.py::test_nothing"]
    assert Record({test: set() for test in [*invented, "tests/unit/test_seen.py::test_only_known_things_are_seen"]}).gone() == invented
