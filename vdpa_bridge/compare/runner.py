# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Runs scenarios on targets, one target at a time, so that times are not those of a busy machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from ..virtio.ids import device_name
from .judge import Comparison, Table, judge
from .record import NOT_REACHED, Key, Outcome, Place, Run, Stop
from .scenarios import SCENARIOS


def run_all(
    places: Sequence[Place],
    scenarios: Sequence[str] = tuple(SCENARIOS),
    repeat: int = 1,
    progress: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Run *scenarios* on all *places* and compare; *progress* gets a line for each run.

    ValueError when a label occurs twice or the targets are not of one type; OSError and ProtocolError from a target that
    cannot even be opened and identified.
    """
    labels = [place.label for place in places]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise ValueError(f"two targets are called {', '.join(sorted(twice))}; write LABEL=TARGET")
    try:
        _same_type(places)
        table: Table = {}
        for name in scenarios:
            columns = []
            for place in places:
                start = time.monotonic()
                columns.append(_merge([_run(place, name) for _ in range(repeat)]))
                progress(f"{name}: {place.label}: {len(columns[-1])} steps, {time.monotonic() - start:.1f} s")
            table[name] = _join(columns)
        return judge(places, table, repeat)
    finally:
        for place in places:
            place.target.close()


def _same_type(places: Sequence[Place]) -> None:
    kinds = {}
    for place in places:
        with place.open() as device:
            kinds[place.label] = device_name(device.identify().device_id)
    if len(set(kinds.values())) > 1:
        raise ValueError("devices of one type can be compared, these are " + ", ".join(f"{label}: {kind}" for label, kind in kinds.items()))


def _run(place: Place, name: str) -> dict[Key, Outcome]:
    """One scenario on one target, which is reset afterwards whatever happened."""
    run = Run(place)
    try:
        run.open()
        SCENARIOS[name](run)
    except Stop:
        pass  # what was not reached is missing, which is a difference
    finally:
        run.close()
    return run.outcomes


def _merge(runs: Sequence[dict[Key, Outcome]]) -> dict[Key, Outcome]:
    """Several runs of one target: the median time, and the answer if it was always the same."""
    merged = {}
    for key in dict.fromkeys(key for run in runs for key in run):
        seen = [run.get(key, Outcome(NOT_REACHED)) for run in runs]
        values = list(dict.fromkeys(outcome.value for outcome in seen))
        value = values[0] if len(values) == 1 else "unstable: " + " / ".join(values)
        merged[key] = Outcome(value, seen[0].detail, round(statistics.median(outcome.micros for outcome in seen), 1))
    return merged


def _join(columns: Sequence[dict[Key, Outcome]]) -> dict[Key, list[Outcome]]:
    """One row per step, in the order of the target that got furthest."""
    longest = max(columns, key=len)
    keys = list(dict.fromkeys([*longest, *(key for column in columns for key in column)]))
    return {key: [column.get(key, Outcome(NOT_REACHED)) for column in columns] for key in keys}
