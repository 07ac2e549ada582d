# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Frames between a driver's queues and a wire.

Rules of this file: who has no room is waited for, not overrun, as QEMU does: what the wire cannot take stays in the transmit
queue until it can, and while there is no receive buffer nothing is read from the wire, whose own queue then drops. What
is lost otherwise is counted: frames that are none, that leave undone what was not agreed on, that fit no receive buffer.
"""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ...engines import TapEngine
from ...netdev import HEADER, LONGEST, Netdev
from ...virtio.features import NetFeature as F
from ...virtqueue import Chain
from ..base import Queue
from ..sources import Sources
from . import offload
from .control import Control
from .offload import GUEST_OFFLOADS

BATCH = 64
"""Frames sent at once."""


@dataclass
class Tally:
    """Frames of one direction."""

    frames: int = 0
    large: int = 0
    """Of those, such as are still to be cut into segments."""
    dropped: int = 0

    def plus(self, engines: Iterable[tuple[int, int, int]]) -> Tally:
        """With those of engines."""
        return Tally(*map(sum, zip((self.frames, self.large, self.dropped), *engines, strict=True)))


class Exchange:
    """Each queue pair with a queue of *wire*, which it holds. See ``model.DataPath``."""

    def __init__(self, wire: Netdev, sources: Sources, control: Control, changed: Callable[[], None]) -> None:
        """*changed* is called when the wire's link went up or down."""
        self.wire = wire
        self._sources, self._control, self._changed = sources, control, changed
        self.features = wire.offloads | F.MRG_RXBUF | F.CTRL_RX | F.CTRL_RX_EXTRA | F.CTRL_VLAN | F.GUEST_ANNOUNCE
        self.reaches, self.controls = wire.reaches, wire.controls
        self._sent, self._received = Tally(), Tally()
        self._engines: dict[int, TapEngine] = {}
        self._receiving: set[int] = set()
        self._up = True
        self._accepted = 0
        self._header = HEADER
        self._merge = False
        self._late: dict[int, list[bytes]] = {}
        self._more: set[int] = set()
        self._watched: dict[int, int] = {}
        self._linked = wire.link
        wire.hold()
        for pair in range(wire.queues):
            self._await(pair)

    @property
    def link(self) -> bool:
        """Whether somebody is at the other end."""
        return self.wire.link

    def start(self, features: int, header: int) -> None:
        """See ``Model.start``; *header* is the size of the driver's virtio_net_hdr."""
        self._accepted, self._header = features, header
        self._merge = bool(features & F.MRG_RXBUF)
        self._retire()
        self.follow()
        for pair in range(self.wire.queues):
            self._await(pair)

    def follow(self) -> None:
        """A command may have changed offloads, and pairs in use; one that comes into use takes part once its queues are served."""
        self._accepted = self._accepted & ~GUEST_OFFLOADS | self._control.offloads
        self.wire.start(self._accepted)
        for pair in range(self._control.used, self.wire.queues):
            self._use(pair, False)
        self._tell()

    def set_link(self, up: bool) -> None:
        """Whether the device is plugged in."""
        self._up = up
        self.wire.set_link(up)
        self._tell()

    def serve(self, queues: Mapping[int, Queue], index: int) -> None:
        """The driver kicked."""
        pair = index // 2
        if pair in self._engines:
            self._attend(self._engines[pair], pair, 2 * pair in queues)
        else:
            if pair < self._control.used and 2 * pair in queues:
                self._use(pair, True)
            if index % 2:
                self._transmit(queues[index], pair)
            elif pair < self._control.used:
                self._receive(queues[index], pair)
        self._await(pair)

    def refresh(self) -> None:
        """Look whether somebody is there now."""
        self.wire.refresh()
        for pair in range(self.wire.queues):
            self._await(pair)

    def stop(self) -> None:
        """The driver is gone, and what was about to be received with it."""
        served = list(self._engines)
        self._retire()
        self._late.clear()
        self._more.clear()
        self.wire.stop()
        for pair in served:
            self.wire.receive(pair)
        for pair in range(self.wire.queues):
            self._await(pair)

    def close(self) -> None:
        """The wire goes with the last one that holds it."""
        self.wire.release()

    # Engines -----------------------------------------------------------------------------------------------------------

    @property
    def native(self) -> bool:
        """Whether engines can do this. They note no frames."""
        return self.wire.native and self.wire.capture is None

    def engine(self, index: int, thread: int) -> TapEngine:
        """What does the same in C for a queue pair. The wire is left to it while it receives: here, it is only seen to."""
        pair = index // 2
        if pair not in self._engines:
            self._engines[pair] = TapEngine(pair, self._header, merge=self._merge, thread=thread)
            self._more.discard(pair)
            self._tell()
        if index % 2 == 0:
            self._receiving.add(pair)
            self._late.pop(pair, None)
        self._await(pair)
        return self._engines[pair]

    def rests(self, index: int) -> None:
        """Frames for a receive queue that is gone come to us again, so that its pair leaves."""
        if index % 2 == 0:
            self._receiving.discard(index // 2)
            self._await(index // 2)

    def _tell(self) -> None:
        """What commands said counts at once."""
        if not self._engines:
            return
        terms = {"from_driver": offload.terms(self._accepted, True), "to_driver": offload.terms(self._accepted, False)}
        for pair, engine in self._engines.items():
            engine.follow(wants=self._control.filter(), **terms, used=pair < self._control.used, plugged=self._up)
            if not self.wire.settled:
                engine.ask()

    def _attend(self, engine: TapEngine, pair: int, receives: bool) -> None:
        """It asked: for the wire, or because of an error."""
        if error := engine.failed():
            self.wire.failed(OSError(error, os.strerror(error)))
        if receives and pair < self._control.used:
            self.wire.use(pair, True)
        self.wire.settle()
        engine.use(self.wire.watched(pair), gone=not self.wire.link)

    def _retire(self) -> None:
        """Engines go with their driver; the wire is everybody's again."""
        self._sent, self._received = self.sent, self.received
        engines, self._engines = self._engines, {}
        self._receiving.clear()
        for engine in engines.values():
            engine.use(-1)

    @property
    def sent(self) -> Tally:
        """What came from drivers."""
        return self._sent.plus(engine.sent for engine in self._engines.values())

    @property
    def received(self) -> Tally:
        """What came for them."""
        return self._received.plus(engine.received for engine in self._engines.values())

    # The wire ----------------------------------------------------------------------------------------------------------

    def _use(self, pair: int, on: bool) -> None:
        self.wire.use(pair, on)
        if not on:
            self._late.pop(pair, None)
            self._await(pair)

    def _left(self, fd: int) -> None:
        """A descriptor is about to be closed, or worth no look any more."""
        for engine in self._engines.values():
            if engine.fd == fd:
                engine.use(-1, gone=not self.wire.link)
        self._sources.remove(fd)
        for pair, watched in list(self._watched.items()):
            if watched == fd:
                del self._watched[pair]

    def _await(self, pair: int) -> None:
        """Wait for what is of use now; tell of a link that changed."""
        self.wire.leaving = self._left
        fd = self.wire.watched(pair)
        if fd >= 0:
            events = 0 if pair in self._late or pair in self._receiving else select.EPOLLIN
            if self.wire.blocked(pair) or pair in self._more:
                events |= select.EPOLLOUT
            if pair not in self._watched:
                self._watched[pair] = fd
                self._sources.add(fd, lambda queues, came: self._ready(queues, came, pair))
            self._sources.await_events(fd, events)
        if self._linked != self.wire.link:
            self._linked = self.wire.link
            self._changed()

    def _ready(self, queues: Mapping[int, Queue], events: int, pair: int) -> None:
        if events & select.EPOLLOUT:
            self.wire.flush(pair)
            if (tx := queues.get(2 * pair + 1)) is not None:
                self._transmit(tx, pair)
            else:
                self._more.discard(pair)
        if events & ~select.EPOLLOUT and pair not in self._receiving:
            if (rx := queues.get(2 * pair)) is not None:
                self._receive(rx, pair)
            elif pair:
                self._use(pair, False)
            else:
                self._late[pair] = []  # until the queue is there
        self._await(pair)

    # From the driver ---------------------------------------------------------------------------------------------------

    def _transmit(self, tx: Queue, pair: int) -> None:
        self._more.discard(pair)
        if self.wire.blocked(pair):
            return
        chains = tx.pop(BATCH)
        taken = 0
        while taken < len(chains) and not self.wire.blocked(pair):
            self._send(chains[taken], pair)
            taken += 1
        tx.push([(chain, 0) for chain in chains[:taken]])
        tx.put_back(chains[taken:])
        if taken == BATCH:
            self._more.add(pair)

    def _send(self, chain: Chain, pair: int) -> None:
        packet = chain.read(0, self._header + LONGEST + 1)
        if self._header < HEADER:
            packet = packet[: self._header] + bytes(HEADER - self._header) + packet[self._header :]
        checked = offload.sent(packet, self._accepted) if len(packet) <= HEADER + LONGEST else None
        if checked is None or not self._up or pair >= self._control.used:
            self._sent.dropped += 1
            return
        self._sent.frames += 1
        self._sent.large += checked[1] != offload.GSO_NONE
        if (capture := self.wire.capture) is not None:
            capture.frame(checked[HEADER:], sent=True)
        self.wire.send(pair, checked)

    # To the driver -----------------------------------------------------------------------------------------------------

    def _receive(self, rx: Queue, pair: int) -> None:
        packets = self._late.pop(pair, None) or self._take(pair)
        if packets and (late := self._deliver(rx, packets)):
            self._late[pair] = late

    def _take(self, pair: int) -> list[bytes]:
        """Frames of the wire that the driver gets."""
        packets = []
        for packet in self.wire.receive(pair):
            if (capture := self.wire.capture) is not None:
                capture.frame(packet[HEADER:], sent=False)
            checked = offload.received(packet, self._accepted)
            if checked is None or not self._up:
                self._received.dropped += 1
            elif self._control.accepts(checked):
                packets.append(checked)
        return packets

    def _deliver(self, rx: Queue, packets: list[bytes]) -> list[bytes]:
        """Put packets into receive buffers; those for which there are too few are returned."""
        room = deque(rx.pop(len(packets)))
        done: list[tuple[Chain, int]] = []
        late: list[bytes] = []
        for at, packet in enumerate(packets):
            size = len(packet) - HEADER + self._header
            buffers = self._find(rx, room, size)
            if sum(buffer.writable for buffer in buffers) >= size:
                done += self._fill(buffers, packet)
                self._received.frames += 1
                self._received.large += packet[1] != offload.GSO_NONE
                continue
            room.extendleft(reversed(buffers))
            if self._merge or not buffers:
                late = packets[at:]
                break
            self._received.dropped += 1
        rx.push(done)
        rx.put_back(list(room))
        return late

    def _find(self, rx: Queue, room: deque[Chain], size: int) -> list[Chain]:
        """Buffers for *size* bytes: as many as it takes, or as there are; one and no more unless they merge."""
        found: list[Chain] = []
        while size > 0 and (self._merge or not found):
            if not room:
                room.extend(rx.pop(1))
            if not room:
                break
            found.append(room.popleft())
            size -= found[-1].writable
        return found

    def _fill(self, buffers: list[Chain], packet: bytes) -> list[tuple[Chain, int]]:
        """One packet over *buffers*, and the bytes in each; num_buffers says how many (virtio 1.2, 5.1.6.4)."""
        header = packet[:10] + len(buffers).to_bytes(2, "little")
        data = memoryview(header[: self._header] + packet[HEADER:])
        done = []
        for buffer in buffers:
            written = buffer.write(data[: buffer.writable])
            done.append((buffer, written))
            data = data[written:]
        return done
