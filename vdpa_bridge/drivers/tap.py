# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A NIC as an interface of this system: frames go between the device and a tap, until somebody says stop.

Rule of this file: a frame lies in one buffer that device and kernel write and read themselves; here it is only passed on. Offloads
are agreed on with the device and asked of the tap alike, so that neither gets a frame that it would have to finish and cannot.
"""

from __future__ import annotations

import errno
import os
import select
from dataclasses import dataclass
from typing import Unpack

from ..device import Device
from ..tap import F_CSUM, Tap
from ..virtio.config import parse_mac
from ..virtio.features import NetFeature as F
from .base import LOOK, Options
from .net import WANTED, NetDriver, Pair
from .ring import drain

OFFLOADS = F.CSUM | F.GUEST_CSUM
"""Checksums that the receiver makes or need not look at. Frames longer than the MTU are not asked for."""
_BURST = 64
_GSO = 10
"""Bytes of the virtio_net_hdr that speak of offloads; num_buffers follows."""
_LOST = (errno.EIO, errno.EINVAL, errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM)
"""Why a frame that came is dropped: the interface is down, the frame is none, there is no room."""


@dataclass
class Tally:
    """Frames and bytes of one direction."""

    frames: int = 0
    bytes: int = 0
    dropped: int = 0

    def add(self, size: int) -> None:
        """One more, of *size* bytes."""
        self.frames += 1
        self.bytes += size


class _TapPair(Pair):
    """Frames that come go to the tap from where they lie."""

    _driver: TapDriver

    def came(self, done: list[tuple[int, int]]) -> None:
        driver = self._driver
        for slot, written in done:
            if written < driver.header:
                raise driver.headless(written)
            frame = self.data[slot][:written]
            if not driver.features & F.GUEST_CSUM:
                frame[:_GSO] = bytes(_GSO)
            try:
                os.write(driver.tap.fileno(), frame)
            except OSError as error:
                if error.errno not in _LOST:
                    raise driver.gone(error) from None
                driver.came.dropped += 1
            else:
                driver.came.add(written - driver.header)


class TapDriver(NetDriver):
    """A NIC behind *tap*, which gets its address and MTU. Borrows the tap."""

    pair_type = _TapPair

    def __init__(self, device: Device, tap: Tap, **options: Unpack[Options]) -> None:
        """See ``Driver``."""
        self.tap = tap
        self.sent, self.came = Tally(), Tally()
        self._too_long = bytearray(1)
        super().__init__(device, wanted=WANTED | OFFLOADS, **options)

    def _ready(self) -> None:
        super()._ready()
        for frame in self._pair(0).frames:
            frame[: self.header] = bytes(self.header)  # the tap leaves num_buffers as it is
        self.tap.set_header(self.header)
        self.tap.set_offload(F_CSUM if self.features & F.CSUM else 0)
        self.tap.set_identity(parse_mac(self.mac) if self.mac else b"", self.mtu)
        self.tap.set_carrier(self.link_up)

    def forward(self, stop: int) -> None:
        """Pass frames on until the descriptor *stop* is readable. DeviceBroken when the device gives up, OSError when the interface is gone."""
        poller = select.poll()
        calls = {self._config_call, *(ring.call for ring in self._rings.values())}
        for fd in (self.tap.fileno(), stop, *calls):
            poller.register(fd, select.POLLIN)
        wants = select.POLLIN
        slots = self._pair(0).outgoing
        while True:
            busy = self.poll()
            busy |= self._take()
            if not busy and self._arm():
                continue
            if wants != (now := select.POLLIN if slots.idle else 0):
                poller.modify(self.tap.fileno(), now)
                wants = now
            ready = {fd for fd, _ in poller.poll(0 if busy else LOOK * 1000)}
            if stop in ready:
                return
            for fd in ready & calls:
                drain(fd)
            if self._config_call in ready or not (ready or busy):
                self._status()
                self.tap.set_carrier(self.link_up)
            for ring in self._rings.values():
                ring.queue.disable_call()

    def _take(self) -> bool:
        """Give the device what the tap has, as much as there are buffers; False when that is nothing."""
        pair, tap = self._pair(0), self.tap.fileno()
        sizes: list[int] = []
        upcoming = pair.outgoing.upcoming(_BURST)
        while len(sizes) < len(upcoming):
            frame = pair.frames[upcoming[len(sizes)]]
            try:
                size = os.readv(tap, (frame, self._too_long))
            except BlockingIOError:
                break
            except OSError as error:
                raise self.gone(error) from None
            if size > len(frame):
                self.sent.dropped += 1
                continue
            sizes.append(size)
            self.sent.add(size - self.header)
        if not sizes:
            return False
        if (added := pair.outgoing.add(sizes)) < len(sizes):
            raise MemoryError(f"{self.name}: queue {pair.tx} took {added} of {len(sizes)} frames: it holds other chains")
        self._publish(pair.tx)
        return True

    def gone(self, error: OSError) -> OSError:
        """What *error* of the tap means."""
        return OSError(error.errno, f"tap {self.tap.name}: {error.strerror}: is the interface gone?")
