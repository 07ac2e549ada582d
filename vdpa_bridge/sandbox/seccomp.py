# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""An allow-list of system calls, made by libseccomp (seccomp(3)), which knows numbers and calling conventions of every architecture.

Rule of this file: what is not allowed is EPERM, or ENOSYS where libc has an older way to do the same; a call by the numbers
of another architecture ends the process.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import NamedTuple

from .kernel import libc

_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_BADARCH, _TSYNC, _TRUE_ERRNO = 2, 4, 9
"""SCMP_FLTATR_*"""
_EQUAL, _MASKED_EQUAL = 4, 7
_NUMBERS = range(512)
"""Where system calls are that this libseccomp may not know yet; for libc, they are those of an older kernel."""
_ALL_BITS = (1 << 64) - 1
INT = (1 << 32) - 1
"""For what the kernel takes as an int: libc may leave anything above it."""
_FALLBACK = ("clone3",)
"""Its flags are in memory, where no filter sees them; libc takes clone instead."""


class Argument(NamedTuple):
    """Holds when argument *position* (from 0) of a call has *value* in the bits of *mask*."""

    position: int
    value: int
    mask: int = _ALL_BITS

    def __str__(self) -> str:
        what = f"argument {self.position}"
        return f"{what} = {self.value:#x}" if self.mask in (_ALL_BITS, INT) else f"{what} & {self.mask:#x} = {self.value:#x}"


class _Compare(ctypes.Structure):
    """``struct scmp_arg_cmp``"""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


Rule = tuple[str, tuple[Argument, ...]]
"""A system call by its name, and what must hold of its arguments."""


def library() -> ctypes.CDLL:
    """libseccomp; OSError when it is not there."""
    try:
        lib = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        raise OSError(errno.ENOENT, "there is no libseccomp.so.2") from None
    lib.seccomp_init.restype = ctypes.c_void_p
    lib.seccomp_init.argtypes = (ctypes.c_uint32,)
    lib.seccomp_release.argtypes = (ctypes.c_void_p,)
    lib.seccomp_load.argtypes = (ctypes.c_void_p,)
    lib.seccomp_attr_set.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32)
    lib.seccomp_rule_add_array.argtypes = (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Compare))
    lib.seccomp_syscall_resolve_name.argtypes = (ctypes.c_char_p,)
    lib.seccomp_arch_native.restype = ctypes.c_uint32
    lib.seccomp_syscall_resolve_num_arch.argtypes = (ctypes.c_uint32, ctypes.c_int)
    lib.seccomp_syscall_resolve_num_arch.restype = ctypes.c_void_p
    return lib


class Filter:
    """The filter that allows *rules*, made at once: the library's file has to be there still. OSError.

    A name that this architecture, or an old library, does not have is left out: it stays closed.
    """

    def __init__(self, rules: list[Rule]) -> None:
        self._lib = lib = library()
        self._context = lib.seccomp_init(_ERRNO | errno.EPERM)
        if not self._context:
            raise MemoryError("seccomp_init")
        _check(lib.seccomp_attr_set(self._context, _BADARCH, _KILL_PROCESS), "seccomp_attr_set")
        _check(lib.seccomp_attr_set(self._context, _TSYNC, 1), "seccomp with TSYNC")
        _check(lib.seccomp_attr_set(self._context, _TRUE_ERRNO, 1), "libseccomp of before 2.5")
        for name, arguments in rules:
            if (number := lib.seccomp_syscall_resolve_name(name.encode())) >= 0:
                compares = (_Compare * len(arguments))(*map(_compare, arguments))
                self._add(_ALLOW, number, len(arguments), compares)
        for number in [lib.seccomp_syscall_resolve_name(name.encode()) for name in _FALLBACK] + _unknown(lib):
            self._add(_ERRNO | errno.ENOSYS, number, 0, None)

    def _add(self, action: int, number: int, count: int, compares: ctypes.Array[_Compare] | None) -> None:
        _check(self._lib.seccomp_rule_add_array(self._context, action, number, count, compares), f"seccomp rule for system call {number}")

    def close(self) -> None:
        """From now on, no thread of this process makes any other system call. OSError when the kernel cannot do that. Once only."""
        try:
            _check(self._lib.seccomp_load(self._context), "seccomp")
        finally:
            self._lib.seccomp_release(self._context)


def _unknown(lib: ctypes.CDLL) -> list[int]:
    architecture = lib.seccomp_arch_native()
    found = []
    for number in _NUMBERS:
        if name := lib.seccomp_syscall_resolve_num_arch(architecture, number):
            libc.free(ctypes.c_void_p(name))
        else:
            found.append(number)
    return found


def _compare(argument: Argument) -> _Compare:
    if argument.mask == _ALL_BITS:
        return _Compare(argument.position, _EQUAL, argument.value, 0)
    return _Compare(argument.position, _MASKED_EQUAL, argument.mask, argument.value)


def _check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
