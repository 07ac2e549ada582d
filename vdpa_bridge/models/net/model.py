# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A virtio network device (virtio 1.2, 5.1).

Rule of this file: where frames go is the business of a data path, which can be another one; here is what a driver sees
beside its frames: features, configuration, control queue.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Protocol, Self

from ...engines import Engine
from ...flags import Feature
from ...netdev import HEADER, Netdev
from ...virtio.config import parse_mac
from ...virtio.features import NetFeature as F
from ...virtio.ids import DeviceId
from ..base import Model, Queue
from ..needs import Needs
from ..options import check_options, parse_count
from ..sources import Sources
from .control import LONGEST_COMMAND, Control
from .exchange import Exchange
from .loop import RULES, Loopback
from .wires import OPTIONS, open_wire

MOST_PAIRS = 64
DEFAULT_MAC = "02:00:00:00:00:01"
DEFAULT_MTU = 1500

_CONFIG = struct.Struct("<6sHHH")
_SPEED = struct.Struct("<IB")
_FULL_DUPLEX = 1
_LINK_UP, _ANNOUNCE = 1, 2
_OK, _ERR = b"\0", b"\1"


class DataPath(Protocol):
    """Where the frames of the data queues go. Synchronization: as the model's."""

    features: int
    """What it can do, beyond what every device does (NetFeature)."""
    reaches: tuple[str, ...]
    """Sockets that it connects to later."""
    controls: tuple[int, ...]
    """See ``Needs``."""

    @property
    def link(self) -> bool:
        """Whether somebody is at the other end."""

    def start(self, features: int, header: int) -> None:
        """The driver is ready, with *features* accepted and headers of that many bytes."""

    def follow(self) -> None:
        """A command changed something."""

    def serve(self, queues: Mapping[int, Queue], index: int) -> None:
        """A data queue may hold chains."""

    @property
    def native(self) -> bool:
        """Whether it has engines."""

    def engine(self, index: int, thread: int) -> Engine:
        """The one of a queue's pair, in that thread; while it serves a queue, ``serve`` is called for what it asks for."""

    def rests(self, index: int) -> None:
        """See ``Model.rests``."""

    def set_link(self, up: bool) -> None:
        """Plugged in or not."""

    def refresh(self) -> None:
        """Look whether somebody is at the other end now."""

    def stop(self) -> None:
        """The driver is gone."""

    def close(self) -> None:
        """Give everything back."""


