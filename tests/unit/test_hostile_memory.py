# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Memory that is not what its client says: the client hears of it or loses its device, and nobody else notices.

In vDPA mode a refusal is an errno, in legacy an acknowledgement of 1 or the end of the connection; either way a text that
somebody reads names the rule and the value. The next client finds the device as good as new, after every test.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import random
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bare import AVAIL, BASE, DESC, HEADERS, MODES, SIZE, STEP, USED, USER, Bare
from tests.support.homes import connector, socket_path
from tests.support.hostile import Stock
from vdpa_bridge import ops
from vdpa_bridge.backends.base import Backend
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.device import Device
from vdpa_bridge.drivers import BlkDriver
from vdpa_bridge.errors import RemoteProtocolError
from vdpa_bridge.flags import Status
from vdpa_bridge.memory import MAX_MAPPINGS, PAGE, SharedMapping
from vdpa_bridge.models import make_model
from vdpa_bridge.vhost_user import messages as m
from vdpa_bridge.vhost_user.framing import VERSION, Frame
from vdpa_bridge.vhost_user.legacy_server import MAX_SLOTS
from vdpa_bridge.vhost_user.server import Server
from vdpa_bridge.vhost_user.session import Session
from vdpa_bridge.wire import EMPTY, U64, IotlbUpdate, Iova, Payload, VringAddr, VringState

SERVER = "vdpa_bridge.vhost_user.server"
MODEL = "vdpa_bridge.backends.model"
TOP = 1 << 64


@pytest.fixture
def model() -> Iterator[ModelDevice]:
    device = ModelDevice(make_model("blk", {"size": "1M"}), "model:blk")
    yield device
    device.close()


@pytest.fixture
def path(model: ModelDevice, caplog: pytest.LogCaptureFixture) -> Iterator[str]:
    """A server that works for a good client after the test, in both modes."""
    caplog.set_level(logging.INFO, "vdpa_bridge")
    with socket_path() as path, Server(model.open, path, timeout=1.0):
        yield path
        for mode in ("require", "off"):
            with Device(connector(path, "blk", mode)()) as device, BlkDriver(device, queue_size=8, pool_size=65536) as disk:
                disk.write(0, b"good" * 128)
                assert disk.read(0, 512) == b"good" * 128
    assert not [record for record in caplog.records if record.exc_info], "a defect in the log"


@pytest.fixture(params=MODES)
def client(request: pytest.FixtureRequest, path: str) -> Iterator[Bare]:
    """In each mode."""
    with Bare(path, request.param) as client:
        yield client


@pytest.fixture
def stock() -> Iterator[Stock]:
    with Stock() as stock:
        yield stock


def logged(caplog: pytest.LogCaptureFixture, pattern: str) -> bool:
    """Whether a line like this comes up within a moment."""
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        if re.search(pattern, caplog.text):
            return True
        time.sleep(0.005)
    return False


# Mappings that cannot be, vDPA mode ------------------------------------------------------------------------------------------------

