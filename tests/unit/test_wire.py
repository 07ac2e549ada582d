# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Structs to bytes and back, as the kernel wants them and as a socket wants them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdpa_bridge import ops
from vdpa_bridge.wire import (
    EMPTY,
    U8,
    U16,
    U32,
    U64,
    ConfigData,
    ConfigRange,
    Empty,
    EventFile,
    IotlbBatchBegin,
    IotlbBatchEnd,
    IotlbInvalidate,
    IotlbMsg,
    IotlbUpdate,
    Iova,
    IovaRange,
    Payload,
    Struct,
    VringAddr,
    VringFile,
    VringState,
    describe,
)

bounded = settings(max_examples=200, deadline=None, derandomize=True, database=None)
STRUCTS = [U8, U16, U32, U64, VringState, VringFile, VringAddr, EventFile, IovaRange, IotlbMsg, Empty]
_LIMITS = {"B": (0, 0xFF), "H": (0, 0xFFFF), "I": (0, 0xFFFFFFFF), "Q": (0, (1 << 64) - 1), "i": (-(1 << 31), (1 << 31) - 1)}


def values(kind: type[Struct]) -> st.SearchStrategy[Struct]:
    """Any value of a struct."""
    codes = [code for code in kind.layout.format[1:] if code in _LIMITS]
    return st.tuples(*[st.integers(*_LIMITS[code]) for code in codes]).map(lambda numbers: kind(*numbers))


u32s, u64s = st.integers(*_LIMITS["I"]), st.integers(*_LIMITS["Q"])
iotlb = st.one_of(
    st.builds(IotlbUpdate, u64s, u64s, st.just(5), u64s, st.integers(0, 255), u32s),
    st.builds(IotlbInvalidate, u64s, u64s, u32s),
    st.builds(IotlbBatchBegin, u32s),
    st.builds(IotlbBatchEnd, u32s),
)


@bounded
@given(st.one_of([values(kind) for kind in STRUCTS]))
def test_struct_round_trip(value: Struct) -> None:
    assert type(value).unpack(value.pack()) == value
    assert len(value.pack()) == type(value).layout.size


@bounded
@given(st.one_of([values(kind) for kind in STRUCTS]), st.integers(1, 9))
def test_any_other_length_is_refused(value: Struct, more: int) -> None:
    data = value.pack()
    for wrong in (data + bytes(more), data[:-more]):
        if len(wrong) != len(data):
            with pytest.raises(ValueError, match=type(value).__name__):
                type(value).unpack(wrong)


@bounded
@given(st.one_of(iotlb, st.builds(ConfigData, u32s, st.binary(max_size=300)), st.builds(ConfigRange, u32s, u32s), *map(values, STRUCTS)))
def test_message_round_trip(value: Payload) -> None:
    """What travels through a socket arrives, each descriptor as the number that it has on the other side."""
    data, fds = value.to_message()
    assert type(value).fds_wanted(data) == len(fds)
    back = type(value).from_message(data, list(fds))
    if isinstance(value, VringFile | EventFile) and value.fd < 0:
        assert back.fd == -1  # type: ignore[attr-defined]
    else:
        assert back == value


@bounded
@given(st.integers(0, 0xFFFFFFFF), st.binary(max_size=64))
def test_config_says_how_much_follows(offset: int, data: bytes) -> None:
    packed = ConfigData(offset, data).pack()
    assert packed == struct.pack("=II", offset, len(data)) + data
    for wrong in (packed + b"\0", packed[:-1], packed[:7], b""):
        with pytest.raises(ValueError, match="vhost_vdpa_config"):
            ConfigData.unpack(wrong)


def test_layouts_by_hand() -> None:
    """Once written out, so that a change of the machinery is noticed."""
    assert VringAddr(1, 2, Iova(3), Iova(4), Iova(5), 6).pack() == struct.pack("=IIQQQQ", 1, 2, 3, 4, 5, 6)
    assert VringFile(7, -1).pack() == struct.pack("=Ii", 7, -1)
    assert IotlbUpdate(Iova(0x1000), 0x2000, 9, 0x3000, 3, 1).message(0x3000) == struct.pack("=IIQQQBB", 2, 1, 0x1000, 0x2000, 0x3000, 3, 2) + bytes(38)
    assert IotlbInvalidate(Iova(0x1000), 0x2000).message() == struct.pack("=IIQQQBB", 2, 0, 0x1000, 0x2000, 0, 0, 3) + bytes(38)
    assert IotlbBatchBegin(3).message()[:8] == struct.pack("=II", 2, 3)
    assert IotlbBatchEnd().message()[33] == 6


def test_descriptors_travel_beside() -> None:
    assert VringFile(3, 77).to_message() == (struct.pack("=Ii", 3, 0), (77,))
    assert VringFile(3, -1).to_message() == (struct.pack("=Ii", 3, -1), ())
    assert VringFile(3, -5).to_message() == (struct.pack("=Ii", 3, -1), ())
    assert EventFile(4).to_message() == (bytes(4), (4,))
    assert VringFile.from_message(struct.pack("=Ii", 3, 0), [12]) == VringFile(3, 12)


@pytest.mark.parametrize(("mark", "fds"), [(1, []), (-2, []), (5, [3])])
def test_descriptor_field_is_a_mark(mark: int, fds: list[int]) -> None:
    with pytest.raises(ValueError, match=r"0 .*-1"):
        VringFile.from_message(struct.pack("=Ii", 0, mark), fds)


@pytest.mark.parametrize("version", [0, 1, 3])
def test_only_version_2_of_iotlb_messages(version: int) -> None:
    data = bytearray(IotlbInvalidate(Iova(0), 4096).message())
    data[0] = version
    with pytest.raises(ValueError, match=f"type is {version}"):
        IotlbInvalidate.from_message(bytes(data), [])


def test_payloads_are_values() -> None:
    assert {VringState(1, 2), VringState(1, 2)} == {VringState(1, 2)}
    assert VringState(1, 2) != VringState(2, 1)
    assert U64(1) != U8(1)


def test_values_that_do_not_fit_are_refused() -> None:
    for wrong in (VringState(-1, 0), VringState(0, 1 << 32), U8(256), VringAddr(0, 0, Iova(1 << 64), Iova(0), Iova(0), 0)):
        with pytest.raises(struct.error):
            wrong.pack()


def test_iotlb_payloads_have_no_struct_of_their_own() -> None:
    """Without an address the kernel's struct cannot be written: only ``message`` can."""
    with pytest.raises(TypeError, match="IotlbUpdate"):
        IotlbUpdate(Iova(0), 4096, 3).pack()
    with pytest.raises(TypeError, match="IotlbUpdate"):
        IotlbUpdate.unpack(bytes(72))


def test_describe() -> None:
    assert describe(VringState(1, 256)) == "index=1 num=256"
    assert "0x1000" in describe(IotlbUpdate(Iova(0x1000), 0x2000, 3))
    assert describe(EMPTY) == ""
    assert "..." in describe(ConfigData(0, bytes(100)))


@pytest.mark.parametrize("op", ops.TABLE, ids=lambda op: op.name)
def test_by_message(op: ops.Op[Payload, Payload]) -> None:
    """A number, and for IOTLB messages the type inside, is an operation; a message cut short is none."""
    payload = IotlbMsg(2, 0, Iova(0), 0, 0, 0, op.msgtype).pack() if op.msgtype is not None else b""
    assert ops.by_message(op.number, payload) is op
    if op.msgtype is not None:
        assert ops.by_message(op.number, payload[:-1]) is None
        assert ops.by_message(op.number, b"") is None
