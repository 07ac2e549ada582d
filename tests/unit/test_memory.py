# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Shared memory, and the table of mappings against a table that is too simple to be wrong."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdpa_bridge.flags import BackendFeature as B
from vdpa_bridge.memory import MAX_MAPPINGS, PAGE, Doorbell, IotlbTable, Region, SharedMapping, as_seen
from vdpa_bridge.wire import RO, RW, IotlbBatchBegin, IotlbBatchEnd, IotlbInvalidate, IotlbUpdate, Iova

U64 = 1 << 64


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4 * PAGE)
    yield fd
    os.close(fd)


def at(mapping: SharedMapping, offset: int = 0) -> ctypes.c_ubyte:
    """A byte of a mapping."""
    return ctypes.c_ubyte.from_address(mapping.address + offset)


# Mappings --------------------------------------------------------------------------------------------------------------------------


def test_mapping_is_shared(memory: int) -> None:
    first, second = SharedMapping(memory, 4 * PAGE), SharedMapping(memory, PAGE, 2 * PAGE)
    at(second).value = 77
    assert at(first, 2 * PAGE).value == 77
    assert os.pread(memory, 1, 2 * PAGE) == b"M"
    for mapping in (first, second, first):
        mapping.close()


def test_read_only_mapping(memory: int) -> None:
    fd = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
    try:
        SharedMapping(fd, PAGE, perm=RO).close()
        with pytest.raises(OSError, match="mmap") as refused:
            SharedMapping(fd, PAGE, perm=RW)
        assert refused.value.errno == errno.EACCES
    finally:
        os.close(fd)


@pytest.mark.parametrize(("size", "offset"), [(5 * PAGE, 0), (PAGE, 4 * PAGE), (4 * PAGE, PAGE)])
def test_mapping_beyond_the_end(memory: int, size: int, offset: int) -> None:
    with pytest.raises(OSError, match="holds 0x4000 bytes") as refused:
        SharedMapping(memory, size, offset)
    assert refused.value.errno == errno.EINVAL


def test_mapping_survives_shrinking(memory: int) -> None:
    """SIGBUS would end the process: zero pages take the place of what went away."""
    mapping = SharedMapping(memory, 4 * PAGE)
    at(mapping, 3 * PAGE).value = 9
    assert not mapping.poisoned
    os.ftruncate(memory, PAGE)
    assert at(mapping, 3 * PAGE).value == 0
    assert mapping.poisoned
    mapping.close()
    assert not mapping.poisoned


# Regions ---------------------------------------------------------------------------------------------------------------------------


def test_region() -> None:
    with Region(Iova(0x10000), 5000) as region:
        assert region.size == 2 * PAGE
        first, second = region.allocate(10), region.allocate(100, 4096)
        assert (first.iova, second.iova) == (0x10000, 0x11000)
        assert second.address - first.address == PAGE
        second.data[:3] = b"abc"
        assert os.pread(region.fd, 3, PAGE) == b"abc"
        assert first.size == 10
        with pytest.raises(MemoryError, match="8192 bytes"):
            region.allocate(PAGE)
        update = region.update(RO, 1)
        assert update == IotlbUpdate(Iova(0x10000), 2 * PAGE, region.fd, 0, RO, 1)
    region.close()
    with pytest.raises(OSError):
        os.fstat(update.fd)


# The table -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"size": 0}, "size is 0"),
        ({"perm": 0}, "permission is 0"),
        ({"perm": 4}, "permission is 4"),
        ({"iova": 8}, "iova 0x8 is not a multiple"),
        ({"size": 100}, "size 0x64 is not a multiple"),
        ({"offset": 1}, "offset 0x1 is not a multiple"),
        ({"iova": U64 - PAGE, "size": 2 * PAGE}, "leaves the IOVA range"),
        ({"asid": 2}, "address space 2 does not exist, the device has 2"),
    ],
)
def test_reasons(change: dict[str, int], text: str) -> None:
    table: IotlbTable[None] = IotlbTable(2)
    with pytest.raises(OSError, match=text) as refused:
        table.add(IotlbUpdate(**({"iova": Iova(0), "size": PAGE, "fd": -1} | change)), None)  # type: ignore[arg-type]
    assert refused.value.errno == errno.EINVAL
    assert len(table) == 0


def test_range_of_the_device() -> None:
    table: IotlbTable[None] = IotlbTable(1, 0x10000, 0x1FFFF)
    for iova, fits in ((0xF000, False), (0x10000, True), (0x1F000, True), (0x20000, False)):
        if fits:
            table.add(IotlbUpdate(Iova(iova), PAGE, -1), None)
        else:
            with pytest.raises(OSError, match="IOVA range"):
                table.add(IotlbUpdate(Iova(iova), PAGE, -1), None)


