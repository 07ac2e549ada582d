# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""From opening to DRIVER_OK and back: what the device says of itself, and the life cycle as it should go."""

from __future__ import annotations

from ... import ops
from ...drivers import Driver
from ...flags import BackendFeature, Feature, bit_names
from ...virtio.ids import device_name
from ...wire import EMPTY, IovaRange, VringState
from ..record import OK, Run

BASICS = Feature.VERSION_1 | Feature.ACCESS_PLATFORM
"""Features without which there is no vDPA device."""
BACKEND_BASICS = BackendFeature.IOTLB_MSG_V2 | BackendFeature.IOTLB_BATCH
_LOW, _HIGH = 1 << 20, 1 << 36
"""IOVAs that every driver may expect to be usable."""


def lacking(value: int) -> str:
    """``ok``, or which of the basic features are missing."""
    return "lacks " + " ".join(bit_names(Feature, BASICS & ~value)) if BASICS & ~value else OK


def at_least(least: int, value: int) -> str:
    """``>= 1``, or the number."""
    return f">= {least}" if value >= least else str(value)


def status_text(value: int) -> str:
    """The status byte."""
    return f"{value:#04x}"


def bringup(run: Run) -> None:
    """Questions, owner, negotiation, start with all queues, reset."""
    device = run.device
    run.must("GET_DEVICE_ID", "", device.get_device_id, show=device_name)
    run.step("GET_FEATURES", "has the basics", device.get_features, show=lacking, detail=hex)
    run.op(
        ops.GET_BACKEND_FEATURES,
        "has the basics",
        show=lambda reply: OK if not BACKEND_BASICS & ~reply.value else " ".join(bit_names(BackendFeature, reply.value)),
        detail=lambda reply: " ".join(bit_names(BackendFeature, reply.value)),
    )
    least = 2 if run.is_net else 1
    run.op(ops.GET_VQS_COUNT, show=lambda reply: at_least(least, reply.value), detail=lambda reply: str(reply.value))
    run.op(ops.GET_VRING_NUM, show=lambda reply: at_least(128, reply.value), detail=lambda reply: str(reply.value))
    run.op(ops.GET_IOVA_RANGE, "1 MiB to 64 GiB", show=_range, detail=lambda reply: f"{reply.first:#x} to {reply.last:#x}")
    run.op(ops.GET_GROUP_NUM, show=lambda reply: at_least(1, reply.value), detail=lambda reply: str(reply.value))
    run.op(ops.GET_AS_NUM, show=lambda reply: at_least(1, reply.value), detail=lambda reply: str(reply.value))
    run.op(ops.GET_STATUS, "at rest", show=lambda reply: status_text(reply.value))
    run.must("own", "SET_OWNER, SET_BACKEND_FEATURES", device.own)
    run.op(ops.GET_VRING_GROUP, "of queue 0", VringState(0, 0), show=lambda reply: str(reply.num))
    run.op(ops.GET_VRING_BASE, "at rest", VringState(0, 0), show=lambda reply: str(reply.num))
    run.op(ops.SET_OWNER, "again", EMPTY)
    run.must("negotiate", "up to FEATURES_OK", lambda: device.negotiate(0), show=lacking, detail=hex)
    run.op(ops.GET_STATUS, "FEATURES_OK", show=lambda reply: status_text(reply.value))
    driver = run.must("bring up", "reset to DRIVER_OK, all queues", lambda: Driver(device))
    try:
        run.op(ops.GET_STATUS, "running", show=lambda reply: status_text(reply.value))
        run.op(ops.GET_VRING_BASE, "while the ring runs", VringState(0, 0), show=lambda reply: str(reply.num))
    finally:
        run.step("reset", "", driver.close)
    run.op(ops.GET_STATUS, "after the reset", show=lambda reply: status_text(reply.value))


def _range(reply: IovaRange) -> str:
    return OK if reply.first <= _LOW and reply.last >= _HIGH else f"{reply.first:#x} to {reply.last:#x}"
