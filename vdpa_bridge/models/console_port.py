# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""One port of a console: bytes between two queues and a stream of the host.

Rule of this file: nothing is lost, and nothing goes round in circles while nothing can be done. What the host sends stays where
it is until the driver has a buffer for it. What the driver sends is taken while the stream takes it, or comes; only a
console, whose driver cannot wait, is always heard, and of what it says without a listener the last bytes are kept.
"""

from __future__ import annotations

import logging
import select
from collections.abc import Callable, Mapping

from ..virtio.console import port_queues
from ..virtqueue import Chain
from .base import Queue
from .console_ways import Stream, Way
from .sources import Sources

Changed = Callable[[Mapping[int, Queue], "Port", bool], None]

_log = logging.getLogger(__name__)

KEPT = 64 << 10
"""Bytes of a console that wait for somebody to listen."""
KEPT_FOR_SLOW = 1 << 20
"""The same while somebody does, slowly."""
LONGEST = 1 << 20
"""Bytes of one buffer that are sent; no driver has longer ones."""
_BATCH = 16
_MOST_SENT = 256
_GONE = select.EPOLLHUP | select.EPOLLERR


class Port:
    """Port *number*, which leads to *way*, its own from now on."""

    def __init__(self, number: int, way: Way, name: str = "", console: bool = False) -> None:
        self.number, self.way, self.name, self.console = number, way, name, console
        self.ready = False
        """Whether the driver knows it, with MULTIPORT."""
        self._rx, self._tx = port_queues(number)
        self._open = False
        self._stream: Stream | None = None
        self._watched: set[int] = set()
        self._pending = bytearray()
        self._starved = self._ended = self._deaf = self._has_more = self._complained = False

    def attach(self, sources: Sources, changed: Changed) -> None:
        """Once. *changed* is called when a stream comes or goes, or, with True, has another size."""
        self._sources, self._changed = sources, changed
        self.way.attach(sources, self._came, lambda queues: changed(queues, self, True))

    @property
    def connected(self) -> bool:
        """Whether there is somebody at the host's end."""
        return self._stream is not None

    @property
    def _is_one(self) -> bool:
        """Whether the stream comes and goes as one: standard input may end, and output stay."""
        return self._stream is not None and self._stream.fileno() == self._stream.sink

    def open(self, is_open: bool) -> None:
        """There is somebody at the driver's end, or nobody any more."""
        self._open, self._starved = is_open, False
        self._rearm()

    def _came(self, queues: Mapping[int, Queue], stream: Stream) -> None:
        self._stream = stream
        self._ended = self._deaf = False
        self._watched = {stream.fileno(), stream.sink} - {-1}
        for fd in list(self._watched):
            try:
                self._sources.add(fd, self._ready, select.EPOLLHUP)
            except PermissionError:  # a regular file, which has always room
                self._watched.remove(fd)
        self._changed(queues, self, False)
        self._flush(queues)
        self._rearm()

    def _gone(self, queues: Mapping[int, Queue]) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            self._forget()
            self.way.gone()
            self._trim()
            self._changed(queues, self, False)

    def _rearm(self) -> None:
        """Wait at the stream for what can be served; if that is nothing, for its other end to go away, where that can be told."""
        if (stream := self._stream) is None:
            return
        reads = select.EPOLLIN * (self._open and not self._starved and not self._ended)
        writes = select.EPOLLOUT * (bool(self._pending or self._has_more) and not self._deaf)
        if self._is_one and not reads | writes and (self._ended or (not self._open and stream.idle)):
            reads = select.EPOLLHUP
        for fd in self._watched:
            self._sources.await_events(fd, reads * (fd == stream.fileno()) | writes * (fd == stream.sink))

    def _ready(self, queues: Mapping[int, Queue], events: int) -> None:
        """Something happened at the stream."""
        if events & select.EPOLLOUT:
            self._flush(queues)
        if self._open and not self._starved and not self._ended and events & (select.EPOLLIN | _GONE):
            self._read(queues)
        if events & _GONE and self._is_one and (self._ended or (not self._open and self._stream is not None and self._stream.idle)):
            self._gone(queues)
        self._rearm()

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        """One of its queues may hold something."""
        if index == self._tx:
            self._transmit(queues)
        else:
            self._starved = False
        self._rearm()

    # To the driver -----------------------------------------------------------------------------------------------------------

    def _read(self, queues: Mapping[int, Queue]) -> None:
        assert self._stream is not None
        rx = queues.get(self._rx)
        done: list[tuple[Chain, int]] = []
        while rx is not None and len(done) < _BATCH and (chains := rx.pop(1)):
            (chain,) = chains
            length = 0
            if chain.writable:
                try:
                    length = chain.preadv(self._stream.source, -1)
                except BlockingIOError:
                    rx.put_back(chains)
                    break
                except OSError:  # a terminal that nobody has open any more, a client that left bytes unread
                    length = 0
                if not length:
                    self._ended = True
                    rx.put_back(chains)
                    break
            done.append((chain, length))
            if length < chain.writable:
                break
        else:
            self._starved = len(done) < _BATCH
        if done and rx is not None:
            rx.push(done)

    # From the driver ---------------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send *data* without a queue; of what nobody takes, a console keeps the last bytes, another port the first."""
        if self.console or len(self._pending) < KEPT:
            self._pending += data
        self._trim()
        self._flush({})
        self._rearm()

    def _flush(self, queues: Mapping[int, Queue]) -> None:
        """Send what waits here, and then what waits in the queue."""
        while self._pending and self._stream is not None and not self._deaf:
            try:
                sent = self._stream.send(self._pending[:KEPT])
            except OSError as error:
                self._deafen(error)
                break
            if not sent:
                return
            del self._pending[:sent]
        self._transmit(queues)

    def _transmit(self, queues: Mapping[int, Queue]) -> None:
        """Take what the driver sends, as long as it can be sent or kept."""
        self._has_more = False
        if (tx := queues.get(self._tx)) is None:
            return
        done: list[tuple[Chain, int]] = []
        while self._hears and (chains := tx.pop(1)):
            self._send(chains[0])
            done.append((chains[0], 0))
            if len(done) == _MOST_SENT:  # others have their turn
                self._has_more = True
                break
        if done:
            tx.push(done)

    @property
    def _hears(self) -> bool:
        return self.console or (self._stream is not None and not self._deaf and not self._pending)

    def _send(self, chain: Chain) -> None:
        length, sent = min(chain.readable, LONGEST), 0
        if self._stream is not None and not self._deaf and not self._pending and length:
            try:
                sent = chain.pwritev(self._stream.sink, -1, 0, length)
            except BlockingIOError:
                pass
            except OSError as error:
                self._deafen(error)
        if sent < length:
            self._pending += chain.read(sent, length - sent)
            self._trim()

    def _deafen(self, error: OSError) -> None:
        """The other end takes no more; it has gone, or a disk is full."""
        self._deaf = True
        if not isinstance(error, ConnectionError):
            _log.warning("console: port %d: nothing more is sent there: %s", self.number, error.strerror)

    def _trim(self) -> None:
        """Keep the last bytes of a console."""
        most = KEPT_FOR_SLOW if self._stream is not None else KEPT
        if self.console and len(self._pending) > most:
            del self._pending[:-most]
            if not self._complained and self._stream is not None:
                self._complained = True
                _log.warning("console: port %d says more than is read there; of that, the last %d bytes are kept", self.number, most)

    def reset(self) -> None:
        """The driver has gone; what it sent is sent still."""
        self.ready = False
        self.open(False)

    def close(self) -> None:
        """The host's end goes, too."""
        self._forget()
        self._stream = None
        self.way.close()

    def _forget(self) -> None:
        for fd in self._watched:
            self._sources.remove(fd)
        self._watched = set()
