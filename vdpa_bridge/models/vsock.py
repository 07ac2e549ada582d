# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A socket device whose host has UNIX sockets in the place of ports (virtio 1.2, 5.10), as Firecracker and others have them.

The guest's connection to port P of the host is one to the path UDS_P. A client of the host connects to the path UDS, writes
``CONNECT P\\n``, reads ``OK N\\n``, and is connected to port P of the guest. To other guests, each behind a device with such a path,
this one connects in the same way.

Rule of this file: the queue from the guest is always served. What there is to tell the guest is bounded: a few packets per
connection, and MOST_RESETS for packets that belong to none; of a guest that gives no buffers, further ones go unanswered.
"""

from __future__ import annotations

import logging
import os
import re
import select
from collections import deque
from collections.abc import Mapping
from typing import Self

from ..outside.unix import UnixListener, UnixStream
from ..virtio.config import Field
from ..virtio.features import VsockFeature as F
from ..virtio.ids import DeviceId
from ..virtio.vsock import HEADER, HOST, RX, STREAM, TX, Op
from ..virtqueue import Chain
from .base import Model, Queue
from .needs import Needs
from .options import check_options, parse_count
from .sources import Sources
from .vsock_connection import Connection, Ends, Phase, Refused

_log = logging.getLogger(__name__)

DEFAULT_CID = 3
MOST = 512
"""Connections at a time, those of clients included that have not said to where; further ones are refused, or wait to be accepted."""
MOST_CALLERS = 64
"""Such clients; the oldest has to go for a further one."""
MOST_RESETS = 1024

_FIRST_PORT, _LAST_PORT = 1 << 30, 1 << 31
"""Ports of the host's clients."""
_BATCH = 16
"""Packets that one connection fills before others have their turn."""
_CONNECT = re.compile(rb"CONNECT (\d{1,10})\r?\n", re.IGNORECASE)


