# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Packed rings through the binding: both ends in one memfd, against a model, and a hostile side."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import random
import struct
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdpa_bridge.virtqueue import PERM_RO, PERM_RW, Chain, DeviceQueue, DriverQueue, IovaMap, RingLayout, ring_layout

SIZE = 1 << 20
RING = 0x10_0000
"""IOVA of the memfd; the ring is at its start."""
DATA_OFFSET = SIZE // 2
DATA = RING + DATA_OFFSET
START = 0x8000_8000
"""The base of a ring on which nothing happened: both places 0, both wrap counters 1."""
AVAIL, USED, NEXT, WRITE, INDIRECT = 1 << 7, 1 << 15, 1, 2, 4


class Pair:
    """A driver and a device on one packed ring in a memfd."""

    opened: ClassVar[list[mmap.mmap]] = []

    def __init__(self, num: int = 16, *, table_entries: int = 0, event_idx: bool = False, base: int | None = None) -> None:
        fd = os.memfd_create("packed")
        os.ftruncate(fd, SIZE)
        self.bytes = mmap.mmap(fd, SIZE)
        os.close(fd)
        self.opened.append(self.bytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))
        self.memory = IovaMap()
        self.memory.add(RING, SIZE, self.address, PERM_RW)
        self.layout = RingLayout.contiguous(num, table_entries, packed=True)
        self.driver: DriverQueue[object] = DriverQueue(
            self.address, DATA_OFFSET, RING, num, table_entries=table_entries, event_idx=event_idx, base=base, packed=True
        )
        self.device = self.device_from(base, event_idx=event_idx)

    def device_from(self, base: int | None, *, event_idx: bool = False) -> DeviceQueue:
        driver = self.driver
        return DeviceQueue(
            self.memory, driver.num, driver.desc, driver.avail, driver.used, base=base, event_idx=event_idx, packed=True
        )

    def post(self, readable: list[tuple[int, int]], writable: list[tuple[int, int]], token: object = None) -> Chain:
        assert self.driver.add_many([(readable, writable, token)]) == 1
        self.driver.publish()
        (chain,) = self.device.pop_many()
        return chain

    def desc(self, position: int) -> tuple[int, int, int, int]:
        """(address, length, id, flags) as they are in memory: virtio 1.2, 2.8.13."""
        return struct.unpack_from("<QIHH", self.bytes, 16 * position)

    def poke(self, position: int, address: int, length: int, number: int, flags: int) -> None:
        """What a hostile side does: plain stores anywhere in the ring."""
        struct.pack_into("<QIHH", self.bytes, 16 * position, address, length, number, flags)


@pytest.fixture(autouse=True)
def unmapped() -> Iterator[None]:
    """Memory that the queues of a test pointed to goes away with it, not before them."""
    yield
    gc.collect()
    while Pair.opened:
        Pair.opened.pop().close()


