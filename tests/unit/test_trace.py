# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Traces: complete lines, and nothing changed by being watched."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

import pytest

from vdpa_bridge import ops
from vdpa_bridge.backends.base import Backend
from vdpa_bridge.backends.trace import TraceBackend
from vdpa_bridge.errors import PeerClosed
from vdpa_bridge.targets import Target
from vdpa_bridge.wire import EMPTY, U8, U64, ConfigRange, VringState

TIME = r" <\d+ us>"


@pytest.fixture
def plain() -> Iterator[Backend]:
    """The back-end of a model."""
    target = Target.parse("model:net")
    try:
        with target.open() as backend:
            yield backend
    finally:
        target.close()


@pytest.fixture
def lines() -> list[str]:
    """What the trace wrote."""
    return []


@pytest.fixture
def traced(plain: Backend, lines: list[str]) -> TraceBackend:
    """The same, traced."""
    return TraceBackend(plain, lines.append)


def matches(lines: list[str], *patterns: str) -> bool:
    """Whether each line is what a pattern says."""
    assert len(lines) == len(patterns), lines
    return all(re.fullmatch(pattern, line) for pattern, line in zip(patterns, lines, strict=True))


def test_a_line_has_request_reply_and_time(traced: TraceBackend, lines: list[str]) -> None:
    traced.call(ops.SET_OWNER, EMPTY)
    traced.call(ops.SET_STATUS, U8(3))
    traced.call(ops.GET_STATUS, EMPTY)
    traced.call(ops.GET_CONFIG, ConfigRange(0, 6))
    assert matches(
        lines,
        r"SET_OWNER\(\) = ok" + TIME,
        r"SET_STATUS\(value=3 ACKNOWLEDGE\|DRIVER\) = ok" + TIME,
        r"GET_STATUS\(\) = value=3 ACKNOWLEDGE\|DRIVER" + TIME,
        r"GET_CONFIG\(offset=0x0 length=6\) = offset=0x0 data=02 00 00 00 00 01" + TIME,
    )


def test_an_error_is_written_and_raised(traced: TraceBackend, lines: list[str]) -> None:
    with pytest.raises(OSError, match="SET_VRING_NUM") as caught:
        traced.call(ops.SET_VRING_NUM, VringState(0, 256))
    assert caught.value.errno == errno.EPERM
    with pytest.raises(OSError, match="SET_BACKEND_FEATURES") as caught:
        traced.call(ops.SET_BACKEND_FEATURES, U64(1 << 63))
    assert caught.value.errno == errno.EOPNOTSUPP
    assert matches(lines, r"SET_VRING_NUM\(index=0 num=256\) = EPERM" + TIME, r"SET_BACKEND_FEATURES\(.*bit 63\) = EOPNOTSUPP" + TIME)


def test_what_is_sent_together_is_a_group(traced: TraceBackend, lines: list[str]) -> None:
    replies = traced.call_many([(ops.GET_DEVICE_ID, EMPTY), (ops.SET_VRING_NUM, VringState(0, 1)), (ops.GET_VQS_COUNT, EMPTY)])
    assert replies[0].value == 1
    assert isinstance(replies[1], OSError)
    assert replies[2].value == 3
    assert matches(
        lines,
        r"\+ GET_DEVICE_ID\(\) = value=1",
        r"\+ SET_VRING_NUM\(index=0 num=1\) = EPERM",
        r"\+ GET_VQS_COUNT\(\) = value=3",
        r"\+ 3 requests pipelined" + TIME,
    )


def test_a_group_is_handed_on_as_a_group(plain: Backend) -> None:
    """Pipelining is the back-end's: a trace must not turn it into single calls."""
    groups: list[int] = []

    class Counting(TraceBackend):
        def call_many(self, calls):  # type: ignore[no-untyped-def]
            groups.append(len(calls))
            return super().call_many(calls)

    TraceBackend(Counting(plain, lambda line: None), lambda line: None).call_many([(ops.GET_STATUS, EMPTY)] * 5)
    assert groups == [5]


def test_a_label_stands_before_every_line(plain: Backend, lines: list[str]) -> None:
    with TraceBackend(plain, lines.append, "left") as traced:
        traced.call(ops.GET_STATUS, EMPTY)
        traced.call_many([(ops.GET_STATUS, EMPTY)])
    assert len(lines) == 4
    assert all(line.startswith("left: ") for line in lines)


def test_closing_is_written_once(plain: Backend, lines: list[str]) -> None:
    traced = TraceBackend(plain, lines.append)
    traced.close()
    traced.close()
    assert matches(lines, r"close\(\)" + TIME)
    with pytest.raises(OSError, match="closed") as caught:
        plain.call(ops.GET_STATUS, EMPTY)
    assert caught.value.errno == errno.EBADF


def test_everything_else_is_the_wrapped_one(plain: Backend, traced: TraceBackend) -> None:
    assert traced.name == plain.name
    assert traced.facts() == plain.facts()
    assert traced.capabilities() == plain.capabilities()


class _Gone(Backend):
    """A peer that hangs up."""

    name = "gone"

    def call(self, op, request):  # type: ignore[no-untyped-def]
        raise PeerClosed("the peer closed the connection")

    def call_many(self, calls):  # type: ignore[no-untyped-def]
        raise PeerClosed("the peer closed the connection")

    def capability(self, op):  # type: ignore[no-untyped-def]
        raise PeerClosed("the peer closed the connection")

    def close(self) -> None:
        pass


def test_a_lost_peer_is_written_and_raised(lines: list[str]) -> None:
    traced = TraceBackend(_Gone(), lines.append)
    with pytest.raises(PeerClosed):
        traced.call(ops.GET_STATUS, EMPTY)
    assert matches(lines, r"GET_STATUS\(\) = PeerClosed: the peer closed the connection" + TIME)


def test_a_group_that_a_lost_peer_cut_short_is_written(lines: list[str]) -> None:
    with pytest.raises(PeerClosed):
        TraceBackend(_Gone(), lines.append).call_many([(ops.GET_STATUS, EMPTY), (ops.SET_OWNER, EMPTY)])
    assert matches(
        lines,
        r"\+ GET_STATUS\(\) \.\.\.",
        r"\+ SET_OWNER\(\) \.\.\.",
        r"\+ 2 requests pipelined = PeerClosed: the peer closed the connection" + TIME,
    )
