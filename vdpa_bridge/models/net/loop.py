# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Frames that come back, by the rules of the kernel's simulator.

Rule of this file: what drivers/vdpa/vdpa_sim/vdpa_sim_net.c does is right. A frame sent comes back when it goes to a
group address or to the device's own; everything else is dropped, and so is a frame for which no receive buffer waits.
The frame is copied verbatim, its virtio_net_hdr included. What the simulator has not: several queue pairs, each of which
loops back for itself; and other rules, for measurements: all comes back (echo), nothing does (sink), or every receive
buffer is filled (source). The engine has the same rules, and asks for nothing but what to do about broken rings.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...engines import NetEngine
from ...virtqueue import Chain
from ..base import Queue
from .control import Control

LONGEST = 4096
"""Bytes of header and frame that come back; the rest is cut off."""
MOST_KEPT = 256
"""Frames of a pair that wait for mappings at most."""
RULES = "loop", "echo", "sink", "source"
_SOURCE = bytes.fromhex("ffffffffffff 000000000000 88b5").ljust(60, b"\0")
"""A frame to everybody, of an experimental type; the sender's address comes in between."""


class Loopback:
    """No wire at all. See ``model.DataPath``."""

    features = 0
    link = True
    native = True
    reaches: tuple[str, ...] = ()
    controls: tuple[int, ...] = ()

    def __init__(self, control: Control, rule: str = "loop") -> None:
        """*rule* is one of RULES."""
        self._control = control
        self._rule = rule
        self._engines: dict[int, NetEngine] = {}
        self._kept: dict[int, list[bytes]] = {}
        self._header = 0

    def start(self, features: int, header: int) -> None:
        """Frames that were kept are gone with the driver before."""
        self._header = header
        self._kept.clear()
        self._engines.clear()

    def engine(self, index: int, thread: int) -> NetEngine:
        """What does the same in C for a queue pair."""
        pair = index // 2
        if pair not in self._engines:
            self._engines[pair] = NetEngine(pair, self._rule, self._header, thread=thread)
            self.follow()
        return self._engines[pair]

    def rests(self, index: int) -> None:
        """A pair loops back when both of its queues are there."""

    def follow(self) -> None:
        """Engines are told; here, addresses and pairs in use are looked up for each frame."""
        for pair, engine in self._engines.items():
            engine.follow(self._control.mac, pair < self._control.used)

    def serve(self, queues: Mapping[int, Queue], index: int) -> None:
        """Frames are given back on both queues at once, received before sent: a driver that sees its frame sent finds it received.

        Frames whose receive buffer is not mapped yet are kept until it is.
        """
        pair = index // 2
        if 2 * pair not in queues or 2 * pair + 1 not in queues:
            return
        rx, tx = queues[2 * pair], queues[2 * pair + 1]
        sent = tx.pop()
        frames: list[Chain | bytes] = [*self._kept.pop(pair, ())]
        frames += [chain for chain in sent if self._accepts(chain)] if pair < self._control.used else []
        room = rx.pop(len(frames)) if frames else []
        rx.push([(buffer, self._copy(frame, buffer)) for buffer, frame in zip(room, frames, strict=False)])
        if rx.waits and len(room) < len(frames):
            late = frames[len(room) : len(room) + MOST_KEPT]
            self._kept[pair] = [frame if isinstance(frame, bytes) else frame.read(0, LONGEST) for frame in late]
        tx.push([(chain, 0) for chain in sent])
        if self._rule == "source" and pair < self._control.used:
            rx.push([(buffer, self._fill(buffer)) for buffer in rx.pop()])

    def _copy(self, frame: Chain | bytes, buffer: Chain) -> int:
        """Bytes copied into a receive buffer; an echo's header is a receiver's, which counts its buffers (virtio 1.2, 5.1.6.4.1)."""
        longest = LONGEST if self._rule == "loop" else None
        length = buffer.write(frame) if isinstance(frame, bytes) else buffer.copy_from(frame, length=longest)
        if self._rule == "echo" and self._header > 10:
            buffer.write(b"\1\0", 10)
        return length

    def _fill(self, buffer: Chain) -> int:
        header = b"\0" * 10 + b"\1\0" * (self._header > 10)
        return buffer.write(header + _SOURCE[:6] + self._control.mac + _SOURCE[12:])

    def _accepts(self, chain: Chain) -> bool:
        """Whether the frame comes back: the lowest bit of the first byte marks group addresses, broadcast among them."""
        if self._rule != "loop":
            return self._rule == "echo"
        to = chain.read(self._header, 6)
        return len(to) == 6 and bool(to[0] & 1 or to == self._control.mac)

    def set_link(self, up: bool) -> None:
        """Loops have no ends."""

    def refresh(self) -> None:
        """Nothing is outside."""

    def stop(self) -> None:
        """What was kept goes when the next driver starts."""

    def close(self) -> None:
        """Nothing to give back."""
