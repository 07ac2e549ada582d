# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Namespaces of one's own (namespaces(7)): no interface but a dead loopback, no process but oneself, and nearly no files.

Rule of this file: where this process may not make them (CAP_SYS_ADMIN), a user namespace lets it (user_namespaces(7)).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from .kernel import MOUNT_SETATTR, MOVE_MOUNT, OPEN_TREE, checked, libc, syscall

_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
"""linux/sched.h, CLONE_NEW*"""
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000
_MNT_DETACH = 2
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV, _ATTR_NOEXEC = 1, 2, 4, 8
_SAFE = _ATTR_NOSUID | _ATTR_NODEV | _ATTR_NOEXEC
DESCRIPTORS = "/proc/self/fd"
"""What a process may know of its own descriptors: the kind of each."""
CURE = (
    "allow user namespaces (sysctl user.max_user_namespaces=10000, and kernel.unprivileged_userns_clone=1 on Debian or "
    "kernel.apparmor_restrict_unprivileged_userns=0 on Ubuntu), outside of a chroot; in a container, unshare and mount in its seccomp profile"
)
"""What helps where they cannot be made."""


def enter(network: bool) -> bool:
    """Put this process, and as to PIDs its next child, into namespaces of its own; whether a user namespace was needed. OSError.

    *network*: that one stays as it is.
    """
    flags = _NEWNS | _NEWCGROUP | _NEWUTS | _NEWIPC | _NEWPID | (0 if network else _NEWNET)
    try:
        checked(libc.unshare(flags), "unshare")
        return False
    except PermissionError:
        pass
    user, group = os.geteuid(), os.getegid()
    checked(libc.unshare(flags | _NEWUSER), "unshare with a user namespace")
    for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", file).write_text(text)
    return True


def empty_root(paths: Mapping[str, bool]) -> None:
    """Leave nothing of the file system but *paths* (whether they can be written), which stay where they are, and the names of our descriptors. OSError."""
    mount("", "/", "", _MS_REC | _MS_PRIVATE)
    here = os.getcwd()
    trees: dict[str, int] = {}
    try:
        for path, writable in sorted({DESCRIPTORS: False, **paths}.items()):
            trees[path] = _tree(path, writable)
        root = os.path.dirname(__file__)  # any directory that is there for certain
        mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "size=64k,mode=755")
        os.chdir(root)
        for path, tree in trees.items():
            _attach(tree, path)
        checked(libc.pivot_root(b".", b"."), "pivot_root")
        checked(libc.umount2(b".", _MNT_DETACH), "umount2")
        os.chdir("/")
        _set(_AT_FDCWD, "/", _SAFE | _ATTR_RDONLY, 0)
    finally:
        with contextlib.suppress(FileNotFoundError, PermissionError):  # for paths that are relative, as far as they are there
            os.chdir(here)
        for tree in trees.values():
            os.close(tree)


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """mount(2)"""
    checked(libc.mount(source.encode(), os.fsencode(target), kind.encode(), flags, data.encode()), f"mount on {target}")


def _tree(path: str, writable: bool) -> int:
    """A mount of what is at *path*, in no place yet."""
    tree = syscall(OPEN_TREE, _AT_FDCWD, os.fsencode(path), _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_RECURSIVE, what=f"open_tree of {path}")
    try:
        _set(tree, "", _SAFE | (0 if writable else _ATTR_RDONLY), _AT_EMPTY_PATH | _AT_RECURSIVE)
    except BaseException:
        os.close(tree)
        raise
    return tree


def _attach(tree: int, path: str) -> None:
    """Put a mount at *path* below the current directory."""
    place = path.lstrip("/")
    if not os.path.lexists(place):
        os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
        if stat.S_ISDIR(os.fstat(tree).st_mode):
            os.mkdir(place)
        else:
            os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
    syscall(MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(place), _MOVE_MOUNT_F_EMPTY_PATH, what=f"move_mount to {path}")


def _set(where: int, path: str, attributes: int, flags: int) -> None:
    """Add *attributes* to a mount (mount_setattr(2))."""
    attr = (ctypes.c_uint64 * 4)(attributes)
    syscall(MOUNT_SETATTR, where, path.encode(), flags, attr, ctypes.sizeof(attr), what="mount_setattr")
