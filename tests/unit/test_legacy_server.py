# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What legacy clients do that our own front-end does not."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

from vdpa_bridge import Device, RemoteProtocolError, Target
from vdpa_bridge.backends.vhost_user import open_vhost_user
from vdpa_bridge.backends.vhost_user_legacy import VhostUserLegacy
from vdpa_bridge.drivers.blk import BlkDriver
from vdpa_bridge.eventfd import EventFd
from vdpa_bridge.vhost_user import messages as m
from vdpa_bridge.vhost_user.framing import NEED_REPLY
from vdpa_bridge.vhost_user.server import Server
from vdpa_bridge.wire import U64


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
