# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A NIC in the kernel: /dev/vhost-net with a tap (drivers/vhost/net.c).

The kernel moves frames between rings and tap. What else a NIC says of itself comes from the tap's interface: whether it is
up, its MTU, which offloads it carries. There is no control queue, as nobody would do what is asked for there.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Collection

from .. import _ioctl
from ..flags import Feature
from ..tap import F_CSUM, F_TSO4, F_TSO6, F_TSO_ECN, Tap
from ..virtio.features import NetFeature as F
from ..virtio.ids import DeviceId
from ..wire import U64, Empty, VringFile
from .vhost_kernel import VhostKernel

OFFLOADS = F.CSUM | F.HOST_TSO4 | F.HOST_TSO6 | F.HOST_ECN | F.GUEST_CSUM | F.GUEST_TSO4 | F.GUEST_TSO6 | F.GUEST_ECN
"""What a virtio_net_hdr tells a tap, and a tap a driver: checksums and segments left to somebody else."""
_LEFT = {F.GUEST_CSUM: F_CSUM, F.GUEST_TSO4: F_TSO4, F.GUEST_TSO6: F_TSO6, F.GUEST_ECN: F_TSO_ECN}
NET_SET_BACKEND = _ioctl.iow(0x30, VringFile.layout)


class VhostNet(VhostKernel):
    """A NIC whose frames the kernel takes from a tap and gives to it."""

    traits = ("vhost-net",)
    node = "/dev/vhost-net"
    device_id = DeviceId.NET
    own_features = F.MRG_RXBUF

    def __init__(self, name: str, tap: str, mac: bytes | None = None) -> None:
        """*mac* is the address of the NIC; by default it is derived from the tap's, which it must not be."""
        self._tap = Tap(tap)
        super().__init__(name)
        try:
            self._mtu = self._tap.mtu
            first, *rest = self._tap.address
        except BaseException:
            self.close()
            raise
        self._mac = mac or bytes([(first ^ 0x08) & 0xFE | 0x02, *rest])

    def facts(self) -> dict[str, object]:
        """The node, and the tap."""
        return {**super().facts(), "tap": self._tap.name}

    def close(self) -> None:
        """The tap goes last."""
        super().close()
        self._tap.close()

    def _get_features(self, request: Empty) -> U64:
        return U64(self._kernel | F.MAC | F.MTU | F.STATUS | OFFLOADS)

    def _config(self) -> bytes:
        with contextlib.suppress(FileNotFoundError):  # a tap that is gone has no MTU
            self._mtu = self._tap.mtu
        return struct.pack("<6sHHH", self._mac, self._tap.up, 1, self._mtu)

    def _bring_up(self) -> None:
        left = sum(flag for feature, flag in _LEFT.items() if self._features & feature)
        if not left & F_CSUM:
            left = 0  # who makes no checksum cuts no segments (virtio 1.2, 5.1.3.1)
        elif not left & (F_TSO4 | F_TSO6):
            left = F_CSUM
        try:
            self._tap.set_offload(left)
            self._tap.set_header(12 if self._features & (Feature.VERSION_1 | F.MRG_RXBUF) else 10)
        except OSError as error:
            raise OSError(error.errno, f"tap {self._tap.name} takes no orders: is the interface gone?") from None
        super()._bring_up()

    def _let_run(self, rings: Collection[int], on: bool) -> None:
        for index in rings:
            self._tell(NET_SET_BACKEND, VringFile(index, self._tap.fileno() if on else -1))
