# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The server's side of a connection without a socket: who decides the mode, and what a legacy client may and may not say."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vdpa_bridge import ops
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.errors import RemoteProtocolError
from vdpa_bridge.flags import VHOST_USER_F_PROTOCOL_FEATURES, Feature, ProtocolFeature, Status
from vdpa_bridge.models import make_model
from vdpa_bridge.vhost_user import messages as m
from vdpa_bridge.vhost_user.framing import HEADER, NEED_REPLY, VERSION, Frame
from vdpa_bridge.vhost_user.legacy_server import MAX_SLOTS
from vdpa_bridge.vhost_user.messages import NOFD, ConfigSpace, MemoryRegion, MemReg, MemTable
from vdpa_bridge.vhost_user.session import Session
from vdpa_bridge.vhost_user.vdpa_mode import HELLO_OP, OUR_HELLO
from vdpa_bridge.wire import EMPTY, U64, Iova, Payload, VringAddr, VringState

SIZE = 65536
GUEST, USER = 0x100000, 0x7F0000000000
"""Where the client's memory lies for its guest, and for itself."""
P = ProtocolFeature
AS_QEMU = P.MQ | P.REPLY_ACK | P.CONFIG | P.CONFIGURE_MEM_SLOTS | P.STATUS | P.RESET_DEVICE
MODERN = Feature.VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES


class Client:
    """Speaks to a session, message by message."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.memory = os.memfd_create("client", os.MFD_CLOEXEC)
        os.ftruncate(self.memory, SIZE)
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)

    def say(self, row: m.Legacy, payload: Payload = EMPTY, *fds: int, flags: int = VERSION) -> bytes:
        """The reply's payload; empty for none. Descriptors are duplicated, as a socket does."""
        data = payload.pack() if payload is not EMPTY else b""
        reply = self.session.handle(Frame(row.number, flags, data, [os.dup(fd) for fd in fds]))
        if not reply:
            return b""
        number, got, size = HEADER.unpack_from(reply)
        assert (number, got) == (row.number, 5)
        assert len(reply) == HEADER.size + size
        return reply[HEADER.size :]

    def refused(self, text: str, row: m.Legacy, payload: Payload = EMPTY, *fds: int) -> None:
        """The message ends the connection, with an error that says *text*."""
        with pytest.raises(RemoteProtocolError, match=text):
            self.say(row, payload, *fds)

    def number(self, row: m.Legacy) -> int:
        return U64.unpack(self.say(row)).value

    def negotiate(self, protocol: int = AS_QEMU) -> None:
        """As QEMU does."""
        self.say(m.GET_FEATURES)
        self.say(m.GET_PROTOCOL_FEATURES)
        self.say(m.SET_PROTOCOL_FEATURES, U64(protocol))
        self.say(m.SET_OWNER)
        self.say(m.SET_FEATURES, U64(MODERN))

    def share(self) -> None:
        """One region."""
        self.say(m.SET_MEM_TABLE, MemTable((MemoryRegion(GUEST, SIZE, USER, 0),)), self.memory)

    def ring(self, index: int = 0) -> None:
        """Everything about a ring but enabling it."""
        self.say(m.SET_VRING_NUM, VringState(index, 16))
        self.say(m.SET_VRING_BASE, VringState(index, 0))
        self.say(m.SET_VRING_ADDR, VringAddr(index, 0, Iova(USER), Iova(USER + 2048), Iova(USER + 1024), 0))
        self.say(m.SET_VRING_KICK, U64(index), self.kick)
        self.say(m.SET_VRING_CALL, U64(index | NOFD))

    @property
    def running(self) -> bool:
        """Whether the device is."""
        return bool(self.session._backend.call(ops.GET_STATUS, EMPTY).value & Status.DRIVER_OK)

    def close(self) -> None:
        os.close(self.memory)
        os.close(self.kick)


