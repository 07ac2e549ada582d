# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The log of a service: each line knows its device, its client and what happened, as text or as JSON.

Rule of this file: a device never waits for whoever reads the log. Lines go through a bounded queue; those that find it
full are counted and left out.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import queue
import threading
import time
from logging.handlers import QueueHandler, QueueListener
from typing import Self, TextIO

from .listening import PeerCredentials

FORMATS = ("text", "json")
LOGGER = logging.getLogger("vdpa_bridge")
_QUEUED = 1024
_PATIENCE = 0.5
"""Seconds for the last lines to be written."""
RINGS = "rings of "
"""How the threads of models are named."""


class Context(threading.local):
    """What a thread is busy with; empty in a thread that serves no device."""

    device = ""
    peer: PeerCredentials | None = None


CONTEXT = Context()


def event(level: int, name: str, text: str = "", device: str = "", **more: object) -> None:
    """Log that *name* happened to the thread's device, or to *device*; *text* is the reason."""
    if not LOGGER.isEnabledFor(level):
        return
    fields: dict[str, object] = {"event": name, "more": more}
    if device:
        fields["device"] = device
    LOGGER.log(level, "%s", text, extra=fields)


class _Queue(QueueHandler):
    """Adds what only the thread that logs knows, and never waits."""

    def __init__(self, lines: queue.Queue[object]) -> None:
        super().__init__(lines)
        self.lost = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Make *record* independent of its thread."""
        record = copy.copy(record)
        record.msg, record.args = record.getMessage(), None
        if not hasattr(record, "device"):
            name = record.threadName or ""
            record.device = CONTEXT.device or (name.removeprefix(RINGS) if name.startswith(RINGS) else "")
        record.peer = CONTEXT.peer
        record.lost, self.lost = self.lost, 0
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """Put it, or count it."""
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.lost += 1 + getattr(record, "lost", 0)


class _Format(logging.Formatter):
    def fields(self, record: logging.LogRecord) -> dict[str, object]:
        """What is known, in the order of writing."""
        fields: dict[str, object] = {"device": getattr(record, "device", ""), "event": getattr(record, "event", "log")}
        peer: PeerCredentials | None = getattr(record, "peer", None)
        if peer is not None:
            fields |= {"pid": peer.pid, "uid": peer.uid}
        fields |= getattr(record, "more", {})
        fields["reason"] = record.getMessage()
        if lost := getattr(record, "lost", 0):
            fields["lines_lost_before"] = lost
        return {key: value for key, value in fields.items() if value != ""}


class TextFormat(_Format):
    """``15:01:02 WARNING disk: drop pid=42 uid=1000: SET_STATUS: flags 0x9, a request has 0x1``"""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback where there is one."""
        fields = self.fields(record)
        device, name, why = fields.pop("device", ""), fields.pop("event"), fields.pop("reason", "")
        words = [] if name == "log" else [str(name)]
        words += [f"{key}={value}" for key, value in fields.items()]
        parts = [str(part).replace("\n", "\\n") for part in (device, " ".join(words), why) if part]
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.levelname} {': '.join(parts)}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormat(_Format):
    """One object per line: time (RFC 3339, UTC), level, device, event, pid and uid of the client, reason."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever is in it."""
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"
        data = {"time": stamp, "level": record.levelname.lower()} | self.fields(record)
        if record.exc_info:
            data["traceback"] = self.formatException(record.exc_info)
        return json.dumps(data, default=str)


class _Writer(QueueListener):
    """Writes lines to a descriptor, with no lock that the end of the process would wait for."""

    def __init__(self, lines: queue.Queue[object], stream: TextIO, style: logging.Formatter) -> None:
        super().__init__(lines)
        self._stream, self._style = stream, style
        try:
            self._fd = stream.fileno()
        except (OSError, ValueError):
            self._fd = -1  # a stream of this process alone

    def handle(self, record: logging.LogRecord) -> None:
        """Write one line; there is nobody to tell that it failed."""
        line = self._style.format(record) + "\n"
        with contextlib.suppress(OSError, ValueError):
            if self._fd < 0:
                self._stream.write(line)
                return
            data = line.encode(errors="backslashreplace")
            while data:
                data = data[os.write(self._fd, data) :]


class Journal:
    """Writes what is logged in this package to *stream* while it is open."""

    def __init__(self, stream: TextIO, style: str = "text", verbose: bool = False) -> None:
        lines: queue.Queue[object] = queue.Queue(_QUEUED)
        self._queue = _Queue(lines)
        self._writer = _Writer(lines, stream, JsonFormat() if style == "json" else TextFormat())
        self._level = logging.INFO if verbose else logging.WARNING
        self._before: tuple[list[logging.Handler], int] = ([], 0)

    def __enter__(self) -> Self:
        self._before = list(LOGGER.handlers), LOGGER.level
        LOGGER.handlers[:] = [self._queue]
        LOGGER.setLevel(self._level)
        self._writer.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Write what is left, unless nobody reads it."""
        LOGGER.handlers[:], level = self._before
        LOGGER.setLevel(level)
        ending = threading.Thread(target=self._end, name="end of the log", daemon=True)
        with contextlib.suppress(RuntimeError):  # no thread can be had any more, nor time for the last lines
            ending.start()
            ending.join(_PATIENCE)

    def _end(self) -> None:
        with contextlib.suppress(queue.Full):  # then its reader is stuck: the lines that wait end with the process
            self._writer.stop()
