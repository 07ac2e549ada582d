# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Where driver memory lies, and that none of it is given out twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdpa_bridge.drivers.pool import Pool, place
from vdpa_bridge.memory import Buffer, Region
from vdpa_bridge.wire import Iova, IovaRange

# Memory --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "last", "size", "iova"),
    [
        (0, (1 << 64) - 1, 1 << 20, 1 << 20),
        (0, 0xFFFFF, 0x1000, 0x1000),
        (0x2000, 0xFFFFF, 0x10000, 0x2000),
        (0x123456, 1 << 40, 0x1000, 0x124000),
        (0, 1 << 40, 0xFEE00000, 0xFEF00000),
        (0xFEE00000, 1 << 40, 0x1000, 0xFEF00000),
        (0xFEE00000, 0xFEF00FFF, 0x1000, 0xFEF00000),
        (1 << 32, 1 << 40, 0x1000, 1 << 32),
    ],
)
def test_place(first: int, last: int, size: int, iova: int) -> None:
    assert place(IovaRange(Iova(first), Iova(last)), size) == iova


@pytest.mark.parametrize(("first", "last"), [(0, 0x1FFE), (0, 0xFFF), (0xFEE00000, 0xFEEFFFFF), (0x1000, 0)])
def test_place_without_room(first: int, last: int) -> None:
    with pytest.raises(ValueError, match="no room for 0x1000 bytes"):
        place(IovaRange(Iova(first), Iova(last)), 0x1000)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5000), st.integers(0, 100)), max_size=60))
def test_pool_never_gives_a_byte_twice(steps: list[tuple[bool, int, int]]) -> None:
    with Region(Iova(0x10000), 32768) as region:
        pool = Pool(region.allocate(32768))
        out: list[Buffer] = []
        for take, size, pick in steps:
            if take:
                try:
                    buffer = pool.take(size)
                except MemoryError:
                    continue
                assert buffer.size == size == len(buffer.data)
                assert buffer.iova % 64 == 0
                assert buffer.iova - 0x10000 == buffer.address - region.mapping.address
                assert all(buffer.iova >= o.iova + o.size or buffer.iova + size <= o.iova for o in out)
                out.append(buffer)
            elif out:
                pool.give(out.pop(pick % len(out)))
        for buffer in out:
            pool.give(buffer)
        assert pool.free == 32768
        assert pool.take(32768).size == 32768
