# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Timers to wait for by a descriptor (timerfd_create(2), which Python has from 3.13 on)."""

from __future__ import annotations

import ctypes
import os
import time

_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]


class _Itimerspec(ctypes.Structure):
    _fields_ = [("it_interval", _Timespec), ("it_value", _Timespec)]


class Timer:
    """Readable once its time has come."""

    def __init__(self) -> None:
        """OSError when there are no descriptors left."""
        self._fd = _libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), f"timerfd_create: {os.strerror(ctypes.get_errno())}")

    def fileno(self) -> int:
        """The descriptor."""
        return int(self._fd)

    def start(self, seconds: float) -> None:
        """Let it be due *seconds* from now, and not before, whatever was said earlier."""
        self._set(max(round(seconds * 1e9), 1))

    def stop(self) -> None:
        """Let it not be due."""
        self._set(0)

    def _set(self, nanoseconds: int) -> None:
        wanted = _Itimerspec(_Timespec(0, 0), _Timespec(*divmod(nanoseconds, 10**9)))
        if _libc.timerfd_settime(self._fd, 0, ctypes.byref(wanted), None):
            raise OSError(ctypes.get_errno(), f"timerfd_settime: {os.strerror(ctypes.get_errno())}")

    def close(self) -> None:
        """Harmless when done before."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