WRONG_UPDATES: dict[str, tuple[tuple[int, int, int, int], int, str]] = {
    "overlaps": ((BASE + PAGE, PAGE, 0, 3), errno.EEXIST, r"\[0x101000, 0x101fff\] overlaps \[0x100000, 0x10ffff\]"),
    "the same again": ((BASE, SIZE, 0, 3), errno.EEXIST, r"overlaps"),
    "wraps": ((TOP - PAGE, 2 * PAGE, 0, 3), errno.EINVAL, r"leaves the IOVA range .*0xffffffffffffffff"),
    "empty": ((0, 0, 0, 3), errno.EINVAL, "size is 0"),
    "everything": ((0, TOP - PAGE, 0, 3), errno.EEXIST, "overlaps"),
    "larger than its file": ((0, SIZE + PAGE, 0, 3), errno.EINVAL, r"holds 0x10000 bytes of memory, the mapping needs 0x11000"),
    "behind its file": ((0, PAGE, SIZE, 3), errno.EINVAL, r"holds 0x10000 bytes of memory, the mapping needs 0x11000"),
    "offset wraps": ((0, PAGE, TOP - PAGE, 3), errno.EINVAL, r"holds 0x10000 bytes"),
    "unaligned": ((1, PAGE, 0, 3), errno.EINVAL, r"iova 0x1 is not a multiple of 4096"),
    "unaligned size": ((0, PAGE + 1, 0, 3), errno.EINVAL, r"size 0x1001 is not a multiple"),
    "unaligned offset": ((0, PAGE, 512, 3), errno.EINVAL, r"offset 0x200 is not a multiple"),
    "no permission": ((0, PAGE, 0, 0), errno.EINVAL, "permission is 0"),
    "what permission": ((0, PAGE, 0, 255), errno.EINVAL, "permission is 255"),
}


@pytest.mark.parametrize("case", WRONG_UPDATES)
def test_wrong_mapping(case: str, model: ModelDevice, path: str) -> None:
    """The same errno through a socket, where the session goes on; the text is the device's."""
    (iova, size, offset, perm), number, text = WRONG_UPDATES[case]
    with Bare(path, "vdpa") as client:
        client.start()
        assert client.share() == 0
        wrong = IotlbUpdate(Iova(iova), size, client.memory, offset, perm)
        assert client.raw.ask(ops.IOTLB_UPDATE, wrong) == number  # type: ignore[arg-type]
        assert client.ring() == 0
        assert client.status() == 15
    memory = os.memfd_create("direct", os.MFD_CLOEXEC)
    os.ftruncate(memory, SIZE)
    with contextlib.closing(fresh(model)) as backend:
        backend.call(ops.SET_OWNER, EMPTY)
        backend.call(ops.IOTLB_UPDATE, IotlbUpdate(Iova(BASE), SIZE, memory))
        with pytest.raises(OSError, match=text) as refused:
            backend.call(ops.IOTLB_UPDATE, IotlbUpdate(Iova(iova), size, memory, offset, perm))
    os.close(memory)
    assert refused.value.errno == number


def fresh(model: ModelDevice) -> Backend:
    """An opening, once the server has given its own back."""
    deadline = time.monotonic() + 3
    while True:
        try:
            return model.open()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_more_mappings_than_there_may_be(model: ModelDevice, stock: Stock) -> None:
    """ENOSPC at a limit that is far below what the process can hold; all of them go with the session."""
    with model.open() as backend:
        backend.call(ops.SET_OWNER, EMPTY)
        for n in range(MAX_MAPPINGS):
            backend.call(ops.IOTLB_UPDATE, IotlbUpdate(Iova(2 * n * PAGE), PAGE, stock["memory"]))
        with pytest.raises(OSError, match=f"holds {MAX_MAPPINGS} mappings, which is the limit") as refused:
            backend.call(ops.IOTLB_UPDATE, IotlbUpdate(Iova(TOP - PAGE), PAGE, stock["memory"]))
        assert refused.value.errno == errno.ENOSPC


NO_MEMORY = ["no memory", "pipe's end", "pipe's beginning", "directory", "socket", "lonely socket", "kick", "null", "read-only memory", "name of a socket"]


@pytest.mark.parametrize("name", NO_MEMORY)
def test_descriptor_that_is_no_memory(name: str, client: Bare, stock: Stock) -> None:
    """Or not writable, though the device is to write."""
    client.start()
    if client.mode == "vdpa":
        assert client.share(0, PAGE, stock[name]) != 0
        assert client.share(0, SIZE) == 0
        assert client.ring() == 0
    else:
        assert client.share(0, PAGE, stock[name]) in (0, 1)  # what it is shows when the device is to see it
        assert client.ring() == 1


