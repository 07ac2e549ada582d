# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The rings through their binding: a driver's and a device's queue in one memfd, honest ones and hostile ones."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import random
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdpa_bridge.virtqueue import (
    PERM_RO,
    PERM_RW,
    PERM_WO,
    Chain,
    DeviceQueue,
    DriverQueue,
    IovaMap,
    RingLayout,
    guard,
    poisoned,
    ring_layout,
    unguard,
)

SIZE = 1 << 20
RING = 0x10_0000
"""IOVA of the memfd; the ring is at its start."""
DATA_OFFSET = SIZE // 2
DATA = RING + DATA_OFFSET


class Shared:
    """A memfd mapped here and, as one region, in an IOVA map."""

    opened: ClassVar[weakref.WeakSet[Shared]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.fd = os.memfd_create("shared")
        os.ftruncate(self.fd, SIZE)
        self.bytes = mmap.mmap(self.fd, SIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))
        self.opened.add(self)

    def close(self) -> None:
        self.bytes.close()
        os.close(self.fd)

    def __del__(self) -> None:
        if not self.bytes.closed:
            self.close()


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Tracebacks that pytest keeps would hold the memory for longer than the test."""
    yield
    for shared in list(Shared.opened):
        if not shared.bytes.closed:
            shared.close()


class Pair:
    """A driver and a device on one ring."""

    def __init__(self, num: int = 16, *, table_entries: int = 0, event_idx: bool = False, base: int = 0) -> None:
        self.shared = Shared()
        self.memory = IovaMap()
        self.memory.add(RING, SIZE, self.shared.address, PERM_RW)
        self.layout = RingLayout.contiguous(num, table_entries)
        self.driver: DriverQueue[object] = DriverQueue(
            self.shared.address, DATA_OFFSET, RING, num, table_entries=table_entries, event_idx=event_idx, base=base, owner=self.shared
        )
        driver = self.driver
        self.device = DeviceQueue(self.memory, num, driver.desc, driver.avail, driver.used, base=base, event_idx=event_idx)

    def post(self, readable: list[tuple[int, int]], writable: list[tuple[int, int]], token: object = None) -> Chain:
        assert self.driver.add_many([(readable, writable, token)]) == 1
        self.driver.publish()
        (chain,) = self.device.pop_many()
        return chain

    def poke16(self, offset: int, *values: int) -> None:
        """What a hostile side does: plain stores anywhere in the ring."""
        for i, value in enumerate(values):
            self.shared.bytes[offset + 2 * i : offset + 2 * i + 2] = value.to_bytes(2, "little")


@pytest.fixture
def pair() -> Pair:
    return Pair()


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("table_entries", [0, 3])
def test_data_tokens_and_lengths_go_round(event_idx: bool, table_entries: int) -> None:
    pair = Pair(event_idx=event_idx, table_entries=table_entries, base=65530)
    data = pair.shared.bytes
    for i in range(100):
        data[DATA_OFFSET : DATA_OFFSET + 4] = b"ping"
        assert pair.driver.add_many([([(DATA, 2), (DATA + 2, 2)], [(DATA + 64, 3)], ("token", i))]) == 1
        assert pair.driver.free == 16 - (1 if table_entries else 3)
        assert pair.driver.publish() is True
        (chain,) = pair.device.pop_many()
        assert (chain.readable, chain.writable, chain.read()) == (4, 3, b"ping")
        assert chain.write(b"pong") == 3
        assert pair.device.in_flight == 1
        assert pair.device.push_many([(chain, 3)]) is True
        assert pair.driver.reap() == [(("token", i), 3)]
        assert data[DATA_OFFSET + 64 : DATA_OFFSET + 67] == b"pon"
        assert pair.device.enable_kick() is False
        assert pair.driver.enable_call() is False
    assert pair.device.base == pair.device.used_idx == (65530 + 100) % 65536
    assert (pair.driver.free, pair.driver.in_flight, pair.device.in_flight) == (16, 0, 0)
    assert pair.driver.broken is pair.device.broken is None


def test_notifications_are_asked_for_and_suppressed(pair: Pair) -> None:
    pair.device.disable_kick()
    assert pair.driver.add_many([([(DATA, 1)], [], i) for i in range(3)]) == 3
    assert pair.driver.publish() is False
    assert pair.driver.publish() is False
    assert pair.device.enable_kick() is True
    pair.driver.disable_call()
    first, second, third = pair.device.pop_many()
    assert pair.device.push_many([(first, 0)]) is False
    assert pair.driver.enable_call() is True
    assert pair.device.push_many([(third, 0), (second, 0)]) is True
    assert len(pair.driver.reap(2)) == 2
    assert len(pair.driver.reap(2)) == 1


def test_a_batch_stops_when_the_ring_is_full(pair: Pair) -> None:
    assert pair.driver.add_many([([(DATA, 1)], [(DATA, 1)], i) for i in range(20)]) == 8
    pair.driver.publish()
    assert len(pair.device.pop_many(5)) == 5
    assert len(pair.device.pop_many()) == 3


def test_chain_access(pair: Pair) -> None:
    pair.shared.bytes[DATA_OFFSET : DATA_OFFSET + 8] = b"abcdefgh"
    source = pair.post([(DATA, 3), (DATA + 3, 5)], [], 0)
    assert source.read(2, 3) == b"cde"
    assert source.read(6, 100) == b"gh"
    assert source.read(8) == source.read(1 << 60) == b""
    target = pair.post([(DATA, 1)], [(DATA + 100, 2), (DATA + 200, 4)], 0)
    assert target.copy_from(source, 1, 1) == 5
    assert target.copy_from(source, 0, 0, 1) == 1
    assert pair.shared.bytes[DATA_OFFSET + 100 : DATA_OFFSET + 102] == b"ab"
    assert pair.shared.bytes[DATA_OFFSET + 200 : DATA_OFFSET + 204] == b"cdef"
    assert target.zero(1, 2) == 2
    assert pair.shared.bytes[DATA_OFFSET + 100 : DATA_OFFSET + 102] == b"a\0"
    assert target.write(memoryview(b"xyz"), 4) == 2
    assert target.write(b"x", 6) == 0
    with pytest.raises(TypeError, match="pop_many"):
        Chain()
    with pytest.raises(ValueError, match="handed back"):
        Chain.__new__(Chain).read()  # type: ignore[call-overload]


def test_chain_file_io(pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    chain = pair.post([(DATA, 5), (DATA + 50, 5)], [(DATA + 1000, 10), (DATA + 2000, 20)], 0)
    with path.open("r+b") as file:
        assert chain.preadv(file.fileno(), 100, 1) == 29
        assert pair.memory.read(DATA + 1001, 9) == bytes(range(100, 109))
        assert pair.memory.read(DATA + 2000, 20) == bytes(range(109, 129))
        assert chain.preadv(file.fileno(), 195, 0, 30) == 5
        assert chain.preadv(file.fileno(), 200) == 0
        pair.memory.write(DATA, b"12345")
        assert chain.pwritev(file.fileno(), 300, 3, 4) == 4
    assert path.read_bytes()[300:] == b"45\0\0"
    with pytest.raises(OSError, match="Bad file") as caught:
        chain.preadv(-1, 0)
    assert caught.value.errno == errno.EBADF
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        assert chain.pwritev(left.fileno(), -1, 2) == 8
        assert chain.preadv(right.fileno(), -1, 4) == 8
        assert pair.memory.read(DATA + 1004, 3) == b"345"


def test_push_refuses_what_the_caller_got_wrong(pair: Pair) -> None:
    chain = pair.post([(DATA, 1)], [(DATA + 1, 4)], "a")
    other = Pair().post([(DATA, 1)], [(DATA, 8)], "b")
    for wrong in ([(chain, 0), (chain, 0)], [(chain, 5)], [(chain, -1)], [(chain, 0), (other, 0)]):
        with pytest.raises(ValueError, match=r"in flight|writable"):
            pair.device.push_many(wrong)
        assert pair.driver.reap() == []
    assert pair.device.push_many([(chain, 4)]) is True
    assert pair.driver.reap() == [("a", 4)]
    for access in (chain.read, chain.zero, lambda: chain.write(b"x"), lambda: other.copy_from(chain), lambda: chain.preadv(0, 0)):
        with pytest.raises(ValueError, match="handed back"):
            access()
    with pytest.raises(ValueError, match="in flight"):
        pair.device.push_many([(chain, 4)])


def test_constructors_refuse_bad_rings() -> None:
    shared, memory = Shared(), IovaMap()
    memory.add(RING, SIZE, shared.address, PERM_RW)
    for num in (0, 3, 65536, -1):
        with pytest.raises(ValueError, match="power of 2"):
            DeviceQueue(memory, num, RING, RING + 0x1000, RING + 0x2000)
        with pytest.raises(ValueError, match="power of 2"):
            DriverQueue(shared.address, SIZE, RING, num)
        with pytest.raises(ValueError, match="power of 2"):
            ring_layout(num)
    for areas in ((RING + 8, RING + 0x1000, RING + 0x2000), (RING, RING + 0x1001, RING + 0x2000), (RING, RING + 0x1000, RING + 0x2002)):
        with pytest.raises(ValueError, match="aligned"):
            DeviceQueue(memory, 16, *areas)
    with pytest.raises(ValueError, match="base"):
        DeviceQueue(memory, 16, RING, RING + 0x1000, RING + 0x2000, base=65536)
    with pytest.raises(OSError, match="no longer mapped") as caught:
        DeviceQueue(memory, 16, RING + SIZE - 16, RING + 0x1000, RING + 0x2000)
    assert caught.value.errno == errno.EFAULT
    with pytest.raises(ValueError, match="needs"):
        DriverQueue(shared.address, RingLayout.contiguous(16).size - 1, RING, 16)
    with pytest.raises(ValueError, match="aligned"):
        DriverQueue(shared.address + 8, SIZE - 8, RING, 16)
    driver: DriverQueue[int] = DriverQueue(shared.address, SIZE, RING, 4, table_entries=6)
    for buffers in ([], [(DATA, 0)], [(DATA, 1)] * 7, [(DATA, 1 << 32)]):
        with pytest.raises(ValueError, match=r"buffer"):
            driver.add_many([(buffers, [], 0)])
    with pytest.raises(OverflowError):
        driver.add_many([([(-1, 1)], [], 0)])


def test_iova_map() -> None:
    shared, memory = Shared(), IovaMap()
    memory.add(0x1000, 0x1000, shared.address, PERM_RO)
    memory.add(0x2000, 0x1000, shared.address + 0x5000, PERM_WO)
    assert memory.regions() == [(0x1000, 0x1000, shared.address, PERM_RO), (0x2000, 0x1000, shared.address + 0x5000, PERM_WO)]
    for iova, size, perm, number in ((0x1800, 1, 3, errno.EEXIST), (0x5000, 0, 3, 22), ((1 << 64) - 1, 2, 3, 22), (0x5000, 1, 4, 22)):
        with pytest.raises(OSError, match="map IOVA") as caught:
            memory.add(iova, size, shared.address, perm)
        assert caught.value.errno == number
    memory.write(0x2000, b"xyz")
    assert shared.bytes[0x5000:0x5003] == b"xyz"
    assert memory.read(0x1000, 0x1000) == bytes(0x1000)
    for access in (lambda: memory.read(0x1fff, 2), lambda: memory.write(0x1fff, b"ab"), lambda: memory.read(0, 1)):
        with pytest.raises(OSError, match="not mapped") as caught:
            access()
        assert caught.value.errno == errno.EFAULT
    assert memory.remove(0x1000, 0xfff) == 0
    assert memory.remove(0x1000, 0x1000) == 1
    with pytest.raises(OSError, match="unmap"):
        memory.remove(0, 0)
    memory.clear()
    assert len(memory) == 0


def test_chains_survive_a_change_of_the_map(pair: Pair) -> None:
    """A chain looks its buffers up again after a removal: same memory elsewhere is fine, no memory is EFAULT."""
    pair.memory.write(DATA, b"before")
    chain = pair.post([(DATA, 6)], [(DATA + 64, 6)], "t")
    moved = Shared()
    moved.bytes[:] = pair.shared.bytes
    moved.bytes[DATA_OFFSET : DATA_OFFSET + 6] = b"after!"
    pair.memory.remove(RING, SIZE)
    for access in (chain.read, chain.zero, lambda: chain.write(b"x"), lambda: chain.preadv(0, 0), lambda: chain.pwritev(0, 0)):
        with pytest.raises(OSError, match="no longer mapped") as caught:
            access()
        assert caught.value.errno == errno.EFAULT
    pair.memory.add(RING, SIZE, moved.address, PERM_RW)
    assert chain.read() == b"after!"
    assert pair.device.push_many([(chain, 0)]) is True
    assert pair.driver.reap() == []
    assert moved.bytes[pair.layout.used + 2] == 1
    pair.memory.clear()
    with pytest.raises(OSError, match="no longer mapped") as caught:
        pair.device.pop_many()
    assert caught.value.errno == errno.EPROTO
    assert pair.device.broken is not None


def test_a_change_of_the_map_waits_for_io(pair: Pair) -> None:
    chain = pair.post([], [(DATA, 4)], 0)
    reader, writer = os.pipe()
    result: list[int] = []
    thread = threading.Thread(target=lambda: result.append(chain.preadv(reader, -1)))
    thread.start()
    time.sleep(0.05)
    release = threading.Timer(0.3, os.write, (writer, b"late"))
    release.start()
    pair.memory.clear()
    thread.join(5)
    assert result == [4]
    assert pair.shared.bytes[DATA_OFFSET : DATA_OFFSET + 4] == b"late"
    release.join(5)
    os.close(reader)
    os.close(writer)


def test_hostile_driver_breaks_only_its_queue(pair: Pair) -> None:
    good = pair.post([(DATA, 4)], [], 0)
    pair.poke16(pair.layout.avail + 4 + 2, 0)  # the next entry names the chain that is in flight
    pair.poke16(pair.layout.avail + 2, 2)
    with pytest.raises(OSError, match="still in flight") as caught:
        pair.device.pop_many()
    assert caught.value.errno == errno.EPROTO
    assert pair.device.broken is not None
    assert "still in flight" in pair.device.broken
    assert good.read() == bytes(4)
    for call in (pair.device.pop_many, pair.device.enable_kick, lambda: pair.device.push_many([(good, 0)])):
        with pytest.raises(OSError, match="still in flight"):
            call()
    pair.device.disable_kick()


def test_chains_before_a_fault_are_delivered(pair: Pair) -> None:
    assert pair.driver.add_many([([(DATA, 1)], [], 0), ([(0xDEAD, 1)], [], 1)]) == 2
    pair.driver.publish()
    assert len(pair.device.pop_many()) == 1
    with pytest.raises(OSError, match="0xdead"):
        pair.device.pop_many()


@pytest.mark.parametrize(
    ("entry", "text"),
    [((1, 0, 0, 0), "no posted chain"), ((16, 0, 0, 0), "outside the ring"), ((0, 0, 5, 0), "more than are writable")],
)
def test_hostile_device_breaks_only_its_queue(pair: Pair, entry: tuple[int, ...], text: str) -> None:
    pair.post([], [(DATA, 4)], "mine")
    pair.poke16(pair.layout.used + 4, *entry)
    pair.poke16(pair.layout.used + 2, 1)
    for call in (pair.driver.reap, pair.driver.publish, pair.driver.enable_call, lambda: pair.driver.add_many([([(DATA, 1)], [], 0)])):
        with pytest.raises(OSError, match=text) as caught:
            call()
        assert caught.value.errno == errno.EPROTO
    pair.driver.disable_call()


def test_random_bytes_in_the_ring_never_crash() -> None:
    random_bytes = random.Random(4711)
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
                pair.shared.bytes[where] = random_bytes.randrange(256)
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
    assert broken > 100


def test_shrunken_memory_breaks_the_queue_not_the_process() -> None:
    """In a process of its own: without the guard this one would end by SIGBUS."""
    program = """
