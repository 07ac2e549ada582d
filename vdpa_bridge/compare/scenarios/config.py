# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The configuration space: size, content, parts, borders, and the eventfd that tells of changes."""

from __future__ import annotations

import os

from ... import ops
from ...virtio.config import parse_config
from ...virtio.ids import DeviceId
from ...wire import ConfigData, ConfigRange, EventFile
from ..record import OK, Run
from .bringup import at_least

_LEAST = {DeviceId.BLOCK: 24, DeviceId.NET: 12}
"""Bytes that every driver of the type reads."""
_CLOSED_FD = 1 << 20
"""A descriptor number beyond any that is open."""


def config(run: Run) -> None:
    """Reads, writes and notifications."""
    device = run.device
    device_id, features = run.kind, device.get_features()
    least = _LEAST.get(DeviceId(device_id), 0)
    size = run.must("GET_CONFIG_SIZE", "", lambda: device.identify().config_size, show=lambda value: at_least(least, value), detail=str)
    whole = run.must(
        "GET_CONFIG",
        "all that the driver needs",
        lambda: device.get_config(0, least),
        show=lambda data: OK if len(data) == least else f"{len(data)} bytes",
        detail=lambda data: _tell(device_id, features, data),
    )
    run.step("GET_CONFIG", "a field", lambda: device.get_config(4, 4), show=lambda data: _same(data, whole[4:8]))
    run.step(
        "GET_CONFIG",
        "byte by byte",
        lambda: b"".join(device.get_config(at, 1) for at in range(least)),
        show=lambda data: _same(data, whole),
    )
    run.op(ops.GET_CONFIG, "the last byte", ConfigRange(size - 1, 1))
    run.op(ops.GET_CONFIG, "no bytes", ConfigRange(0, 0))
    run.op(ops.GET_CONFIG, "across the end", ConfigRange(size - 1, 2))
    run.op(ops.GET_CONFIG, "at the end", ConfigRange(size, 1))
    run.op(ops.GET_CONFIG, "far beyond the end", ConfigRange(0xFFFFFFFF, 1))
    run.op(ops.SET_CONFIG, "across the end", ConfigData(size - 1, bytes(2)))
    run.op(ops.SET_CONFIG, "no bytes", ConfigData(0, b""))
    event, plain = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), os.memfd_create("plain", os.MFD_CLOEXEC)
    try:
        run.op(ops.SET_CONFIG_CALL, "an eventfd", EventFile(event))
        run.op(ops.SET_CONFIG_CALL, "none", EventFile(-1))
        run.op(ops.SET_CONFIG_CALL, "no eventfd", EventFile(plain))
        run.op(ops.SET_CONFIG_CALL, "a closed descriptor", EventFile(_CLOSED_FD))
    finally:
        os.close(event)
        os.close(plain)


def _same(data: bytes, expected: bytes) -> str:
    return "same bytes" if data == expected else f"{data.hex()} instead of {expected.hex()}"


def _tell(device_id: int, features: int, data: bytes) -> str:
    return " ".join(f"{name}={value}" for name, value in parse_config(device_id, features, data).items())
