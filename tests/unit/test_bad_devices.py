# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Devices whose answers to operations are wrong: errors that name the device, from drivers and from Device, and soon."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.driven import quiet
from vdpa_bridge import ops
from vdpa_bridge.backends.base import Backend, Capability
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.device import Device
from vdpa_bridge.drivers import BlkDriver, Driver, GenericDriver, NetDriver
from vdpa_bridge.errors import DeviceBroken, FeatureError
from vdpa_bridge.flags import Status
from vdpa_bridge.models import make_model
from vdpa_bridge.ops import Op, Rep, Req
from vdpa_bridge.wire import U8, U16, U32, U64, ConfigData, Iova, IovaRange, VringState

__all__ = ["quiet"]  # an autouse fixture

NUMBERS = (0, 1, 2, 3, 7, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)
QUESTIONS = (
    ops.GET_DEVICE_ID, ops.GET_FEATURES, ops.GET_BACKEND_FEATURES, ops.GET_VQS_COUNT, ops.GET_VRING_NUM, ops.GET_CONFIG_SIZE, ops.GET_IOVA_RANGE,
    ops.GET_GROUP_NUM, ops.GET_AS_NUM, ops.GET_STATUS, ops.GET_CONFIG, ops.GET_VRING_GROUP,
)  # fmt: skip

Answer = Callable[[Any], Any]
"""Makes the wrong reply of the right one."""


class Altered(Backend):
    """Passes operations on, and alters replies."""

    def __init__(self, inner: Backend, answers: dict[Op[Any, Any], Answer]) -> None:
        self.name, self._inner, self._answers = inner.name, inner, answers

    def call(self, op: Op[Req, Rep], request: Req) -> Rep:
        reply = self._inner.call(op, request)
        altered: Rep = self._answers[op](reply) if op in self._answers else reply
        return altered

    def capability(self, op: Op[Any, Any]) -> Capability:
        return self._inner.capability(op)

    def close(self) -> None:
        self._inner.close()


@contextmanager
def altered(kind: str, answers: dict[Op[Any, Any], Answer]) -> Iterator[Device]:
    home = ModelDevice(make_model(kind, {}), "model:test")
    try:
        with Device(Altered(home.open(), answers)) as device:
            yield device
    finally:
        home.close()


def of_status(change: Callable[[int], int]) -> dict[Op[Any, Any], Answer]:
    return {ops.GET_STATUS: lambda reply: U8(change(reply.value))}


@pytest.mark.parametrize("driver", [BlkDriver, GenericDriver])
def test_features_never_accepted(driver: type[Driver]) -> None:
    with altered("blk", of_status(lambda status: status & ~Status.FEATURES_OK)) as device, pytest.raises(FeatureError, match="model:test refuses the feature set"):
        driver(device)


@pytest.mark.parametrize("change", [lambda status: status & ~Status.DRIVER_OK, lambda status: status | Status.NEEDS_RESET, lambda status: status | Status.FAILED])
def test_never_starts(change: Callable[[int], int]) -> None:
    with altered("blk", of_status(change)) as device, pytest.raises(DeviceBroken, match="model:test did not start"):
        BlkDriver(device)


@pytest.mark.parametrize("count", [1 << 17, (1 << 32) - 1])
def test_more_queues_than_can_be(count: int) -> None:
    with altered("blk", {ops.GET_VQS_COUNT: lambda reply: U32(count)}) as device, pytest.raises(DeviceBroken, match=f"model:test says that it has {count} queues"):
        GenericDriver(device)


@pytest.mark.parametrize("length", [0, 7])
def test_configuration_that_is_short(length: int) -> None:
    answers: dict[Op[Any, Any], Answer] = {ops.GET_CONFIG: lambda reply: ConfigData(reply.offset, reply.data[:length])}
    with altered("blk", answers) as device, pytest.raises(DeviceBroken, match=f"model:test has a configuration space of {length} bytes"):
        BlkDriver(device)


def test_configuration_that_is_another_each_time() -> None:
    """A driver believes one reading at a time, and what it read once does not bound what it does later."""
    rng = random.Random(8)
    answers: dict[Op[Any, Any], Answer] = {ops.GET_CONFIG: lambda reply: ConfigData(reply.offset, rng.randbytes(len(reply.data)))}
    with altered("blk", answers) as device:
        for _ in range(40):
            try:
                with BlkDriver(device, timeout=0.2) as disk:
                    disk.read(0, 512)
                    disk.refresh()
            except OSError as error:
                assert "model:test" in str(error)  # noqa: PT017 - most turns may pass
            except ValueError as error:
                assert "leaves the disk" in str(error)  # noqa: PT017
    answers[ops.GET_CONFIG] = lambda reply: reply
    with altered("net", answers) as device, NetDriver(device) as nic:
        assert nic.info["mac"]


def wrong(op: Op[Any, Any], rng: random.Random) -> Answer:
    """Any value that the reply's type can have."""
    if op is ops.GET_CONFIG:
        return lambda reply: ConfigData(reply.offset, rng.randbytes(rng.choice((0, 1, len(reply.data), 300))))
    if op is ops.GET_IOVA_RANGE:
        return lambda reply: IovaRange(Iova(rng.choice(NUMBERS)), Iova(rng.choice(NUMBERS)))
    if op is ops.GET_VRING_GROUP:
        return lambda reply: VringState(reply.index, rng.choice(NUMBERS) & 0xFFFFFFFF)
    masks = {U8: 0xFF, U16: 0xFFFF, U32: 0xFFFFFFFF, U64: (1 << 64) - 1}
    return lambda reply: type(reply)(rng.choice(NUMBERS) & masks[type(reply)])


@pytest.mark.parametrize(("kind", "driver"), [("blk", BlkDriver), ("net", NetDriver), ("rng", GenericDriver), ("net", GenericDriver)])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_wrong_answers(kind: str, driver: type[Driver], seed: int) -> None:
    """Every question may be answered by any number, one or two at a time."""
    rng = random.Random(seed)
    answers = {op: wrong(op, rng) for op in rng.sample(QUESTIONS, rng.choice((1, 1, 2)))}
    got: Exception | None = None
    start = time.monotonic()
    with altered(kind, answers) as device:
        try:
            with driver(device, timeout=0.05, pool_size=1 << 18) as driving:
                driving.poll()
                if kind == "rng":
                    driving.ask(0, (), 8)
        except (OSError, FeatureError, ValueError) as error:
            got = error
    assert got is None or "model:test" in str(got) or "IOVA range" in str(got), f"the error does not name the device: {got!r}, {answers}"
    assert time.monotonic() - start < 5