class VsockModel(Model):
    """The guest with context id *cid*, and the host's sockets at *path*; without, there are none."""

    device_id = DeviceId.VSOCK
    queue_count = 3
    features = F.STREAM
    layout = (Field("guest_cid", "Q"),)

    def __init__(self, cid: int, path: str | None = None, peers: Mapping[int, str] | None = None) -> None:
        """*peers*: the paths of other guests' devices, by their context ids. OSError when *path* cannot be listened on."""
        self.guest_cid = cid
        self._path = os.path.abspath(path) if path is not None else None
        self._peers = {peer: os.path.abspath(place) for peer, place in (peers or {}).items()}
        self.needs = Needs(connect=(*([os.path.dirname(self._path)] if self._path is not None else []), *self._peers.values()))
        self._callers: dict[Connection, None] = {}
        self._connections: dict[Ends, Connection] = {}
        self._left: set[Connection] = set()
        self._starved: list[Connection] = []
        self._talkers: dict[Connection, None] = {}
        self._resets: deque[bytes] = deque()
        self._last_port = _FIRST_PORT
        self._complained = False
        self._listener = UnixListener(self._path) if self._path is not None else None
        self.sources = self._sources = Sources()
        if self._listener is not None:
            self._sources.add(self._listener.fileno(), self._accept)

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """``cid=3``, ``uds=PATH``, ``peers=CID:PATH,CID:PATH``."""
        check_options("vsock", options, ("cid", "uds", "peers"))
        peers = {}
        for peer in filter(None, options.get("peers", "").split(",")):
            cid, colon, path = peer.partition(":")
            if not colon or not path:
                raise ValueError(f"peers={options['peers']}: it is written CID:PATH,CID:PATH")
            peers[_cid("peers", cid)] = path
        return cls(_cid("cid", options.get("cid", str(DEFAULT_CID))), options.get("uds"), peers)

    def reset(self) -> None:
        """All connections end; clients that have not said to where they want may stay."""
        for connection in [*self._connections.values(), *self._left]:
            connection.close()
        for kept in (self._connections, self._left, self._starved, self._talkers, self._resets):
            kept.clear()

    def close(self) -> None:
        """All connections end, and the path goes."""
        self.reset()
        for caller in self._callers:
            caller.close()
        self._callers.clear()
        if self._listener is not None:
            self._listener.close()
        super().close()

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        """Serve a batch of packets of the guest's, or use the buffers that it gave."""
        if index == TX:
            packets = queues[TX].pop()
            for chain in packets:
                self._hear(chain)
            queues[TX].push([(chain, 0) for chain in packets])
        self._speak(queues)
        if index == RX and not self._resets and not self._talkers:
            starved, self._starved = self._starved, []
            for connection in starved:
                connection.starved = False
                self._settle(connection)
            self._speak(queues)
        if self._listener is not None:
            self._sources.await_events(self._listener.fileno(), select.EPOLLIN)

    # From the guest --------------------------------------------------------------------------------------------------------

    def _hear(self, chain: Chain) -> None:
        header = chain.read(0, HEADER.size)
        if len(header) < HEADER.size:
            return
        source, peer, port, peer_port, length, kind, op, flags, window, taken = HEADER.unpack(header)
        ends = Ends(peer, peer_port, port)
        connection = self._connections.get(ends)
        valid = source == self.guest_cid and kind == STREAM and length <= chain.readable - HEADER.size
        if op == Op.RST:
            if valid and connection is not None:
                connection.leave()
                self._settle(connection)
        elif not valid or (connection is None and op != Op.REQUEST):
            self._refuse(ends, kind)
        elif connection is None or (op == Op.REQUEST and connection.phase is Phase.ENDED):
            self._open(ends, window, taken)
        else:
            connection.credit(window, taken)
            try:
                connection.hear(op, flags, chain, length)
            except Refused:
                self._refuse(ends)
            else:
                self._settle(connection)

    def _open(self, ends: Ends, window: int, taken: int) -> None:
        """The guest asks for a connection."""
        self._forget(ends)
        path = self._peers.get(ends.peer)
        if ends.peer == HOST and self._path is not None:
            path = f"{self._path}_{ends.peer_port}"
        if path is None or not self._has_room():
            self._refuse(ends)
            return
        try:
            stream = UnixStream.connect(path)
        except OSError as error:
            _log.debug("vsock: guest %d is refused port %d of %d: %s: %s", self.guest_cid, ends.peer_port, ends.peer, path, error.strerror)
            self._refuse(ends)
            return
        connection = self._connections[ends] = self._adopt(stream, Phase.FORWARDED, ends)
        connection.credit(window, taken)
        try:
            if ends.peer == HOST:
                connection.establish()
            else:
                connection.call(ends.peer_port)
        except Refused:
            self._refuse(ends)
        else:
            self._settle(connection)

    def _adopt(self, stream: UnixStream, phase: Phase, ends: Ends | None = None) -> Connection:
        connection = Connection(self.guest_cid, stream, self._sources, phase, ends)
        self._sources.add(stream.fileno(), lambda queues, events: self._ready(connection, queues, events))
        return connection

    def _has_room(self) -> bool:
        """Whether there can be one more connection; of those that wait for nothing but the guest's RST, the oldest has to go for it."""
        if len(self._connections) + len(self._callers) + len(self._left) < MOST:
            return True
        for ends, connection in self._connections.items():
            if connection.phase is Phase.ENDED:
                self._forget(ends)
                return True
        if not self._complained:  # a guest can bring that about as fast as it likes
            self._complained = True
            _log.warning("vsock: guest %d has %d connections, and is refused more, as it will be from now on", self.guest_cid, MOST)
        return False

    def _refuse(self, ends: Ends, kind: int = STREAM) -> None:
        """There is no connection of these *ends*, or there is none any more."""
        self._forget(ends)
        if len(self._resets) < MOST_RESETS:
            self._resets.append(HEADER.pack(ends.peer, self.guest_cid, ends.peer_port, ends.port, 0, kind, Op.RST, 0, 0, 0))

    def _forget(self, ends: Ends) -> None:
        if (connection := self._connections.get(ends)) is not None:
            connection.close()
            self._settle(connection)

    def _settle(self, connection: Connection) -> None:
        """Put a connection to where it belongs, after something happened to it."""
        if connection.phase in (Phase.LEFT, Phase.GONE) and self._connections.get(connection.ends) is connection:
            del self._connections[connection.ends]
            self._left.add(connection)
        if connection.phase is Phase.GONE:
            self._left.discard(connection)
        connection.rearm()
        if connection.talks:
            self._talkers[connection] = None
        else:
            self._talkers.pop(connection, None)

    # To the guest ------------------------------------------------------------------------------------------------------------

    def _buffer(self, queues: Mapping[int, Queue]) -> Chain | None:
        """A buffer of the guest's with room for a header and a byte; those with less go back."""
        if (rx := queues.get(RX)) is not None:
            for _ in range(self.queue_size):
                if not (chains := rx.pop(1)):
                    break
                if chains[0].writable > HEADER.size:
                    return chains[0]
                rx.push([(chains[0], 0)])
        return None

    def _speak(self, queues: Mapping[int, Queue]) -> None:
        """Tell the guest what there is to tell, as far as it has buffers."""
        done = []
        while (self._talkers or self._resets) and (buffer := self._buffer(queues)) is not None:
            if self._talkers:
                connection = next(iter(self._talkers))
                packet = connection.packet()
                if not connection.talks:
                    del self._talkers[connection]
            else:
                packet = self._resets.popleft()
            done.append((buffer, buffer.write(packet)))
        if done:
            queues[RX].push(done)

    def _ready(self, connection: Connection, queues: Mapping[int, Queue], events: int) -> None:
        """Something happened at a stream."""
        try:
            if connection.phase is Phase.CALLED:
                self._call(connection)
            elif connection.phase is Phase.FORWARDED:
                if (line := connection.line()) is not None:
                    if not line.startswith(b"OK "):
                        raise Refused
                    connection.establish()
            else:
                connection.look(events)
                self._read(connection, queues)
        except Refused:
            if connection in self._callers:
                del self._callers[connection]
                connection.close()
            else:
                self._refuse(connection.ends)
        else:
            self._settle(connection)
        self._speak(queues)

    def _read(self, connection: Connection, queues: Mapping[int, Queue]) -> None:
        """Pass on what a stream has, as far as the guest has buffers."""
        if self._talkers or self._resets:
            self._speak(queues)
        done: list[tuple[Chain, int]] = []
        more = True
        while more and len(done) < _BATCH and connection.readable and connection.room and not connection.starved:
            buffer = None if self._talkers or self._resets else self._buffer(queues)
            if buffer is None:
                connection.starved = True
                self._starved.append(connection)
                break
            written, more = connection.fill(buffer)
            done.append((buffer, written))
        if done:
            queues[RX].push(done)

    # Clients of the host -----------------------------------------------------------------------------------------------------

    def _accept(self, queues: Mapping[int, Queue], events: int) -> None:
        """Let clients in, until there are too many connections; the next word of the guest's is reason to look again."""
        assert self._listener is not None
        for _ in range(_BATCH):
            if not self._has_room():
                self._sources.await_events(self._listener.fileno(), 0)
                return
            if (client := self._listener.accept()) is None:
                return
            if len(self._callers) >= MOST_CALLERS:
                oldest = next(iter(self._callers))
                del self._callers[oldest]
                oldest.close()
            self._callers[self._adopt(UnixStream(client), Phase.CALLED)] = None

    def _call(self, connection: Connection) -> None:
        """A client says where it wants to."""
        if (line := connection.line()) is None:
            return
        wanted = _CONNECT.fullmatch(line)
        if wanted is None or int(wanted[1]) >= 1 << 32:
            raise Refused
        port = int(wanted[1])
        while (ends := Ends(HOST, self._last_port, port)) in self._connections:
            self._last_port = self._last_port + 1 if self._last_port < _LAST_PORT else _FIRST_PORT
        self._last_port = self._last_port + 1 if self._last_port < _LAST_PORT else _FIRST_PORT
        del self._callers[connection]
        self._connections[ends] = connection
        connection.offer(ends)


def _cid(name: str, text: str) -> int:
    return parse_count(name, text, 3, 0xFFFFFFFE)