class NetModel(Model):
    """Queue pairs and a control queue, which is a group of its own that can be put into another address space.

    With MQ, VQ_PAIRS_SET says how many pairs are used; the others drop what is sent. Before it is said, all are used: many
    clients keep the control queue to themselves (QEMU, DPDK) and enable the rings of the pairs that they use.
    """

    device_id = DeviceId.NET
    groups = 2
    address_spaces = 2
    features = F.MTU | F.MAC | F.STATUS | F.CTRL_VQ | F.CTRL_MAC_ADDR

    def __init__(
        self,
        mac: bytes,
        mtu: int = DEFAULT_MTU,
        pairs: int = 1,
        *,
        wire: Netdev | None = None,
        up: bool = True,
        speed: int = 0,
        rule: str = "loop",
        threads: int = 1,
    ) -> None:
        """*mac* is six bytes, *mtu* in bytes without the Ethernet header, *speed* in Mbit/s, 0 if not told.

        Without a *wire* frames come back by *rule* (``loop.RULES``). *threads* is of engines, 0 for none: they serve what has no wire, and
        wires that are ``native``."""
        self.mtu = mtu
        self.pairs = pairs
        self.queue_count = 2 * pairs + 1
        self.speed = speed
        self.up = up
        """Whether the device is plugged in; ``plug`` changes it."""
        self.control = Control(mac, pairs)
        self.path: DataPath = Loopback(self.control, rule)
        if wire is not None:
            self.sources = Sources()
            self.path = Exchange(wire, self.sources, self.control, self._link_changed)
        self.threads = threads if self.path.native and type(self) is NetModel else 0
        self.path.set_link(up)
        self.needs = Needs(connect=self.path.reaches, controls=self.path.controls)
        self.features |= self.path.features
        if pairs > 1:
            self.features |= F.MQ
        if speed:
            self.features |= F.SPEED_DUPLEX
        self._accepted = 0
        self._inherited: Mapping[str, Any] = {}
        self._ctrl = self._control_queue(0)

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """``mac=52:54:00:12:34:56``, ``mtu=1500``, ``pairs=N``, ``link=down``, ``speed=MBITS``, a wire (``wires.OPTIONS``) or ``rule=echo``, and ``threads=N``."""
        return cls._make(options)

    @classmethod
    def succeed(cls, predecessor: Model, options: Mapping[str, str]) -> Self:
        """With the predecessor's wire, which is there once."""
        path = predecessor.path if isinstance(predecessor, NetModel) else None
        successor = cls._make(options, path.wire if isinstance(path, Exchange) else None)
        try:
            successor.restore(predecessor.snapshot())
        except BaseException:
            successor.close()
            raise
        return successor

    @classmethod
    def _make(cls, options: Mapping[str, str], wire: Netdev | None = None) -> Self:
        check_options("net", options, ("mac", "mtu", "pairs", "link", "speed", "rule", "threads", *OPTIONS))
        mac = parse_mac(options.get("mac", DEFAULT_MAC))
        if mac[0] & 1:
            raise ValueError(f"mac={options['mac']} is a group address, which no device has")
        mtu = parse_count("mtu", options["mtu"], 68, 65535) if "mtu" in options else 0
        pairs = parse_count("pairs", options.get("pairs", "1"), 1, MOST_PAIRS)
        speed = parse_count("speed", options.get("speed", "0"), 0, (1 << 31) - 1)
        if (link := options.get("link", "up")) not in ("up", "down"):
            raise ValueError(f"link={link}; it is up or down")
        if (rule := options.get("rule", "loop")) not in RULES:
            raise ValueError(f"rule={rule}; it is {', '.join(RULES)}")
        threads = parse_count("threads", options.get("threads", "1"), 0, pairs)
        if options.keys() & {"rule", "threads"} and options.keys() & set(OPTIONS) - ({"tap"} if "rule" not in options else set()):
            raise ValueError("rule= is for devices without a wire, threads= for these and taps that nothing captures")
        wire = wire or open_wire(options, pairs, mtu)
        mtu = mtu or (wire.mtu if wire is not None else 0) or DEFAULT_MTU
        return cls(mac, mtu, pairs, wire=wire, up=link == "up", speed=speed, rule=rule, threads=threads)

    @property
    def mac(self) -> bytes:
        """The address, as the driver may have changed it."""
        return self.control.mac

    def config(self) -> bytes:
        """``struct virtio_net_config`` up to the MTU: 12 bytes; with a speed 17."""
        status = _LINK_UP * (self.up and self.path.link) | _ANNOUNCE * self.control.announce
        space = _CONFIG.pack(self.mac, status, self.pairs, self.mtu)
        return space + _SPEED.pack(self.speed, _FULL_DUPLEX) if self.speed else space

    def group_of(self, index: int, features: int) -> int:
        """The control queue is a group; it comes behind the pairs that the driver knows of (virtio 1.2, 5.1.2)."""
        return int(index == self._control_queue(features))

    def _control_queue(self, features: int) -> int:
        return 2 * self.pairs if features & F.MQ else 2

    def start(self, features: int) -> None:
        """The header has its last field, num_buffers, for modern drivers (virtio 1.2, 5.1.6.1)."""
        self._accepted = features
        self._ctrl = self._control_queue(features)
        self.control.start(features)
        if self._inherited:
            self.control.restore(self._inherited)
            self._inherited = {}
            self._announce(True)
        self.path.start(features, HEADER if features & (Feature.VERSION_1 | F.MRG_RXBUF) else HEADER - 2)

    def reset(self) -> None:
        """What was under way to the driver is lost."""
        self.control.announce = False
        self._inherited = {}
        self.path.stop()

    def engine(self, index: int) -> Engine | None:
        """One for each queue pair, where the data path has them."""
        if not self.threads or index >= self._ctrl:
            return None
        return self.path.engine(index, index // 2 % self.threads)

    def rests(self, index: int) -> None:
        """The data path may have something to do instead."""
        self.path.rests(index)

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        """Serve a batch of one queue."""
        if index == self._ctrl:
            ctrl = queues[index]
            ctrl.push([(chain, chain.write(self._command(chain.read(0, LONGEST_COMMAND)))) for chain in ctrl.pop()])
        elif index < self._ctrl:
            self.path.serve(queues, index)

    def _command(self, command: bytes) -> bytes:
        if not self.control.carry_out(command):
            return _ERR
        self.path.follow()
        return _OK

    def plug(self, up: bool) -> None:
        """Put the cable in, or out; called as ``ModelDevice.change`` calls its action."""
        if up != self.up:
            self.up = up
            self.path.set_link(up)
            self._announce(up)

    def _link_changed(self) -> None:
        self._announce(self.path.link)
        self.config_changed()

    def _announce(self, up: bool) -> None:
        """Have the driver say where it is, for switches that it has not been heard by (virtio 1.2, 5.1.6.5.4)."""
        self.control.announce = up and bool(self._accepted & F.GUEST_ANNOUNCE and self._accepted & F.CTRL_VQ)

    def refresh(self) -> str:
        """Connect anew to a socket whose other side had gone."""
        before = self.path.link
        self.path.refresh()
        return f"the link is {'up' if self.path.link else 'down'}" if self.path.link != before else ""

    def snapshot(self) -> dict[str, Any]:
        """What commands said."""
        return self.control.snapshot()

    def restore(self, state: Mapping[str, Any]) -> None:
        """The same for the driver that is there, when it goes on (``start``), and has the network learn of the new place."""
        self.control.restore(state)
        self._inherited = dict(state)

    def close(self) -> None:
        """The wire goes as well."""
        super().close()
        self.path.close()
