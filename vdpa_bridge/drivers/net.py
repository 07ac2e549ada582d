# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A network driver (virtio 1.2, 5.1): Ethernet frames out and in, over one queue pair or several.

Rule of this file: the receive queue is kept full, and frames that came in wait here until somebody asks. No offload is
asked for, so the virtio_net_hdr is all zeroes and frames are complete.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterable
from typing import ClassVar, Unpack

from ..device import Device
from ..errors import DeviceBroken, FeatureError
from ..flags import Feature
from ..memory import Buffer
from ..virtio.config import Value, mac_text, parse_config, parse_mac
from ..virtio.features import NetFeature as F
from ..virtio.features import feature_names
from ..virtio.ids import DeviceId
from .base import Driver, Options, Pending, Segments
from .pool import Pool

CTRL = 2
"""The control queue of a driver that does not take MQ (virtio 1.2, 5.1.2)."""
WANTED = F.MAC | F.MTU | F.STATUS | F.CTRL_VQ | F.CTRL_MAC_ADDR

SHORTEST = 14
"""Bytes of a frame that is only a header."""
_VLAN = 4
_DEFAULT_MTU = 1500
_LINK_UP = 1
_CONFIG_BYTES = 12
_SET_MAC = bytes((1, 1))
_SET_PAIRS = bytes((4, 0))
_BACKLOG = 65536
"""Frames that wait to be asked for; later ones are dropped and counted."""


def _most_pairs(device: Device) -> int:
    """Queue pairs of the device; a control queue may come on top."""
    limits = device.identify()
    return limits.queues // 2 if limits.features & F.MQ else 1


class RxBuffer(Pending):
    """A receive buffer."""

    __slots__ = ("buffer", "pair")

    def __init__(self, pair: Pair, buffer: Buffer) -> None:
        super().__init__()
        self.pair, self.buffer = pair, buffer

    def complete(self, written: int) -> None:
        self.written = written
        self.pair.came(self)


class TxBuffer(Pending):
    """A transmit buffer, which is used again and again."""

    __slots__ = ("buffer", "pair")

    def __init__(self, pair: Pair, buffer: Buffer) -> None:
        super().__init__()
        self.pair, self.buffer = pair, buffer

    def complete(self, written: int) -> None:
        self.pair.idle.append(self)


