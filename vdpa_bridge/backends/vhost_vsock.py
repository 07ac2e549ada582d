# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A socket device in the kernel: /dev/vhost-vsock (drivers/vhost/vsock.c)."""

from __future__ import annotations

import errno
import struct
from collections.abc import Collection
from typing import ClassVar

from .. import _ioctl, ops
from ..errors import device_error
from ..virtio.features import VsockFeature
from ..virtio.ids import DeviceId
from ..wire import U32, U64
from .vhost_kernel import VhostKernel

VSOCK_SET_GUEST_CID = _ioctl.iow(0x60, U64.layout)
VSOCK_SET_RUNNING = _ioctl.iow(0x61, U32.layout)


class VhostVsock(VhostKernel):
    """A socket device: the kernel connects its driver with AF_VSOCK sockets of this machine, under a context id.

    The kernel serves receive and transmit queue, both or none. The event queue is for migration; nothing comes there.
    """

    traits = ("vhost-vsock",)
    node = "/dev/vhost-vsock"
    device_id = DeviceId.VSOCK
    how: ClassVar = {**VhostKernel.how, ops.SET_VRING_ENABLE: "the kernel serves receive and transmit ring, both or none"}
    own_features = VsockFeature.STREAM | VsockFeature.SEQPACKET

    def __init__(self, name: str, cid: int) -> None:
        self._cid = cid
        super().__init__(name)

    def _claim(self) -> None:
        try:
            self._tell(VSOCK_SET_GUEST_CID, U64(self._cid))
        except OSError as error:
            number, why = error.errno or errno.EIO, ""
            if number == errno.EADDRINUSE:
                number, why = errno.EBUSY, f"another device has context id {self._cid}"
            raise device_error(number, "open", self.name, why) from None

    def facts(self) -> dict[str, object]:
        """The node, and the context id."""
        return {**super().facts(), "cid": self._cid}

    def _config(self) -> bytes:
        return struct.pack("<Q", self._cid)

    def _queues(self) -> int:
        return 3

    def _wanted(self) -> set[int]:
        return wanted if len(wanted := super()._wanted()) == len(self.served) else set()

    def _let_run(self, rings: Collection[int], on: bool) -> None:
        self._tell(VSOCK_SET_RUNNING, U32(on))
