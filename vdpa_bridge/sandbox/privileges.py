# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a process could still do by who it is: capabilities, limits, being looked into.

Rule of this file: everything goes away for good, and nothing comes back by running a program (no_new_privs).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import struct
from collections.abc import Mapping
from pathlib import Path

from .kernel import (
    PR_CAP_AMBIENT,
    PR_CAP_AMBIENT_CLEAR_ALL,
    PR_CAPBSET_DROP,
    PR_CAPBSET_READ,
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    checked,
    libc,
    prctl,
)

_CAPABILITY_VERSION_3 = 0x20080522
_MOST_CAPABILITIES = 64


def drop() -> None:
    """No capability in any set, none to be had by execve, and nobody of the same user may look into this process."""
    prctl(PR_SET_NO_NEW_PRIVS, 1, what="no_new_privs")
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, what="ambient capabilities")
    for number in range(_MOST_CAPABILITIES):
        with contextlib.suppress(OSError):  # the last one is passed, or there is none that could be in the way
            if prctl(PR_CAPBSET_READ, number, what="bounding set"):
                prctl(PR_CAPBSET_DROP, number, what="bounding set")
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), 8)
    checked(libc.capset(header, ctypes.create_string_buffer(24)), "capset")
    prctl(PR_SET_DUMPABLE, 0, what="PR_SET_DUMPABLE")


def limit(limits: Mapping[str, int]) -> None:
    """Set hard limits by the names of getrlimit(2), without RLIMIT_; none is raised."""
    for name, value in limits.items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def close_inherited() -> None:
    """Close what a careless parent left open for its children: descriptors beyond 0, 1, 2 without FD_CLOEXEC, which Python gives to all of its own."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that listed the directory is closed by now
            if int(name) > 2 and not fcntl.fcntl(int(name), fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                os.close(int(name))


def own_memory() -> int:
    """Bytes that RLIMIT_DATA counts now: what is private to this process and can be written."""
    return int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")


def open_descriptors() -> int:
    """One more than the highest that is open."""
    return max(map(int, os.listdir("/proc/self/fd"))) + 1
