# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Every operation of the table, in every home: before there is an owner, on a running device, on a queue that is not there.

Rule of this file: the loops run over the table, so that an operation without an answer here fails.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from tests.contract.test_config import WRITABLE
from tests.support.probe import RING_IOVA, RUNNING, Probe, name_of
from vdpa_bridge import ops
from vdpa_bridge.backends.base import ABSENT
from vdpa_bridge.flags import BackendFeature as B
from vdpa_bridge.flags import Feature
from vdpa_bridge.ops import Op
from vdpa_bridge.wire import (
    EMPTY,
    U8,
    U64,
    ConfigRange,
    Empty,
    EventFile,
    IotlbBatchBegin,
    IotlbBatchEnd,
    IotlbInvalidate,
    IotlbUpdate,
    Iova,
    Payload,
    VringAddr,
    VringFile,
    VringState,
)

ELSEWHERE = Iova(0x4000000)
"""Where nothing is mapped."""

FREE_FOR_ALL = {
    *(ops.GET_FEATURES, ops.SET_FEATURES, ops.GET_BACKEND_FEATURES, ops.SET_BACKEND_FEATURES, ops.GET_DEVICE_ID),
    *(ops.GET_STATUS, ops.SET_STATUS, ops.GET_CONFIG, ops.SET_CONFIG, ops.GET_CONFIG_SIZE, ops.SET_CONFIG_CALL),
    *(ops.GET_VRING_NUM, ops.GET_VQS_COUNT, ops.GET_IOVA_RANGE, ops.GET_GROUP_NUM, ops.GET_AS_NUM),
    *(ops.SUSPEND, ops.RESUME, ops.SET_OWNER),
}
"""What vhost_vdpa_unlocked_ioctl answers before it asks for the owner."""


def samples(probe: Probe, index: int = 0) -> dict[Op[Any, Any], Callable[[], Payload]]:
    """A right request of each operation, for a running device and queue *index*."""
    state = lambda num: lambda: VringState(index, num)  # noqa: E731
    file = lambda: VringFile(index, probe.eventfd())  # noqa: E731
    memory = probe.region(iova=ELSEWHERE)
    return {
        **dict.fromkeys([op for op in ops.TABLE if op.request is Empty], lambda: EMPTY),
        ops.SET_FEATURES: lambda: U64(Feature.VERSION_1 | Feature.ACCESS_PLATFORM),
        ops.SET_BACKEND_FEATURES: lambda: U64(B.IOTLB_MSG_V2),
        ops.SET_STATUS: lambda: U8(probe.get(ops.GET_STATUS)),
        ops.GET_CONFIG: lambda: ConfigRange(0, 8),
        ops.SET_CONFIG: lambda: probe.ask(ops.GET_CONFIG, ConfigRange(WRITABLE[probe.home.kind], 1)),
        ops.SET_CONFIG_CALL: lambda: EventFile(probe.eventfd()),
        **{op: state(0) for op in (ops.GET_VRING_SIZE, ops.GET_VRING_BASE, ops.GET_VRING_GROUP, ops.GET_VRING_DESC_GROUP, ops.SET_GROUP_ASID)},
        ops.SET_VRING_NUM: state(16),
        ops.SET_VRING_ADDR: lambda: VringAddr(index, 0, Iova(RING_IOVA), Iova(RING_IOVA + 2048), Iova(RING_IOVA + 1024), 0),
        ops.SET_VRING_BASE: state(0),
        ops.SET_VRING_ENABLE: state(1),
        **dict.fromkeys((ops.SET_VRING_KICK, ops.SET_VRING_CALL, ops.SET_VRING_ERR), file),
        ops.IOTLB_UPDATE: memory.update,
        ops.IOTLB_INVALIDATE: lambda: IotlbInvalidate(ELSEWHERE, 4096),
        ops.IOTLB_BATCH_BEGIN: IotlbBatchBegin,
        ops.IOTLB_BATCH_END: IotlbBatchEnd,
    }


def compare(probe: Probe, got: dict[Op[Any, Any], int], expected: dict[Op[Any, Any], int]) -> None:
    """Fail with the whole list of what differs."""
    assert set(got) == set(expected)
    wrong = [f"{op.name}: {name_of(got[op])} instead of {name_of(number)}" for op, number in expected.items() if got[op] != number]
    assert not wrong, f"{probe.home}: " + ", ".join(wrong)


def test_without_an_owner(probe: Probe) -> None:
    """EPERM for whatever touches rings and mappings. SET_OWNER comes last, as it ends the state."""
    requests = samples(probe)
    assert set(requests) == set(ops.TABLE), "an operation without a sample"
    order = sorted(ops.TABLE, key=lambda op: op is ops.SET_OWNER)
    got = {op: probe.errno(op, requests[op]()) for op in order}
    compare(probe, got, {op: 0 if op in FREE_FOR_ALL else errno.EPERM for op in ops.TABLE})