def test_read_only_memory_for_a_device_that_reads(path: str, stock: Stock) -> None:
    with Bare(path, "vdpa") as client:
        client.start()
        assert client.raw.ask(ops.IOTLB_UPDATE, IotlbUpdate(Iova(BASE), PAGE, stock["read-only memory"], 0, 1)) == 0  # type: ignore[arg-type]
        assert client.raw.ask(ops.IOTLB_UPDATE, IotlbUpdate(Iova(BASE + PAGE), PAGE, stock["read-only memory"], 0, 3)) == errno.EACCES  # type: ignore[arg-type]


NO_EVENTS = ["memory", "named like an [eventfd]", "pipe's end", "broken pipe", "directory", "socket", "null"]


@pytest.mark.parametrize("name", NO_EVENTS)
@pytest.mark.parametrize("event", ["kick", "call"])
def test_descriptor_that_is_no_eventfd(event: str, name: str, client: Bare, stock: Stock) -> None:
    client.start()
    assert client.share() == 0
    good = getattr(client, event)
    setattr(client, event, stock[name])
    try:
        assert client.ring() == (errno.EINVAL if client.mode == "vdpa" else 1)
        assert not client.status() & Status.NEEDS_RESET
    finally:
        setattr(client, event, good)
    if client.mode == "legacy":  # the good one first, as the ring comes up with the kick
        assert client.tell(m.SET_VRING_CALL, U64(0), client.call) == 0
    assert client.ring() == 0


# Regions that cannot be, legacy --------------------------------------------------------------------------------------------------------

R = m.MemoryRegion
WRONG_TABLES: dict[str, tuple[list[m.MemoryRegion], str]] = {
    "user addresses overlap": ([R(BASE, SIZE, USER, 0), R(BASE + SIZE, SIZE, USER + PAGE, 0)], rf"user addresses of the region at {USER + PAGE:#x} overlap"),
    "guest addresses overlap": ([R(BASE, SIZE, USER, 0), R(BASE + PAGE, SIZE, USER + SIZE, 0)], r"\[0x101000, 0x110fff\] overlaps \[0x100000, 0x10ffff\]"),
    "guest address wraps": ([R(TOP - PAGE, SIZE, USER, 0)], r"region of 0x10000 bytes at 0xfffffffffffff000 .*wraps"),
    "user address wraps": ([R(BASE, SIZE, TOP - PAGE, 0)], "wraps"),
    "offset wraps": ([R(BASE, SIZE, USER, TOP - PAGE)], "wraps"),
    "empty": ([R(BASE, 0, USER, 0)], "region of 0x0 bytes at 0x100000 is empty"),
    "all there is": ([R(0, TOP - 1, 0, 0)], "memory, the mapping needs 0x1"),
    "larger than its file": ([R(BASE, 2 * SIZE, USER, 0)], "holds 0x10000 bytes of memory, the mapping needs 0x20000"),
    "behind its file": ([R(BASE, SIZE, USER, SIZE)], "holds 0x10000 bytes of memory, the mapping needs 0x20000"),
}


class Legacy:
    """A legacy session without a socket, for the texts."""

    def __init__(self, session: Session, memory: int) -> None:
        self.session = session
        self.memory = memory

    def say(self, row: m.Legacy, payload: Payload, fds: int = 0, fd: int | None = None) -> bytes:
        return self.session.handle(Frame(row.number, VERSION, payload.pack(), [os.dup(self.memory if fd is None else fd) for _ in range(fds)]))

    def add(self, regions: list[m.MemoryRegion]) -> None:
        for region in regions:
            self.say(m.ADD_MEM_REG, m.MemReg.of(region), 1)

    def go(self, desc: int = USER + DESC, avail: int = USER + AVAIL, used: int = USER + USED) -> None:
        kick = os.eventfd(0)
        try:
            self.say(m.SET_VRING_NUM, VringState(0, 16))
            self.say(m.SET_VRING_ADDR, VringAddr(0, 0, Iova(desc), Iova(used), Iova(avail), 0))
            self.say(m.SET_VRING_KICK, U64(0), 1, kick)
            self.say(m.SET_VRING_ENABLE, VringState(0, 1))
        finally:
            os.close(kick)


