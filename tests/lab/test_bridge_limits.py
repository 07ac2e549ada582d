# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a kernel device cannot do for a client, and how both learn of it: the client by a refusal, the operator by the log.

Rule of this file: after each refusal the next client is served. Refusals that a relay would spare the client are seen
without one; tests/lab/test_relay.py has the same with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vdpa_bridge import RemoteProtocolError, ops
from vdpa_bridge.backends.vhost_user import open_vhost_user
from vdpa_bridge.backends.vhost_user_legacy import VhostUserLegacy
from vdpa_bridge.flags import ProtocolFeature as P
from vdpa_bridge.memory import Region
from vdpa_bridge.vhost_user import messages as m
from vdpa_bridge.vhost_user.connection import Connection
from vdpa_bridge.vhost_user.framing import NEED_REPLY, frame
from vdpa_bridge.wire import EMPTY, U64, IotlbUpdate, Iova, VringAddr, VringState

from ..support.bridge import REFUSED, Bridge, bridging, node, run_client

pytestmark = pytest.mark.lab
SIZE = 1 << 20
VERSION_1 = 1 << 32
PROTOCOL_FEATURES = 1 << 30
DESC, AVAIL, USED = 0, 4096, 8192


class Client:
    """A legacy front-end, message by message, acknowledged or not as its test wants it."""

    def __init__(self, connection: Connection, memory: int, acknowledged: bool) -> None:
        self.connection, self.memory = connection, memory
        self.events: list[int] = []
        if acknowledged:
            self.tell(m.SET_PROTOCOL_FEATURES, U64(P.REPLY_ACK | P.CONFIGURE_MEM_SLOTS).pack())
        else:
            self.say(m.SET_PROTOCOL_FEATURES, U64(P.CONFIGURE_MEM_SLOTS).pack())
        self.say(m.SET_FEATURES, U64(VERSION_1 | PROTOCOL_FEATURES).pack())

    def tell(self, row: m.Legacy, payload: bytes, fds: tuple[int, ...] = ()) -> bool:
        """Whether the server says that it is done."""
        return self.connection.ask(row.number, payload, fds, flags=NEED_REPLY) == bytes(8)

    def say(self, row: m.Legacy, payload: bytes, fds: tuple[int, ...] = ()) -> None:
        """And wait for nothing."""
        self.connection.send(frame(row.number, payload), fds)

    def region(self, guest: int, size: int = SIZE) -> bool:
        return self.tell(m.ADD_MEM_REG, m.MemReg.of(m.MemoryRegion(guest, size, guest, 0)).pack(), (self.memory,))

    def ring(self, index: int, guest: int, base: int = 0) -> bool:
        """Everything about a ring but its enabling."""
        kick = os.eventfd(0)
        self.events.append(kick)
        at = guest + index * 16384
        said = [
            self.tell(m.SET_VRING_NUM, VringState(index, 64).pack()),
            self.tell(m.SET_VRING_BASE, VringState(index, base).pack()),
            self.tell(m.SET_VRING_ADDR, VringAddr(index, 0, at + DESC, at + USED, at + AVAIL, 0).pack()),
            self.tell(m.SET_VRING_KICK, U64(index).pack(), (kick,)),
        ]
        return all(said)

    def enable(self, index: int, on: bool = True) -> bool:
        return self.tell(m.SET_VRING_ENABLE, VringState(index, int(on)).pack())


@contextmanager
def speaking(bridge: Bridge, device_id: int = 2, acknowledged: bool = True) -> Iterator[Client]:
    """A client of *bridge* that has negotiated."""
    memory = os.memfd_create("client")
    os.ftruncate(memory, SIZE)
    backend = open_vhost_user(bridge.path, device_id=device_id, vdpa="off", timeout=20)
    assert isinstance(backend, VhostUserLegacy)
    client = Client(backend._connection, memory, acknowledged)
    try:
        yield client
    finally:
        backend.close()
        for fd in [memory, *client.events]:
            os.close(fd)
        bridge.release()


@pytest.fixture(scope="module")
def bare_blk() -> Iterator[Bridge]:
    """Without a relay."""
    with bridging(node("VP_BLK"), "--relay", "off") as bridge:
        yield bridge


def new_words(bridge: Bridge, before: str) -> str:
    return bridge.said()[len(before) :]


def test_memory_outside_the_iova_range(bare_blk: Bridge) -> None:
    """An IOMMU of 48 bits (or fewer): what lies higher cannot be reached. Said when the device is brought up, naming both."""
    before = bare_blk.said()
    with speaking(bare_blk) as client:
        assert client.region(1 << 57)
        client.ring(0, 1 << 57)
        assert not client.enable(0)
    assert "leaves the IOVA range [0x0, 0x" in new_words(bare_blk, before)
    assert "[0x200000000000000, 0x2000000000fffff]" in new_words(bare_blk, before)
    bare_blk.works()


