# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A socket driver (virtio 1.2, 5.10): stream connections between this driver's context id and others, the host's (2) above all.

Rule of this file: packets are handled as they come, whoever waits for what. What the other end of a connection may send ahead
is WINDOW bytes, which bounds memory; who sends more is hung up on.
"""

from __future__ import annotations

import contextlib
import errno
import random
from collections import deque
from typing import NamedTuple, Self, Unpack

from ..device import Device
from ..errors import DeviceBroken
from ..virtio.config import parse_config
from ..virtio.features import VsockFeature as F
from ..virtio.ids import DeviceId
from ..virtio.vsock import COUNTER, EVENT, HEADER, HOST, NO_RECEIVE, NO_SEND, RX, STREAM, TX, Op
from .base import Driver, Options
from .inbox import Inbox

WINDOW = 256 << 10
"""Bytes of a connection that wait to be received at most."""

_CHUNK = 4096
_DEPTH = 64
_BACKLOG = 16
"""Connections that wait to be accepted on a port at most."""


class Ends(NamedTuple):
    """What tells connections apart: our port, and context id and port of the other end."""

    port: int
    peer: int
    peer_port: int

    def __str__(self) -> str:
        return f"connection from port {self.port} to {self.peer}:{self.peer_port}"


class VsockStream:
    """One connection, which ``VsockDriver`` makes."""

    def __init__(self, driver: VsockDriver, ends: Ends) -> None:
        self._driver = driver
        self.ends = ends
        self.connected = False
        self._data = bytearray()
        self._ended = self._deaf = False  # the other end sends, or takes, no more
        self._finished = False  # we send no more
        self._error: OSError | None = None
        self._taken = self._told = self._sent = 0
        self._their_window = self._their_taken = 0

    # Packets -----------------------------------------------------------------------------------------------------------

    def handle(self, op: int, flags: int, window: int, taken: int, data: bytes) -> None:
        """A packet came."""
        self._their_window, self._their_taken = window, taken
        if op == Op.RESPONSE and not self.connected:
            self.connected = True
        elif op == Op.RST:
            clean = self._ended and (self._finished or self._deaf)
            self.drop(None if clean else ConnectionResetError(errno.ECONNRESET, f"{self._driver.name}: {self.ends} was reset by the other end"))
        elif op == Op.SHUTDOWN:
            self._ended |= bool(flags & NO_SEND)
            self._deaf |= bool(flags & NO_RECEIVE)
            if self._ended and self._deaf:
                self._driver.answer(self.ends, Op.RST)
                self.drop(None)
        elif op == Op.CREDIT_REQUEST:
            self._driver.answer(self.ends, Op.CREDIT_UPDATE, self._counted())
        elif op == Op.RW and self.connected and not self._ended and len(self._data) + len(data) <= WINDOW:
            self._data += data
        elif op != Op.CREDIT_UPDATE:
            self._driver.answer(self.ends, Op.RST)
            wrong = f"{self._driver.name}: {self.ends} was given up: operation {op} with {len(data)} bytes has no place there"
            self.drop(ConnectionAbortedError(errno.ECONNABORTED, wrong))

    def drop(self, error: OSError | None) -> None:
        """The connection is gone; what came before can still be received, then *error* is met."""
        self._ended = self._deaf = True
        self._error = self._error or error
        self._driver.forget(self)

    def _counted(self) -> int:
        self._told = self._taken
        return self._taken

    def _room(self) -> int:
        """Bytes that the other end has room for (virtio 1.2, 5.10.6.3)."""
        return max(self._their_window - (self._sent - self._their_taken & COUNTER), 0)

    # Users -------------------------------------------------------------------------------------------------------------

    def send(self, data: bytes, timeout: float | None = None) -> None:
        """Send all of *data*. TimeoutError when the other end takes nothing for *timeout* seconds, BrokenPipeError when it will not
        take any more, ConnectionError when it is gone."""
        driver, view = self._driver, memoryview(data)
        while view:
            if not self._room() and not self._deaf:
                driver.tell(self.ends, Op.CREDIT_REQUEST, self._counted())
                driver.wait(lambda: bool(self._room() or self._deaf), f"room at the other end of the {self.ends}", timeout)
            if self._deaf or self._finished:
                raise self._error or BrokenPipeError(errno.EPIPE, f"{driver.name}: {self.ends} takes no more")
            piece = bytes(view[: min(self._room(), _CHUNK)])
            self._sent = self._sent + len(piece) & COUNTER
            driver.tell(self.ends, Op.RW, self._counted(), data=piece, timeout=timeout)
            view = view[len(piece) :]

    def receive(self, most: int = 1 << 16, timeout: float | None = None) -> bytes:
        """Up to *most* bytes, one at least; none once the other end has sent all. TimeoutError when nothing comes."""
        if not self._data and not self._ended:
            self._driver.wait(lambda: bool(self._data or self._ended), f"bytes by the {self.ends}", timeout)
        if not self._data and self._error:
            raise self._error
        data = bytes(self._data[:most])
        del self._data[: len(data)]
        self._taken = self._taken + len(data) & COUNTER
        if (self._taken - self._told & COUNTER) >= WINDOW // 2 and not self._ended:
            self._driver.tell(self.ends, Op.CREDIT_UPDATE, self._counted(), timeout=timeout)
        return data

    def shutdown(self, timeout: float | None = None) -> None:
        """Say that nothing more will be sent; what the other end sends still comes."""
        if not self._finished and not self._deaf:
            self._finished = True
            self._driver.tell(self.ends, Op.SHUTDOWN, self._counted(), NO_SEND, timeout=timeout)

    def close(self) -> None:
        """Hang up; harmless when done before."""
        if self._driver.forget(self):
            self.drop(OSError(errno.EBADF, f"{self._driver.name}: {self.ends} is closed"))
            with contextlib.suppress(OSError, ValueError):  # the device, or its driver, is gone: so is the other end
                self._driver.answer(self.ends, Op.SHUTDOWN, self._taken, NO_SEND | NO_RECEIVE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class VsockDriver(Driver):
    """A socket device: ``connect`` to a port of another context, or ``listen`` on one of ours and ``accept``."""

    device_id = DeviceId.VSOCK
    table_entries = 2

    def __init__(self, device: Device, *, wanted: int = F.STREAM, **options: Unpack[Options]) -> None:
        """See ``Driver``. Devices that keep the event queue to themselves are taken as they are."""
        options.setdefault("pool_size", 1 << 20)
        self._streams: dict[Ends, VsockStream] = {}
        self._waiting: dict[int, deque[VsockStream]] = {}
        self._last_port = random.randrange(1 << 16, 1 << 31)  # far from those that the other end may remember
        super().__init__(device, wanted=wanted, queues=range(min(device.identify().queues, 3)), **options)

    def _ready(self) -> None:
        self._arrive()
        self._inbox = Inbox(self, RX, HEADER.size + _CHUNK, _DEPTH)
        self._event_box = Inbox(self, EVENT, 4, 4) if EVENT in self._rings else None

    def _arrive(self) -> None:
        """After a reset, and when the device has moved to another host: connections are gone, the context id may be another."""
        for stream in list(self._streams.values()):
            stream.drop(ConnectionResetError(errno.ECONNRESET, f"{self.name}: {stream.ends} ended with the transport"))
        config = parse_config(DeviceId.VSOCK, self.features, self.read_config(8))
        if "guest_cid" not in config:
            raise DeviceBroken(f"{self.name} has a configuration space too short for a context id")
        self.cid = int(config["guest_cid"])
        """Our context id."""

    def _replenish(self) -> None:
        while (packet := self._inbox.take()) is not None:
            self._packet(packet)
        while self._event_box is not None and self._event_box.take() is not None:  # the only event there is: the transport was reset
            self._arrive()

    def _packet(self, packet: bytes) -> None:
        if len(packet) < HEADER.size:
            raise DeviceBroken(f"{self.name}: a packet of {len(packet)} bytes, less than its header")
        peer, to, peer_port, port, length, kind, op, flags, window, taken = HEADER.unpack_from(packet)
        data = packet[HEADER.size :]
        if length != len(data) and (op == Op.RW or data):
            raise DeviceBroken(f"{self.name}: a packet with {len(data)} bytes of data says that it has {length}")
        ends = Ends(port, peer, peer_port)
        stream = self._streams.get(ends)
        if to != self.cid or kind != STREAM:
            self.answer(ends, Op.RST)
        elif stream is not None:
            stream.handle(op, flags, window, taken, data)
        elif op == Op.REQUEST and port in self._waiting and len(self._waiting[port]) < _BACKLOG:
            stream = self._streams[ends] = VsockStream(self, ends)
            stream.handle(Op.CREDIT_UPDATE, 0, window, taken, b"")
            self._waiting[port].append(stream)
        elif op not in (Op.RST, Op.SHUTDOWN):
            self.answer(ends, Op.RST)

    # Streams -----------------------------------------------------------------------------------------------------------

    def connect(self, port: int, cid: int = HOST, timeout: float | None = None) -> VsockStream:
        """A connection to *port* of context *cid*. ConnectionRefusedError when nobody listens there, TimeoutError without an answer."""
        self._last_port += 1
        ends = Ends(self._last_port, cid, port)
        stream = self._streams[ends] = VsockStream(self, ends)
        try:
            self.tell(ends, Op.REQUEST, 0, timeout=timeout)
            self.wait(lambda: stream.connected or ends not in self._streams, f"an answer to the {ends}", timeout)
        except BaseException:
            stream.close()
            raise
        if not stream.connected:
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"{self.name}: {ends} was refused")
        return stream

    def listen(self, port: int) -> None:
        """Let others connect to *port*, from now on."""
        self._waiting.setdefault(port, deque())

    def accept(self, port: int, timeout: float | None = None) -> VsockStream:
        """The next connection to *port*, which must be listened on."""
        waiting = self._waiting[port]
        while True:
            if not waiting:
                self.wait(lambda: bool(waiting), f"a connection to port {port}", timeout)
            stream = waiting.popleft()
            if stream.ends in self._streams:
                stream.connected = True
                self.tell(stream.ends, Op.RESPONSE, 0, timeout=timeout)
                return stream

    def forget(self, stream: VsockStream) -> bool:
        """Let packets of *stream* be nobody's; whether they were its own until now."""
        if self._streams.get(stream.ends) is not stream:
            return False
        del self._streams[stream.ends]
        return True

    # Packets -----------------------------------------------------------------------------------------------------------

    def tell(self, ends: Ends, op: int, taken: int, flags: int = 0, data: bytes = b"", timeout: float | None = None) -> None:
        """Send a packet; returns when the device has taken it."""
        self.ask(TX, self._chain(ends, op, taken, flags, data), timeout=timeout)

    def answer(self, ends: Ends, op: int, taken: int = 0, flags: int = 0) -> None:
        """Send a packet without waiting; while the device takes none, it is not sent."""
        with contextlib.suppress(MemoryError):
            self.post(TX, self._chain(ends, op, taken, flags, b""))

    def _chain(self, ends: Ends, op: int, taken: int, flags: int, data: bytes) -> list[bytes]:
        header = HEADER.pack(self.cid, ends.peer, ends.port, ends.peer_port, len(data), STREAM, op, flags, WINDOW, taken)
        return [header, data] if data else [header]
