# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A legacy client with an IOMMU: what it is offered, how it is asked for translations, and what it may answer."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
import select
import socket
import tempfile
import time
from collections.abc import Iterator

import pytest

from tests.support.bare import BASE, HEADERS, SIZE, STEP, USER, Bare
from tests.support.homes import connector
from tests.support.translating import BOTH, IOVA, PAGE, RO, WO, Translating, page_at
from vdpa_bridge import Device, Target, ops
from vdpa_bridge.backends.base import Miss
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.device import RingSetup
from vdpa_bridge.drivers import BlkDriver
from vdpa_bridge.flags import Feature, Status
from vdpa_bridge.flags import ProtocolFeature as P
from vdpa_bridge.memory import Region
from vdpa_bridge.models.rng import RngModel
from vdpa_bridge.vhost_user import legacy_iotlb
from vdpa_bridge.vhost_user import messages as m
from vdpa_bridge.vhost_user.framing import REPLY_FLAGS, frame
from vdpa_bridge.vhost_user.server import Server
from vdpa_bridge.virtqueue import DriverQueue
from vdpa_bridge.wire import RW, U64, IotlbInvalidate, IotlbUpdate, Iova

RING_MISSES = [(IOVA, RO), (IOVA, WO)]
"""A split ring in one page: two areas are read, one is written."""
CONTENT = random.Random(7).randbytes(512 * STEP)


@pytest.fixture
def path() -> Iterator[str]:
    target = Target.parse("model:blk?size=1M")
    with tempfile.TemporaryDirectory(prefix="vb") as directory, Server(target.open, f"{directory}/s"):
        yield f"{directory}/s"
    target.close()


@pytest.fixture
def client(path: str) -> Iterator[Translating]:
    """Up, with nothing translated yet."""
    with Translating(path) as client:
        client.bring_up()
        yield client


def dropped(client: Bare, caplog: pytest.LogCaptureFixture, text: str) -> None:
    """The server hangs up, and its log says why."""
    assert client.raw.hung_up()
    deadline = time.monotonic() + 5
    while not (said := [r.getMessage() for r in caplog.records if ": drop: " in r.getMessage()]):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert text in said[0]


# What is offered -------------------------------------------------------------------------------------------------------------------


def test_offered_once_it_can_be_carried(path: str) -> None:
    """QEMU asks again after it has accepted protocol features; clients that do not know the channel never see the bit."""
    with Translating(path) as client:
        assert not client.offered() & Feature.ACCESS_PLATFORM
        for accepted in (P.REPLY_ACK, P.REPLY_ACK | P.CONFIG | P.STATUS, BOTH):
            assert client.tell(m.SET_PROTOCOL_FEATURES, U64(accepted)) == 0
            assert bool(client.offered() & Feature.ACCESS_PLATFORM) == (accepted == BOTH)


@pytest.mark.parametrize("behind", ["require", "off"])
def test_hidden_where_the_device_cannot_wait(path: str, behind: str) -> None:
    """A bridge: the way to its device knows no misses."""
    bridge = f"{path}-bridge"
    with Server(connector(path, "blk", behind), bridge), Translating(bridge) as client:
        assert client.tell(m.SET_PROTOCOL_FEATURES, U64(BOTH)) == 0
        assert not client.offered() & Feature.ACCESS_PLATFORM


