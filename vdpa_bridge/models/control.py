# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A UNIX socket on which people and programs talk to a model in lines of text, as ``nc -U PATH`` does.

Rule of this file: whoever sends too much, reads too little or comes one too many is hung up on; nobody here makes a driver wait.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..outside.unix import UnixListener, UnixStream
from .sources import Sources

if TYPE_CHECKING:
    from .base import Queue

MOST_PEERS = 16
LONGEST = 1024
"""Bytes of a line that is heard."""
MOST_UNREAD = 1 << 20
"""Bytes that a peer may leave unread."""

Hear = Callable[["Mapping[int, Queue]", "Peer", str], None]
"""Called with the queues that work now, who speaks, and a line without its end."""


class Control:
    """Listens at *path*, for as long as the model lives, and lets *hear* have every line that comes."""

    def __init__(self, path: str, sources: Sources, hear: Hear) -> None:
        """OSError when the socket cannot be had."""
        self.peers: list[Peer] = []
        self._sources, self._hear = sources, hear
        self._listener = UnixListener(path)
        sources.add(self._listener.fileno(), self._come)

    def _come(self, queues: Mapping[int, Queue], events: int) -> None:
        if (client := self._listener.accept()) is None:
            return
        peer = Peer(UnixStream(client), self._sources, self._hear, self.peers.remove)
        self.peers.append(peer)
        if len(self.peers) > MOST_PEERS:
            peer.say(f"error {MOST_PEERS} others are here already")
            peer.close()

    def close(self) -> None:
        """Hang up on all and take the socket away; harmless when done before."""
        for peer in list(self.peers):
            peer.close()
        self._sources.remove(self._listener.fileno())
        self._listener.close()


class Peer:
    """Somebody who is connected."""

    def __init__(self, stream: UnixStream, sources: Sources, hear: Hear, gone: Callable[[Peer], None]) -> None:
        self.watches = False
        """Whether it wants to be told of changes."""
        self._sources, self._hear, self._gone = sources, hear, gone
        self._came, self._unread = b"", b""
        self._ends = self._closed = False
        self._stream = stream
        sources.add(stream.fileno(), self._ready)

    def say(self, line: str) -> None:
        """Send a line, without waiting."""
        self._unread += line.encode() + b"\n"
        self._flush()

    def _ready(self, queues: Mapping[int, Queue], events: int) -> None:
        if not self._ends:
            self._read(queues)
        self._flush()

    def _read(self, queues: Mapping[int, Queue]) -> None:
        try:
            data = self._stream.receive(LONGEST)
        except OSError:
            self.close()
            return
        if data is None:
            return
        self._ends = not data
        *lines, self._came = (self._came + data).split(b"\n")
        for line in lines:
            if not self._closed:
                self._hear(queues, self, line.decode(errors="backslashreplace").strip())
        if len(self._came) > LONGEST:
            self.say(f"error a line has at most {LONGEST} bytes")
            self.close()

    def _flush(self) -> None:
        if self._closed:
            return
        try:
            while self._unread and (sent := self._stream.send(self._unread)):
                self._unread = self._unread[sent:]
        except OSError:
            self._unread, self._ends = b"", True
        if len(self._unread) > MOST_UNREAD or (self._ends and not self._unread):
            self.close()
            return
        self._sources.await_events(self._stream.fileno(), select.EPOLLIN * (not self._ends) | select.EPOLLOUT * bool(self._unread))

    def close(self) -> None:
        """Hang up; harmless when done before."""
        if not self._closed:
            self._closed = True
            self._sources.remove(self._stream.fileno())
            self._stream.close()
            self._gone(self)
