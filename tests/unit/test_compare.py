# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Comparisons: devices that are alike are found so, and one that lies is found out."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from vdpa_bridge import ops
from vdpa_bridge.backends.base import ABSENT, Backend, Capability
from vdpa_bridge.backends.model import ModelBackend
from vdpa_bridge.cli import main
from vdpa_bridge.cli.common import Trace
from vdpa_bridge.compare import SCENARIOS, Comparison, Outcome, Place, judge, run_all
from vdpa_bridge.compare.record import NOT_REACHED
from vdpa_bridge.models.blk import BlkModel
from vdpa_bridge.targets import Target
from vdpa_bridge.vhost_user.server import Server
from vdpa_bridge.wire import U8, VringState

MODELS = {"blk": "model:blk?size=8M", "net": "model:net"}


class Liar(Backend):
    """Passes operations on and changes what *lie* changes: a reply, or an exception to raise."""

    def __init__(self, backend: Backend, lie: Callable[[Any, Any, Any], Any]) -> None:
        self.backend, self.name, self.traits, self._lie = backend, backend.name, backend.traits, lie

    def call(self, op, request):  # type: ignore[no-untyped-def]
        try:
            reply = self.backend.call(op, request)
        except OSError as error:
            reply = error
        reply = self._lie(op, request, reply)
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def capability(self, op: ops.Op[Any, Any]) -> Capability:
        return self.backend.capability(op)

    def close(self) -> None:
        self.backend.close()


def lie_about_status(op: Any, request: Any, reply: Any) -> Any:
    """A status that has one bit more than it should."""
    return U8(reply.value | 0x40) if op is ops.GET_STATUS and reply.value == 0x0B else reply


def lie_about_errors(op: Any, request: Any, reply: Any) -> Any:
    """Another errno than the kernel's."""
    if op is ops.SET_VRING_NUM and isinstance(reply, OSError) and reply.errno == errno.ENOBUFS:
        return OSError(errno.EINVAL, "SET_VRING_NUM: invalid")
    return reply


def lie_about_a_base(op: Any, request: Any, reply: Any) -> Any:
    """A ring that went further than it did."""
    return VringState(reply.index, reply.num + 1) if op is ops.GET_VRING_BASE and not isinstance(reply, OSError) and reply.num else reply


def disobey(op: Any, request: Any, reply: Any) -> Any:
    """An operation that is there and refuses."""
    return OSError(errno.EOPNOTSUPP, "SUSPEND: not today") if op is ops.SUSPEND else reply


@contextmanager
def served(kind: str, directory: Path) -> Iterator[str]:
    """A model behind our server; yields the socket's path."""
    target = Target.parse(MODELS[kind])
    try:
        with Server(target.open, str(directory / "s")):
            yield str(directory / "s")
    finally:
        target.close()


@pytest.mark.parametrize("kind", ["blk", "net"])
def test_the_model_answers_alike_in_all_homes(kind: str, tmp_path: Path) -> None:
    with served(kind, tmp_path) as path:
        places = [
            Place.parse(f"model={MODELS[kind]}"),
            Place.parse(f"vdpa=vhost-user:{path}?vdpa=require"),
            Place.parse(f"legacy=vhost-user:{path}?vdpa=off&type={kind}"),
        ]
        result = run_all(places)
    assert [step for step in result.steps if step.verdict == "different"] == []
    assert {step.scenario for step in result.steps} == set(SCENARIOS)
    assert result.count("same") > 100
    assert any("stops the ring" in reason for step in result.steps for reason in step.reasons)
    assert all(outcome.value != NOT_REACHED for step in result.steps for outcome in step.outcomes)
    assert result.homes == ("in this process", "vhost-user, vDPA mode", "vhost-user, legacy mode")


@pytest.mark.parametrize(
    ("lie", "scenario", "operation"),
    [
        (lie_about_status, "status", "GET_STATUS"),
        (lie_about_errors, "wrong", "SET_VRING_NUM"),
        (lie_about_a_base, "restart", "GET_VRING_BASE"),
        (disobey, "status", "SUSPEND"),
    ],
)
def test_a_liar_is_found_out(lie: Callable[..., Any], scenario: str, operation: str) -> None:
    liar = Place.parse("liar=model:blk?size=8M")
    liar.wrap = lambda backend, label: Liar(backend, lie)
    result = run_all([Place.parse("honest=model:blk?size=8M"), liar], [scenario])
    found = [step for step in result.steps if step.verdict == "different"]
    assert operation in {step.operation for step in found}
    assert all("liar" in reason for step in found for reason in step.reasons)


