# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What legacy clients do that our own front-end does not."""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import tempfile
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.bare import AVAIL, BASE, DESC, MODES, RING, SIZE, STEP, USED, USER, Bare
from tests.support.homes import socket_path
from vdpa_bridge import Device, RemoteProtocolError, Target
from vdpa_bridge.backends.model import ModelBackend
from vdpa_bridge.backends.vhost_user import open_vhost_user
from vdpa_bridge.backends.vhost_user_legacy import VhostUserLegacy
from vdpa_bridge.drivers.blk import BlkDriver
from vdpa_bridge.eventfd import EventFd
from vdpa_bridge.flags import BackendFeature
from vdpa_bridge.vhost_user import messages as m
from vdpa_bridge.vhost_user.framing import NEED_REPLY
from vdpa_bridge.vhost_user.server import Server
from vdpa_bridge.wire import EMPTY, U64, Iova, VringAddr, VringState


@pytest.fixture
def path() -> Iterator[str]:
    target = Target.parse("model:blk?size=4M")
    with tempfile.TemporaryDirectory(prefix="vb") as directory, Server(target.open, f"{directory}/s"):
        yield f"{directory}/s"
    target.close()


def open_legacy(path: str) -> VhostUserLegacy:
    backend = open_vhost_user(path, device_id=2, vdpa="off")
    assert isinstance(backend, VhostUserLegacy)
    return backend


def test_rings_without_kick_are_polled(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tell_event = VhostUserLegacy._tell_event
    said: list[int] = []

    def without_kick(self: VhostUserLegacy, row: m.Legacy, index: int, event: EventFd | None) -> None:
        if row is m.SET_VRING_KICK:
            said.append(index)
            self._tell(row, U64(index | m.NOFD).pack())
        else:
            tell_event(self, row, index, event)

    monkeypatch.setattr(VhostUserLegacy, "_tell_event", without_kick)
    data = bytes(range(256)) * 4096
    with Device(open_legacy(path)) as device, BlkDriver(device) as disk:
        for _ in range(3):
            disk.write(0, data)
            assert disk.read(0, len(data)) == data
        disk.suspend()
        disk.resume()
        assert disk.read(0, 512) == data[:512]
    assert said, "the client did say that it does not kick"


def test_a_new_call_descriptor_is_signalled(path: str) -> None:
    """What was signalled on the old one meanwhile may have gone unseen: the client had moved on before it said so."""
    new = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        with Bare(path, "legacy") as client:
            client.start()
            assert client.tell(m.SET_VRING_CALL, U64(0), new) == 0
            assert not select.select([new], [], [], 0)[0], "there is no ring yet"
            assert client.share() == client.ring() == 0
            assert client.tell(m.SET_VRING_CALL, U64(0), new) == 0
            assert select.select([new], [], [], 5)[0]
    finally:
        os.close(new)


SHORT = SIZE - 0x4F0


@pytest.mark.parametrize("mode", MODES)
def test_memory_that_ends_within_a_page(path: str, mode: str) -> None:
    """A file as long as what is in it: the rest of its last page can be mapped with it, and no page behind that."""
    with Bare(path, mode) as client:
        os.ftruncate(client.memory, SHORT)
        client.start()
        assert client.share(size=SIZE if mode == "vdpa" else SHORT) == 0
        assert client.ring() == 0
        client.fill(kind=8, data_at=BASE + SIZE - STEP * 4096)
        client.offer(STEP)
        client.wait_done(STEP)
        assert client.statuses() == bytes(STEP)
        assert os.pread(client.memory, 11, SIZE - 4096) == b"vdpa_bridge"
        assert os.fstat(client.memory).st_size == SHORT
    with Bare(path, mode) as client:
        os.ftruncate(client.memory, SIZE - 4096)
        client.start()
        with contextlib.suppress(ConnectionError):
            assert client.share() or client.ring()


@pytest.mark.parametrize("channel", [False, True], ids=["", "channel"])
@pytest.mark.parametrize("late", [True, False], ids=["late", "hardware"])
def test_ring_that_is_never_enabled(late: bool, channel: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The log says what is waited for, once; a client that comes to say it is served."""
    monkeypatch.setattr("vdpa_bridge.vhost_user.server._SILENCE", 0.05)
    if not late:
        monkeypatch.setattr(ModelBackend, "offered_backend_features", ModelBackend.offered_backend_features & ~BackendFeature.ENABLE_AFTER_DRIVER_OK)
    target = Target.parse("model:blk?size=4M&queues=2")
    ours, its = socket.socketpair()
    with socket_path() as path, Server(target.open, path) as server, Bare(path, "legacy") as client, ours, its:
        client.start()
        assert client.share() == 0
        if channel:
            assert client.tell(m.SET_BACKEND_REQ_FD, EMPTY, its.fileno()) == 0
        for index in range(2):
            addr = VringAddr(index, 0, Iova(USER + DESC), Iova(USER + USED), Iova(USER + AVAIL), 0)
            assert client.tell(m.SET_VRING_NUM, VringState(index, RING)) == 0
            assert client.tell(m.SET_VRING_ADDR, addr) == 0
            assert client.tell(m.SET_VRING_KICK, U64(index), client.kick) == 0
        if not late:
            assert client.tell(m.SET_VRING_ENABLE, VringState(0, 1)) == 0
        owed = r"wait: ring 0, ring 1 set up, .* SET_VRING_ENABLE$" if late else r"wait: ring 1 set up, .*; this device enables no ring once it runs"
        assert eventually(lambda: re.search(owed, caplog.text, re.M))
        assert client.tell(m.SET_VRING_ENABLE, VringState(0, 1)) == client.tell(m.SET_VRING_ENABLE, VringState(1, 0)) == 0
        assert server.session is not None
        assert not server.session.waits_for
        client.fill()
        client.offer(STEP)
        client.wait_done(STEP)
    target.close()
    assert len(re.findall("wait:", caplog.text)) == 1


def eventually(condition: Callable[[], object]) -> bool:
    """Whether it comes to hold within 5 s."""
    end = time.monotonic() + 5
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@pytest.mark.parametrize(("offset", "user", "allowed"), [(0, 0, True), (0, 1 << 40, False)])
def test_gpa_addresses(path: str, offset: int, user: int, allowed: bool) -> None:
    """With GPA_ADDRESSES accepted, user addresses are guest addresses."""
    with open_legacy(path) as backend:
        connection = backend._connection
        features = m.P.REPLY_ACK | m.P.CONFIGURE_MEM_SLOTS | m.P.GPA_ADDRESSES
        connection.ask(m.SET_PROTOCOL_FEATURES.number, U64(features).pack(), flags=NEED_REPLY)
        memory = os.memfd_create("guest")
        os.ftruncate(memory, 1 << 20)
        region = m.MemReg.of(m.MemoryRegion(0x100000, 1 << 20, 0x100000 + user, offset))
        try:
            if allowed:
                assert connection.ask(m.ADD_MEM_REG.number, region.pack(), (memory,), flags=NEED_REPLY) == bytes(8)
            else:
                with pytest.raises(RemoteProtocolError, match="closed the connection"):
                    connection.ask(m.ADD_MEM_REG.number, region.pack(), (memory,), flags=NEED_REPLY)
        finally:
            os.close(memory)
