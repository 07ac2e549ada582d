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
from ..virtio.config import Value, mac_text, parse_config, parse_mac
from ..virtio.features import NetFeature as F
from ..virtio.features import feature_names
from ..virtio.ids import DeviceId
from .base import Driver, Options
from .pool import LINE, Pool

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


class Pair:
    """The buffers and frames of one queue pair."""

    def __init__(self, driver: NetDriver, number: int) -> None:
        self._driver = driver
        self.rx, self.tx = 2 * number, 2 * number + 1
        self.received: deque[bytes] = deque()
        self._parts: list[bytes] = []
        self._missing = 0

    def fill(self, pool: Pool, depth: int, size: int) -> None:
        """Start anew: *depth* receive buffers, half as many transmit buffers, so that what loops back finds room."""
        self.received.clear()
        self._parts, self._missing = [], 0
        self._size, stride = size, -(-size // LINE) * LINE
        came, sent = pool.take(depth * stride), pool.take(depth // 2 * stride)
        self.data = [came.data[at : at + size] for at in range(0, came.size, stride)]
        """The receive buffers."""
        self.frames = [sent.data[at : at + size] for at in range(0, sent.size, stride)]
        """The transmit buffers."""
        self.incoming = self._driver.ring(self.rx).lend(came, stride, True, self._take)
        self.outgoing = self._driver.ring(self.tx).lend(sent, stride, False)

    def replenish(self) -> None:
        """Post the receive buffers that there are; those for which others leave no room come next time."""
        if self.incoming.idle and self.incoming.fill(self._size):
            self._driver._publish(self.rx)

    def _take(self) -> int:
        done = self.incoming.reap()
        if done:
            self.came(done)
        return len(done)

    def came(self, done: list[tuple[int, int]]) -> None:
        """Buffers came back, each with so many bytes written: frames, which go to those that wait to be asked for."""
        driver = self._driver
        if driver.features & F.MRG_RXBUF:
            frames = self._merge(done)
        else:
            if min(written for _, written in done) < driver.header:
                raise driver.headless(min(written for _, written in done))
            frames = self.incoming.read(done, driver.header)
        room = _BACKLOG - len(self.received)
        driver.dropped += max(len(frames) - room, 0)
        self.received.extend(frames[:room])

    def _merge(self, done: list[tuple[int, int]]) -> list[bytes]:
        """The frames that are complete, each in as many buffers as its header says (virtio 1.2, 5.1.6.4)."""
        driver, frames = self._driver, []
        most = driver.ring(self.rx).queue.num
        for slot, written in done:
            start = 0
            if not self._missing:
                if written < driver.header:
                    raise driver.headless(written)
                start = driver.header
                self._missing = int.from_bytes(self.data[slot][10:12], "little")
                if not 0 < self._missing <= most:
                    raise DeviceBroken(f"{driver.name}: a received frame in {self._missing} buffers of a ring of {most}")
            self._parts += self.incoming.read([(slot, written)], start)
            self._missing -= 1
            if not self._missing:
                frames.append(b"".join(self._parts))
                self._parts.clear()
        return frames


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
        self.pairs = [self.pair_type(self, number) for number in range(pairs)]
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
        depth = min(self._num, self._pool.free * 9 // 10 // len(self.pairs) // (-(-size // LINE) * LINE) * 2 // 3)
        if depth < 2:
            raise ValueError(f"{self.name}: a pool of {self._pool.free} bytes has no room for frames of {self.max_frame}")
        for pair in self.pairs:
            pair.fill(self._pool, depth, size)
        self._replenish()
        if len(self.pairs) > 1 and self.features & F.CTRL_VQ:
            self._command(_SET_PAIRS, len(self.pairs).to_bytes(2, "little"), f"{len(self.pairs)} queue pairs")

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
        waiting = list(frames)
        for frame in waiting:
            if not SHORTEST <= len(frame) <= self.max_frame:
                raise ValueError(f"a frame of {len(frame)} bytes; {self.name} takes {SHORTEST} to {self.max_frame} (MTU {self.mtu})")
        slots, posted = over.outgoing, 0
        before = slots.idle
        while posted < len(waiting):
            if not slots.idle:
                self.wait(lambda: bool(slots.idle), f"transmission of {len(waiting) - posted} frames", timeout)
            posted += self._copy(over, waiting, posted)
        self.wait(lambda: slots.idle >= before, "transmission", timeout)

    def _copy(self, over: Pair, frames: list[bytes], first: int) -> int:
        """Give the device frames from number *first* on, as many as there is room for; MemoryError when there is none."""
        copied = over.outgoing.copy(frames, first, self.header)
        if not copied:
            raise MemoryError(f"{self.name}: queue {over.tx} took none of {len(frames) - first} frames: it holds other chains")
        self._publish(over.tx)
        return copied

    def _pair(self, number: int) -> Pair:
        if not 0 <= number < len(self.pairs):
            raise ValueError(f"{self.name}: there is no queue pair {number}, the driver has {len(self.pairs)}")
        return self.pairs[number]

    # Receive -----------------------------------------------------------------------------------------------------------

    def receive(self, timeout: float | None = None, pair: int | None = None) -> bytes:
        """The next frame, of queue pair number *pair* (default: of any); TimeoutError when none comes."""
        pairs = self.pairs if pair is None else [self._pair(pair)]
        if not any(one.received for one in pairs):
            self.wait(lambda: any(one.received for one in pairs), "the arrival of a frame", timeout)
        return next(one for one in pairs if one.received).received.popleft()

    def receive_many(self, count: int, timeout: float | None = None, pair: int | None = None) -> list[bytes]:
        """*count* frames, or those that came within *timeout* seconds (default: the driver's) if these are fewer.

        In order of arrival within a queue pair; of several pairs, the lower one first.
        """
        pairs = self.pairs if pair is None else [self._pair(pair)]
        try:
            self.wait(lambda: sum(len(one.received) for one in pairs) >= count, f"the arrival of {count} frames", timeout)
        except TimeoutError:
            pass
        waiting = [one for one in pairs for _ in one.received]
        return [one.received.popleft() for one in waiting[:count]]

    def _replenish(self) -> None:
        for pair in self.pairs:
            pair.replenish()

    def headless(self, written: int) -> DeviceBroken:
        """What a buffer is without a whole header in it."""
        return DeviceBroken(f"{self.name}: a received buffer with {written} bytes, less than a virtio_net_hdr")

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