@pytest.fixture
def legacy(model: ModelDevice, stock: Stock) -> Iterator[Legacy]:
    session = Session(model.open())
    legacy = Legacy(session, stock["memory"])
    legacy.say(m.SET_PROTOCOL_FEATURES, U64(m.P.CONFIGURE_MEM_SLOTS))
    legacy.say(m.SET_FEATURES, U64(1 << 32 | 1 << 30))
    yield legacy
    session.close()


@pytest.mark.parametrize("case", WRONG_TABLES)
@pytest.mark.parametrize("slots", [False, True], ids=["table", "slots"])
def test_wrong_regions(slots: bool, case: str, legacy: Legacy) -> None:
    """Refused at once, or when the device is to see them."""
    regions, text = WRONG_TABLES[case]

    def share_and_go() -> None:
        if slots:
            legacy.add(regions)
        else:
            legacy.say(m.SET_MEM_TABLE, m.MemTable(tuple(regions)), len(regions))
        legacy.go()

    with pytest.raises(RemoteProtocolError, match=text):
        share_and_go()


@pytest.mark.parametrize("case", WRONG_TABLES)
def test_wrong_regions_under_a_running_device(case: str, legacy: Legacy) -> None:
    legacy.say(m.SET_MEM_TABLE, m.MemTable((R(0, SIZE, 0, 0),)), 1)
    legacy.go(DESC, AVAIL, USED)
    regions, text = WRONG_TABLES[case]
    with pytest.raises(RemoteProtocolError, match=text if case != "all there is" else "overlap"):
        legacy.add(regions)


def test_more_regions_than_there_are_slots(legacy: Legacy) -> None:
    for n in range(MAX_SLOTS):
        legacy.say(m.ADD_MEM_REG, m.MemReg.of(R(BASE + n * SIZE, SIZE, USER + n * SIZE, 0)), 1)
    legacy.go()
    with pytest.raises(RemoteProtocolError, match=f"more than {MAX_SLOTS} memory regions"):
        legacy.say(m.ADD_MEM_REG, m.MemReg.of(R(0, SIZE, 0, 0)), 1)


def test_table_that_is_refused_can_be_sent_again(path: str) -> None:
    """What was mapped of the wrong one is in nobody's way."""
    with Bare(path, "legacy") as client:
        client.start()
        good = R(BASE, SIZE, USER, 0)
        wrong = m.MemTable((good, R(BASE + SIZE, 2 * SIZE, USER + SIZE, 0)))
        assert client.tell(m.SET_MEM_TABLE, wrong, client.memory, client.memory) == 0
        assert client.ring() == 1
        assert client.tell(m.SET_MEM_TABLE, m.MemTable((good,)), client.memory) == 0
        assert client.ring() == 0
        client.fill()
        client.offer(STEP)
        client.wait_done(STEP)


@pytest.mark.parametrize("moved", [0, SIZE], ids=["added", "moved"])
def test_table_that_is_refused_under_a_running_device(moved: int, path: str, caplog: pytest.LogCaptureFixture) -> None:
    """There is no way back to the one before."""
    with Bare(path, "legacy") as client:
        busy(client, 0)
        wrong = m.MemTable((R(BASE, SIZE, USER + moved, 0), R(BASE + SIZE, 2 * SIZE, USER + 2 * SIZE, 0)))
        with pytest.raises(ConnectionError):
            client.tell(m.SET_MEM_TABLE, wrong, client.memory, client.memory)
        assert logged(caplog, r"drop: SET_MEM_TABLE \(5\): .* holds 0x10000 bytes of memory, the mapping needs 0x20000")


