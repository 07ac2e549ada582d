# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The receiver: messages in whatever pieces, each with its own descriptors, and none lost or left open."""

from __future__ import annotations

import os
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdpa_bridge import ops
from vdpa_bridge.errors import RemoteProtocolError
from vdpa_bridge.vhost_user import messages as m
from vdpa_bridge.vhost_user.framing import HEADER, MAX_FDS, Frame, Receiver, frame
from vdpa_bridge.vhost_user.messages import NOFD, MemoryRegion, MemTable, message_name
from vdpa_bridge.vhost_user.vdpa_mode import MAX_PAYLOAD, fds_wanted
from vdpa_bridge.wire import U8, U64, IotlbUpdate, Iova, VringFile, VringState

QUESTION = frame(ops.GET_STATUS.number)
KICK = frame(ops.SET_VRING_KICK.number, VringFile(0, 0).pack())
UNKICK = frame(ops.SET_VRING_KICK.number, VringFile(0, -1).pack())
MAP = frame(ops.IOTLB, IotlbUpdate(Iova(0), 4096, 0).message())
LEGACY_CALL = frame(m.SET_VRING_CALL.number, U64(0).pack())
LEGACY_NO_CALL = frame(m.SET_VRING_CALL.number, U64(NOFD).pack())
TABLE = frame(m.SET_MEM_TABLE.number, MemTable((MemoryRegion(0, 4096, 0, 0), MemoryRegion(4096, 4096, 4096, 0))).pack())
CLAIMS = {QUESTION: 0, KICK: 1, UNKICK: 0, MAP: 1, LEGACY_CALL: 1, LEGACY_NO_CALL: 0, TABLE: 2}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver(fds_wanted, MAX_PAYLOAD, message_name)
    yield receiver
    receiver.close()


def fd() -> int:
    """A descriptor to give away."""
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


def drain(receiver: Receiver) -> list[Frame]:
    """All whole messages; their descriptors are closed."""
    frames = []
    while (message := receiver.next()) is not None:
        frames.append(message)
    return frames


def test_byte_by_byte(receiver: Receiver) -> None:
    data = frame(ops.SET_STATUS.number, U8(7).pack())
    for byte in data[:-1]:
        receiver.feed(bytes([byte]), [])
        assert receiver.next() is None
        assert receiver.partial
    receiver.feed(data[-1:], [])
    message = receiver.next()
    assert message == Frame(ops.SET_STATUS.number, 1, b"\7")
    assert not receiver.partial
    assert receiver.next() is None


def test_glued(receiver: Receiver) -> None:
    receiver.feed(QUESTION * 3 + QUESTION[:5], [])
    assert len(drain(receiver)) == 3
    assert receiver.partial


def test_each_claims_its_own(receiver: Receiver) -> None:
    """Glued messages and queued descriptors: first come, first served, by what each announces."""
    fds = [fd() for _ in range(5)]
    receiver.feed(KICK + UNKICK + QUESTION + MAP + TABLE + LEGACY_CALL, fds)
    frames = drain(receiver)
    assert [message.fds for message in frames] == [fds[:1], [], [], fds[1:2], fds[2:4], fds[4:]]
    for message in frames:
        message.close()
        message.close()
        assert message.fds == []


def test_descriptors_come_with_the_first_byte(receiver: Receiver) -> None:
    mine = fd()
    receiver.feed(KICK[:1], [mine])
    assert receiver.next() is None
    receiver.feed(KICK[1:], [])
    message = receiver.next()
    assert message is not None
    assert message.take_fds() == [mine]
    message.close()
    os.fstat(mine)
    os.close(mine)


@pytest.mark.parametrize("message", [KICK, MAP, TABLE, LEGACY_CALL])
def test_missing_descriptors(receiver: Receiver, message: bytes) -> None:
    given = [fd() for _ in range(CLAIMS[message] - 1)]
    receiver.feed(message, given)
    with pytest.raises(RemoteProtocolError, match=f"{CLAIMS[message]} descriptors announced, {len(given)} came"):
        receiver.next()


