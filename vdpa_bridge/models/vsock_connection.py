# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""One connection between a guest and a stream of the host: its state, and its packets (virtio 1.2, 5.10.6).

Rule of this file: what the guest may send ahead is WINDOW bytes, and no more than that is kept; what the host sends is read
only into a buffer of the guest's for which it has given credit. A connection never waits: what it cannot do now it says in
``events``.
"""

from __future__ import annotations

import select
from enum import Enum, auto
from typing import NamedTuple

from ..outside.unix import UnixStream
from ..virtio.vsock import COUNTER, HEADER, NO_RECEIVE, NO_SEND, STREAM, Op
from ..virtqueue import Chain
from .sources import Sources

WINDOW = 256 << 10
"""Bytes from the guest that wait for the host at most."""
LARGEST_PACKET = 64 << 10
"""Bytes of data for the guest in one packet."""
_LONGEST_LINE = 32
_GONE = select.EPOLLHUP | select.EPOLLERR


class Ends(NamedTuple):
    """What tells connections apart: context id and port of the other end, and the guest's port."""

    peer: int
    peer_port: int
    port: int


class Phase(Enum):
    """How far a connection is."""

    CALLED = auto()
    """A client of the host has connected, and not yet said to which port."""
    OFFERED = auto()
    """The guest is asked for that connection."""
    FORWARDED = auto()
    """Another guest's device is asked for the connection that this guest wants."""
    OPEN = auto()
    ENDED = auto()
    """The host's end is closed, and the guest knows or will; its RST is awaited."""
    LEFT = auto()
    """The guest has forgotten the connection; what it sent before goes to the host still."""
    GONE = auto()


class Refused(Exception):
    """The connection is to be reset."""