# Rings that cannot be ------------------------------------------------------------------------------------------------------------------

WRONG_RINGS: dict[str, tuple[dict[str, int], int, str, str]] = {
    # keywords of Bare.ring, errno in vDPA mode (0: the device needs a reset), the legacy server's text, the device's text
    "outside": ({"desc": 4 * SIZE}, 0, "descriptors ring address 0x7f0000040000 lies in no memory region", "0x140000"),
    "used outside": ({"used": 4 * SIZE}, 0, "used ring address 0x7f0000040000 lies in no memory region", "0x140000"),
    "avail before the memory": ({"avail": -PAGE}, 0, "avail ring address 0x7efffffff000 lies in no memory region", "0xff000"),
    "across the end": ({"desc": SIZE - 16}, 0, "", "0x10fff0"),
    "avail across the end": ({"avail": SIZE - 2}, 0, "", "0x10fffe"),
    "used across the end": ({"used": SIZE - 4}, 0, "", "0x10fffc"),
    "unaligned": ({"desc": 8}, 0, "not aligned to 16, 2 and 4", "align"),
    "avail unaligned": ({"avail": 1025}, errno.EINVAL, "not aligned to 16, 2 and 4", ""),
    "used unaligned": ({"used": 2050}, errno.EINVAL, "not aligned to 16, 2 and 4", ""),
}


@pytest.mark.parametrize("case", WRONG_RINGS)
def test_wrong_ring(case: str, client: Bare, caplog: pytest.LogCaptureFixture) -> None:
    """Refused where the server can see it; else the device needs a reset, and the log says of what."""
    place, number, refusal, why = WRONG_RINGS[case]
    client.start()
    assert client.share() == 0
    if client.mode == "legacy" and refusal:
        try:
            assert client.ring(**place) == 1
        except ConnectionError:
            pass  # what breaks the protocol ends it
        assert logged(caplog, refusal)
    elif number and client.mode == "vdpa":
        assert client.ring(**place) == number
    else:
        assert client.ring(**place) == 0
        assert client.status() & Status.NEEDS_RESET
        assert logged(caplog, rf"queue 0: (?!.*Errno).*{why}.*; the device needs a reset")


# Memory that goes away -----------------------------------------------------------------------------------------------------------------


def busy(client: Bare, kind: int) -> int:
    """The device at work; how many requests it did."""
    client.bring_up().fill(kind=kind)
    count = 25 * STEP
    for done in range(STEP, count + 1, STEP):
        client.offer(done)
        client.wait_done(done)
    return count


@pytest.mark.parametrize(("left", "statuses"), [(PAGE, b"\1\1\1\1"), (2 * PAGE, b"\0\1\1\1"), (5 * PAGE, bytes(4))])
def test_data_that_goes_away(left: int, statuses: bytes, client: Bare) -> None:
    """The kernel moves the data, and finds out itself: an I/O error for each request whose data is gone, and the ring goes on."""
    done = busy(client, 0)
    os.ftruncate(client.memory, left)
    client.offer(done + STEP)
    client.wait_done(done + STEP)
    assert client.statuses() == statuses
    os.ftruncate(client.memory, SIZE)
    client.offer(done + 2 * STEP)
    client.wait_done(done + 2 * STEP)
    assert client.statuses() == bytes(4)
    assert client.reset() == 0


@pytest.mark.parametrize(("left", "kind"), [(0, 0), (0, 8), (PAGE, 8), (2 * PAGE, 8)])
def test_memory_that_goes_away_under_the_device(left: int, kind: int, client: Bare) -> None:
    """The ring itself, or data that the device writes itself: it needs a reset, says so, and can be reset."""
    done = busy(client, kind)
    os.ftruncate(client.memory, left)
    if left:
        client.offer(done + STEP)
    assert client.needs_reset()
    assert client.reset() == 0


