# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Where the ports of a console lead to: a pseudoterminal, a UNIX socket, standard input and output, a file.

Rule of this file: a way has one stream at a time, or none. What the other end does before a stream is there, or after it has
gone, waits there.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Mapping

from ..outside.pipe import Pipe
from ..outside.terminal import Terminal
from ..outside.timer import Timer
from ..outside.unix import UnixListener, UnixStream
from .base import Queue
from .needs import Needs
from .options import check_options
from .sources import Sources

Stream = Pipe | UnixStream
Came = Callable[[Mapping[int, Queue], Stream], None]
"""Called when there is a stream."""
Sized = Callable[[Mapping[int, Queue]], None]
"""Called when the size of the terminal is another one."""

_EVERY = 0.5
"""Seconds between looks at what nobody tells of."""
_GET_SIZE, _SET_MODES = 0x5413, (0x5402, 0x5403, 0x5404)
"""Requests (asm-generic/ioctls.h): TIOCGWINSZ; TCSETS, TCSETSW, TCSETSF."""


class Way:
    """A stream that is there from the beginning, and stays; others do more."""

    needs = Needs()
    _sources: Sources | None = None

    def __init__(self, stream: Stream | None = None) -> None:
        self.stream = stream
        self.size: tuple[int, int] | None = None
        """Columns and rows, where it is a terminal."""

    def attach(self, sources: Sources, came: Came, sized: Sized) -> None:
        """Once, before all others: say it there."""
        if self.stream is not None:
            came({}, self.stream)

    def gone(self) -> None:
        """The stream broke: wait for the next."""
        self._drop()

    def _drop(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def _forget(self, fd: int) -> None:
        if self._sources is not None:
            self._sources.remove(fd)

    def close(self) -> None:
        """Harmless when done before."""
        self._drop()


class TimedWay(Way):
    """A way at which one has to look from time to time."""

    def __init__(self, stream: Stream | None = None) -> None:
        super().__init__(stream)
        self._timer = Timer()

    def attach(self, sources: Sources, came: Came, sized: Sized) -> None:
        """See ``Way``."""
        super().attach(sources, came, sized)
        self._sources, self._tell, self._sized = sources, came, sized
        sources.add(self._timer.fileno(), self._tick)
        self._timer.start(0)

    def _tick(self, queues: Mapping[int, Queue], events: int) -> None:
        """Look."""
        raise NotImplementedError

    def close(self) -> None:
        """See ``Way``."""
        super().close()
        if self._timer.fileno() >= 0:
            self._forget(self._timer.fileno())
            self._timer.close()


class TerminalWay(TimedWay):
    """A way that is a terminal, which has a size."""

    def __init__(self, stream: Stream | None, fd: int) -> None:
        super().__init__(stream)
        self._fd = fd
        self.size = self._look()

    def _look(self) -> tuple[int, int]:
        try:
            size = os.get_terminal_size(self._fd)
            return size.columns, size.lines
        except OSError:
            return 0, 0

    def _tick(self, queues: Mapping[int, Queue], events: int) -> None:
        self._timer.start(_EVERY)
        if (size := self._look()) != self.size:
            self.size = size
            self._sized(queues)


class StdioWay(TerminalWay):
    """Standard input and output."""

    needs = Needs(controls=(_GET_SIZE, *_SET_MODES))

    def __init__(self) -> None:
        stream = Pipe.stdio()
        super().__init__(stream, stream.sink)


class PtyWay(TerminalWay):
    """A pseudoterminal, with *link* to it; there is a stream while somebody has it open."""

    needs = Needs(controls=(_GET_SIZE,))

    def __init__(self, link: str | None) -> None:
        self._terminal = Terminal(link)
        self.path = self._terminal.path
        super().__init__(None, self._terminal.fileno())

    def _tick(self, queues: Mapping[int, Queue], events: int) -> None:
        if self.stream is None and self._terminal.is_open:
            self.stream = Pipe(fd := os.dup(self._terminal.fileno()), fd)
            self._tell(queues, self.stream)
        super()._tick(queues, events)

    def close(self) -> None:
        """See ``Way``."""
        super().close()
        self._terminal.close()


class ListenWay(Way):
    """Clients of a UNIX socket, one after the other."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._listener = UnixListener(path)

    def attach(self, sources: Sources, came: Came, sized: Sized) -> None:
        """See ``Way``."""
        super().attach(sources, came, sized)
        self._sources, self._tell = sources, came
        sources.add(self._listener.fileno(), self._accept)

    def _await(self, events: int) -> None:
        if self._sources is not None:
            self._sources.await_events(self._listener.fileno(), events)

    def _accept(self, queues: Mapping[int, Queue], events: int) -> None:
        if (client := self._listener.accept()) is not None:
            self.stream = UnixStream(client)
            self._await(0)
            self._tell(queues, self.stream)

    def gone(self) -> None:
        """See ``Way``."""
        super().gone()
        self._await(select.EPOLLIN)

    def close(self) -> None:
        """See ``Way``."""
        super().close()
        if self._listener.fileno() >= 0:
            self._forget(self._listener.fileno())
            self._listener.close()


class ConnectWay(TimedWay):
    """A UNIX socket that somebody else listens on; tried again until it is there."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = os.path.abspath(path)
        self.needs = Needs(connect=(self._path,))

    def _tick(self, queues: Mapping[int, Queue], events: int) -> None:
        self._timer.stop()
        try:
            self.stream = UnixStream.connect(self._path)
        except OSError:
            self._timer.start(_EVERY)
            return
        self._tell(queues, self.stream)

    def gone(self) -> None:
        """See ``Way``."""
        super().gone()
        self._timer.start(_EVERY)


def make_way(kind: str, options: Mapping[str, str]) -> Way:
    """The way that *kind* is, of its *options*. ValueError that names a wrong one, OSError."""
    wanted: dict[str, tuple[str, ...]] = {"pty": (), "listen": ("path",), "connect": ("path",), "stdio": (), "file": ("path",)}
    if kind not in wanted:
        raise ValueError(f"a port leads to {', '.join(wanted)}, not to {kind!r}")
    check_options(f"console port {kind}", options, wanted[kind] or (("link",) if kind == "pty" else ()))
    if missing := [name for name in wanted[kind] if name not in options]:
        raise ValueError(f"a port to {kind} needs {missing[0]}=")
    match kind:
        case "pty":
            return PtyWay(options.get("link"))
        case "listen":
            return ListenWay(options["path"])
        case "connect":
            return ConnectWay(options["path"])
        case "stdio":
            return StdioWay()
        case _:
            return Way(Pipe.file(options["path"]))
