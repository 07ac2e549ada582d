# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A tap of this system as the other end: packets pass with their headers, and what these leave to be done the kernel does.

Rules of this file: the kernel leaves to the driver what the driver accepted, no more. Nothing is asked of the tap while a
driver is told that its device is ready: such requests take the RTNL, which Linux's own virtio-net driver holds meanwhile, when
the device is one of this kernel's by VDUSE.
"""

from __future__ import annotations

import errno
import os

from ..tap import CONTROLS, F_CSUM, F_TSO4, F_TSO6, F_TSO_ECN, F_UFO, F_USO4, F_USO6, Tap
from ..virtio.features import NetFeature as F
from .base import BATCH, HEADER, LONGEST, SHORTEST, Netdev

_LEFT = (
    (F.GUEST_CSUM, F_CSUM),
    (F.GUEST_TSO4, F_TSO4),
    (F.GUEST_TSO6, F_TSO6),
    (F.GUEST_ECN, F_TSO_ECN),
    (F.GUEST_UFO, F_UFO),
    (F.GUEST_USO4, F_USO4),
    (F.GUEST_USO6, F_USO6),
)
"""What a driver accepts, and what a tap then leaves to it."""
_ALWAYS = F.CSUM | F.GUEST_CSUM | F.CTRL_GUEST_OFFLOADS
_USO = F_USO4 | F_USO6
_PROBED = (
    (F_TSO4 | F_TSO6 | F_TSO_ECN, F.HOST_TSO4 | F.HOST_TSO6 | F.HOST_ECN | F.GUEST_TSO4 | F.GUEST_TSO6 | F.GUEST_ECN),
    (F_UFO, F.HOST_UFO | F.GUEST_UFO),
    (_USO, F.HOST_USO | F.GUEST_USO4 | F.GUEST_USO6),
)
"""What a kernel that knows one knows of the other (UFO, USO: not all do)."""
_GONE = (errno.EBADFD, errno.EBADF, errno.ENODEV)


class TapNetdev(Netdev):
    """The interface *name*, with a queue for each pair. One that is made here is brought up and goes with this object."""

    native = True

    def __init__(self, name: str, queues: int = 1, mtu: int = 0) -> None:
        """*mtu* is given to an interface that is made here. OSError with what to type, ValueError for what is no name."""
        super().__init__()
        self.controls = CONTROLS
        self.queues = queues
        self._tap = Tap(name, queues)
        try:
            self._attached = [True] * queues
            self._wanted = self._given = 0
            self._tap.set_header(HEADER)
            self.offloads = int(_ALWAYS)
            for flags, features in _PROBED:
                if self._tap.knows(F_CSUM | flags):
                    self.offloads |= int(features)
            if self._tap.made:
                self._tap.set_identity(b"", mtu or self._tap.mtu)
                self._tap.set_up()
            self.mtu = self._tap.mtu
            self.stop()
        except BaseException:
            self._tap.close()
            raise

    def __str__(self) -> str:
        return f"tap {self._tap.name}"

    def start(self, features: int) -> None:
        """The tap hears of it with the next look for packets, and leaves less until then.

        What a driver accepted without what it depends on is left out, as the kernel knows no such thing (virtio 1.2, 5.1.3.1).
        """
        flags = sum(flag for feature, flag in _LEFT if features & feature)
        if not flags & (F_TSO4 | F_TSO6):
            flags &= ~F_TSO_ECN
        if flags & _USO != _USO:
            flags &= ~_USO
        self._wanted = flags if flags & F_CSUM else 0

    @property
    def settled(self) -> bool:
        """Whether the tap knows what to leave to the driver."""
        return self._given == self._wanted or not self.link

    def settle(self) -> None:
        """Have the kernel leave what is wanted to the driver."""
        if self.link and self._given != self._wanted:
            try:
                self._tap.set_offload(self._wanted)
            except OSError as error:
                self._went(error)
            else:
                self._given = self._wanted

    def failed(self, error: OSError) -> None:
        """It may have said that the interface is gone."""
        (self._went if error.errno in _GONE else self._lose)(error)

    def watched(self, queue: int) -> int:
        """None, once the interface is gone or for a queue that is not used: polling them would not wait."""
        return self._tap.fileno(queue) if self.link and self._attached[queue] else -1

    def use(self, queue: int, on: bool) -> None:
        """A queue that is not used leaves, so that the kernel puts no frames there; a single one stays."""
        if self.queues == 1 or on == self._attached[queue] or not self.link:
            return
        if not on:
            self.leaving(self._tap.fileno(queue))
            self._held.pop(queue, None)
        try:
            self._tap.attach(queue, on)
        except OSError as error:
            self._went(error)
        else:
            self._attached[queue] = on

    def receive(self, queue: int) -> list[bytes]:
        """One read each."""
        self.settle()
        packets: list[bytes] = []
        fd = self.watched(queue)
        while fd >= 0 and len(packets) < BATCH:
            try:
                packet = os.read(fd, HEADER + LONGEST + 1)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in _GONE:
                    self._went(error)
                break  # EIO: the interface is down
            if HEADER + SHORTEST <= len(packet) <= HEADER + LONGEST:
                packets.append(packet)
        return packets

    def _form(self, packet: bytes) -> bytes:
        return packet

    def _put(self, queue: int, packet: bytes) -> int:
        if not self.link or not self._attached[queue]:
            raise OSError(errno.ENETDOWN, "the interface is gone, or its queue is not used")
        try:
            return os.write(self._tap.fileno(queue), packet)
        except OSError as error:
            if error.errno in _GONE:
                self._went(error)
            raise

    def _went(self, error: OSError) -> None:
        """Somebody removed the interface: nothing passes any more."""
        for queue in range(self.queues):
            self.leaving(self._tap.fileno(queue))
        self.link = False
        self._lose(OSError(error.errno, f"{error.strerror}: is the interface gone?"))

    def set_link(self, up: bool) -> None:
        """As the interface's carrier."""
        if self.link:
            try:
                self._tap.set_carrier(up)
            except OSError as error:
                self._went(error)

    def stop(self) -> None:
        """The next driver may accept less; one queue stays, as the interface needs one."""
        super().stop()
        for queue in range(1, self.queues):
            self.use(queue, False)
        self._wanted = 0
        self.settle()

    def close(self) -> None:
        """Detach."""
        self._tap.close()
