# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a legacy client has said, piece by piece: its memory and its rings. Owners of the descriptors that came with it."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

from ..memory import PAGE, SharedMapping
from ..wire import RO, IotlbUpdate, Iova, VringAddr
from .messages import MemoryRegion


def whole_base(num: int, packed: bool) -> int:
    """The base of a ring from a peer's SET_VRING_BASE or GET_VRING_BASE.

    DPDK 22.11 says of a packed ring the available half only, and means both: nothing is in flight when a ring stands.
    """
    if not packed:
        return num & 0xFFFF
    return num if num >> 16 else num << 16 | num


@dataclass(eq=False)
class ClientRegion:
    """A piece of the client's memory; owns its descriptor."""

    region: MemoryRegion
    fd: int

    @property
    def update(self) -> IotlbUpdate:
        """The mapping, widened to whole pages."""
        head = self.region.guest_addr % PAGE
        size = -(-(head + self.region.size) // PAGE) * PAGE
        return IotlbUpdate(Iova(self.region.guest_addr - head), size, self.fd, self.region.mmap_offset - head)


    def holds(self, address: int) -> bool:
        """Whether *address*, as the client sees it, lies in here."""
        return self.region.user_addr <= address < self.region.user_addr + self.region.size

    def read_u16(self, address: int) -> int:
        """The two bytes at *address*, as the client sees it."""
        update = self.update
        at = address - self.region.user_addr + self.region.guest_addr - update.iova
        page = at // PAGE * PAGE
        mapping = SharedMapping(self.fd, PAGE, update.offset + page, RO)
        try:
            return ctypes.c_uint16.from_address(mapping.address + at - page).value
        finally:
            mapping.close()


@dataclass
class ClientRing:
    """What the client has said about one ring; owns its descriptors."""

    num: int = 0
    base: int = 0
    addr: VringAddr | None = None
    kick: int = -1
    call: int = -1
    enabled: bool = False
    set_up: bool = False
    """The device knows this ring."""

    def replace(self, which: str, fd: int) -> None:
        old = getattr(self, which)
        setattr(self, which, fd)
        if old >= 0:
            os.close(old)

    @property
    def ready(self) -> bool:
        return bool(self.num) and self.addr is not None and self.kick >= 0
