# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What an errno means for an operation, and what to do: the same words whichever home the device lives in.

The meanings are the kernel's (drivers/vhost/vdpa.c, drivers/vhost/vhost.c); the lists hold what people really meet.
"""

from __future__ import annotations

import errno
from typing import Any

from .. import ops
from ..ops import Op
from ..wire import VringAddr, VringFile, VringState

_HINTS: dict[tuple[Op[Any, Any], int], str] = {
    (ops.SET_OWNER, errno.EBUSY): "this opening of the device has an owner already",
    (ops.SET_FEATURES, errno.EBUSY): "FEATURES_OK is set; reset the device first (SET_STATUS 0)",
    (ops.SET_FEATURES, errno.EINVAL): "the device refuses the set; most vDPA devices demand ACCESS_PLATFORM (bit 33)",
    (ops.SET_STATUS, errno.EINVAL): "a status write may only add bits; write 0 to reset",
    (ops.SET_BACKEND_FEATURES, errno.EOPNOTSUPP): "acknowledge only what GET_BACKEND_FEATURES offers",
    (ops.SET_BACKEND_FEATURES, errno.EINVAL): "DESC_ASID needs IOTLB_ASID",
    (ops.GET_CONFIG, errno.EINVAL): "the range is empty or leaves the configuration space (GET_CONFIG_SIZE)",
    (ops.SET_CONFIG, errno.EINVAL): "the range is empty or leaves the configuration space (GET_CONFIG_SIZE)",
    (ops.SET_VRING_NUM, errno.EINVAL): "a split ring has a power of two of entries, at most GET_VRING_NUM",
    (ops.SET_VRING_ADDR, errno.EINVAL): "avail is aligned to 2, used to 4; no change while the device runs",
    (ops.SET_VRING_ADDR, errno.EOPNOTSUPP): "the only flag is bit 0 (log)",
    (ops.SET_VRING_BASE, errno.EINVAL): "a split base is at most 65535; no change while the device runs",
    (ops.SET_VRING_BASE, errno.EOPNOTSUPP): "this device starts a ring at index 0 only (vp_vdpa does): have the driver reset it and make the ring anew",
    (ops.GET_VRING_BASE, errno.EBUSY): "the ring runs and this peer would stop it; SUSPEND first",
    (ops.SET_GROUP_ASID, errno.EINVAL): "no such group or address space (GET_GROUP_NUM, GET_AS_NUM)",
    (ops.SUSPEND, errno.EOPNOTSUPP): "this device cannot be suspended; reset it instead",
    (ops.RESUME, errno.EOPNOTSUPP): "this device cannot be resumed; reset it instead",
}


_CHOICES = (ops.SET_BACKEND_FEATURES, ops.SET_VRING_ADDR, ops.SET_VRING_BASE)
"""Operations for which EOPNOTSUPP speaks of the value in the request, not of the operation."""


def lacking(op: Op[Any, Any], number: int) -> bool:
    """Whether errno *number* says that the device has no *op* at all."""
    return number == errno.EOPNOTSUPP and op not in _CHOICES


def hint(op: Op[Any, Any], number: int) -> str:
    """What to do about errno *number* of *op*; empty when there is nothing to add."""
    if known := _HINTS.get((op, number)):
        return known
    if number == errno.EPERM:
        return "SET_OWNER first, from the process that makes this call"
    if number == errno.ENOBUFS and op.request in (VringState, VringAddr, VringFile):
        return "no such queue (GET_VQS_COUNT)"
    if number in (errno.EBADF, errno.EINVAL) and "fd" in getattr(op.request, "names", ()):
        return "the descriptor must be an open eventfd, or -1 for none"
    return ""
