# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What all tests share: the homes of a device, the count of what a test leaves behind, skips that can be forbidden.

``VDPA_BRIDGE_REQUIRE=peers,lab`` (either or both) makes a failure of every test that would be skipped, but for want of
what is not required.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdpa_bridge.device import Device

from .support.homes import HOMES, Home, Opener
from .support.probe import Probe, probing
from .support.seen import KEPT, Record, Seen

REQUIRED = set(filter(None, os.environ.get("VDPA_BRIDGE_REQUIRE", "").split(",")))
SEEN = pytest.StashKey[Seen]()
RECORD = pytest.StashKey[Record]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seen", type=Path, metavar="FILE", help="write there what passing tests saw working, for tools/render --seen FILE")
    parser.addoption("--every-home", action="store_true", help="collect tests of homes that are not here, too (for --collect-only)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORD] = Record() if config.option.seen else Record.load()
    if unknown := REQUIRED - {"peers", "lab"}:
        raise pytest.UsageError(f"VDPA_BRIDGE_REQUIRE knows peers and lab, not {', '.join(sorted(unknown))}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """With something required, no test may be skipped but for want of what is not."""
    report = yield
    wants = {mark.name for mark in item.iter_markers()} & {"peers", "lab"}
    if report.skipped and not hasattr(report, "wasxfail") and REQUIRED and wants <= REQUIRED:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"VDPA_BRIDGE_REQUIRE={','.join(sorted(REQUIRED))} forbids this: {reason}"
    return report


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A temporary directory whose path leaves room for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="vb") as name:
        yield Path(name)


# What is seen working --------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Seen:
    """Says what the test saw working, after it did: a row, or a part of one, of docs/clients.md or docs/devices.md."""
    return request.node.stash.setdefault(SEEN, Seen())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test that passes has said what the documentation has of it, neither more nor less; with --seen it is noted instead."""
    yield
    seen, record = item.stash.get(SEEN, Seen()), item.config.stash[RECORD]
    if item.config.option.seen:
        record.add(item.nodeid, seen)
    elif (kept := record.tests.get(item.nodeid, set())) != seen.sights:
        more, less = sorted(seen.sights - kept), sorted(kept - seen.sights)
        pytest.fail(f"seen, but not in {KEPT.name}: {more}; there, but not seen: {less}. Run it with --seen FILE, then tools/render --seen FILE", pytrace=False)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.option.seen and not session.config.option.collectonly:
        session.config.stash[RECORD].save(session.config.option.seen)


# Homes -----------------------------------------------------------------------------------------------------------------


def _params(kind: str | None, every: bool) -> list[object]:
    """The homes as parameters: one that is missing gives one skip in test_homes, and no test."""
    chosen = [home for home in HOMES if (kind is None or home.kind == kind) and (every or not home.missing)]
    return [pytest.param(home, id=str(home), marks=[getattr(pytest.mark, home.mark)] if home.mark else []) for home in chosen]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that use a home run in all of them; ``blk_home`` and ``net_home`` choose those with such a device."""
    if "place" in metafunc.fixturenames:
        kind = next((kind for kind in ("blk", "net") if f"{kind}_home" in metafunc.fixturenames), None)
        metafunc.parametrize("place", _params(kind, metafunc.config.option.every_home), indirect=True, scope="session")


@pytest.fixture(scope="session")
def place(request: pytest.FixtureRequest) -> Iterator[tuple[Home, Opener]]:
    """A home, started once for all tests in it."""
    home: Home = request.param
    with home.start(home.kind) as opener:
        yield home, opener


@pytest.fixture
def home(place: tuple[Home, Opener]) -> Home:
    """Every home in turn."""
    return place[0]


@pytest.fixture
def blk_home(place: tuple[Home, Opener]) -> Home:
    """Homes of block devices."""
    return place[0]


@pytest.fixture
def net_home(place: tuple[Home, Opener]) -> Home:
    """Homes of network devices."""
    return place[0]


@pytest.fixture
def opener(place: tuple[Home, Opener]) -> Opener:
    """Opens the device of the test's home."""
    return place[1]


@pytest.fixture
def probe(place: tuple[Home, Opener]) -> Iterator[Probe]:
    """One opening, closed after the test."""
    home, opener = place
    with probing(home, opener()) as probe:
        yield probe


@pytest.fixture
def device(opener: Opener) -> Iterator[Device]:
    """One opening as a Device, closed after the test."""
    with Device(opener()) as device:
        yield device


# What is left behind ---------------------------------------------------------------------------------------------------


def belongings() -> Counter[str]:
    """Descriptors, shared mappings and threads of this process."""
    things: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue  # the one that listed the directory
        things["fd " + re.sub(r"\d+", "N", link)] += 1
    with open("/proc/self/maps") as maps:
        things.update("map " + line.split(maxsplit=5)[5].strip() for line in maps if "/memfd:" in line or " rw-s " in line)
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/self/task/{task}/comm") as comm:
            things["thread " + comm.read().strip()] += 1
    return things


def _standard() -> list[tuple[int, int]]:
    """Which files stdin, stdout and stderr are: nobody but the owner of descriptors 0 to 2 may have closed them."""
    return [(found.st_dev, found.st_ino) for found in map(os.fstat, range(3))]


@pytest.fixture(scope="session", autouse=True)
def standard() -> list[tuple[int, int]]:
    """As they were at first."""
    return _standard()


@pytest.fixture(autouse=True)
def leaves_nothing_behind(request: pytest.FixtureRequest, standard: list[tuple[int, int]]) -> Iterator[None]:
    """Fails a test after which there is more than before. A peer in a thread gets a moment to notice the end."""
    if "place" in request.fixturenames:
        request.getfixturevalue("place")  # the home itself stays
    before = belongings()
    yield
    deadline = time.monotonic() + 3
    while (more := belongings() - before) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not more, f"left behind: {dict(more)}"
    assert _standard() == standard, "the test closed stdin, stdout or stderr"
