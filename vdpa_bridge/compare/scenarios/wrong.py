# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a careless or hostile caller asks for: every answer is an errno, and the device works afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ... import ops
from ...flags import BackendFeature
from ...memory import PAGE, Region
from ...wire import EMPTY, U64, IotlbInvalidate, IotlbUpdate, Iova, VringAddr, VringFile, VringState
from ..record import Run
from .config import _CLOSED_FD
from .traffic import check_traffic

_HERE = Iova(1 << 30)
"""Away from 0 and from the interrupt window of x86."""
_UNKNOWN_BIT = 1 << 63


def wrong(run: Run) -> None:
    """Before there is an owner, then queues, rings, descriptors, features, mappings; then work as usual."""
    with Region(_HERE, 2 * PAGE) as region:
        run.op(ops.IOTLB_UPDATE, "before SET_OWNER", region.update())
        run.device.identify()
        run.op(ops.SET_BACKEND_FEATURES, "an unknown bit", U64(_UNKNOWN_BIT))
        run.must("own", "", run.device.own)
        run.op(ops.SET_VRING_BASE, "before FEATURES_OK", VringState(0, 0))
        run.must("negotiate", "", lambda: run.device.negotiate(0))
        _queues(run, run.device.identify().queues)
        _rings(run)
        _mappings(run, region)
    run.open("after all that")
    check_traffic(run, "after all that")


def _queues(run: Run, beyond: int) -> None:
    """Every operation of a ring, for the first queue that is not there."""
    case = "no such queue"
    for op in (ops.SET_VRING_NUM, ops.SET_VRING_BASE, ops.GET_VRING_BASE, ops.SET_VRING_ENABLE, ops.GET_VRING_GROUP):
        run.op(op, case, VringState(beyond, 1))
    run.op(ops.SET_VRING_ADDR, case, VringAddr(beyond, 0, Iova(0), Iova(0), Iova(0), 0))
    for file_op in (ops.SET_VRING_KICK, ops.SET_VRING_CALL, ops.SET_VRING_ERR):
        run.op(file_op, case, VringFile(beyond, -1))
    run.op(ops.SET_VRING_NUM, "queue 2^32-1", VringState(0xFFFFFFFF, 1))


def _rings(run: Run) -> None:
    for num in (0, 3, 0x10000):
        run.op(ops.SET_VRING_NUM, f"{num} entries", VringState(0, num))
    run.op(ops.SET_VRING_ADDR, "avail not aligned", VringAddr(0, 0, Iova(0), Iova(0), Iova(1), 0))
    run.op(ops.SET_VRING_ADDR, "used not aligned", VringAddr(0, 0, Iova(0), Iova(2), Iova(0), 0))
    run.op(ops.SET_VRING_ADDR, "an unknown flag", VringAddr(0, 2, Iova(0), Iova(0), Iova(0), 0))
    run.op(ops.SET_VRING_BASE, "65536", VringState(0, 0x10000))
    run.op(ops.SET_VRING_BASE, "not 0", VringState(0, 7))
    with _plain_file() as plain:
        run.op(ops.SET_VRING_KICK, "no eventfd", VringFile(0, plain))
        run.op(ops.SET_VRING_CALL, "no eventfd", VringFile(0, plain))
    run.op(ops.SET_VRING_KICK, "a closed descriptor", VringFile(0, _CLOSED_FD))
    run.op(ops.SET_VRING_CALL, "a closed descriptor", VringFile(0, _CLOSED_FD))
    spaces = run.device.identify().address_spaces
    run.op(ops.SET_GROUP_ASID, "no such address space", VringState(0, spaces))


def _mappings(run: Run, region: Region) -> None:
    limits = run.device.identify()
    right = region.update()

    def update(case: str, **change: int) -> None:
        fields = {"iova": right.iova, "size": right.size, "fd": right.fd, "offset": right.offset, "perm": right.perm, "asid": right.asid}
        run.op(ops.IOTLB_UPDATE, case, IotlbUpdate(**{**fields, **change}))  # type: ignore[arg-type]

    update("size 0", size=0)
    update("iova not aligned", iova=_HERE + 1)
    update("size not aligned", size=PAGE + 1)
    update("no permission", perm=0)
    update("unknown permission", perm=4)
    update("beyond the IOVA range", iova=limits.iova_range.last - PAGE + 1)
    if run.device.backend_features & BackendFeature.IOTLB_ASID:
        update("no such address space", asid=limits.address_spaces)
    else:
        run.not_offered("IOTLB_UPDATE", "no such address space", "back-end feature IOTLB_ASID is not offered, so the field has no meaning")
    update("more than the memory", size=4 * PAGE)
    update("a closed descriptor", fd=_CLOSED_FD)
    update("right")
    update("the same again")
    update("overlap", iova=_HERE + PAGE)
    run.op(ops.IOTLB_INVALIDATE, "size 0", IotlbInvalidate(_HERE, 0))
    run.op(ops.IOTLB_INVALIDATE, "half a mapping", IotlbInvalidate(_HERE, PAGE))
    run.op(ops.IOTLB_INVALIDATE, "right", IotlbInvalidate(_HERE, 2 * PAGE))
    run.op(ops.IOTLB_INVALIDATE, "nothing there", IotlbInvalidate(_HERE, 2 * PAGE))
    update("right once more")
    run.op(ops.SET_OWNER, "again", EMPTY)


@contextmanager
def _plain_file() -> Iterator[int]:
    """A descriptor that is no eventfd."""
    fd = os.memfd_create("plain", os.MFD_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