import os
from test_virtqueue import DATA, SIZE, Pair, guard, poisoned, unguard
pair = Pair()
guard(pair.shared.address, SIZE)
first = pair.post([(DATA, 4096)], [], "t")
assert not pair.memory.poisoned
os.ftruncate(pair.shared.fd, 0)
errors = []
for call in (first.read, pair.device.pop_many, pair.driver.publish):
    try:
        call()
    except OSError as error:
        errors.append(error.errno)
print(errors, poisoned(pair.shared.address), pair.memory.poisoned, pair.device.broken, pair.driver.broken, sep="|")
unguard(pair.shared.address)
"""
    path = os.pathsep.join((str(Path(__file__).parent), *sys.path))
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    truncated = "shared memory was truncated by its owner"
    assert done.stdout.strip() == f"[{errno.EFAULT}, {errno.EPROTO}, {errno.EPROTO}]|True|True|{truncated}|{truncated}"


def test_guard_refuses() -> None:
    shared = Shared()
    for address, size in ((shared.address + 1, 4096), (shared.address, 0)):
        with pytest.raises(ValueError, match="empty, or not page aligned"):
            guard(address, size)
    guard(shared.address, SIZE)
    with pytest.raises(ValueError, match="overlaps"):
        guard(shared.address + 4096, 4096)
    assert poisoned(shared.address) is False
    unguard(shared.address)
    for call in (unguard, poisoned):
        with pytest.raises(ValueError, match="no guarded mapping"):
            call(shared.address)


def test_tokens_and_owner_live_as_long_as_needed() -> None:
    class Token:
        pass

    pair, token = Pair(), Token()
    token_ref, owner_ref = weakref.ref(token), weakref.ref(pair.shared)
    chain = pair.post([(DATA, 1)], [], token)
    del token
    gc.collect()
    assert token_ref() is not None
    pair.device.push_many([(chain, 0)])
    pair.driver.reap()
    assert token_ref() is None
    driver = pair.driver
    del pair, chain
    gc.collect()
    assert owner_ref() is not None
    assert driver.in_flight == 0
    del driver
    gc.collect()
    assert owner_ref() is None


_steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.integers(1, 40), max_size=3), st.lists(st.integers(1, 40), max_size=3)),
        st.tuples(st.just("publish")),
        st.tuples(st.just("pop"), st.integers(1, 5)),
        st.tuples(st.just("push"), st.integers(0, 1 << 16)),
        st.tuples(st.just("reap"), st.integers(1, 5)),
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(steps=_steps, event_idx=st.booleans(), table_entries=st.sampled_from([0, 2, 6]), base=st.sampled_from([0, 65531]))
def test_any_sequence_keeps_data_and_tokens(steps: list[tuple], event_idx: bool, table_entries: int, base: int) -> None:  # type: ignore[type-arg]
    pair = Pair(8, event_idx=event_idx, table_entries=table_entries, base=base)
    sent: dict[int, bytes] = {}
    answers: dict[int, bytes] = {}
    added: list[int] = []
    available: list[int] = []
    popped: list[tuple[int, Chain]] = []
    pushed: list[int] = []
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
                added += [number] * pair.driver.add_many([(readable, writable, number)])
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
            case ("push", pick) if popped:
                token, chain = popped.pop(pick % len(popped))
                answers[token] = bytes((token * 3 + i) % 256 for i in range(chain.writable))
                assert chain.write(answers[token]) == chain.writable
                pair.device.push_many([(chain, chain.writable)])
                pushed.append(token)
            case ("reap", limit):
                for done, written in pair.driver.reap(limit):
                    oldest = pushed.pop(0)
                    assert (done, written) == (oldest, len(answers[oldest]))
    assert pair.device.in_flight == len(popped)
    assert pair.driver.in_flight == len(added) + len(available) + len(popped) + len(pushed)
    assert pair.driver.broken is pair.device.broken is None
