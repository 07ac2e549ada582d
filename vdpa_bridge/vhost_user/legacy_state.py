# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a legacy client has said, piece by piece: its memory and its rings. Owners of the descriptors that came with it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..memory import PAGE
from ..wire import IotlbUpdate, Iova, VringAddr
from .messages import MemoryRegion


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