def test_layout_has_event_structures_for_areas() -> None:
    for num in (1, 3, 16, 256, 32768):
        desc, avail, used, tables, size = ring_layout(num, 2, packed=True)
        assert (desc, avail, size - tables) == (0, 16 * num, 32 * num)
        assert used >= avail + 4
        assert tables >= used + 4
        assert used % 64 == tables % 64 == 0
        layout = RingLayout.contiguous(num, 2, packed=True)
        assert (layout.packed, layout.avail, layout.used, layout.size) == (True, avail, used, size)
    assert RingLayout.contiguous(16).packed is False
    assert ring_layout(16) == ring_layout(16, 0, False) != ring_layout(16, 0, True)


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("table_entries", [0, 3])
@pytest.mark.parametrize("num", [16, 13])
def test_data_tokens_and_lengths_go_round(event_idx: bool, table_entries: int, num: int) -> None:
    pair = Pair(num, event_idx=event_idx, table_entries=table_entries)
    step = 1 if table_entries else 3
    place = 0
    for i in range(100):
        pair.memory.write(DATA, b"ping")
        assert pair.driver.add_many([([(DATA, 2), (DATA + 2, 2)], [(DATA + 64, 3)], ("token", i))]) == 1
        assert pair.driver.free == num - step
        assert pair.device.pop_many() == []
        assert pair.driver.publish() is True
        (chain,) = pair.device.pop_many()
        assert (chain.readable, chain.writable, chain.read()) == (4, 3, b"ping")
        assert chain.write(b"pong") == 3
        assert pair.device.in_flight == 1
        assert pair.device.push_many([(chain, 3)]) is True
        assert pair.driver.reap() == [(("token", i), 3)]
        assert pair.memory.read(DATA + 64, 3) == b"pon"
        assert pair.device.enable_kick() is False
        assert pair.driver.enable_call() is False
        place += step
        cursor = place % num | (0 if place // num % 2 else 0x8000)
        assert pair.device.used_idx == cursor
        assert pair.device.base == cursor << 16 | cursor
    assert (pair.driver.free, pair.driver.in_flight, pair.device.in_flight) == (num, 0, 0)
    assert pair.driver.broken is pair.device.broken is None


def test_a_batch_is_published_by_its_first_flags() -> None:
    pair = Pair()
    requests = [([(DATA, 1)], [], "a"), ([(DATA + 1, 2)], [(DATA + 8, 4)], "b")]
    assert pair.driver.add_many(requests) == 2
    assert pair.desc(0) == (DATA, 1, 0, 0)
    assert pair.desc(1) == (DATA + 1, 2, 1, AVAIL | NEXT)
    assert pair.desc(2) == (DATA + 8, 4, 1, AVAIL | WRITE)
    assert pair.device.pop_many() == []
    pair.driver.publish()
    assert pair.desc(0) == (DATA, 1, 0, AVAIL)
    first, second = pair.device.pop_many()
    assert (first.head, second.head) == (0, 1)
    assert pair.device.base == START | 3
    pair.device.push_many([(second, 4), (first, 0)])
    assert pair.desc(0) == (DATA, 4, 1, AVAIL | USED | WRITE)
    assert pair.desc(2) == (DATA + 8, 0, 0, AVAIL | USED)
    assert pair.driver.reap() == [("b", 4), ("a", 0)]


@pytest.mark.parametrize("event_idx", [False, True])
def test_notifications_are_asked_for_and_suppressed(event_idx: bool) -> None:
    pair = Pair(event_idx=event_idx)
    pair.device.disable_kick()
    assert pair.memory.read(pair.driver.used, 4) == b"\0\0\1\0"
    assert pair.driver.add_many([([(DATA, 1)], [], i) for i in range(3)]) == 3
    assert pair.driver.publish() is False
    assert pair.driver.publish() is False
    assert pair.device.enable_kick() is True
    pair.driver.disable_call()
    first, second, third = pair.device.pop_many()
    assert pair.device.push_many([(first, 0)]) is False
    assert pair.driver.enable_call() is True
    assert pair.device.push_many([(third, 0), (second, 0)]) is not event_idx  # its event lies behind: it was told
    assert len(pair.driver.reap(2)) == 2
    assert len(pair.driver.reap(2)) == 1
    assert pair.driver.enable_call() is False
    assert pair.memory.read(pair.driver.avail, 4) == (b"\3\x80\2\0" if event_idx else bytes(4))


@pytest.mark.parametrize("base", [START, 0x0005_0005, 0x800F_800F, 0x0000_0000])
def test_a_device_goes_on_where_one_stopped(base: int) -> None:
    pair = Pair(base=base)
    assert pair.device.base == base
    for i in range(40):
        chain = pair.post([(DATA, 1)], [(DATA, 1)], i)
        pair.device.push_many([(chain, 1)])
        pair.device = pair.device_from(pair.device.base)
        assert pair.driver.reap() == [(i, 1)]


def test_constructors_refuse_bad_rings() -> None:
    pair = Pair()
    memory, areas = pair.memory, (RING, RING + 0x1000, RING + 0x2000)
    for num in (0, 32769, -1):
        with pytest.raises(ValueError, match="up to 32768"):
            DeviceQueue(memory, num, *areas, packed=True)
        with pytest.raises(ValueError, match="up to 32768"):
            DriverQueue(pair.address, SIZE, RING, num, packed=True)
        with pytest.raises(ValueError, match="up to 32768"):
            ring_layout(num, packed=True)
    with pytest.raises(ValueError, match="power of 2"):
        DeviceQueue(memory, 6, *areas)
    for wrong in ((RING + 8, *areas[1:]), (RING, RING + 0x1002, RING + 0x2000), (RING, RING + 0x1000, RING + 0x2002)):
        with pytest.raises(ValueError, match="16, 4 and 4"):
            DeviceQueue(memory, 16, *wrong, packed=True)
    for base in (16, 0x8010_8000, 1 << 32, -1):
        with pytest.raises(ValueError, match="wrap counters"):
            DeviceQueue(memory, 16, *areas, base=base, packed=True)
        with pytest.raises(ValueError, match="wrap counters"):
            DriverQueue(pair.address, SIZE, RING, 16, base=base, packed=True)
    with pytest.raises(ValueError, match="in flight"):
        DriverQueue(pair.address, SIZE, RING, 16, base=0x8000_8001, packed=True)
    with pytest.raises(ValueError, match="16-bit"):
        DeviceQueue(memory, 16, *areas, base=START)
    memory.clear()
    memory.add(RING, SIZE, pair.address, PERM_RO)
    with pytest.raises(OSError, match="no longer mapped") as caught:
        DeviceQueue(memory, 16, *areas, packed=True)
    assert caught.value.errno == errno.EFAULT


_FAULTS: list[tuple[list[tuple[int, int, int, int]], str]] = [
    ([(DATA, 1, 16, AVAIL)], "outside the ring"),
    ([(DATA, 1, 0, AVAIL | NEXT), (DATA, 1, 0, 0)], "descriptor 1 was not made available"),
    ([(DATA, 1, 0, AVAIL | NEXT)] * 16, "loops, or is longer"),
    ([(0xDEAD, 1, 0, AVAIL)], "0xdead is not mapped"),
    ([(DATA, 1, 0, AVAIL | NEXT | WRITE), (DATA, 1, 0, AVAIL)], "after a writable one"),
    ([(DATA, 16, 0, AVAIL | NEXT | INDIRECT)], "has a next one"),
    ([(DATA, 17, 0, AVAIL | INDIRECT)], "ragged"),
    ([(0xBEEF_0000, 16, 0, AVAIL | INDIRECT)], "table at IOVA 0xbeef0000 is not mapped"),
]


@pytest.mark.parametrize(("ring", "text"), _FAULTS, ids=[text for _, text in _FAULTS])
def test_hostile_driver_breaks_only_its_queue(ring: list[tuple[int, int, int, int]], text: str) -> None:
    pair = Pair()
    for position, desc in enumerate(ring):
        pair.poke(position, *desc)
    calls: list[Callable[[], object]] = [pair.device.pop_many, pair.device.enable_kick, lambda: pair.device.push_many([])]
    for call in calls:
        with pytest.raises(OSError, match=text) as caught:
            call()
        assert caught.value.errno == errno.EPROTO
    pair.device.disable_kick()
    assert pair.device.broken is not None
    assert pair.device.in_flight == 0


def test_chains_before_a_fault_are_delivered() -> None:
    pair = Pair()
    good = pair.post([(DATA, 4)], [], 0)
    pair.poke(1, DATA, 1, 1, AVAIL)
    pair.poke(2, DATA, 1, good.head, AVAIL)
    (other,) = pair.device.pop_many()
    assert other.head == 1
    with pytest.raises(OSError, match="still in flight"):
        pair.device.pop_many()
    assert good.read() == bytes(4)
    with pytest.raises(OSError, match="still in flight"):
        pair.device.push_many([(good, 0)])


def test_a_used_length_without_write_counts_as_far_as_it_can_be_true() -> None:
    """QEMU leaves WRITE out of used descriptors; DPDK leaves an available descriptor's length in those without it."""
    pair = Pair()
    for place, (length, counted) in enumerate(((4, 4), (5, 0))):
        chain = pair.post([], [(DATA, 4)], "mine")
        pair.device.push_many([(chain, 0)])
        pair.poke(place, 0, length, 0, AVAIL | USED)
        assert pair.driver.reap() == [("mine", counted)]
    assert pair.driver.broken is None


@pytest.mark.parametrize(
    ("number", "length", "text"), [(1, 0, "no posted chain"), (16, 0, "outside the ring"), (0, 5, "more than are writable")]
)
def test_hostile_device_breaks_only_its_queue(number: int, length: int, text: str) -> None:
    pair = Pair()
    pair.post([], [(DATA, 4)], "mine")
    pair.poke(0, 0, length, number, AVAIL | USED | WRITE)
    for call in (pair.driver.reap, pair.driver.publish, pair.driver.enable_call, lambda: pair.driver.add_many([([(DATA, 1)], [], 0)])):
        with pytest.raises(OSError, match=text) as caught:
            call()
        assert caught.value.errno == errno.EPROTO
    pair.driver.disable_call()


def test_random_bytes_in_the_ring_never_crash() -> None:
    random_bytes = random.Random(4712)
    broken = 0
    for _ in range(300):
        pair = Pair(8, table_entries=4, event_idx=random_bytes.random() < 0.5)
        tokens = set()
        for token in range(30):
            try:
                if pair.driver.add_many([([(DATA, 16)], [(DATA + 64, 16), (DATA + 128, 8)], token)]):
                    tokens.add(token)
                pair.driver.publish()
                where = random_bytes.randrange(pair.layout.size)
                pair.bytes[where] = random_bytes.randrange(256)
                for chain in pair.device.pop_many():
                    chain.write(chain.read(0, 64))
                    pair.device.push_many([(chain, min(chain.writable, 24))])
                for done, written in pair.driver.reap():
                    assert written <= 24
                    assert isinstance(done, int)
                    tokens.remove(done)
            except OSError as error:
                broken += error.errno == errno.EPROTO
                assert pair.driver.broken or pair.device.broken
                break
    assert broken > 50


def test_memory_that_goes_away_breaks_the_queue() -> None:
    pair = Pair()
    chain = pair.post([(DATA, 1)], [(DATA + 1, 1)], 0)
    pair.memory.clear()
    with pytest.raises(OSError, match="no longer mapped") as caught:
        chain.read()
    assert caught.value.errno == errno.EFAULT
    with pytest.raises(OSError, match="no longer mapped") as caught:
        pair.device.push_many([(chain, 0)])
    assert caught.value.errno == errno.EPROTO
    assert pair.driver.reap() == []


_steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.integers(1, 40), max_size=3), st.lists(st.integers(1, 40), max_size=3)),
        st.tuples(st.just("publish")),
        st.tuples(st.just("pop"), st.integers(1, 5)),
        st.tuples(st.just("push"), st.lists(st.integers(0, 1 << 16), min_size=1, max_size=3)),
        st.tuples(st.just("reap"), st.integers(1, 5)),
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(
    steps=_steps,
    event_idx=st.booleans(),
    table_entries=st.sampled_from([0, 2, 6]),
    num=st.sampled_from([8, 7]),
    base=st.sampled_from([None, 0x0006_0006, 0x8005_8005]),
)
def test_any_sequence_keeps_data_tokens_and_places(
    steps: list[tuple],  # type: ignore[type-arg]
    event_idx: bool,
    table_entries: int,
    num: int,
    base: int | None,
) -> None:
    """A model of lists, with the two places counted in descriptors; the ring has to agree after every step."""
    pair = Pair(num, event_idx=event_idx, table_entries=table_entries, base=base)
    sent: dict[int, bytes] = {}
    entries: dict[int, int] = {}
    added: list[int] = []
    available: list[int] = []
    popped: list[tuple[int, Chain]] = []
    pushed: list[tuple[int, int]] = []
    taken = handed = 0

    def cursor(moved: int) -> int:
        start = START & 0xFFFF if base is None else base & 0xFFFF
        laps, position = divmod((start & 0x7FFF) + moved, num)
        return position | (start & 0x8000 ^ (laps % 2) << 15)

    for number, step in enumerate(steps):
        match step:
            case ("add", reads, writes) if reads or writes:
                start = number * 512
                readable = [(DATA + start + 64 * i, size) for i, size in enumerate(reads)]
                writable = [(DATA + start + 256 + 64 * i, size) for i, size in enumerate(writes)]
                sent[number] = b""
                for iova, size in readable:
                    part = bytes((number + i) % 256 for i in range(size))
                    pair.memory.write(iova, part)
                    sent[number] += part
                count = len(reads) + len(writes)
                entries[number] = 1 if 1 < count <= table_entries else count
                fits = entries[number] <= pair.driver.free
                assert pair.driver.add_many([(readable, writable, number)]) == fits
                added += [number] * fits
            case ("publish",):
                pair.driver.publish()
                available += added
                added = []
            case ("pop", limit):
                chains = pair.device.pop_many(limit)
                assert len(chains) == min(limit, len(available))
                for chain in chains:
                    token = available.pop(0)
                    assert chain.read() == sent[token]
                    popped.append((token, chain))
                    taken += entries[token]
            case ("push", picks):
                batch = []
                for pick in picks[: len(popped)]:
                    token, chain = popped.pop(pick % len(popped))
                    answer = bytes((token * 3 + i) % 256 for i in range(chain.writable))
                    assert chain.write(answer) == chain.writable
                    batch.append((chain, chain.writable))
                    pushed.append((token, chain.writable))
                    handed += entries[token]
                pair.device.push_many(batch)
            case ("reap", limit):
                expected, pushed = pushed[:limit], pushed[limit:]
                assert pair.driver.reap(limit) == expected
        assert pair.device.base == cursor(handed) << 16 | cursor(taken)
        waiting = [*added, *available, *(token for token, _ in popped), *(token for token, _ in pushed)]
        assert pair.driver.free == num - sum(entries[token] for token in waiting)
        assert pair.driver.in_flight == len(waiting)
        assert pair.device.in_flight == len(popped)
    assert pair.driver.broken is pair.device.broken is None