@contextmanager
def talking(kind: str = "blk", vdpa: str = "prefer") -> Iterator[Client]:
    device = ModelDevice(make_model(kind, {"size": "1M"} if kind == "blk" else {}), f"model:{kind}")
    session = Session(device.open(), vdpa)
    client = Client(session)
    try:
        yield client
    finally:
        session.close()
        client.close()
        device.open().close()
        device.close()


@pytest.fixture
def client() -> Iterator[Client]:
    with talking() as client:
        yield client


# Who decides -----------------------------------------------------------------------------------------------------------------------


def test_questions_decide_nothing(client: Client) -> None:
    for row in (m.GET_FEATURES, m.GET_PROTOCOL_FEATURES, m.SET_OWNER, m.GET_FEATURES):
        client.say(row)
    assert client.session.mode == "undecided"


def test_the_bit_decides_for_vdpa_mode(client: Client) -> None:
    assert client.number(m.GET_PROTOCOL_FEATURES) & ProtocolFeature.VDPA
    assert client.say(m.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.VDPA)) == b""
    assert client.session.mode == "vDPA"
    reply = client.session.handle(Frame(HELLO_OP.number, VERSION, OUR_HELLO.pack()))
    assert reply.endswith(OUR_HELLO.pack())
    reply = client.session.handle(Frame(ops.GET_DEVICE_ID.number, VERSION, b""))
    assert reply[HEADER.size :] == bytes(8) + b"\2\0\0\0"


@pytest.mark.parametrize("row", [m.SET_FEATURES, m.SET_VRING_CALL, m.GET_QUEUE_NUM])
def test_anything_else_decides_for_legacy(client: Client, row: m.Legacy) -> None:
    payload = {m.SET_FEATURES: U64(0), m.SET_VRING_CALL: U64(NOFD)}.get(row, EMPTY)
    client.say(row, payload)
    assert client.session.mode == "legacy"
    client.say(m.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.VDPA))
    assert client.session.mode == "legacy"


def test_off_means_not_offered() -> None:
    with talking(vdpa="off") as client:
        assert not client.number(m.GET_PROTOCOL_FEATURES) & ProtocolFeature.VDPA
        client.refused("not offered", m.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.VDPA))


def test_require_refuses_legacy() -> None:
    with talking(vdpa="require") as client:
        client.say(m.GET_FEATURES)
        client.refused("requires VHOST_USER_PROTOCOL_F_VDPA", m.SET_FEATURES, U64(0))


def test_last_words_are_for_vdpa_mode(client: Client) -> None:
    error = RemoteProtocolError("wrong", 0x1234)
    assert client.session.last_words(error) == b""
    client.say(m.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.VDPA))
    assert int.from_bytes(client.session.last_words(error)[12:16], "little") == errno.EPROTO
    assert client.session.last_words(RemoteProtocolError("no request known")) == b""


# What is offered ---------------------------------------------------------------------------------------------------------------------


def test_access_platform_is_hidden(client: Client) -> None:
    offered = client.number(m.GET_FEATURES)
    assert offered & Feature.VERSION_1
    assert offered & VHOST_USER_F_PROTOCOL_FEATURES
    assert not offered & Feature.ACCESS_PLATFORM
    client.refused("not offered", m.SET_FEATURES, U64(Feature.ACCESS_PLATFORM | MODERN))


@pytest.mark.parametrize("bit", [26, 41, 57, 63])
def test_features_that_were_not_offered(client: Client, bit: int) -> None:
    client.refused(f"{1 << bit:#x}", m.SET_FEATURES, U64(1 << bit))


@pytest.mark.parametrize("bit", [1, 12, 40, 63])
def test_protocol_features_that_were_not_offered(client: Client, bit: int) -> None:
    client.refused(f"{1 << bit:#x}", m.SET_PROTOCOL_FEATURES, U64(1 << bit))


