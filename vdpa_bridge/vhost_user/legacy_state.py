# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a legacy client has said about its rings, piece by piece; owner of the descriptors that came with it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..wire import VringAddr


def whole_base(num: int, packed: bool) -> int:
    """The base of a ring from a peer's SET_VRING_BASE or GET_VRING_BASE.

    DPDK 22.11 says of a packed ring the available half only, and means both: nothing is in flight when a ring stands.
    """
    if not packed:
        return num & 0xFFFF
    return num if num >> 16 else num << 16 | num


@dataclass
class ClientRing:
    """What the client has said about one ring; owns its descriptors."""

    num: int = 0
    base: int = 0
    addr: VringAddr | None = None
    kick: int = -1
    call: int = -1
    enabled: bool = False
    told: bool = False
    """Whether the client has said that it is enabled, or that it is not."""
    set_up: bool = False
    """The device knows this ring."""
    bound: bool = False
    """The device has a kick descriptor of it, from now or from before a reset, which takes none away (drivers/vhost/vdpa.c)."""

    def replace(self, which: str, fd: int) -> None:
        old = getattr(self, which)
        setattr(self, which, fd)
        if old >= 0:
            os.close(old)

    @property
    def ready(self) -> bool:
        return bool(self.num) and self.addr is not None and self.kick >= 0