def test_there_is_an_end() -> None:
    """A client cannot make us hold mappings without number."""
    table: IotlbTable[None] = IotlbTable()
    for number in range(MAX_MAPPINGS):
        table.add(IotlbUpdate(Iova(2 * number * PAGE), PAGE, -1), None)
    with pytest.raises(OSError, match=str(MAX_MAPPINGS)) as refused:
        table.add(IotlbUpdate(Iova(PAGE), PAGE, -1), None)
    assert refused.value.errno == errno.ENOSPC
    assert len(table.clear()) == MAX_MAPPINGS
    table.add(IotlbUpdate(Iova(PAGE), PAGE, -1), None)


def test_batch_belongs_to_one_address_space() -> None:
    table: IotlbTable[None] = IotlbTable(2)
    assert not table.end(IotlbBatchEnd(0))
    table.begin(IotlbBatchBegin(1))
    table.begin(IotlbBatchBegin(1))
    for wrong in (lambda: table.add(IotlbUpdate(Iova(0), PAGE, -1), None), lambda: table.begin(IotlbBatchBegin(0)), lambda: table.end(IotlbBatchEnd(0))):
        with pytest.raises(OSError, match="a batch is open for address space 1"):
            wrong()
    table.add(IotlbUpdate(Iova(0), PAGE, -1, asid=1), None)
    assert table.end(IotlbBatchEnd(1))
    assert not table.end(IotlbBatchEnd(1))
    assert (table.space(0), len(table.space(1))) == ([], 1)


def test_address_space_counts_once_acknowledged() -> None:
    message = IotlbInvalidate(Iova(0), PAGE, 3)
    assert as_seen(message, 0).asid == 0
    assert as_seen(message, B.IOTLB_BATCH | B.IOTLB_PERSIST).asid == 0
    assert as_seen(message, B.IOTLB_ASID) is message


class Naive:
    """One owner for each page: so simple that it must be right. Pages 0 to 31 of two address spaces."""

    def __init__(self) -> None:
        self.pages: dict[tuple[int, int], int] = {}
        self.next = 0

    def add(self, asid: int, first: int, count: int) -> int | None:
        """The number of the new mapping, or None when it overlaps."""
        wanted = [(asid, page) for page in range(first, first + count)]
        if any(page in self.pages for page in wanted):
            return None
        self.next += 1
        self.pages.update(dict.fromkeys(wanted, self.next))
        return self.next

    def remove(self, asid: int, first: int, count: int) -> set[int] | None:
        """The mappings taken away, or None when one would be cut."""
        inside = {owner for (space, page), owner in self.pages.items() if space == asid and first <= page < first + count}
        outside = {owner for (space, page), owner in self.pages.items() if not (space == asid and first <= page < first + count)}
        if inside & outside:
            return None
        self.pages = {page: owner for page, owner in self.pages.items() if owner not in inside}
        return inside


_steps = st.lists(st.tuples(st.booleans(), st.integers(0, 1), st.integers(0, 31), st.integers(1, 8)), max_size=60)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(_steps)
def test_table_against_the_naive_one(steps: list[tuple[bool, int, int, int]]) -> None:
    table: IotlbTable[int] = IotlbTable(2)
    naive = Naive()
    for adding, asid, first, count in steps:
        iova, size = Iova(first * PAGE), count * PAGE
        if adding:
            number = naive.add(asid, first, count)
            update = IotlbUpdate(iova, size, -1, asid=asid)
            if number is None:
                with pytest.raises(OSError) as refused:
                    table.add(update, -1)
                assert refused.value.errno == errno.EEXIST
            else:
                entry = table.add(update, number)
                assert (entry.iova, entry.last, entry.asid) == (iova, iova + size - 1, asid)
        else:
            gone = naive.remove(asid, first, count)
            request = IotlbInvalidate(iova, size, asid)
            if gone is None:
                for refusing in (table.inside, table.remove):
                    with pytest.raises(OSError) as refused:
                        refusing(request)
                    assert refused.value.errno == errno.EINVAL
            else:
                assert {entry.value for entry in table.inside(request)} == gone
                assert {entry.value for entry in table.remove(request)} == gone
        assert {entry.value for entry in table} == set(naive.pages.values())
        assert len(table) == len(set(naive.pages.values()))
        for space in (0, 1):
            iovas = [entry.iova for entry in table.space(space)]
            assert iovas == sorted(iovas)


def test_doorbell_stores_the_index_of_its_queue() -> None:
    """16 bits of it, at the start of the page that has the queue's number, each time it rings."""
    fd = os.memfd_create("doorbells", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 8 * PAGE)
        bell = Doorbell(fd, 5)
        for _ in range(2):
            os.pwrite(fd, b"\xee" * 8 * PAGE, 0)
            bell.ring()
            assert os.pread(fd, 8 * PAGE, 0) == b"\xee" * 5 * PAGE + b"\x05\0" + b"\xee" * (3 * PAGE - 2)
        bell.close()
        bell.close()
        with pytest.raises(ValueError, match="queue 5 is closed"):
            bell.ring()
        read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        with pytest.raises(PermissionError, match="doorbell page"):
            Doorbell(read_only, 0)
        os.close(read_only)
    finally:
        os.close(fd)
