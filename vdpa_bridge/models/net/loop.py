# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Frames that come back, by the rules of the kernel's simulator.

Rule of this file: what drivers/vdpa/vdpa_sim/vdpa_sim_net.c does is right. A frame sent comes back when it goes to a
group address or to the device's own; everything else is dropped, and so is a frame for which no receive buffer waits.
The frame is copied verbatim, its virtio_net_hdr included. What the simulator has not: several queue pairs, each of which
loops back for itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...virtqueue import Chain
from ..base import Queue
from .control import Control

LONGEST = 4096
"""Bytes of header and frame that come back; the rest is cut off."""
MOST_KEPT = 256
"""Frames of a pair that wait for mappings at most."""


def _copy(frame: Chain | bytes, buffer: Chain) -> int:
    """Bytes copied into a receive buffer."""
    return buffer.write(frame) if isinstance(frame, bytes) else buffer.copy_from(frame, length=LONGEST)


class Loopback:
    """No wire at all. See ``model.DataPath``."""

    features = 0
    link = True
    reaches: tuple[str, ...] = ()
    controls: tuple[int, ...] = ()

    def __init__(self, control: Control) -> None:
        self._control = control
        self._kept: dict[int, list[bytes]] = {}
        self._header = 0

    def start(self, features: int, header: int) -> None:
        """Frames that were kept are gone with the driver before."""
        self._header = header
        self._kept.clear()

    def follow(self) -> None:
        """Pairs in use are looked up for each frame."""

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
        rx.push([(buffer, _copy(frame, buffer)) for buffer, frame in zip(room, frames, strict=False)])
        if rx.waits and len(room) < len(frames):
            late = frames[len(room) : len(room) + MOST_KEPT]
            self._kept[pair] = [frame if isinstance(frame, bytes) else frame.read(0, LONGEST) for frame in late]
        tx.push([(chain, 0) for chain in sent])

    def _accepts(self, chain: Chain) -> bool:
        """Whether the frame comes back: the lowest bit of the first byte marks group addresses, broadcast among them."""
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
