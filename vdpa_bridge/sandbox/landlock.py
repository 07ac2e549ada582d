# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Landlock (landlock(7), linux/landlock.h): files by path, TCP, abstract sockets and signals, closed for this process for good.

Rule of this file: everything that the kernel's ABI can close is closed, and opened again only below the paths of a policy.
Holds for the calling thread and those that it starts.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from enum import IntFlag

from .kernel import LANDLOCK_ADD_RULE, LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF, PR_SET_NO_NEW_PRIVS, prctl, syscall

_VERSION = 1
"""LANDLOCK_CREATE_RULESET_VERSION"""
_PATH_BENEATH = 1
_RULESET = struct.Struct("=QQQ")
"""``struct landlock_ruleset_attr``: handled_access_fs, handled_access_net, scoped."""
_BENEATH = struct.Struct("=Qi")
"""``struct landlock_path_beneath_attr``"""


class Access(IntFlag):
    """LANDLOCK_ACCESS_FS_*"""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


_OF_ABI = {1: (1 << 13) - 1, 2: Access.REFER, 3: Access.TRUNCATE, 5: Access.IOCTL_DEV}
"""What each ABI brought for files."""
_NET_ABI, _NET = 4, 3
"""Binding and connecting TCP sockets."""
_SCOPE_ABI, _SCOPES = 6, 3
"""Abstract UNIX sockets and signals, to who is not in the same domain."""

READ = Access.READ_FILE | Access.READ_DIR
WRITE = (
    READ
    | Access.WRITE_FILE
    | Access.REMOVE_DIR
    | Access.REMOVE_FILE
    | Access.MAKE_DIR
    | Access.MAKE_REG
    | Access.MAKE_SOCK
    | Access.MAKE_FIFO
    | Access.MAKE_SYM
    | Access.REFER
    | Access.TRUNCATE
)
CONNECT = Access.MAKE_SOCK | Access.REMOVE_FILE
CHANGES = Access.WRITE_FILE | Access.MAKE_SOCK
"""What takes a mount that can be written."""
_OF_FILES = Access.EXECUTE | Access.WRITE_FILE | Access.READ_FILE | Access.TRUNCATE | Access.IOCTL_DEV
"""What a rule for something that is no directory may have."""


def abi() -> int:
    """The kernel's version of Landlock, 1 or more; OSError when there is none, or when it is not enabled (lsm=)."""
    return syscall(LANDLOCK_CREATE_RULESET, None, 0, _VERSION, what="landlock_create_ruleset")


def close(paths: dict[str, Access], network: bool) -> None:
    """Close all but *paths*, each with what is allowed below it; *network* leaves TCP open. OSError as of ``abi``, or for a path that is not there."""
    version = abi()
    files = sum(bits for since, bits in _OF_ABI.items() if version >= since)
    net = _NET if version >= _NET_ABI and not network else 0
    scopes = _SCOPES if version >= _SCOPE_ABI else 0
    size = 24 if version >= _SCOPE_ABI else 16 if version >= _NET_ABI else 8
    attributes = ctypes.create_string_buffer(_RULESET.pack(files, net, scopes)[:size], size)
    ruleset = syscall(LANDLOCK_CREATE_RULESET, attributes, size, 0, what="landlock_create_ruleset")
    try:
        for path, access in paths.items():
            _add(ruleset, path, access & files)
        prctl(PR_SET_NO_NEW_PRIVS, 1, what="no_new_privs")
        syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0, what="landlock_restrict_self")
    finally:
        os.close(ruleset)


def _add(ruleset: int, path: str, access: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(error.errno or errno.EIO, f"{path}: {error.strerror}") from None
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            access &= _OF_FILES
        rule = ctypes.create_string_buffer(_BENEATH.pack(access, fd), _BENEATH.size)
        syscall(LANDLOCK_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0, what=f"landlock_add_rule for {path}")
    finally:
        os.close(fd)