@pytest.mark.parametrize(("kind", "count"), [("blk", 1), ("net", 3)])
def test_queues_are_counted(kind: str, count: int) -> None:
    with talking(kind) as client:
        client.negotiate()
        assert client.number(m.GET_QUEUE_NUM) == count


def test_unknown_message(client: Client) -> None:
    for number in (0, 6, 23, 31, 45, 99):
        with pytest.raises(RemoteProtocolError, match="not offered by this server"):
            client.session.handle(Frame(number, VERSION, b""))


# Life cycle --------------------------------------------------------------------------------------------------------------------------


def test_device_runs_once_a_ring_is_enabled(client: Client) -> None:
    client.negotiate()
    client.share()
    client.ring()
    assert not client.running
    client.say(m.SET_VRING_ENABLE, VringState(0, 1))
    assert client.running


def test_ring_is_enabled_before_it_is_set_up(client: Client) -> None:
    """DPDK's virtio-user enables first."""
    client.negotiate()
    client.share()
    client.say(m.SET_VRING_ENABLE, VringState(0, 1))
    assert not client.running
    client.ring()
    assert client.running


def test_rings_are_enabled_without_protocol_features(client: Client) -> None:
    """A kick descriptor starts a ring then (vhost-user, "Ring states")."""
    client.say(m.SET_FEATURES, U64(Feature.VERSION_1))
    client.share()
    client.ring()
    assert client.running


def test_stopping_the_last_ring_resets(client: Client) -> None:
    """And it can be started again, with memory that was not sent again, as SeaBIOS and Linux do in turn."""
    client.negotiate()
    client.share()
    for _ in range(3):
        client.ring()
        client.say(m.SET_VRING_ENABLE, VringState(0, 1))
        assert client.running
        client.say(m.SET_VRING_ENABLE, VringState(0, 0))
        assert VringState.unpack(client.say(m.GET_VRING_BASE, VringState(0, 0))) == VringState(0, 0)
        assert not client.running


def test_features_may_change_between_runs(client: Client) -> None:
    client.negotiate()
    client.share()
    client.ring()
    client.say(m.SET_VRING_ENABLE, VringState(0, 1))
    client.say(m.GET_VRING_BASE, VringState(0, 0))
    client.say(m.SET_FEATURES, U64(MODERN | Feature.RING_EVENT_IDX))
    client.ring()
    client.say(m.SET_VRING_ENABLE, VringState(0, 1))
    assert client.running


def test_status(client: Client) -> None:
    client.negotiate()
    client.say(m.SET_STATUS, U64(Status.ACKNOWLEDGE))
    assert client.number(m.GET_STATUS) == Status.ACKNOWLEDGE
    client.share()
    client.ring()
    client.say(m.SET_VRING_ENABLE, VringState(0, 1))
    client.say(m.SET_STATUS, U64(0))
    assert not client.running
    client.refused("not a byte", m.SET_STATUS, U64(0x100))


def test_reset_device(client: Client) -> None:
    client.negotiate()
    client.share()
    client.ring()
    client.say(m.SET_VRING_ENABLE, VringState(0, 1))
    client.say(m.RESET_DEVICE)
    assert not client.running


def test_acknowledgements(client: Client) -> None:
    """Asked for and negotiated: 0 for success, 1 for what the device refuses; a question has its reply alone."""
    client.negotiate()
    asking = VERSION | NEED_REPLY
    assert U64.unpack(client.say(m.SET_VRING_NUM, VringState(0, 16), flags=asking)).value == 0
    assert len(client.say(m.GET_FEATURES, flags=asking)) == 8
    client.say(m.SET_VRING_ADDR, VringAddr(0, 0, Iova(USER), Iova(USER + 2048), Iova(USER + 1024), 0))
    client.say(m.SET_VRING_KICK, U64(0), client.kick)
    assert U64.unpack(client.say(m.SET_VRING_ENABLE, VringState(0, 1), flags=asking)).value == 1


