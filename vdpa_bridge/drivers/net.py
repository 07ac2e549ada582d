# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A network driver (virtio 1.2, 5.1): Ethernet frames out and in, one queue pair.

Rule of this file: the receive queue is kept full, and frames that came in wait here until somebody asks. No offload is
asked for, so the virtio_net_hdr is all zeroes and frames are complete.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Unpack

from ..device import Device
from ..errors import DeviceBroken, FeatureError
from ..flags import Feature
from ..memory import Buffer
from ..virtio.config import Value, mac_text, parse_config, parse_mac
from ..virtio.features import NetFeature as F
from ..virtio.features import feature_names
from ..virtio.ids import DeviceId
from .base import Driver, Options, Pending, Segments

RX, TX, CTRL = 0, 1, 2
"""Queues of a device without MQ (virtio 1.2, 5.1.2)."""
WANTED = F.MAC | F.MTU | F.STATUS | F.CTRL_VQ | F.CTRL_MAC_ADDR

SHORTEST = 14
"""Bytes of a frame that is only a header."""
_VLAN = 4
_DEFAULT_MTU = 1500
_LINK_UP = 1
_SET_MAC = bytes((1, 1))
_BACKLOG = 65536
"""Frames that wait to be asked for; later ones are dropped and counted."""


class _Rx(Pending):
    """A receive buffer."""

    __slots__ = ("buffer", "driver")

    def __init__(self, driver: NetDriver, buffer: Buffer) -> None:
        super().__init__()
        self.driver, self.buffer = driver, buffer

    def complete(self, written: int) -> None:
        self.written = written
        self.driver._came(self)


class _Tx(Pending):
    """A transmit buffer, which is used again and again."""

    __slots__ = ("buffer", "driver")

    def __init__(self, driver: NetDriver, buffer: Buffer) -> None:
        super().__init__()
        self.driver, self.buffer = driver, buffer

    def complete(self, written: int) -> None:
        self.driver._idle.append(self)


