# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""From outcomes to verdicts, and a comparison as a value that can be written to a file and read again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from ..differences import documented
from ..errors import errno_name
from .record import NOT_OFFERED, NOT_REACHED, OK, Key, Outcome, Place

Verdict = Literal["same", "allowed", "different"]
Table = dict[str, dict[Key, list[Outcome]]]
"""Scenario to step to one outcome per place."""


@dataclass(frozen=True)
class Judged:
    """One step on all targets."""

    scenario: str
    operation: str
    case: str
    outcomes: tuple[Outcome, ...]
    verdict: Verdict
    reasons: tuple[str, ...] = ()
    """Why it may differ, or which target differs."""


@dataclass(frozen=True)
class Comparison:
    """All steps on all targets."""

    labels: tuple[str, ...]
    targets: tuple[str, ...]
    homes: tuple[str, ...]
    """How each target is reached, in words."""
    repeat: int
    steps: tuple[Judged, ...]

    def count(self, verdict: Verdict) -> int:
        """How many steps ended so."""
        return sum(step.verdict == verdict for step in self.steps)

    @property
    def summary(self) -> str:
        """``41 steps, 38 same, 3 allowed, 0 different``"""
        return f"{len(self.steps)} steps, {self.count('same')} same, {self.count('allowed')} allowed, {self.count('different')} different"

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        counts = {"steps": len(self.steps)} | {name: self.count(name) for name in ("same", "allowed", "different")}
        return {**asdict(self), "summary": counts}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """The inverse of ``to_json``; ValueError when it is none."""
        try:
            steps = tuple(
                Judged(
                    step["scenario"],
                    step["operation"],
                    step["case"],
                    tuple(Outcome(**outcome) for outcome in step["outcomes"]),
                    step["verdict"],
                    tuple(step["reasons"]),
                )
                for step in data["steps"]
            )
            return cls(tuple(data["labels"]), tuple(data["targets"]), tuple(data["homes"]), data["repeat"], steps)
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no comparison: {error}") from None


def judge(places: Sequence[Place], table: Table, repeat: int) -> Comparison:
    """Compare every target with the first."""
    steps = [_judge(places, scenario, key, outcomes) for scenario, rows in table.items() for key, outcomes in rows.items()]
    homes = tuple(str(place.facts.get("transport", "?")) for place in places)
    return Comparison(tuple(p.label for p in places), tuple(p.target.text for p in places), homes, repeat, tuple(steps))


def _judge(places: Sequence[Place], scenario: str, key: Key, outcomes: Sequence[Outcome]) -> Judged:
    allowed: dict[str, list[str]] = {}
    different: list[str] = []
    own_reason = _excuse(places[0], key, outcomes[0])
    for place, outcome in zip(places[1:], outcomes[1:], strict=True):
        if outcome.value == outcomes[0].value:
            continue
        reason = _excuse(place, key, outcome)
        if reason is not None:
            allowed.setdefault(reason, []).append(place.label)
        elif own_reason is not None:
            allowed.setdefault(own_reason, [places[0].label])
        else:
            different.append(f"{place.label} answers {_tell(outcome)}, {places[0].label} {_tell(outcomes[0])}")
    verdict: Verdict = "different" if different else "allowed" if allowed else "same"
    return Judged(
        scenario,
        *key,
        tuple(outcomes),
        verdict,
        tuple(different or [f"{', '.join(labels)}: {reason}" for reason, labels in allowed.items()]),
    )


def _excuse(place: Place, key: Key, outcome: Outcome) -> str | None:
    """Why *place* may answer so, if it may."""
    operation, case = key
    if outcome.value == NOT_OFFERED:
        return outcome.detail
    if outcome.value == "EOPNOTSUPP" and operation in place.absent:
        return f"absent: {place.absent[operation]}"
    row = documented(place.traits, operation, case)
    if row is None:
        return None
    if row.instead is None:
        return row.reason  # whatever it answers
    instead = errno_name(row.instead) if row.instead else OK
    return row.reason if outcome.value == instead else None


def _tell(outcome: Outcome) -> str:
    return f"{outcome.value} ({outcome.detail})" if outcome.detail and outcome.value not in (OK, NOT_REACHED) else outcome.value
