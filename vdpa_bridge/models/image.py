# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What disks store their blocks in: a file, a block device, or memory, which is a file as well (a memfd)."""

from __future__ import annotations

import fcntl
import os
import stat


def open_image(path: str, readonly: bool = False) -> int:
    """A descriptor of a file or block device. ValueError for anything else, OSError when it cannot be opened."""
    fd = os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
    if stat.S_ISREG(mode := os.fstat(fd).st_mode) or stat.S_ISBLK(mode):
        return fd
    os.close(fd)
    raise ValueError(f"{path} is neither a file nor a block device")


def memory_image(size: int) -> int:
    """A descriptor of *size* bytes of memory."""
    fd = os.memfd_create("vdpa-bridge-disk", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_memory(fd: int) -> bool:
    """Whether the file lives in memory (a memfd, tmpfs), so that nothing ever waits for it: such files alone have seals."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def open_direct(fd: int, readonly: bool = False) -> int:
    """Another descriptor of the same file, whose transfers pass by the page cache. OSError EINVAL where the file system has no such thing."""
    return os.open(f"/proc/self/fd/{fd}", (os.O_RDONLY if readonly else os.O_RDWR) | os.O_DIRECT | os.O_CLOEXEC)
