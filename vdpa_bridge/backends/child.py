# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A model in a child process of its own, in a sandbox, spoken to in vDPA mode (docs/sandbox.md).

Rule of this file: whatever the model does there (crash, loop, eat memory, fill its log) is an error here that says so, and
nothing more. The child ends with this process however that ends, as its end of the socket closes then.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from ..errors import RemoteProtocolError, signal_name
from ..vhost_user.connection import Connection
from .base import Backend
from .vhost_user import VhostUserVdpa

_log = logging.getLogger(__name__)

_ROOT = str(Path(__file__).parents[2])
_START = "import sys; root = sys.argv.pop(1); root in sys.path or sys.path.insert(0, root); from vdpa_bridge.cli import main; main()"
"""This package, and not what is called so in the directory where somebody happens to be."""
_READY = 30.0
"""Seconds that Python and the model may need to start."""
_GRACE = 8.0
"""Seconds that it has to end: more than its own supervisor waits (service/sandboxed.py)."""
_DEATH = 1.0
"""Seconds from a socket that closed to an exit status."""
_LINE = 2000
"""Characters of a line of its log that are kept."""
_RATE = 50
"""Lines of its log in a second that go into ours."""
_USAGE = 2


class ChildDevice:
    """A model in a child process. ``open`` gives one session at a time; the model lives from here to ``close``.

    *target* is what the child serves (``model:...``), *name* what it is called in messages, *sandbox* on, degrade or off.
    ValueError when the model refuses its options; OSError when the child does not come up, with its last words.
    """

    def __init__(self, target: str, name: str, sandbox: str = "on", timeout: float = 5.0) -> None:
        self.name = name
        self.timeout = timeout
        self._busy = threading.Lock()
        self._words = ""
        self._ready = self._closing = False
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-P", "-c", _START, _ROOT, "serve", target, "--fd", str(theirs.fileno())]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [*command, "--vdpa=require", f"--sandbox={sandbox}", "--log-format=json", "--json"],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
        except BaseException:
            self._socket.close()
            raise
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._out, self._err = self._process.stdout, self._process.stderr
        self._reader = threading.Thread(target=self._read_log, name=f"log of {name}", daemon=True)
        self._reader.start()
        try:
            self._await_ready()
        except BaseException:
            self.close()
            raise

    def _await_ready(self) -> None:
        watch = select.poll()
        watch.register(self._out, select.POLLIN)
        ready = watch.poll(_READY * 1000)
        if ready and os.read(self._out.fileno(), 1 << 16):
            self._ready = True
            return
        if not ready:
            raise OSError(errno.ETIMEDOUT, f"{self.name}: {self.state()}: it is not ready after {_READY:g} s")
        how = self.state()
        if self._process.poll() == _USAGE:
            raise ValueError(f"{self.name}: {self._words}")
        raise OSError(errno.ECHILD, f"{self.name}: {how}")

    def open(self) -> Backend:
        """A fresh session; EBUSY while there is one, ProtocolError or OSError that tells how the child ended when it has."""
        if not self._busy.acquire(blocking=False):
            raise OSError(errno.EBUSY, f"open of {self.name}: {os.strerror(errno.EBUSY)}: another session is open")
        try:
            ours, theirs = socket.socketpair()
            connection = _Connection(ours, self)
            try:
                with theirs:
                    self._send(theirs)
                return _Session(connection, self)
            except BaseException:
                connection.close()
                raise
        except BaseException:
            self._busy.release()
            raise

    def left(self) -> None:
        """The session is closed: the next one can come."""
        self._busy.release()

    def _send(self, client: socket.socket) -> None:
        try:
            socket.send_fds(self._socket, [b"client"], [client.fileno()], socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except OSError as error:
            raise OSError(errno.ECHILD if error.errno == errno.EPIPE else error.errno, f"{self.name}: {self.state()}") from None

    @property
    def pid(self) -> int:
        """Of the child; the process in the sandbox is a child of that."""
        return self._process.pid

    def state(self) -> str:
        """How the child is: its number, how it ended, what it said last."""
        how = self._how()
        self._reader.join(_DEATH if self.ended else 0)
        return f"{how}{'; it' if self.ended else ', and'} last said: {self._words}" if self._words else how

    def _how(self) -> str:
        """Whether it runs, or how it ended, which it gets a moment for."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_DEATH)
        status = self._process.poll()
        if status is None:
            how = "runs"
        elif status > 128:
            how = f"died of {signal_name(status - 128)}"
        elif status < 0:
            how = f"was ended by {signal_name(-status)}"
        else:
            how = f"ended with status {status}"
        return f"its process {self.pid} {how}"

    def refresh(self) -> None:
        """Let the model look anew at what is outside, as SIGHUP does; a driver hears of it."""
        if not self.ended:
            self._process.send_signal(signal.SIGHUP)

    @property
    def ended(self) -> bool:
        """Whether it is gone for good."""
        return self._process.poll() is not None

    def _read_log(self) -> None:
        """Take lines as they come, so that the child is never stuck with them, and hand on as many as a person can read."""
        second, lines, rest = 0, 0, b""
        while chunk := os.read(self._err.fileno(), 1 << 16):
            *whole, rest = (rest[-_LINE:] + chunk).split(b"\n")
            for line in whole:
                level, self._words = _parse(line[:_LINE], self._words)
                if (now := int(time.monotonic())) != second:
                    if lines > _RATE:
                        _log.warning("%s: %d lines of its log were left out", self.name, lines - _RATE)
                    second, lines = now, 0
                lines += 1
                if self._ready and lines <= _RATE:  # until then, what is said is the reason of an error
                    _log.log(level, "%s: %s", self.name, self._words)
        if self._ready and not self._closing:
            _log.error("%s: %s", self.name, self._how())

    def close(self) -> None:
        """End the child; harmless when done before. No session is open any more, or it breaks."""
        self._closing = True
        self._socket.close()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()  # and the process in the sandbox dies of that
            self._process.wait(_GRACE)
        self._reader.join(_DEATH)
        self._out.close()
        if not self._reader.is_alive():
            self._err.close()


class _Connection(Connection):
    """One that says how the child is when it fails."""

    def __init__(self, sock: socket.socket, child: ChildDevice) -> None:
        super().__init__(sock, child.name, child.timeout)
        self._child = child

    def _fail(self, error: RemoteProtocolError) -> RemoteProtocolError:
        error.args = (f"{error}: {self._child.state()}",)
        return super()._fail(error)


class _Session(VhostUserVdpa):
    """A session with the child, whose answers are a model's."""

    traits: tuple[str, ...] = ()

    def __init__(self, connection: Connection, child: ChildDevice) -> None:
        super().__init__(connection)
        self._greeted()
        self._child: ChildDevice | None = child
        self._pid = child.pid

    def facts(self) -> dict[str, object]:
        """The process, too."""
        return super().facts() | {"process": self._pid}

    def close(self) -> None:
        """Hang up; the model is reset then, and lives on."""
        super().close()
        child, self._child = self._child, None
        if child is not None:
            child.left()


def _parse(line: bytes, before: str) -> tuple[int, str]:
    """Level and text of a line of a log: JSON, or what Python says when it dies. An empty line says what was said *before*."""
    text = line.decode(errors="replace").strip()
    with contextlib.suppress(ValueError, RecursionError):
        fields = json.loads(text)
        if isinstance(fields, dict):
            level = logging.getLevelNamesMapping().get(str(fields.get("level")).upper(), logging.WARNING)
            words = [str(fields[key]) for key in ("event", "reason") if fields.get(key)]
            return level, _printable(": ".join(words)) or before
    return logging.WARNING, _printable(text.removeprefix("error: ")) or before


def _printable(text: str) -> str:
    """*text*, which a stranger chose, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
