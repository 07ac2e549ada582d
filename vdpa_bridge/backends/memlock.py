# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""How much memory this process may pin, which the kernel asks for devices that reach memory physically, root not exempt.

Rule of this file: the soft limit is ours to raise as far as is needed; the hard one too, where we are privileged. The
kernel's account is per process, over all its devices (drivers/vhost/vdpa.c, vhost_vdpa_pa_map).
"""

from __future__ import annotations

import os
import resource

from ..memory import PAGE


def pinned() -> int:
    """Bytes that this process has pinned."""
    with open("/proc/self/status") as status:
        return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmPin:")), 0)


def suffices(size: int) -> bool:
    """Whether *size* more bytes may be pinned."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return limit == resource.RLIM_INFINITY or pinned() + _whole(size) <= limit


def make_room(size: int) -> str:
    """Raise the limit so that *size* more bytes may be pinned. Where that is not ours to do: what is needed, and how to give it."""
    need = pinned() + _whole(size)
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    ceiling = hard if hard == resource.RLIM_INFINITY else max(hard, need)
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (need, ceiling))
    except (ValueError, OSError):  # ValueError is Python's word for EPERM here
        return (
            f"the device pins memory: {need} bytes with this mapping, RLIMIT_MEMLOCK allows {soft} and up to {hard}; "
            f"as root: prlimit --pid {os.getpid()} --memlock={need}:{need} (ulimit -l {need // 1024} before the start, LimitMEMLOCK={need} in a unit)"
        )
    return ""


def _whole(size: int) -> int:
    return -(-size // PAGE) * PAGE