class Pair:
    """The buffers and frames of one queue pair."""

    def __init__(self, driver: NetDriver, number: int) -> None:
        self._driver = driver
        self.rx, self.tx = 2 * number, 2 * number + 1
        self.received: deque[bytes] = deque()
        self.idle: list[TxBuffer] = []
        self.empty: list[RxBuffer] = []
        self._parts: list[bytes] = []
        self._missing = 0

    def fill(self, pool: Pool, depth: int, size: int) -> None:
        """Start anew: *depth* receive buffers, half as many transmit buffers, so that what loops back finds room."""
        self.received.clear()
        self._parts, self._missing = [], 0
        self.empty = [RxBuffer(self, pool.take(size)) for _ in range(depth)]
        self.idle = [TxBuffer(self, pool.take(size)) for _ in range(depth // 2)]

    def came(self, rx: RxBuffer) -> None:
        """A buffer came back: a frame, or with MRG_RXBUF a part of one (virtio 1.2, 5.1.6.4)."""
        self.empty.append(rx)
        driver, start = self._driver, 0
        if not self._missing:
            if rx.written < driver.header:
                raise DeviceBroken(f"{driver.name}: a received buffer with {rx.written} bytes, less than a virtio_net_hdr")
            start, self._missing = driver.header, 1
            if driver.features & F.MRG_RXBUF:
                self._missing = int.from_bytes(rx.buffer.data[10:12], "little")
                if not 0 < self._missing <= driver.ring(self.rx).queue.num:
                    raise DeviceBroken(f"{driver.name}: a received frame in {self._missing} buffers of a ring of {driver.ring(self.rx).queue.num}")
        self._parts.append(bytes(rx.buffer.data[start : rx.written]))
        self._missing -= 1
        if not self._missing:
            if len(self.received) < _BACKLOG:
                self.received.append(b"".join(self._parts))
            else:
                driver.dropped += 1
            self._parts.clear()


class NetDriver(Driver):
    """A NIC. Frames are bytes from the destination address on, without a checksum."""

    device_id = DeviceId.NET
    table_entries = 4
    pair_type: ClassVar[type[Pair]] = Pair
    """What becomes of frames that come in."""

    def __init__(
        self, device: Device, *, wanted: int = WANTED, pairs: int = 1, isolate_cvq: bool = False, **options: Unpack[Options]
    ) -> None:
        """See ``Driver``; the control queue is set up when the device has one and CTRL_VQ is *wanted*. With *isolate_cvq* it is in an
        address space of its own, as a VMM has it that answers a guest's commands itself; FeatureError where the device cannot.

        More than one of *pairs* needs MQ. A device with a control queue is told their number; without, their rings being enabled
        says it. ValueError when the device has fewer.
        """
        limits = device.identify()
        most = _most_pairs(device)
        if not 1 <= pairs <= most:
            raise ValueError(f"{device.name} has {most} queue pair{'s' * (most != 1)}, {pairs} are wanted")
        if pairs > 1:
            options["required"] = options.get("required", 0) | F.MQ
        self._control = 2 * most if pairs > 1 else CTRL
        queues = list(range(2 * pairs))
        if limits.features & wanted & F.CTRL_VQ and limits.queues > self._control:
            queues.append(self._control)
        else:
            wanted &= ~(F.CTRL_VQ | F.CTRL_MAC_ADDR)
            if isolate_cvq:
                raise FeatureError(f"{device.name} has no control queue to isolate")
        if isolate_cvq:
            options["isolated"] = (self._control,)
        self.dropped = 0
        """Frames that came in while too many were waiting already."""
        self._pairs = [self.pair_type(self, number) for number in range(pairs)]
        super().__init__(device, wanted=wanted & ~F.MQ, queues=queues, **options)

    def _ready(self) -> None:
        """Fill the receive rings with buffers for the longest frame; say how many pairs there are."""
        self.header = 12 if self.features & (Feature.VERSION_1 | F.MRG_RXBUF) else 10
        config = self._config()
        mac, mtu = config.get("mac"), config.get("mtu", _DEFAULT_MTU)
        self.mac = str(mac) if mac is not None else ""
        """Our address; empty where the device names none."""
        self.mtu = int(mtu)
        """Bytes of payload that a frame may have."""
        self.max_frame = self.mtu + SHORTEST + _VLAN
        size = self.header + self.max_frame
        depth = min(self._num, self._pool.free * 9 // 10 // len(self._pairs) // (-(-size // 64) * 64) * 2 // 3)
        if depth < 2:
            raise ValueError(f"{self.name}: a pool of {self._pool.free} bytes has no room for frames of {self.max_frame}")
        for pair in self._pairs:
            pair.fill(self._pool, depth, size)
        self._replenish()
        if len(self._pairs) > 1 and self.features & F.CTRL_VQ:
            self._command(_SET_PAIRS, len(self._pairs).to_bytes(2, "little"), f"{len(self._pairs)} queue pairs")

    def _config(self) -> dict[str, Value]:
        return parse_config(DeviceId.NET, self.features, self.read_config(_CONFIG_BYTES))

    @property
    def link_up(self) -> bool:
        """Whether there is a link, as the device says now; always where it does not say (virtio 1.2, 5.1.4.2)."""
        return bool(int(self._config().get("status", _LINK_UP)) & _LINK_UP)

    @property
    def info(self) -> dict[str, object]:
        """Address, MTU, link, queue pairs there are and the names of the features agreed on."""
        names = feature_names(DeviceId.NET, self.features)
        return {"mac": self.mac, "mtu": self.mtu, "link_up": self.link_up, "pairs": _most_pairs(self.device), "features": names}

    # Send ------------------------------------------------------------------------------------------------------------

    def send(self, frame: bytes, timeout: float | None = None, pair: int = 0) -> None:
        """Send one frame; returns when the device has taken it."""
        self.send_many([frame], timeout, pair)

    def send_many(self, frames: Iterable[bytes], timeout: float | None = None, pair: int = 0) -> None:
        """Send *frames* over queue pair number *pair*, many in flight; returns when the device has taken all.

        ValueError, before anything is sent, for a frame shorter than its header or longer than the MTU allows. TimeoutError when
        the device takes nothing for *timeout* seconds.
        """
        self._need_open()
        over = self._pair(pair)
        waiting = deque(frames)
        for frame in waiting:
            if not SHORTEST <= len(frame) <= self.max_frame:
                raise ValueError(f"a frame of {len(frame)} bytes; {self.name} takes {SHORTEST} to {self.max_frame} (MTU {self.mtu})")
        slots = len(over.idle)
        while waiting:
            if not over.idle:
                self.wait(lambda: bool(over.idle), f"transmission of {len(waiting)} frames", timeout)
            chains: list[tuple[Segments, Segments, Pending]] = []
            while waiting and over.idle:
                frame, slot = waiting.popleft(), over.idle.pop()
                end = self.header + len(frame)
                slot.buffer.data[: self.header] = bytes(self.header)
                slot.buffer.data[self.header : end] = frame
                chains.append(([(slot.buffer.iova, end)], [], slot))
            self._post(over.tx, chains)
        self.wait(lambda: len(over.idle) >= slots, "transmission", timeout)

    def _pair(self, number: int) -> Pair:
        if not 0 <= number < len(self._pairs):
            raise ValueError(f"{self.name}: there is no queue pair {number}, the driver has {len(self._pairs)}")
        return self._pairs[number]

    def _post(self, index: int, chains: list[tuple[Segments, Segments, Pending]]) -> None:
        """Post chains of one descriptor each, of which there are never more than the ring has entries."""
        if (posted := self._submit(self.ring(index), chains)) < len(chains):
            raise MemoryError(f"{self.name}: queue {index} took {posted} of {len(chains)} chains: it holds others")

    # Receive -----------------------------------------------------------------------------------------------------------

    def receive(self, timeout: float | None = None, pair: int | None = None) -> bytes:
        """The next frame, of queue pair number *pair* (default: of any); TimeoutError when none comes."""
        pairs = self._pairs if pair is None else [self._pair(pair)]
        if not any(one.received for one in pairs):
            self.wait(lambda: any(one.received for one in pairs), "the arrival of a frame", timeout)
        return next(one for one in pairs if one.received).received.popleft()

    def receive_many(self, count: int, timeout: float | None = None, pair: int | None = None) -> list[bytes]:
        """*count* frames, or those that came within *timeout* seconds (default: the driver's) if these are fewer.

        In order of arrival within a queue pair; of several pairs, the lower one first.
        """
        pairs = self._pairs if pair is None else [self._pair(pair)]
        try:
            self.wait(lambda: sum(len(one.received) for one in pairs) >= count, f"the arrival of {count} frames", timeout)
        except TimeoutError:
            pass
        waiting = [one for one in pairs for _ in one.received]
        return [one.received.popleft() for one in waiting[:count]]

    def _replenish(self) -> None:
        for pair in self._pairs:
            empty, pair.empty = pair.empty, []
            if empty:
                self._post(pair.rx, [([], [(rx.buffer.iova, rx.buffer.size)], rx) for rx in empty])

    # Control ---------------------------------------------------------------------------------------------------------

    def set_mac(self, mac: str, timeout: float | None = None) -> None:
        """Give the device another address (virtio 1.2, 5.1.6.5.2). OSError: EOPNOTSUPP where it cannot, EIO when it refuses."""
        address = parse_mac(mac)
        if not self.features & F.CTRL_MAC_ADDR:
            raise OSError(errno.EOPNOTSUPP, f"{self.name}: CTRL_MAC_ADDR is not among the features agreed on")
        self._command(_SET_MAC, address, f"the address {mac}", timeout)
        self.mac = mac_text(address)

    def _command(self, command: bytes, value: bytes, what: str, timeout: float | None = None) -> None:
        _, (ack,) = self.transact(self._control, [command, value], [1], timeout)
        if ack != b"\0":
            raise OSError(errno.EIO, f"{self.name} refuses {what} (ack {ack[0]})")