def test_memory_outside_the_iova_range_while_running(bare_blk: Bridge) -> None:
    """Only the new region is refused: the device goes on."""
    before = bare_blk.said()
    with speaking(bare_blk) as client:
        assert client.region(1 << 20)
        assert client.ring(0, 1 << 20)
        assert client.enable(0)
        assert not client.region(1 << 57)
        assert client.region(1 << 30)
    assert "ADD_MEM_REG" in new_words(bare_blk, before)
    assert "leaves the IOVA range" in new_words(bare_blk, before)
    bare_blk.works()


def test_too_little_may_be_pinned() -> None:
    """RLIMIT_MEMLOCK of the server: the log names the limit, what is needed, and what to do."""
    with bridging(node("VP_BLK"), memlock=128 << 10) as bridge:
        assert "refuses request" in run_client(bridge.path, "--bytes", 65536, status=REFUSED)["error"]
        said = bridge.said()
        assert "RLIMIT_MEMLOCK allows 131072" in said
        assert f"prlimit --pid {bridge.process.pid} --memlock=" in said
        run_client(bridge.path, "--requests", 20, "--bytes", 512)


def test_without_acknowledgements_a_refusal_ends_the_connection(bare_blk: Bridge) -> None:
    """Else the client would wait for requests that nobody sees."""
    before = bare_blk.said()
    with speaking(bare_blk, acknowledged=False) as client:
        client.say(m.ADD_MEM_REG, m.MemReg.of(m.MemoryRegion(1 << 57, SIZE, 1 << 57, 0)).pack(), (client.memory,))
        for row, payload in (
            (m.SET_VRING_NUM, VringState(0, 64)),
            (m.SET_VRING_ADDR, VringAddr(0, 0, 1 << 57, (1 << 57) + USED, (1 << 57) + AVAIL, 0)),
        ):
            client.say(row, payload.pack())
        client.events.append(os.eventfd(0))
        client.say(m.SET_VRING_KICK, U64(0).pack(), (client.events[0],))
        client.say(m.SET_VRING_ENABLE, VringState(0, 1).pack())
        with pytest.raises(RemoteProtocolError, match="closed the connection"):
            client.connection.ask(m.GET_FEATURES.number)
    assert "drop" in new_words(bare_blk, before)
    assert "leaves the IOVA range" in new_words(bare_blk, before)
    bare_blk.works()


def test_a_ring_starts_at_0_on_hardware(bare_blk: Bridge) -> None:
    before = bare_blk.said()
    with speaking(bare_blk) as client:
        assert client.region(1 << 20)
        assert client.ring(0, 1 << 20, base=7)
        assert not client.enable(0)
    assert "SET_VRING_BASE" in new_words(bare_blk, before)
    assert "index 0" in new_words(bare_blk, before)
    bare_blk.works()


def test_rings_enabled_one_after_the_other(vp_net: Bridge) -> None:
    """A device that enables no ring late gets them together; the client need not know."""
    before = vp_net.said()
    with speaking(vp_net, device_id=1) as client:
        assert client.region(1 << 20)
        assert client.ring(0, 1 << 20)
        assert client.ring(1, 1 << 20)
        assert client.enable(0)
        assert client.enable(1)
    assert new_words(vp_net, before) == ""


def test_a_ring_that_comes_later(vp_net: Bridge) -> None:
    """The device is reset for it and brought up with all, which works as long as the others have not moved."""
    before = vp_net.said()
    with speaking(vp_net, device_id=1) as client:
        assert client.region(1 << 20)
        for index in (1, 0):
            assert client.ring(index, 1 << 20)
            assert client.enable(index)
        assert client.connection.ask(m.GET_VRING_BASE.number, VringState(1, 0).pack()) == VringState(1, 0).pack()
    assert new_words(vp_net, before) == ""


def test_refused_mapping_in_vdpa_mode_is_an_errno(vp_blk: Bridge) -> None:
    """And the session goes on."""
    with vp_blk.device("blk", "require") as device, Region(Iova(1 << 20), SIZE) as region:
        device.own()
        with pytest.raises(OSError, match="IOTLB_UPDATE"):
            device.backend.call(ops.IOTLB_UPDATE, IotlbUpdate(Iova(1 << 57), SIZE, region.fd))
        device.backend.call(ops.IOTLB_UPDATE, region.update())
        assert device.backend.call(ops.GET_STATUS, EMPTY).value == 0
    vp_blk.release()
