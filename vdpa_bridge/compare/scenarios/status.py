# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The status byte and feature negotiation, step by step and in the wrong order (virtio 1.2, 2.1 and 3.1.1)."""

from __future__ import annotations

from ... import ops
from ...flags import Feature, Status
from ...wire import U8, U64
from ..record import Run
from .bringup import BASICS, status_text

_DRIVER = Status.ACKNOWLEDGE | Status.DRIVER


def status(run: Run) -> None:
    """Up to FEATURES_OK by single writes; then back to nothing."""
    device = run.device
    offered = device.get_features()
    run.must("own", "", device.own)

    def write(case: str, value: int) -> None:
        run.op(ops.SET_STATUS, case, U8(value))
        run.op(ops.GET_STATUS, case, show=lambda reply: status_text(reply.value))

    write("0", 0)
    write("ACKNOWLEDGE", Status.ACKNOWLEDGE)
    write("DRIVER", _DRIVER)
    write("a bit taken away", Status.ACKNOWLEDGE)
    run.op(ops.SET_FEATURES, "without ACCESS_PLATFORM", U64(Feature.VERSION_1))
    run.op(ops.SET_FEATURES, "the basics", U64(offered & BASICS))
    run.op(ops.SET_FEATURES, "once more", U64(offered & BASICS))
    write("FEATURES_OK", _DRIVER | Status.FEATURES_OK)
    run.op(ops.SET_FEATURES, "after FEATURES_OK", U64(offered & BASICS))
    run.op(ops.GET_FEATURES, "are still those offered", show=lambda reply: "same" if reply.value == offered else f"{reply.value:#x}")
    run.op(ops.SUSPEND, "while not running")
    run.op(ops.RESUME, "while not running")
    write("FAILED", _DRIVER | Status.FEATURES_OK | Status.FAILED)
    write("0 again", 0)
    write("0 when it is 0", 0)
    run.op(ops.SET_FEATURES, "after the reset", U64(offered & BASICS))