def test_message_needs_the_feature(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with Translating(path) as client:
        client.features &= ~Feature.ACCESS_PLATFORM
        client.start()
        client.share()
        with pytest.raises(ConnectionError):
            client.update(0)
        dropped(client, caplog, "IOTLB_MSG (22): ACCESS_PLATFORM was not accepted")


def test_nobody_to_ask(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with Translating(path) as client:
        assert client.tell(m.SET_PROTOCOL_FEATURES, U64(BOTH)) == 0
        assert client.tell(m.SET_FEATURES, U64(client.features)) == 0
        assert client.share() == 0
        assert client.ring() == 1
        assert "SET_BACKEND_REQ_FD brought no socket" in caplog.text


# Misses ----------------------------------------------------------------------------------------------------------------------------


def test_everything_is_asked_for_once(client: Translating) -> None:
    """The ring when the device starts, headers and data when they are needed; then nothing more."""
    client.round(0, 5, CONTENT)
    assert sorted(client.misses[:2]) == RING_MISSES
    expected = [(IOVA + page * PAGE, perm) for pages, perm in ((range(1, 5), RO), (range(8, 12), WO)) for page in pages]
    assert sorted(client.misses[2:]) == sorted(expected)
    before = len(client.misses)
    client.round(2 * STEP, 6, CONTENT[::-1])
    assert len(client.misses) == before


def test_updates_nobody_asked_for(path: str) -> None:
    """QEMU sends those of the used rings by itself; before the device runs they are forgotten, and asked for."""
    with Translating(path) as client:
        client.start()
        client.share()
        assert client.update(0) == 0
        assert client.ring() == 0
        assert sorted(m for m in (client.ask(), client.ask()) if m) == RING_MISSES
        assert client.update(0) == 0
        client.answer()
        client.answer()
        for page in range(1, 16):
            assert client.update(page) == 0
        client.fill()
        client.offer(STEP)
        client.wait_done(STEP)
        assert client.silent()


def test_late_answers(client: Translating) -> None:
    """Each miss is asked once, however often the driver kicks; the server goes on with messages meanwhile."""
    client.fill()
    client.offer(STEP)
    assert sorted(m for m in (client.ask(), client.ask()) if m) == RING_MISSES
    for _ in range(20):
        client.ring_bell()
        assert client.status() == 0
    assert client.silent()
    assert client.update(0) == 0
    assert client.ask() == (IOVA + PAGE, WO)
    client.ring_bell()
    assert client.silent()
    assert client.done == 0
    assert client.update(1) == 0
    client.serve(STEP)


def test_never_answered(path: str) -> None:
    """The ring can be stopped, the device be reset and started anew, and the client vanish."""
    with Translating(path) as client:
        client.bring_up()
        client.fill()
        client.offer(STEP)
        assert client.ask()
        assert client.stop() == 0
        assert client.ring() == 0
        assert client.tell(m.SET_STATUS, U64(0)) == 0
        assert client.ring() == 0
    with Device(connector(path, "blk", "require")()) as device, BlkDriver(device) as disk:
        assert disk.read(0, 512) == bytes(512)


def test_refusals_of_the_past(client: Translating) -> None:
    """Answers to what was asked before a reset are nothing to the ring that asks for the same now."""
    assert {client.ask(), client.ask()} == set(RING_MISSES)
    assert client.tell(m.SET_STATUS, U64(0)) == 0
    assert client.ring() == 0
    assert {client.ask(), client.ask()} == set(RING_MISSES)
    client.answer(1)
    client.answer(1)
    assert client.update(0) == 0
    client.answer()
    client.answer()
    client.round(0, 1, CONTENT)


def test_other_queues_go_on() -> None:
    """One ring waits for its data, its neighbour works; then the mapping comes, or is refused."""

    class Two(RngModel):
        queue_count = 2

    home = ModelDevice(Two(), "model:two")
    missed = os.eventfd(0, os.EFD_NONBLOCK)
    with contextlib.ExitStack() as stack:
        stack.callback(home.close)
        stack.callback(os.close, missed)
        device = stack.enter_context(Device(home.open()))
        memory = stack.enter_context(Region(Iova(IOVA), 4 * PAGE))
        buffers = [memory.allocate(PAGE, PAGE) for _ in range(4)]
        queues: list[DriverQueue[str]] = [DriverQueue(b.address, PAGE, b.iova, 16) for b in buffers[:2]]
        events = [(os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0)) for _ in queues]
        for fd in itertools.chain(*events):
            stack.callback(os.close, fd)
        backend = device.backend
        assert backend.iotlb is not None
        backend.iotlb.enable(missed)
        rings = [RingSetup(n, 16, queue.desc, queue.avail, queue.used, *events[n]) for n, queue in enumerate(queues)]
        device.negotiate(0)  # mapped are the rings, and the data of the second
        device.start(rings, [IotlbUpdate(Iova(IOVA + n * PAGE), PAGE, memory.fd, n * PAGE) for n in (0, 1, 3)])

        def post(n: int) -> None:
            assert queues[n].add_many([([], [(IOVA + (2 + n) * PAGE, 64)], "token")]) == 1
            queues[n].publish()
            os.eventfd_write(events[n][0], 1)

        def finished(n: int) -> bool:
            select.select([events[n][1]], [], [], 5)
            return queues[n].reap() == [("token", 64)]

        for refused in (False, True):
            post(0)
            assert select.select([missed], [], [], 5)[0]
            os.eventfd_read(missed)
            assert backend.iotlb.misses() == [Miss(Iova(IOVA + 2 * PAGE), WO)]
            for _ in range(50):
                post(1)
                assert finished(1)
                os.eventfd_read(events[1][1])
            assert queues[0].reap() == []
            if refused:
                backend.iotlb.refuse(Miss(Iova(IOVA + 2 * PAGE), WO))
                assert device.get_status() & Status.NEEDS_RESET
                assert backend.iotlb.misses() == []
            else:
                backend.call(ops.IOTLB_UPDATE, IotlbUpdate(Iova(IOVA + 2 * PAGE), PAGE, memory.fd, 2 * PAGE))
                assert finished(0)
                backend.call(ops.IOTLB_INVALIDATE, IotlbInvalidate(Iova(IOVA + 2 * PAGE), PAGE))
        post(1)
        assert finished(1)


def test_refused(client: Translating) -> None:
    """As without an IOMMU: the ring is broken, and works again after a reset."""
    client.fill()
    client.offer(STEP)
    for _ in range(2):
        assert client.ask()
    assert client.update(0) == 0
    client.answer()
    client.answer()
    assert client.ask() == (IOVA + PAGE, WO)
    assert not client.status() & Status.NEEDS_RESET
    client.answer(1)
    assert client.needs_reset()
    assert client.tell(m.SET_STATUS, U64(0)) == 0
    os.pwrite(client.memory, bytes(4), 2048)
    os.pwrite(client.memory, bytes(4), 1024)
    assert client.ring() == 0
    client.round(0, 9, CONTENT)


def test_success_without_a_mapping(client: Translating) -> None:
    """Asked once more, as an invalidation may have come in between; then it is a refusal."""
    first = {client.ask(), client.ask()}
    client.answer()
    client.answer()
    assert {client.ask(), client.ask()} == first
    assert not client.status() & Status.NEEDS_RESET
    client.answer()
    assert client.needs_reset()


def test_less_permission_than_asked(client: Translating) -> None:
    client.fill()
    client.offer(STEP)
    for _ in range(2):
        assert client.ask()
    assert client.update(0) == 0
    assert client.ask() == (IOVA + PAGE, WO)
    assert client.update(1, RO) == 0
    assert client.done == 0
    assert client.update(1, WO) == 0
    for page in (2, 3, 4):
        assert client.ask() == (IOVA + page * PAGE, WO)
        assert client.update(page) == 0
    client.wait_done(STEP)


# Translations that change ------------------------------------------------------------------------------------------------------------


def test_invalidation_under_way(client: Translating) -> None:
    """Of the ring, of what is in flight, of everything, while requests come: all of them are served, with their data."""
    pick = random.Random(11)
    for turn in range(40):
        for page in pick.sample(range(16), 4):
            client.unmap(page)
        if turn % 8 == 0:
            assert client.invalidate(*pick.choice([(0, 0), (0, 1 << 47), (IOVA - PAGE, 1 << 20)])) == 0
        client.round(2 * STEP * turn, turn, pick.randbytes(512 * STEP))


def test_unmapped_means_untouched(client: Translating) -> None:
    """Once an invalidation is acknowledged, nothing is written there."""
    client.round(0, 1, CONTENT)
    client.unmap(0)
    before = os.pread(client.memory, SIZE, 0)
    client.fill()
    os.pwrite(client.memory, b"\xff" * STEP, HEADERS + 64)
    client.offer(3 * STEP)
    assert {client.ask(), client.ask()} == set(RING_MISSES)
    assert os.pread(client.memory, SIZE - PAGE, PAGE) == before[PAGE:]
    assert client.statuses() == b"\xff" * STEP
    client.update(0)
    client.serve(3 * STEP)


def test_updates_replace_what_they_overlap(client: Translating) -> None:
    """Data goes where the last one says; the rest of a larger one that it cut is asked for again."""
    client.fill(kind=8)
    assert client.update(0) == 0
    two = m.IotlbMessage(IOVA + PAGE, 2 * PAGE, USER + 5 * PAGE, RW, m.UPDATE)  # guest pages 1 and 2 in pages 5 and 6
    assert client.tell(m.IOTLB_MSG, two) == 0
    assert client.update(1) == 0
    client.offer(STEP)
    client.serve(STEP)
    assert (IOVA + 2 * PAGE, WO) in client.misses
    assert (IOVA + PAGE, WO) not in client.misses
    assert os.pread(client.memory, 11, page_at(1) * PAGE) == b"vdpa_bridge"
    assert os.pread(client.memory, SIZE, 0)[5 * PAGE : 7 * PAGE] == bytes(2 * PAGE)


def test_a_region_goes(client: Translating) -> None:
    """Translations go with the memory that they lead into."""
    client.round(0, 2, CONTENT)
    region = m.MemReg.of(m.MemoryRegion(0x100000, SIZE, USER, 0))
    assert client.tell(m.REM_MEM_REG, region) == 0
    assert client.share() == 0
    before = len(client.misses)
    client.round(2 * STEP, 3, CONTENT)
    assert len(client.misses) - before >= 10


def test_more_than_the_cache_holds(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy_iotlb, "MOST", 4)
    with Translating(path) as client:
        client.bring_up()
        for turn in range(4):
            client.round(2 * STEP * turn, turn, CONTENT)
        assert len(client.misses) > 40


def test_with_and_without_in_turn(client: Translating) -> None:
    """Firmware without an IOMMU and a kernel with one drive the same device; ring addresses mean different things then."""
    client.round(0, 4, CONTENT)
    for translated in (False, True, False, True):
        client.stop()
        os.pwrite(client.memory, bytes(4096), 0)
        client.features = (client.features & ~Feature.ACCESS_PLATFORM) | (Feature.ACCESS_PLATFORM if translated else 0)
        assert client.tell(m.SET_FEATURES, U64(client.features)) == 0
        if translated:
            assert client.ring() == 0
            client.round(0, 4, CONTENT)
        else:
            assert Bare.ring(client) == 0
            Bare.fill(client, kind=8)
            client.offer(STEP)
            client.wait_done(STEP)
            assert os.pread(client.memory, 11, PAGE) == b"vdpa_bridge"


def test_no_way_around(path: str) -> None:
    """What was mapped by guest addresses, for firmware without an IOMMU, is not there for a kernel with one."""
    with Translating(path) as client:
        client.features &= ~Feature.ACCESS_PLATFORM
        client.start()
        client.share()
        assert Bare.ring(client) == 0
        client.stop()
        assert client.tell(m.SET_FEATURES, U64(client.features | Feature.ACCESS_PLATFORM)) == 0
        assert client.ring() == 0
        assert {client.ask(), client.ask()} == set(RING_MISSES)
        assert client.update(0) == 0
        client.fill(data_at=BASE + PAGE)
        client.offer(STEP)
        assert client.ask() == (BASE + PAGE, WO)
        assert os.pread(client.memory, SIZE - PAGE, PAGE) == bytes(SIZE - PAGE)


# What is wrong -----------------------------------------------------------------------------------------------------------------------

WRONG = {
    "size 0": (m.IotlbMessage(IOVA, 0, USER, 3, 2), "are empty or wrap"),
    "wraps": (m.IotlbMessage((1 << 64) - PAGE, 2 * PAGE, USER, 3, 2), "are empty or wrap"),
    "address wraps": (m.IotlbMessage(IOVA, 2 * PAGE, (1 << 64) - PAGE, 3, 2), "are empty or wrap"),
    "no permission": (m.IotlbMessage(IOVA, PAGE, USER, 0, 2), "permission is 0"),
    "too much permission": (m.IotlbMessage(IOVA, PAGE, USER, 4, 2), "permission is 4"),
    "unknown memory": (m.IotlbMessage(IOVA, PAGE, 0x1000, 3, 2), "lie in no memory region"),
    "beyond the memory": (m.IotlbMessage(IOVA, 2 * PAGE, USER + SIZE - PAGE, 3, 2), "lie in no memory region"),
    "not at a page": (m.IotlbMessage(IOVA + 8, PAGE, USER, 3, 2), "are not whole pages"),
    "not of pages": (m.IotlbMessage(IOVA, 8, USER, 3, 2), "are not whole pages"),
    "from within a page": (m.IotlbMessage(IOVA, PAGE, USER + 8, 3, 2), "are not whole pages"),
    "a miss": (m.IotlbMessage(IOVA, PAGE, USER, 3, 1), "type 1 is neither"),
    "access fail": (m.IotlbMessage(IOVA, PAGE, USER, 3, 4), "type 4 is neither"),
    "nothing invalid": (m.IotlbMessage(IOVA, 0, 0, 0, 3), "are empty or wrap"),
    "invalidation wraps": (m.IotlbMessage(IOVA, (1 << 64) - PAGE, 0, 0, 3), "are empty or wrap"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_messages(client: Translating, caplog: pytest.LogCaptureFixture, what: str) -> None:
    message, text = WRONG[what]
    with pytest.raises(ConnectionError):
        client.tell(m.IOTLB_MSG, message)
    dropped(client, caplog, "IOTLB_MSG (22): ")
    assert text in caplog.text


def test_memory_that_is_too_short(client: Translating) -> None:
    """The device cannot map it: an answer, not the end."""
    os.ftruncate(client.memory, PAGE)
    assert client.update(1) == 1
    assert client.update(0) == 0


ANSWERS = {
    "too many": frame(m.BACKEND_IOTLB, bytes(8), REPLY_FLAGS) * 200,
    "to something else": frame(m.BACKEND_CONFIG_CHANGE, bytes(8), REPLY_FLAGS),
    "nothing": bytes(20),
    "closed": None,
}


@pytest.mark.parametrize("data", ANSWERS.values(), ids=ANSWERS)
def test_wrong_answers(client: Translating, caplog: pytest.LogCaptureFixture, data: bytes | None) -> None:
    caplog.set_level(logging.WARNING, "vdpa_bridge")
    client.fill()
    client.offer(STEP)
    assert client.ask()
    if data is None:
        client.channel.shutdown(socket.SHUT_RDWR)
    else:
        client.channel.sendall(data)
    dropped(client, caplog, "IOTLB_MSG (1) to the client")


def test_channel_that_closes_first(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """No offence, as long as nothing is asked."""
    with Translating(path) as client:
        client.bring_up()
        client.round(0, 1, CONTENT)
        client.channel.close()
        client._theirs.close()
        client.fill()
        client.offer(3 * STEP)
        client.wait_done(3 * STEP)
        assert "drop" not in caplog.text
        client.unmap(0)
        client.ring_bell()
        dropped(client, caplog, "IOTLB_MSG (1) to the client: the client does not take the message")


def test_client_that_does_not_read(client: Translating) -> None:
    """No more is asked than any socket takes; the client keeps its device, which waits."""
    client.fill()
    client.offer(STEP)
    for _ in range(1000):
        assert client.update(0) == 0
        assert client.invalidate(0, 0) == 0
        client.ring_bell()
    assert client.status() == 0
    client.channel.settimeout(0.1)
    while client.ask():
        pass
    assert 2 < len(client.misses) <= legacy_iotlb.AT_ONCE
    for _ in client.misses:
        client.answer()
    client.serve(STEP)
