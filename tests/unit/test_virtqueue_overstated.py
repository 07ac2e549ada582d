# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rings of devices that count more bytes written than they were given room for: forgiven where that was asked for, nowhere else."""

from __future__ import annotations

import errno
import struct

import pytest

from vdpa_bridge.memory import Region
from vdpa_bridge.virtqueue import PACKED_BEGIN, DriverQueue, RingLayout
from vdpa_bridge.wire import Iova

BASE, DATA = 0x100000, 0x180000
AVAIL, USED, WRITE = 1 << 7, 1 << 15, 1 << 1


@pytest.mark.parametrize("flags", [AVAIL | USED, AVAIL | USED | WRITE])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("room", [0, 4])
def test_claims(packed: bool, flags: int, room: int) -> None:
    layout = RingLayout.contiguous(16, 0, packed)
    for overstated in (True, False):
        with Region(Iova(BASE), -(-layout.size // 4096) * 4096) as region:
            area = region.allocate(region.size, 4096)
            queue: DriverQueue[str] = DriverQueue(
                area.address, area.size, area.iova, 16, base=PACKED_BEGIN if packed else 0, owner=region, packed=packed, overstated=overstated
            )
            assert queue.add_many([([(DATA, 8)], [(DATA + 8, room)] * bool(room), "mine")]) == 1
            queue.publish()
            if packed:
                struct.pack_into("<QIHH", area.data, 0, 0, 100, 0, flags)
            else:
                struct.pack_into("<II", area.data, layout.used + 4, 0, 100)
                struct.pack_into("<H", area.data, layout.used + 2, 1)
            if overstated:
                assert queue.reap() == [("mine", room)]
                assert queue.broken is None
            elif packed and not flags & WRITE:
                assert queue.reap() == [("mine", 0)], "a length that says nothing"
            else:
                with pytest.raises(OSError, match="more than are writable") as broken:
                    queue.reap()
                assert broken.value.errno == errno.EPROTO
            del queue