def test_corrupted_data_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that forgets one byte of what was written."""
    liar, honest = Place.parse("liar=model:blk?size=8M&engine=python"), Place.parse("honest=model:blk?size=8M")
    spoiled: list[BlkModel] = []

    def spoil(backend: Backend, label: str) -> Backend:
        assert isinstance(backend, ModelBackend)
        model = backend._model
        assert isinstance(model, BlkModel)
        if model in spoiled:  # one model serves all sessions
            return backend
        spoiled.append(model)
        request = model._request

        def forgetful(chain: Any) -> int:
            written = request(chain)
            if chain.read(0, 4) == b"\1\0\0\0":  # OUT
                offset = int.from_bytes(chain.read(8, 8), "little") * 512
                byte = os.pread(model.image.fd, 1, offset)[0]
                os.pwrite(model.image.fd, bytes([byte ^ 1]), offset)
            return written

        monkeypatch.setattr(model, "_request", forgetful)
        return backend

    liar.wrap = spoil
    result = run_all([honest, liar], ["io"])
    found = {f"{step.operation} {step.case}": step.outcomes[1].value for step in result.steps if step.verdict == "different"}
    assert found["write 4 KiB, read back"] == "differs at 0"


def test_a_difference_is_exit_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trace, "wrap", lambda self, backend, label="": Liar(backend, lie_about_errors) if label == "liar" else backend)
    arguments = ["compare", "honest=model:net", "liar=model:net", "--scenario", "wrong"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "DIFFERENT" in result.stdout
    assert "liar answers EINVAL" in result.stdout
    assert CliRunner().invoke(main, [*arguments[:2], "other=model:net", *arguments[3:]]).exit_code == 0


def test_the_result_can_be_kept_and_shown_again(tmp_path: Path) -> None:
    kept = tmp_path / "result.json"
    arguments = ["compare", "a=model:blk?size=1M", "b=model:blk?size=2M", "--scenario", "config", "--repeat", "3"]
    first = CliRunner().invoke(main, [*arguments, f"--json={kept}"])
    assert first.exit_code == 0, first.stderr
    again = CliRunner().invoke(main, ["compare", "--from", str(kept)])
    assert again.exit_code == 0
    assert again.stdout == first.stdout
    data = json.loads(kept.read_text())
    assert data["summary"]["different"] == 0
    assert data["summary"]["steps"] == len(data["steps"])
    assert json.loads(json.dumps(Comparison.from_json(data).to_json())) == data
    assert "median of 3 runs" in first.stdout


def test_five_targets_fit_160_columns() -> None:
    labels = [f"{name}=model:blk?size=1M" for name in ("sim", "vdpa", "legacy", "model", "qsd")]
    result = CliRunner().invoke(main, ["compare", *labels], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.endswith("same")]
    assert len(rows) > 100
    assert max(map(len, rows)) <= 160


def test_a_step_that_is_not_reached_is_a_difference() -> None:
    def refuse(op: Any, request: Any, reply: Any) -> Any:
        return OSError(errno.EIO, "SET_OWNER: no") if op is ops.SET_OWNER else reply

    liar = Place.parse("liar=model:net")
    liar.wrap = lambda backend, label: Liar(backend, refuse)
    result = run_all([Place.parse("honest=model:net"), liar], ["status"])
    values = {step.outcomes[1].value for step in result.steps}
    assert values == {"ok", "EIO", NOT_REACHED}
    assert result.count("different") == len(result.steps) - 1


def test_answers_that_change_from_run_to_run_are_a_difference() -> None:
    count = 0

    def moody(op: Any, request: Any, reply: Any) -> Any:
        nonlocal count
        count += op is ops.GET_VRING_GROUP
        return VringState(0, count) if op is ops.GET_VRING_GROUP and not isinstance(reply, OSError) else reply

    liar = Place.parse("moody=model:net")
    liar.wrap = lambda backend, label: Liar(backend, moody)
    result = run_all([Place.parse("steady=model:net"), liar], ["bringup"], repeat=2)
    (found,) = [step for step in result.steps if step.verdict == "different"]
    assert found.outcomes[1].value == "unstable: 1 / 2"


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [(Outcome("EOPNOTSUPP"), "allowed"), (Outcome("EINVAL"), "different"), (Outcome("ok"), "same")],
)
def test_only_a_declared_lack_excuses(answer: Outcome, verdict: str) -> None:
    lacking = replace(Place.parse("b=model:net"), absent={"SUSPEND": "no such thing"})
    table = {"restart": {("SUSPEND", "while running"): [Outcome("ok"), answer]}}
    (step,) = judge([Place.parse("a=model:net"), lacking], table, 1).steps
    assert step.verdict == verdict


def test_what_the_reference_lacks_is_no_difference_either() -> None:
    place = replace(Place.parse("a=model:net"), absent={"GET_VRING_SIZE": "this kernel does not know it"})
    table = {"bringup": {("GET_VRING_SIZE", ""): [Outcome("EOPNOTSUPP"), Outcome("ok")]}}
    (step,) = judge([place, Place.parse("b=model:net")], table, 1).steps
    assert (step.verdict, step.reasons) == ("allowed", ("a: absent: this kernel does not know it",))


def test_capabilities_are_learned_from_the_session() -> None:
    place = Place.parse("model:net")
    run_all([place, Place.parse("b=model:net")], ["config"])
    with place.open() as device:
        lacks = {name for name, capability in device.backend.capabilities().items() if capability.level == ABSENT}
    place.target.close()
    assert set(place.absent) == lacks != set()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model:net"], "two targets"),
        ([], "give targets"),
        (["model:net", "model:net"], "LABEL=TARGET"),
        (["model:net", "model:blk"], "one type"),
        (["a=model:net", "b=model:net", "--scenario", "dance"], "bringup, config"),
        (["a=model:net", "b=nonsense:x"], "a target is"),
    ],
)
def test_wrong_usage_says_what_is_right(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(main, ["compare", *arguments])
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.startswith("error: ")


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    for text in ('{"steps": 3}', "no json"):
        (tmp_path / "x.json").write_text(text)
        result = CliRunner().invoke(main, ["compare", "--from", str(tmp_path / "x.json")])
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ")