# Memory ----------------------------------------------------------------------------------------------------------------------------


def test_regions_come_and_go(client: Client) -> None:
    client.negotiate()
    region = MemoryRegion(GUEST, SIZE, USER, 0)
    for _ in range(3):
        client.say(m.ADD_MEM_REG, MemReg.of(region), client.memory)
        client.say(m.REM_MEM_REG, MemReg.of(region))
    assert client.number(m.GET_MAX_MEM_SLOTS) == MAX_SLOTS
    client.refused("no region", m.REM_MEM_REG, MemReg.of(region))


def test_regions_come_and_go_while_the_device_runs(client: Client) -> None:
    client.negotiate()
    client.share()
    client.ring()
    client.say(m.SET_VRING_ENABLE, VringState(0, 1))
    more = MemoryRegion(GUEST + SIZE, SIZE, USER + SIZE, 0)
    client.say(m.ADD_MEM_REG, MemReg.of(more), client.memory)
    client.say(m.REM_MEM_REG, MemReg.of(more), client.memory)
    assert client.running


def test_regions_added_once_per_queue_pair(client: Client) -> None:
    """QEMU 7.2 does so; the memory is there until it was removed as often. Another file at the same place is another region."""
    client.negotiate()
    region = MemReg.of(MemoryRegion(GUEST, SIZE, USER, 0))
    for _ in range(2):
        client.say(m.ADD_MEM_REG, region, client.memory)
    client.ring()
    client.say(m.SET_VRING_ENABLE, VringState(0, 1))
    client.say(m.REM_MEM_REG, region)
    client.say(m.GET_VRING_BASE, VringState(0, 0))
    client.ring()
    assert client.running
    client.say(m.REM_MEM_REG, region)
    client.refused("no region", m.REM_MEM_REG, region)


def test_another_file_at_the_place_of_a_region(client: Client) -> None:
    client.negotiate()
    other = os.memfd_create("other", os.MFD_CLOEXEC)
    try:
        os.ftruncate(other, SIZE)
        client.share()
        client.refused("overlap", m.ADD_MEM_REG, MemReg.of(MemoryRegion(GUEST, SIZE, USER, 0)), other)
    finally:
        os.close(other)


WRONG_REGIONS = {
    "empty": MemoryRegion(GUEST, 0, USER, 0),
    "guest address wraps": MemoryRegion((1 << 64) - 4096, 8192, USER, 0),
    "user address wraps": MemoryRegion(GUEST, 8192, (1 << 64) - 4096, 0),
    "offset wraps": MemoryRegion(GUEST, 8192, USER, (1 << 64) - 4096),
    "offset within a page": MemoryRegion(GUEST, 4096, USER, 2048),
}


@pytest.mark.parametrize("case", WRONG_REGIONS)
def test_wrong_regions(case: str) -> None:
    for table in (True, False):
        with talking() as client:
            client.negotiate()
            region = WRONG_REGIONS[case]
            if table:
                client.refused("region", m.SET_MEM_TABLE, MemTable((region,)), client.memory)
            else:
                client.refused("region", m.ADD_MEM_REG, MemReg.of(region), client.memory)


def test_regions_overlap(client: Client) -> None:
    client.negotiate()
    client.share()
    client.refused("overlap", m.ADD_MEM_REG, MemReg.of(MemoryRegion(GUEST + SIZE, SIZE, USER + 4096, 0)), client.memory)


def test_memory_that_is_too_short(client: Client) -> None:
    """Found when the device is to see it."""
    client.negotiate()
    client.say(m.SET_MEM_TABLE, MemTable((MemoryRegion(GUEST, 2 * SIZE, USER, 0),)), client.memory)
    client.ring()
    client.refused("memory", m.SET_VRING_ENABLE, VringState(0, 1))