def test_on_a_running_device(probe: Probe) -> None:
    """Each operation is called once; what is not there says so, beforehand and when called."""
    probe.run(B.IOTLB_BATCH)
    refused = {ops.SET_OWNER: errno.EBUSY, ops.SET_FEATURES: errno.EBUSY, ops.SET_VRING_ADDR: errno.EINVAL, ops.SET_VRING_BASE: errno.EINVAL}
    if "legacy" in probe.home.traits:
        refused[ops.GET_VRING_BASE] = errno.EBUSY
    requests = samples(probe)
    order = sorted(ops.TABLE, key=lambda op: op is ops.SUSPEND or 2 * (op is ops.RESUME))
    got = {op: probe.errno(op, requests[op]()) for op in order}
    absent = {op for op in ops.TABLE if probe.backend.capability(op).level == ABSENT}
    expected = {op: errno.EOPNOTSUPP if op in absent else refused.get(op, 0) for op in ops.TABLE}
    compare(probe, got, expected)
    assert probe.get(ops.GET_STATUS) == RUNNING


def test_what_may_be_absent(probe: Probe) -> None:
    """Everything else is in every home."""
    probe.run()
    for op, request in samples(probe).items():
        probe.errno(op, request())
    absent = {op for op in ops.TABLE if probe.backend.capability(op).level == ABSENT}
    optional = {ops.GET_VRING_DESC_GROUP, ops.GET_VRING_SIZE}
    if "vp_vdpa" in probe.home.traits:
        optional |= {ops.SUSPEND, ops.RESUME, ops.GET_VRING_BASE, ops.GET_VRING_GROUP, ops.SET_GROUP_ASID}
    if "VDUSE" in probe.home.traits:
        optional |= {ops.SUSPEND, ops.RESUME, ops.GET_VRING_GROUP, ops.SET_GROUP_ASID}
    assert absent <= optional, f"{probe.home} lacks {absent - optional}"


def test_queue_that_is_not_there(probe: Probe) -> None:
    """ENOBUFS, before anything else is looked at."""
    probe.own()
    requests = samples(probe, index=probe.get(ops.GET_VQS_COUNT))
    of_queues = [op for op in ops.TABLE if op.request in (VringState, VringAddr, VringFile)]
    compare(probe, {op: probe.errno(op, requests[op]()) for op in of_queues}, dict.fromkeys(of_queues, errno.ENOBUFS))
    requests = samples(probe, index=0xFFFFFFFF)
    compare(probe, {op: probe.errno(op, requests[op]()) for op in of_queues}, dict.fromkeys(of_queues, errno.ENOBUFS))


def test_many_at_once(probe: Probe) -> None:
    """``call_many`` answers each as ``call`` would, in order, and goes on after an error."""
    last = probe.get(ops.GET_VQS_COUNT)
    calls: list[ops.Call] = [(ops.SET_OWNER, EMPTY)]
    for number in range(300):
        calls += [(ops.GET_DEVICE_ID, EMPTY), (ops.SET_VRING_NUM, VringState(last, 16)), (ops.SET_VRING_KICK, VringFile(0, probe.eventfd() if number < 8 else -1))]
    calls.append((ops.GET_CONFIG, ConfigRange(0, 8)))
    results = probe.backend.call_many(calls)
    assert len(results) == len(calls)
    assert results[0] == EMPTY
    identity = probe.get(ops.GET_DEVICE_ID)
    assert {r.value for r in results[1:-1:3]} == {identity}
    assert {r.errno for r in results[2:-1:3]} == {errno.ENOBUFS}
    assert set(results[3:-1:3]) == {EMPTY}
    assert results[-1] == probe.ask(ops.GET_CONFIG, ConfigRange(0, 8))


def test_many_with_a_bad_descriptor_among_them(probe: Probe) -> None:
    probe.own()
    closed = 1 << 20
    calls: list[ops.Call] = [
        (ops.SET_VRING_NUM, VringState(0, 16)),
        (ops.SET_VRING_KICK, VringFile(0, closed)),
        (ops.SET_VRING_CALL, VringFile(0, probe.eventfd())),
        (ops.IOTLB_UPDATE, IotlbUpdate(ELSEWHERE, 4096, closed)),
        (ops.GET_STATUS, EMPTY),
    ]
    results = probe.backend.call_many(calls)
    assert [r.errno if isinstance(r, OSError) else 0 for r in results] == [0, errno.EBADF, 0, errno.EBADF, 0]
