# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Slots as Python has them: what goes out and comes back, and what is refused. Their C has tests of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdpa_bridge.memory import Region
from vdpa_bridge.virtqueue import PERM_RW, DeviceQueue, DriverQueue, IovaMap, RingLayout, Slots
from vdpa_bridge.wire import Iova

NUM, STRIDE, COUNT = 8, 64, 6


@contextmanager
def ends(packed: bool, writable: bool) -> Iterator[tuple[Slots[str], DriverQueue[str], DeviceQueue]]:
    layout = RingLayout.contiguous(NUM, packed=packed)
    with Region(Iova(1 << 20), 1 << 16) as region:
        area, data = region.allocate(layout.size, 4096), region.allocate(STRIDE * COUNT)
        queue: DriverQueue[str] = DriverQueue(area.address, layout.size, area.iova, NUM, packed=packed)
        memory = IovaMap()
        memory.add(region.iova, region.size, region.mapping.address, PERM_RW)
        device = DeviceQueue(memory, NUM, queue.desc, queue.avail, queue.used, packed=packed)
        yield Slots(queue, data.address, data.iova, STRIDE, COUNT, writable=writable), queue, device


@given(packed=st.booleans(), skip=st.integers(0, 12), items=st.lists(st.binary(min_size=1, max_size=STRIDE - 12), max_size=3 * COUNT))
def test_copies_arrive(packed: bool, skip: int, items: list[bytes]) -> None:
    with ends(packed, False) as (slots, queue, device):
        first, got = 0, []
        while first < len(items):
            count = slots.copy(items, first, skip)
            assert count == min(COUNT, len(items) - first)
            first += count
            queue.publish()
            chains = device.pop_many()
            got += [chain.read() for chain in chains]
            device.push_many([(chain, 0) for chain in chains])
            assert slots.collect() == count
        assert got == [bytes(skip) + item for item in items]


@pytest.mark.parametrize("packed", [False, True])
def test_received_data_is_read_where_it_was_written(packed: bool) -> None:
    with ends(packed, True) as (slots, queue, device):
        for turn in range(20):
            assert slots.fill(STRIDE) == COUNT
            queue.publish()
            chains = device.pop_many()[::-1]
            device.push_many([(chain, chain.write(bytes([turn, at]) * 20)) for at, chain in enumerate(chains)])
            done = slots.reap()
            assert slots.read(done, 2) == [bytes([turn, at]) * 19 for at in range(COUNT)]
            assert sorted(slot for slot, _ in done) == list(range(COUNT))
            assert slots.upcoming(99) == [slot for slot, _ in done][::-1]


def test_chains_of_others_pass_through() -> None:
    with ends(False, False) as (slots, queue, device):
        queue.add_many([([(1 << 20, 16)], [], "other")])
        slots.add([1, 2])
        queue.publish()
        device.push_many([(chain, 0) for chain in device.pop_many()])
        assert slots.collect() == 3
        assert slots.take_others() == [("other", 0)]
        assert slots.take_others() == []
        assert slots.idle == COUNT


def test_what_is_refused() -> None:
    with ends(False, True) as (slots, queue, _):
        for stride, count in ((0, 1), (1, 0), (1, 32769)):
            with pytest.raises(ValueError, match=f"{count} slots of {stride} bytes"):
                Slots(queue, 4096, 4096, stride, count)
        for length in (0, STRIDE + 1, -1):
            with pytest.raises(ValueError, match=f"{length} bytes in a slot of 64"):
                slots.add([length])
        with pytest.raises(ValueError, match="65 bytes in a slot"):
            slots.copy([b"x" * 64], 0, 1)
        for done, skip in (([(COUNT, 1)], 0), ([(0, 1)], 2), ([(0, STRIDE + 1)], 0)):
            with pytest.raises(ValueError, match=r"slot \d with \d+ bytes"):
                slots.read(done, skip)
        assert slots.idle == COUNT


def test_a_broken_queue_says_so() -> None:
    with Region(Iova(1 << 20), 4096) as region:
        area = region.allocate(4096, 4096)
        queue: DriverQueue[str] = DriverQueue(area.address, area.size, area.iova, NUM)
        slots: Slots[str] = Slots(queue, area.address + 2048, area.iova + 2048, STRIDE, COUNT, writable=True)
        slots.fill(STRIDE)
        queue.publish()
        area.data[queue.used - area.iova + 2] = COUNT + 1  # used->idx: more than it was given
        for call in (slots.reap, slots.collect):
            with pytest.raises(OSError, match="virtqueue is broken"):
                call()
        assert slots.fill(STRIDE) == 0
