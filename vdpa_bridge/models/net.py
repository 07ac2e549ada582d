# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A virtio network device that loops back (virtio 1.2, 5.1), by the rules of the kernel's simulator.

Rule of this file: what drivers/vdpa/vdpa_sim/vdpa_sim_net.c does is right. A frame sent comes back when it goes to a
group address or to the device's own; everything else is dropped, and so is a frame for which no receive buffer waits.
The frame is copied verbatim, its virtio_net_hdr included. What the simulator has not: several queue pairs, each of which
loops back for itself.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Self

from ..flags import Feature
from ..virtio.config import parse_mac
from ..virtio.features import NetFeature as F
from ..virtio.ids import DeviceId
from ..virtqueue import Chain
from .base import Model, Queue
from .options import check_options, parse_count

MOST_PAIRS = 64
LONGEST = 4096
"""Bytes of header and frame that come back; the rest is cut off."""
MOST_KEPT = 256
"""Frames of a pair that wait for mappings at most."""
DEFAULT_MAC = "02:00:00:00:00:01"
DEFAULT_MTU = 1500

_CONFIG = struct.Struct("<6sHHH")
_LINK_UP = 1
_MAC_ADDR_SET = bytes((1, 1))
_VQ_PAIRS_SET = bytes((4, 0))
_OK, _ERR = b"\0", b"\1"


def _copy(frame: Chain | bytes, buffer: Chain) -> int:
    """Bytes copied into a receive buffer."""
    return buffer.write(frame) if isinstance(frame, bytes) else buffer.copy_from(frame, length=LONGEST)


class NetModel(Model):
    """Queue pairs and a control queue, which is a group of its own that can be put into another address space.

    With MQ, VQ_PAIRS_SET says how many pairs are used; the others drop what is sent. Before it is said, all are used: many
    clients keep the control queue to themselves (QEMU, DPDK) and enable the rings of the pairs that they use.
    """

    device_id = DeviceId.NET
    groups = 2
    address_spaces = 2
    features = F.MTU | F.MAC | F.STATUS | F.CTRL_VQ | F.CTRL_MAC_ADDR

    def __init__(self, mac: bytes, mtu: int = DEFAULT_MTU, pairs: int = 1) -> None:
        """*mac* is six bytes, *mtu* in bytes without the Ethernet header."""
        self.mac = mac
        self.mtu = mtu
        self.pairs = pairs
        self.queue_count = 2 * pairs + 1
        if pairs > 1:
            self.features |= F.MQ
        self.start(0)

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """``mac=52:54:00:12:34:56``, ``mtu=1500``, ``pairs=N``."""
        check_options("net", options, ("mac", "mtu", "pairs"))
        mac = parse_mac(options.get("mac", DEFAULT_MAC))
        if mac[0] & 1:
            raise ValueError(f"mac={options['mac']} is a group address, which no device has")
        mtu = parse_count("mtu", options.get("mtu", str(DEFAULT_MTU)), 68, 65535)
        return cls(mac, mtu, parse_count("pairs", options.get("pairs", "1"), 1, MOST_PAIRS))

    def config(self) -> bytes:
        """``struct virtio_net_config`` up to the MTU: 12 bytes."""
        return _CONFIG.pack(self.mac, _LINK_UP, self.pairs, self.mtu)

    def group_of(self, index: int, features: int) -> int:
        """The control queue is a group; it comes behind the pairs that the driver knows of (virtio 1.2, 5.1.2)."""
        return int(index == self._control(features))

    def _control(self, features: int) -> int:
        return 2 * self.pairs if features & F.MQ else 2

    def start(self, features: int) -> None:
        """The header has its last field, num_buffers, for modern drivers (virtio 1.2, 5.1.6.1)."""
        self._header = 12 if features & (Feature.VERSION_1 | F.MRG_RXBUF) else 10
        self._multiqueue = bool(features & F.MQ)
        self._ctrl = self._control(features)
        self._used = self.pairs
        self._kept: dict[int, list[bytes]] = {}

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        """Serve a batch of one queue."""
        rx, tx = index & ~1, index | 1
        if index == self._ctrl:
            ctrl = queues[index]
            ctrl.push([(chain, chain.write(self._command(chain.read(0, 64)))) for chain in ctrl.pop()])
        elif tx < self._ctrl and rx in queues and tx in queues:
            self._loop(queues[rx], queues[tx], rx // 2)

    def _loop(self, rx: Queue, tx: Queue, pair: int) -> None:
        """Frames are given back on both queues at once, received before sent: a driver that sees its frame sent finds it received.

        Frames whose receive buffer is not mapped yet are kept until it is.
        """
        sent = tx.pop()
        frames: list[Chain | bytes] = [*self._kept.pop(pair, ())]
        frames += [chain for chain in sent if self._accepts(chain)] if pair < self._used else []
        room = rx.pop(len(frames)) if frames else []
        rx.push([(buffer, _copy(frame, buffer)) for buffer, frame in zip(room, frames, strict=False)])
        if rx.waits and len(room) < len(frames):
            late = frames[len(room) : len(room) + MOST_KEPT]
            self._kept[pair] = [frame if isinstance(frame, bytes) else frame.read(0, LONGEST) for frame in late]
        tx.push([(chain, 0) for chain in sent])

    def _accepts(self, chain: Chain) -> bool:
        """Whether the frame comes back: the lowest bit of the first byte marks group addresses, broadcast among them."""
        to = chain.read(self._header, 6)
        return len(to) == 6 and bool(to[0] & 1 or to == self.mac)

    def _command(self, command: bytes) -> bytes:
        """One control command (virtio 1.2, 5.1.6.5): the MAC address, and with MQ the number of queue pairs."""
        what, value = command[:2], command[2:]
        if what == _MAC_ADDR_SET and len(value) == 6:
            self.mac = value
            return _OK
        pairs = int.from_bytes(value, "little")
        if what == _VQ_PAIRS_SET and len(value) == 2 and self._multiqueue and 1 <= pairs <= self.pairs:
            self._used = pairs
            return _OK
        return _ERR
