# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Files as streams: pipes, FIFOs, terminals, regular files. Nothing blocks, as with ``UnixStream``."""

from __future__ import annotations

import contextlib
import os
import stat
import termios
import tty
from typing import Any


class Pipe:
    """Bytes from *source* (None: there are none) and to *sink*, which may be the same. The descriptors are its own from now on."""

    def __init__(self, source: int | None, sink: int) -> None:
        self._source, self._sink = source, sink
        self._blocked = [fd for fd in self._all if os.get_blocking(fd)]
        for fd in self._blocked:
            os.set_blocking(fd, False)
        self._always: int | None = None
        if source is not None and stat.S_ISREG(os.fstat(source).st_mode):  # which cannot be waited for
            self._always = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._terminal: list[Any] | None = None

    @classmethod
    def stdio(cls) -> Pipe:
        """This process's standard input and output. A terminal hands keys on as they are pressed, unseen, until ``close``; signals stay."""
        pipe = cls(os.dup(0), os.dup(1))
        if os.isatty(0):
            pipe._terminal = termios.tcgetattr(0)
            tty.setcbreak(0)
        return pipe

    @classmethod
    def file(cls, path: str) -> Pipe:
        """A FIFO or device, both ways; any other file is written, behind what it has. OSError."""
        special = os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode)
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | (0 if special else os.O_CREAT | os.O_APPEND), 0o600)
        return cls(fd if special else None, fd)

    @property
    def _all(self) -> set[int]:
        return {self._sink} | ({self._source} if self._source is not None else set())

    def fileno(self) -> int:
        """To wait for bytes; -1 where there are none to come, or it is closed."""
        return self._always if self._always is not None else self.source

    @property
    def source(self) -> int:
        """To read from."""
        return -1 if self._source is None else self._source

    @property
    def sink(self) -> int:
        """To write to, and to wait for room."""
        return self._sink

    @property
    def idle(self) -> bool:
        """Whether nothing came that was not read. A pipe that somebody may still write to is never known to be."""
        return False

    def send(self, data: bytes | bytearray) -> int:
        """See ``UnixStream.send``."""
        try:
            return os.write(self._sink, data)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Harmless when done before."""
        if self._sink < 0:
            return
        with contextlib.suppress(OSError, termios.error):  # others may have closed it, or the terminal is gone
            if self._terminal is not None and self._source is not None:
                termios.tcsetattr(self._source, termios.TCSADRAIN, self._terminal)
        for fd in self._blocked:  # they are whoever's started us as well
            with contextlib.suppress(OSError):
                os.set_blocking(fd, True)
        for fd in self._all | ({self._always} if self._always is not None else set()):
            os.close(fd)
        self._source, self._sink, self._always = None, -1, None