@pytest.mark.parametrize("mode", MODES)
def test_memory_that_shrinks_at_any_time(mode: str, path: str) -> None:
    """Under a device at full speed, at twenty moments."""
    pick = random.Random(mode)
    for _ in range(20):
        with Bare(path, mode) as client:
            client.bring_up().fill(kind=pick.choice((0, 1)))
            end = time.monotonic() + pick.random() * 0.02
            index = 0
            while time.monotonic() < end:
                index += STEP
                client.offer(index)
            left = pick.choice((0, 2048, PAGE))
            os.ftruncate(client.memory, left)
            assert client.needs_reset() if left == 0 else not client.status() & Status.FAILED
            client.ring_bell()
            if pick.random() < 0.5:
                assert client.reset() == 0


def test_huge_pages_that_go_away() -> None:
    """They are mapped, replaced and unmapped as a whole, however little of them is shared."""
    huge = 2 << 20
    fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    try:
        os.ftruncate(fd, huge)
        if "HugePages_Free:        0\n" in Path("/proc/meminfo").read_text():  # echo 2 > /proc/sys/vm/nr_hugepages
            with pytest.raises(OSError, match="mmap of 0x1000 bytes at offset 0x3000") as refused:
                SharedMapping(fd, PAGE, 3 * PAGE)
            assert refused.value.errno == errno.ENOMEM
            return
        mapping = SharedMapping(fd, PAGE, 3 * PAGE)
        other = SharedMapping(fd, 2 * PAGE, huge - 2 * PAGE)
        assert not mapping.poisoned
        os.ftruncate(fd, 0)
        assert ctypes.string_at(mapping.address, PAGE) == bytes(PAGE)
        assert mapping.poisoned
        assert not other.poisoned
        mapping.close()
        other.close()
    finally:
        os.close(fd)


# Memory that is there twice --------------------------------------------------------------------------------------------------------------


def test_aliases(client: Bare) -> None:
    """The same memory at two addresses is as good as any: the ring through one, requests and data through the other."""
    client.start()
    assert client.share() == 0
    assert client.share(SIZE) == 0
    assert client.ring() == 0
    index = 0
    for kind, sector, data in ((1, 8, b"a"), (1, 16, b"b"), (0, 8, b"a"), (0, 16, b"b")):
        client.fill(sector, kind, BASE + SIZE + PAGE, BASE + SIZE + HEADERS)
        os.pwrite(client.memory, (data if kind else b"-") * STEP * PAGE, PAGE)
        index += STEP
        client.offer(index)
        client.wait_done(index)
        assert os.pread(client.memory, 512, PAGE) == data * 512


def test_socket_of_changes_that_is_none(path: str, stock: Stock) -> None:
    """SET_BACKEND_REQ_FD with what looks like a socket and cannot be spoken through; nothing is left of it while the session goes on."""
    with Bare(path, "legacy") as client:
        client.start()
        assert client.tell(m.SET_PROTOCOL_FEATURES, U64(m.P.REPLY_ACK | m.P.BACKEND_REQ | m.P.STATUS)) == 0
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            assert client.tell(m.SET_BACKEND_REQ_FD, EMPTY, stock["name of a socket"]) == 1
        assert len(os.listdir("/proc/self/fd")) == before
        for name in ("socket", "lonely socket", "datagram socket"):
            assert client.tell(m.SET_BACKEND_REQ_FD, EMPTY, stock[name]) == 0
        with pytest.raises(ConnectionError):
            client.tell(m.SET_BACKEND_REQ_FD, EMPTY, stock["memory"])


def test_nothing_hides_in_the_helpers() -> None:
    """The kinds of descriptors are what they are called."""
    with Stock() as stock:
        assert os.readlink(f"/proc/self/fd/{stock['named like an [eventfd]']}").startswith("/memfd:[eventfd]")
        with socket.socket(fileno=os.dup(stock["socket"])) as one:
            assert one.family == socket.AF_UNIX