@pytest.mark.parametrize("count", [9, 0xFFFFFFFF])
def test_table_that_is_too_long(client: Client, count: int) -> None:
    with pytest.raises(RemoteProtocolError, match="at most 8"):
        client.session.handle(Frame(m.SET_MEM_TABLE.number, VERSION, count.to_bytes(4, "little") + bytes(4 + 32 * 9)))
    with pytest.raises(RemoteProtocolError, match="announced in"):
        client.session.handle(Frame(m.SET_MEM_TABLE.number, VERSION, b"\2\0\0\0" + bytes(4 + 32)))


# Rings -----------------------------------------------------------------------------------------------------------------------------


def test_wrong_rings(client: Client) -> None:
    client.negotiate()
    client.refused("the device has 1", m.SET_VRING_NUM, VringState(1, 16))
    client.refused("the device has 1", m.SET_VRING_ADDR, VringAddr(0xFFFFFFFF, 0, Iova(0), Iova(0), Iova(0), 0))
    client.refused("the device has 1", m.SET_VRING_KICK, U64(255), client.kick)
    client.refused("the device has 1", m.GET_VRING_BASE, VringState(7, 0))
    for num in (0, 3, 512, 0x80000000):
        client.refused("power of two", m.SET_VRING_NUM, VringState(0, num))
    client.refused("16 bits", m.SET_VRING_BASE, VringState(0, 0x10000))
    client.refused("logging", m.SET_VRING_ADDR, VringAddr(0, 1, Iova(0), Iova(0), Iova(0), 0))
    client.refused("aligned", m.SET_VRING_ADDR, VringAddr(0, 0, Iova(8), Iova(0), Iova(0), 0))
    client.refused("0 or 1", m.SET_VRING_ENABLE, VringState(0, 2))
    client.refused("unknown bits", m.SET_VRING_CALL, U64(0x200), client.kick)


def test_ring_outside_of_memory(client: Client) -> None:
    client.negotiate()
    client.share()
    client.ring()
    client.say(m.SET_VRING_ADDR, VringAddr(0, 0, Iova(USER), Iova(USER + SIZE), Iova(USER + 1024), 0))
    client.refused("lies in no memory region", m.SET_VRING_ENABLE, VringState(0, 1))


@pytest.mark.parametrize("row", [m.SET_VRING_NUM, m.SET_VRING_ADDR, m.SET_FEATURES, m.ADD_MEM_REG, m.SET_STATUS])
@pytest.mark.parametrize("length", [0, 3, 200])
def test_payload_of_the_wrong_size(client: Client, row: m.Legacy, length: int) -> None:
    with pytest.raises(RemoteProtocolError, match=row.name):
        client.session.handle(Frame(row.number, VERSION, bytes(length), [os.dup(client.memory)] if row is m.ADD_MEM_REG else []))


# Configuration space ---------------------------------------------------------------------------------------------------------------


def test_config(client: Client) -> None:
    """As much as is asked for: what the device does not have is zero; nothing at all when it is out of bounds."""
    client.negotiate()
    whole = ConfigSpace.unpack(client.say(m.GET_CONFIG, ConfigSpace(0, 0, bytes(256))))
    assert len(whole.data) == 256
    assert int.from_bytes(whole.data[:8], "little") == 2048
    part = ConfigSpace.unpack(client.say(m.GET_CONFIG, ConfigSpace(4, 0, bytes(8))))
    assert part.data == whole.data[4:12]
    client.refused("SET_CONFIG", m.SET_CONFIG, ConfigSpace(0xFFFF, 0, bytes(4)))


@pytest.mark.parametrize("payload", [b"", bytes(11), bytes(4) + b"\1\1\0\0" + bytes(4 + 257), bytes(4) + b"\4\0\0\0" + bytes(4 + 3)])
def test_config_that_lies_about_its_size(client: Client, payload: bytes) -> None:
    client.negotiate()
    with pytest.raises(RemoteProtocolError, match="configuration payload"):
        client.session.handle(Frame(m.GET_CONFIG.number, VERSION, payload))
