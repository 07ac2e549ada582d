# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A connection to an NBD server by libnbd(3), which is loaded when the first one is made.

Rule of this file: making a connection waits, with an end; nothing else does. What libnbd reads from or writes into lives
until the command has ended or the handle is closed.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import select
import time
from collections.abc import Callable
from ctypes import Structure, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any

FUA, NO_HOLE = 1, 2
"""Flags of commands: it is on the medium when it ends; zeroes keep their storage."""
MINIMUM, PREFERRED, MAXIMUM = 0, 1, 2
"""Block sizes that a server tells."""
_READ, _WRITE = 1, 2
"""Directions of ``nbd_aio_get_direction``."""
_SLICE = 0.1
"""Seconds after which whoever connects looks whether he still should."""


class _Completion(Structure):
    """``nbd_completion_callback``; all NULL for none."""

    _fields_ = (("callback", c_void_p), ("user_data", c_void_p), ("free", c_void_p))


_NONE = _Completion()
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "create": (c_void_p,),
    "close": (None, c_void_p),
    "get_error": (c_char_p,),
    "get_errno": (c_int,),
    "set_uri_allow_local_file": (c_int, c_void_p, ctypes.c_bool),
    "aio_connect_uri": (c_int, c_void_p, c_char_p),
    "aio_is_connecting": (c_int, c_void_p),
    "aio_is_negotiating": (c_int, c_void_p),
    "aio_is_ready": (c_int, c_void_p),
    "aio_is_processing": (c_int, c_void_p),
    "aio_disconnect": (c_int, c_void_p, c_uint32),
    "poll": (c_int, c_void_p, c_int),
    "aio_get_fd": (c_int, c_void_p),
    "aio_get_direction": (ctypes.c_uint, c_void_p),
    "aio_notify_read": (c_int, c_void_p),
    "aio_notify_write": (c_int, c_void_p),
    "get_size": (c_int64, c_void_p),
    "get_block_size": (c_int64, c_void_p, c_int),
    "is_read_only": (c_int, c_void_p),
    "can_flush": (c_int, c_void_p),
    "can_fua": (c_int, c_void_p),
    "can_trim": (c_int, c_void_p),
    "can_zero": (c_int, c_void_p),
    "aio_pread": (c_int64, c_void_p, c_void_p, c_size_t, c_uint64, _Completion, c_uint32),
    "aio_pwrite": (c_int64, c_void_p, c_void_p, c_size_t, c_uint64, _Completion, c_uint32),
    "aio_flush": (c_int64, c_void_p, _Completion, c_uint32),
    "aio_trim": (c_int64, c_void_p, c_uint64, c_uint64, _Completion, c_uint32),
    "aio_zero": (c_int64, c_void_p, c_uint64, c_uint64, _Completion, c_uint32),
    "aio_peek_command_completed": (c_int64, c_void_p),
    "aio_command_completed": (c_int, c_void_p, c_uint64),
}
"""Of each function ``nbd_NAME``: what it returns, and what it takes (libnbd.h)."""


@functools.cache
def _library() -> dict[str, Any]:
    """FileNotFoundError that names the package."""
    try:
        library = ctypes.CDLL("libnbd.so.0")
    except OSError:
        raise FileNotFoundError(errno.ENOENT, "disks of NBD servers need libnbd: apt install libnbd0") from None
    functions = {}
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(library, f"nbd_{name}")
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    return functions