@pytest.mark.parametrize("message", list(CLAIMS))
def test_surplus_descriptors(receiver: Receiver, message: bytes) -> None:
    """Closed with the connection, those that were claimed too."""
    before = len(os.listdir("/proc/self/fd"))
    receiver.feed(message, [fd() for _ in range(CLAIMS[message] + 1)])
    with pytest.raises(RemoteProtocolError, match="1 more descriptors"):
        receiver.next()
    receiver.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_too_many_descriptors(receiver: Receiver) -> None:
    receiver.feed(b"", [fd() for _ in range(MAX_FDS)])
    with pytest.raises(RemoteProtocolError, match=f"at most {MAX_FDS}"):
        receiver.feed(b"", [fd()])


@pytest.mark.parametrize("flags", [0, 2, 3, 0x10, 0xFFFFFFFF])
def test_version(receiver: Receiver, flags: int) -> None:
    receiver.feed(HEADER.pack(m.GET_FEATURES.number, flags, 0), [])
    with pytest.raises(RemoteProtocolError, match="version") as error:
        receiver.next()
    assert error.value.request == m.GET_FEATURES.number


@pytest.mark.parametrize("size", [MAX_PAYLOAD + 1, 0xFFFFFFFF])
def test_size(receiver: Receiver, size: int) -> None:
    """Refused by the header alone: nothing of it is waited for."""
    receiver.feed(HEADER.pack(ops.SET_CONFIG.number, 1, size), [])
    with pytest.raises(RemoteProtocolError, match="at most"):
        receiver.next()


def test_largest(receiver: Receiver) -> None:
    receiver.feed(frame(ops.SET_CONFIG.number, bytes(MAX_PAYLOAD)), [])
    message = receiver.next()
    assert message is not None
    assert len(message.payload) == MAX_PAYLOAD


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(list(CLAIMS)), min_size=1, max_size=12), st.integers(0, 1 << 32))
def test_any_cuts(messages: list[bytes], seed: int) -> None:
    """However the stream is cut, the same messages come out, and each has its descriptors.

    As on a socket: the descriptors of a message arrive with its first byte, and no delivery crosses the next such byte.
    """
    receiver = Receiver(fds_wanted, MAX_PAYLOAD, message_name)
    random = Random(seed)
    got: list[Frame] = []
    sent: list[list[int]] = []
    try:
        for message in messages:
            fds = [fd() for _ in range(CLAIMS[message])]
            sent.append(fds)
            rest = message
            while rest:
                cut = random.randint(1, len(rest))
                receiver.feed(rest[:cut], fds)
                rest, fds = rest[cut:], []
                if random.random() < 0.5:
                    got += drain(receiver)
        got += drain(receiver)
        assert [frame(g.request, g.payload, g.flags) for g in got] == messages
        assert [g.fds for g in got] == sent
    finally:
        receiver.close()
        for g in got:
            g.close()


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.binary(max_size=30), st.integers(0, 3)), max_size=10))
def test_any_bytes(pieces: list[tuple[bytes, int]]) -> None:
    """Noise gives messages or RemoteProtocolError, and no descriptor stays open."""
    before = len(os.listdir("/proc/self/fd"))
    receiver = Receiver(fds_wanted, MAX_PAYLOAD, message_name)
    got: list[Frame] = []
    try:
        for data, count in pieces:
            receiver.feed(data, [fd() for _ in range(count)])
            got += drain(receiver)
    except RemoteProtocolError:
        pass  # one of the two allowed ends
    finally:
        receiver.close()
        for message in got:
            message.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_names() -> None:
    """Errors name what the peer sent, known or not."""
    assert message_name(8) == "SET_VRING_NUM (8)"
    assert message_name(41) == "GET_SHARED_OBJECT (41)"
    assert message_name(ops.GET_STATUS.number) == f"GET_STATUS ({ops.GET_STATUS.number:#x})"
    assert "IOTLB" in message_name(ops.IOTLB)
    assert message_name(0x1234) == "request 0x1234"
    assert frame(ops.SET_VRING_NUM.number, VringState(0, 1).pack())[:4] == ops.SET_VRING_NUM.number.to_bytes(4, "little")
