# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The memory of a legacy client: its regions, where an address of its lies, what differs between two of its tables.

Rule of this file: guest addresses are the IOVAs; user addresses are the client's own and only looked up. A region is
mapped by whole pages. Each descriptor is owned by its region and closed once.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass

from .. import ops
from ..memory import PAGE, SharedMapping
from ..ops import Call
from ..wire import RO, IotlbInvalidate, IotlbUpdate, Iova, VringAddr
from .messages import MemoryRegion


@dataclass(eq=False)
class ClientRegion:
    """A piece of the client's memory; owns its descriptor."""

    region: MemoryRegion
    fd: int
    times: int = 1
    """How often the client added it: QEMU 7.2 adds and removes all regions once for each queue pair."""

    @property
    def update(self) -> IotlbUpdate:
        """The mapping, widened to whole pages."""
        head = self.region.guest_addr % PAGE
        size = -(-(head + self.region.size) // PAGE) * PAGE
        return IotlbUpdate(Iova(self.region.guest_addr - head), size, self.fd, self.region.mmap_offset - head)

    @property
    def there(self) -> Call:
        """The request that maps it."""
        return ops.IOTLB_UPDATE, self.update

    @property
    def gone(self) -> Call:
        """The request that takes it away."""
        update = self.update
        return ops.IOTLB_INVALIDATE, IotlbInvalidate(update.iova, update.size)

    def holds(self, address: int) -> bool:
        """Whether *address*, as the client sees it, lies in here."""
        return self.region.user_addr <= address < self.region.user_addr + self.region.size

    def overlaps(self, other: ClientRegion) -> bool:
        """Whether the two share IOVAs."""
        mine, its = self.update, other.update
        return mine.iova < its.iova + its.size and its.iova < mine.iova + mine.size

    def same(self, region: MemoryRegion, fd: int) -> bool:
        """Whether it is the same piece of the same file, wherever the descriptors come from."""
        return self.region == region and os.path.sameopenfile(self.fd, fd)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.fd)


class ClientMemory:
    """All regions of one client; owns them."""

    def __init__(self) -> None:
        self.regions: list[ClientRegion] = []

    def checked(self, region: MemoryRegion, fd: int, gpa_addresses: bool) -> ClientRegion:
        """A region that fits to the others; ValueError when it does not. *gpa_addresses*: user addresses are guest addresses."""
        r = region
        if not r.size or max(r.guest_addr, r.user_addr, r.mmap_offset) + r.size > 1 << 64:
            raise ValueError(f"region of {r.size:#x} bytes at {r.guest_addr:#x} is empty or wraps around")
        if gpa_addresses and r.user_addr != r.guest_addr:
            raise ValueError(f"GPA_ADDRESSES is accepted, but the region at {r.guest_addr:#x} has user address {r.user_addr:#x}")
        if r.guest_addr % PAGE != r.mmap_offset % PAGE:
            raise ValueError(f"region at {r.guest_addr:#x} from offset {r.mmap_offset:#x} cannot be mapped by pages")
        for held in self.regions:
            o = held.region
            if o.user_addr < r.user_addr + r.size and r.user_addr < o.user_addr + o.size:
                raise ValueError(f"user addresses of the region at {r.user_addr:#x} overlap those of the one at {o.user_addr:#x}")
        return ClientRegion(region, fd)

    def again(self, region: MemoryRegion, fd: int) -> bool:
        """Whether exactly this is there already; then it has to be removed once more."""
        for held in self.regions:
            if held.same(region, fd):
                held.times += 1
                return True
        return False

    def renew(self, table: Sequence[MemoryRegion], fds: list[int], gpa_addresses: bool) -> tuple[list[ClientRegion], list[ClientRegion]]:
        """Take a whole table over, and *fds* in any case. Returns the regions that are gone, which are now the caller's, and
        those that are new; what stays where it was is neither."""
        old, self.regions = self.regions, []
        fresh: list[ClientRegion] = []
        try:
            for region in table:
                new = self.checked(region, fds[0], gpa_addresses)
                del fds[0]
                self.regions.append(new)
                if (same := next((held for held in old if held.same(region, new.fd)), None)) is not None:
                    self.regions[-1] = same
                    same.times = 1
                    old.remove(same)
                    new.close()
                else:
                    fresh.append(new)
        except BaseException:
            for held in old:
                held.close()
            for fd in fds:
                os.close(fd)
            raise
        return old, fresh

    def find(self, address: int) -> ClientRegion | None:
        """The region with the client's *address* in it."""
        for held in self.regions:
            if held.holds(address):
                return held
        return None

    def holder(self, address: int, what: str) -> ClientRegion:
        """The same; EFAULT."""
        if (held := self.find(address)) is None:
            raise OSError(errno.EFAULT, f"{what} ring address {address:#x} lies in no memory region")
        return held

    def same(self, region: MemoryRegion) -> ClientRegion:
        """The one that a client means by *region* when it takes it away; ValueError."""
        for held in self.regions:
            r = held.region
            if (r.guest_addr, r.size, r.user_addr) == (region.guest_addr, region.size, region.user_addr):
                return held
        raise ValueError(f"there is no region of {region.size:#x} bytes at {region.guest_addr:#x}")

    def iova(self, address: int, what: str) -> Iova:
        """The client's user address as an IOVA; EFAULT."""
        region = self.holder(address, what).region
        return Iova(address - region.user_addr + region.guest_addr)

    def ring(self, index: int, addr: VringAddr) -> VringAddr:
        """The places of a ring as the device is told; EFAULT."""
        return VringAddr(index, 0, self.iova(addr.desc, "descriptors"), self.iova(addr.used, "used"), self.iova(addr.avail, "avail"), 0)

    def used_index(self, addr: VringAddr) -> int:
        """``used.idx`` of a split ring, from the client's memory; EFAULT."""
        at = addr.used + 2
        held = self.holder(at, "used")
        update = held.update
        offset = at - held.region.user_addr + held.region.guest_addr - update.iova
        page = offset // PAGE * PAGE
        mapping = SharedMapping(held.fd, PAGE, update.offset + page, RO)
        try:
            return ctypes.c_uint16.from_address(mapping.address + offset - page).value
        finally:
            mapping.close()

    def close(self) -> None:
        """Give all descriptors back."""
        for region in self.regions:
            region.close()
        self.regions.clear()