class Connection:
    """A *stream* of the host, which is the connection's own from now on, and, but for the phase CALLED, its *ends*."""

    def __init__(self, cid: int, stream: UnixStream, sources: Sources, phase: Phase, ends: Ends | None = None) -> None:
        """*cid* is the guest's. The owner adds the stream to *sources*."""
        self.phase = phase
        self.ends = ends or Ends(0, 0, 0)
        self.starved = False
        """Whether the guest had no buffer for what is to be read."""
        self._cid, self._stream, self._sources = cid, stream, sources
        self._fd = stream.fileno()
        self._due: set[Op] = set()
        self._pending = bytearray()
        self._guest_ended = self._guest_deaf = self._host_ended = self._host_deaf = False  # sends, takes no more
        self._passed_on = False  # the guest's end, to the host
        self._said = 0  # flags of SHUTDOWN
        self._taken = self._told = self._sent = 0
        self._window = self._window_taken = 0
        self._asked = False

    def _header(self, op: Op, length: int = 0) -> bytes:
        self._told, flags = self._taken, 0
        if op is Op.SHUTDOWN:
            flags = self._said = NO_SEND * self._host_ended | NO_RECEIVE * self._host_deaf
        return HEADER.pack(self.ends.peer, self._cid, self.ends.peer_port, self.ends.port, length, STREAM, op, flags, WINDOW, self._taken)

    # The guest's side ----------------------------------------------------------------------------------------------------

    def credit(self, window: int, taken: int) -> None:
        """The guest says how much room it has, and how much it took."""
        self._window, self._window_taken = window, taken
        if self.room:
            self._asked = False

    @property
    def room(self) -> int:
        """Bytes that the guest has room for (virtio 1.2, 5.10.6.3)."""
        return max(self._window - (self._sent - self._window_taken & COUNTER), 0)

    def hear(self, op: int, flags: int, chain: Chain, length: int) -> None:
        """A packet for this connection, but for REQUEST and RST. ``Refused`` when it has no place here, or ends the connection."""
        if op == Op.RESPONSE and self.phase is Phase.OFFERED:
            self.phase = Phase.OPEN
            self._write(b"OK %d\n" % self.ends.peer_port)
        elif op == Op.CREDIT_REQUEST:
            self._due.add(Op.CREDIT_UPDATE)
        elif op == Op.RW and self.phase is Phase.OPEN and not self._guest_ended:
            self._receive(chain, length)
        elif op == Op.SHUTDOWN and self.phase in (Phase.OPEN, Phase.ENDED):
            self._shut_down(flags)
        elif op != Op.CREDIT_UPDATE and not (op == Op.RW and self.phase is Phase.ENDED):  # which was on its way
            raise Refused

    def leave(self) -> None:
        """The guest reset the connection. What it sent before it ended it goes to the host still."""
        if self.phase is Phase.OPEN and self._guest_ended and self._pending:
            self.phase = Phase.LEFT
            self._due.clear()
        else:
            self.close()

    def _receive(self, chain: Chain, length: int) -> None:
        done = 0
        if not self._pending and not self._host_deaf and length:
            try:
                done = chain.pwritev(self._fd, -1, HEADER.size, length)
            except BlockingIOError:
                pass
            except OSError:
                self._deafen()
        if self._host_deaf:  # the guest was told, but this was on its way
            done = length
        self._count(done)
        if done < length:
            if len(self._pending) + length - done > WINDOW:
                raise Refused
            self._pending += chain.read(HEADER.size + done, length - done)

    def _count(self, taken: int) -> None:
        self._taken = self._taken + taken & COUNTER
        if (self._taken - self._told & COUNTER) >= WINDOW // 2:
            self._due.add(Op.CREDIT_UPDATE)

    def _shut_down(self, flags: int) -> None:
        self._guest_ended |= bool(flags & NO_SEND)
        if flags & NO_RECEIVE and not self._guest_deaf:
            self._guest_deaf = True
            self._stream.end_receiving()
        self._settle()

    # The host's side -----------------------------------------------------------------------------------------------------

    @property
    def readable(self) -> bool:
        """Whether the host may send, and the guest take."""
        return self.phase is Phase.OPEN and not self._host_ended and not self._guest_deaf

    def rearm(self) -> None:
        """Wait at the stream for what can be served; if that is nothing any more, for its other end to go away.

        A guest without room is asked, once, to say when it has some.
        """
        if self.phase in (Phase.CALLED, Phase.FORWARDED):
            events = select.EPOLLIN
        elif self.readable:
            if not self.room and not self._asked:
                self._asked = True
                self._due.add(Op.CREDIT_REQUEST)
            events = select.EPOLLIN * (self.room > 0 and not self.starved) | select.EPOLLOUT * bool(self._pending)
        elif self.phase in (Phase.ENDED, Phase.GONE):
            return
        else:
            events = select.EPOLLOUT if self._pending else select.EPOLLHUP
        self._sources.await_events(self._fd, events)

    def line(self) -> bytes | None:
        """The line by which devices and their clients agree on a port, None while it is not complete; ``Refused`` when it is none."""
        try:
            return self._stream.read_line(_LONGEST_LINE)
        except (OSError, ValueError):
            raise Refused from None

    def call(self, port: int) -> None:
        """Ask another guest's device, at the stream's other end, for *port*; ``Refused`` when it is gone."""
        self._write(b"CONNECT %d\n" % port)

    def establish(self) -> None:
        """The guest's request is granted."""
        self.phase = Phase.OPEN
        self._due.add(Op.RESPONSE)

    def offer(self, ends: Ends) -> None:
        """Ask the guest for the connection."""
        self.phase, self.ends = Phase.OFFERED, ends
        self._due.add(Op.REQUEST)

    def look(self, events: int) -> None:
        """Something happened at the stream: send what waits, and see whether its other end is there still. ``Refused`` as ``hear``."""
        if events & _GONE:
            if self.phase is Phase.OFFERED:
                raise Refused
            self._deafen()
        elif self._pending:
            try:
                sent = self._stream.send(self._pending)
            except OSError:
                self._deafen()
            else:
                del self._pending[:sent]
                self._count(sent)
        self._settle()

    def fill(self, chain: Chain) -> tuple[int, bool]:
        """Read into the guest's buffer: the bytes of the packet that it holds then, and whether there may be more to read. The end is a packet, too."""
        most = min(chain.writable - HEADER.size, self.room, LARGEST_PACKET)
        try:
            length = chain.preadv(self._fd, -1, HEADER.size, most)
        except BlockingIOError:
            return chain.write(self._header(Op.CREDIT_UPDATE)), False
        except OSError:  # the other end went away with bytes unread
            self._deafen()
            length = 0
        if not length:
            self._host_ended = True
            self._due.discard(Op.SHUTDOWN)
            written = chain.write(self._header(Op.SHUTDOWN))
            self._settle()
            return written, False
        self._sent = self._sent + length & COUNTER
        return chain.write(self._header(Op.RW, length)) + length, length == most

    def _write(self, line: bytes) -> None:
        """Send the first bytes, for which there is room."""
        try:
            if self._stream.send(line) == len(line):
                return
        except OSError:
            pass
        raise Refused

    def _deafen(self) -> None:
        """The host takes no more."""
        if not self._host_deaf:
            self._host_deaf = True
            self._count(len(self._pending))
            self._pending.clear()
            if self.phase is Phase.OPEN:
                self._due.add(Op.SHUTDOWN)

    def _settle(self) -> None:
        """Go on to the next phase when nothing is left to do in this one; ``Refused`` once the guest has ended and the host has all it sent."""
        if self._pending:
            return
        if self.phase is Phase.LEFT:
            self.close()
        elif self._guest_ended and self._guest_deaf:
            raise Refused
        elif self.phase is Phase.OPEN and self._host_deaf and (self._host_ended or self._guest_deaf):
            self._host_ended = True
            self._due = {Op.SHUTDOWN} if self._said != NO_SEND | NO_RECEIVE else set()
            self.phase = Phase.ENDED
            self._hang_up()
        elif self._guest_ended and not self._passed_on:
            self._passed_on = True
            self._stream.end_sending()

    def _hang_up(self) -> None:
        if self._stream.fileno() >= 0:
            self._sources.remove(self._fd)
            self._stream.close()

    def close(self) -> None:
        """Be gone; harmless when done before."""
        self.phase = Phase.GONE
        self._due.clear()
        self._hang_up()

    # Packets ---------------------------------------------------------------------------------------------------------------

    @property
    def talks(self) -> bool:
        """Whether there is something to tell the guest, other than data."""
        return bool(self._due)

    def packet(self) -> bytes:
        """The next of what there is to tell."""
        op = min(self._due)
        self._due.remove(op)
        return self._header(op)