class NetDriver(Driver):
    """A NIC. Frames are bytes from the destination address on, without a checksum."""

    device_id = DeviceId.NET
    table_entries = 4

    def __init__(self, device: Device, *, wanted: int = WANTED, isolate_cvq: bool = False, **options: Unpack[Options]) -> None:
        """See ``Driver``; the control queue is set up when the device has one. With *isolate_cvq* it is in an address space of its
        own, as a VMM has it that answers a guest's commands itself; FeatureError where the device cannot."""
        limits = device.identify()
        ctrl = limits.features & wanted & F.CTRL_VQ and limits.queues > CTRL
        if not ctrl:
            wanted &= ~(F.CTRL_VQ | F.CTRL_MAC_ADDR)
            if isolate_cvq:
                raise FeatureError(f"{device.name} has no control queue to isolate")
        self._received: deque[bytes] = deque()
        self._idle: list[_Tx] = []
        self._empty: list[_Rx] = []
        self._parts: list[bytes] = []
        self._missing = 0
        self.dropped = 0
        """Frames that came in while too many were waiting already."""
        queues: Sequence[int] = (RX, TX, CTRL) if ctrl else (RX, TX)
        if isolate_cvq:
            options["isolated"] = (CTRL,)
        super().__init__(device, wanted=wanted & ~F.MQ, queues=queues, **options)

    def _ready(self) -> None:
        """Receive buffers for the longest frame, half as many transmit buffers: so what loops back finds room."""
        self.header = 12 if self.features & (Feature.VERSION_1 | F.MRG_RXBUF) else 10
        self._merge = bool(self.features & F.MRG_RXBUF)
        config = self._config()
        mac, mtu = config.get("mac"), config.get("mtu", _DEFAULT_MTU)
        self.mac = str(mac) if mac is not None else ""
        """Our address; empty where the device names none."""
        self.mtu = int(mtu)
        """Bytes of payload that a frame may have."""
        self.max_frame = self.mtu + SHORTEST + _VLAN
        size = self.header + self.max_frame
        depth = min(self._num, self._pool.free * 9 // 10 // (-(-size // 64) * 64) * 2 // 3)
        if depth < 2:
            raise ValueError(f"{self.name}: a pool of {self._pool.free} bytes has no room for frames of {self.max_frame}")
        self._received.clear()
        self._parts, self._missing = [], 0
        self._empty = [_Rx(self, self._pool.take(size)) for _ in range(depth)]
        self._idle = [_Tx(self, self._pool.take(size)) for _ in range(depth // 2)]
        self._replenish()

    def _config(self) -> dict[str, Value]:
        size = self.device.identify().config_size
        return parse_config(DeviceId.NET, self.features, self.device.get_config(0, min(size, 12)) if size else b"")

    @property
    def link_up(self) -> bool:
        """Whether there is a link, as the device says now; always where it does not say (virtio 1.2, 5.1.4.2)."""
        return bool(int(self._config().get("status", _LINK_UP)) & _LINK_UP)

    @property
    def info(self) -> dict[str, object]:
        """Address, MTU, link and the names of the features agreed on."""
        names = feature_names(DeviceId.NET, self.features)
        return {"mac": self.mac, "mtu": self.mtu, "link_up": self.link_up, "features": names}

    # Send ------------------------------------------------------------------------------------------------------------

    def send(self, frame: bytes, timeout: float | None = None) -> None:
        """Send one frame; returns when the device has taken it."""
        self.send_many([frame], timeout)

    def send_many(self, frames: Iterable[bytes], timeout: float | None = None) -> None:
        """Send *frames*, many in flight; returns when the device has taken all.

        ValueError, before anything is sent, for a frame shorter than its header or longer than the MTU allows. TimeoutError when
        the device takes nothing for *timeout* seconds.
        """
        self._need_open()
        waiting = deque(frames)
        for frame in waiting:
            if not SHORTEST <= len(frame) <= self.max_frame:
                raise ValueError(f"a frame of {len(frame)} bytes; {self.name} takes {SHORTEST} to {self.max_frame} (MTU {self.mtu})")
        slots = len(self._idle)
        while waiting:
            if not self._idle:
                self.wait(lambda: bool(self._idle), f"transmission of {len(waiting)} frames", timeout)
            chains: list[tuple[Segments, Segments, Pending]] = []
            while waiting and self._idle:
                frame, slot = waiting.popleft(), self._idle.pop()
                end = self.header + len(frame)
                slot.buffer.data[: self.header] = bytes(self.header)
                slot.buffer.data[self.header : end] = frame
                chains.append(([(slot.buffer.iova, end)], [], slot))
            self._post(TX, chains)
        self.wait(lambda: len(self._idle) >= slots, "transmission", timeout)

    def _post(self, index: int, chains: list[tuple[Segments, Segments, Pending]]) -> None:
        """Post chains of one descriptor each, of which there are never more than the ring has entries."""
        if (posted := self._submit(self.ring(index), chains)) < len(chains):
            raise MemoryError(f"{self.name}: queue {index} took {posted} of {len(chains)} chains: it holds others")

    # Receive -----------------------------------------------------------------------------------------------------------

    def receive(self, timeout: float | None = None) -> bytes:
        """The next frame; TimeoutError when none comes."""
        if not self._received:
            self.wait(lambda: bool(self._received), "the arrival of a frame", timeout)
        return self._received.popleft()

    def receive_many(self, count: int, timeout: float | None = None) -> list[bytes]:
        """*count* frames, or those that came within *timeout* seconds (default: the driver's) if these are fewer."""
        try:
            self.wait(lambda: len(self._received) >= count, f"the arrival of {count} frames", timeout)
        except TimeoutError:
            pass
        return [self._received.popleft() for _ in range(min(count, len(self._received)))]

    def _came(self, rx: _Rx) -> None:
        """A buffer came back: a frame, or with MRG_RXBUF a part of one (virtio 1.2, 5.1.6.4)."""
        self._empty.append(rx)
        start = 0
        if not self._missing:
            if rx.written < self.header:
                raise DeviceBroken(f"{self.name}: a received buffer with {rx.written} bytes, less than a virtio_net_hdr")
            start, self._missing = self.header, 1
            if self._merge:
                self._missing = int.from_bytes(rx.buffer.data[10:12], "little")
                if not 0 < self._missing <= self._num:
                    raise DeviceBroken(f"{self.name}: a received frame in {self._missing} buffers of a ring of {self._num}")
        self._parts.append(bytes(rx.buffer.data[start : rx.written]))
        self._missing -= 1
        if not self._missing:
            if len(self._received) < _BACKLOG:
                self._received.append(b"".join(self._parts))
            else:
                self.dropped += 1
            self._parts.clear()

    def _replenish(self) -> None:
        empty, self._empty = self._empty, []
        if empty:
            self._post(RX, [([], [(rx.buffer.iova, rx.buffer.size)], rx) for rx in empty])

    # Control ---------------------------------------------------------------------------------------------------------

    def set_mac(self, mac: str, timeout: float | None = None) -> None:
        """Give the device another address (virtio 1.2, 5.1.6.5.2). OSError: EOPNOTSUPP where it cannot, EIO when it refuses."""
        address = parse_mac(mac)
        if not self.features & F.CTRL_MAC_ADDR:
            raise OSError(errno.EOPNOTSUPP, f"{self.name}: CTRL_MAC_ADDR is not among the features agreed on")
        _, (ack,) = self.transact(CTRL, [_SET_MAC, address], [1], timeout)
        if ack != b"\0":
            raise OSError(errno.EIO, f"{self.name} refuses the address {mac} (ack {ack[0]})")
        self.mac = mac_text(address)