class Connection:
    """One export of one server. Commands are begun, and end in any order. Synchronization: one thread at a time."""

    def __init__(self, uri: str, timeout: float, given_up: Callable[[], bool] = lambda: False) -> None:
        """Wait for it, *timeout* seconds at most and until it is *given_up*. OSError that says what libnbd says."""
        self.uri = uri
        self._call = _library()
        self._buffers: dict[int, object] = {}
        self._handle = self._call["create"]()
        if not self._handle:
            raise self._error()
        try:
            self._checked("set_uri_allow_local_file", True)  # keys, for TLS
            self._checked("aio_connect_uri", uri.encode())
            end = time.monotonic() + timeout
            while self._checked("aio_is_connecting") or self._checked("aio_is_negotiating"):
                self._checked("poll", int(_SLICE * 1000))
                if given_up() or time.monotonic() > end:
                    raise OSError(errno.ETIMEDOUT, f"{uri}: no connection within {timeout:g} s")
            if not self.alive:
                raise OSError(errno.ECONNABORTED, f"{uri}: the server ended the connection")
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether commands can be begun."""
        return bool(self._handle) and (self._call["aio_is_ready"](self._handle) == 1 or self._call["aio_is_processing"](self._handle) == 1)

    def ask(self, name: str, *arguments: int) -> int:
        """What the server said when it was connected to: ``get_size``, ``can_trim`` and so on."""
        return self._checked(name, *arguments)

    # Commands: each is begun, and known by a cookie from then on ------------------------------------------------------------

    def read(self, buffer: bytearray, skip: int, length: int, offset: int) -> int:
        """Fill *length* bytes of *buffer* from *skip* on."""
        return self._begin("aio_pread", (ctypes.c_char * length).from_buffer(buffer, skip), length, offset, flags=0)

    def write(self, data: bytes, offset: int, flags: int = 0) -> int:
        """Store *data*."""
        return self._begin("aio_pwrite", data, len(data), offset, flags=flags)

    def flush(self) -> int:
        """Let what was written last."""
        return self._begin("aio_flush", flags=0)

    def trim(self, length: int, offset: int, flags: int = 0) -> int:
        """Keep it no longer."""
        return self._begin("aio_trim", length, offset, flags=flags)

    def zero(self, length: int, offset: int, flags: int = 0) -> int:
        """Let it be zeroes."""
        return self._begin("aio_zero", length, offset, flags=flags)

    def _begin(self, name: str, *arguments: Any, flags: int) -> int:
        cookie = self._checked(name, *arguments, _NONE, flags)
        if name in ("aio_pread", "aio_pwrite"):
            self._buffers[cookie] = arguments[0]
        return cookie

    def ended(self) -> list[tuple[int, OSError | None]]:
        """Commands that ended since, with how they failed. All have when the connection is lost."""
        found = []
        while self._handle and (cookie := self._call["aio_peek_command_completed"](self._handle)) > 0:
            found.append((cookie, None if self._call["aio_command_completed"](self._handle, cookie) == 1 else self._error()))
            self._buffers.pop(cookie, None)
        return found

    # To be waited for -------------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """The socket."""
        return self._checked("aio_get_fd")

    @property
    def events(self) -> int:
        """What to wait for at the socket (select.EPOLLIN ...), until the next command or event."""
        direction = self._checked("aio_get_direction")
        return select.EPOLLIN * bool(direction & _READ) | select.EPOLLOUT * bool(direction & _WRITE) or select.EPOLLIN  # of a dead one, its end

    def notify(self, events: int) -> None:
        """Go on, as *events* came."""
        wanted = self.events if self.alive else 0
        if events & ~select.EPOLLOUT and wanted & select.EPOLLIN:
            self._call["aio_notify_read"](self._handle)
        elif events & ~select.EPOLLIN and wanted & select.EPOLLOUT:
            self._call["aio_notify_write"](self._handle)

    def close(self) -> None:
        """Drop the connection and whatever is under way on it; harmless when done before."""
        handle, self._handle = self._handle, None
        if handle:
            if self._call["aio_is_ready"](handle) == 1:
                self._call["aio_disconnect"](handle, 0)
            self._call["close"](handle)
        self._buffers.clear()

    def _checked(self, name: str, *arguments: Any) -> int:
        if not self._handle:
            raise OSError(errno.ENOTCONN, f"{self.uri}: not connected")
        result = self._call[name](self._handle, *arguments)
        if result == -1:
            raise self._error()
        return int(result)

    def _error(self) -> OSError:
        number = self._call["get_errno"]() or errno.EIO
        text = (self._call["get_error"]() or os.strerror(number).encode()).decode(errors="replace")
        return OSError(number, f"{self.uri}: {text.partition(': ')[2] or text}")  # without the name of the function
