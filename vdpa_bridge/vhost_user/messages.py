# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The messages of legacy vhost-user, once: number, name, payloads, descriptors, gate.

Source: the vhost-user specification (QEMU docs/interop/vhost-user.rst). Only messages that one of our two roles speaks
have a row; for the rest there is a name, so that refusals and traces can say what the peer wanted.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self

from .. import ops
from ..flags import ProtocolFeature as P
from ..wire import EMPTY, U64, Empty, Payload, Struct, VringAddr, VringState, immutable, u8, u32, u64

MAX_REGIONS = 8
"""Regions in one SET_MEM_TABLE."""
NOFD = 0x100
"""Bit 8 of the u64 of SET_VRING_KICK, _CALL, _ERR: no descriptor comes along."""
MAX_CONFIG = 256
"""Bytes of configuration space that one message can carry."""


class MemoryRegion(Struct):
    """One region of a memory table: guest address, size, the front-end's user address, offset in the descriptor."""

    guest_addr: u64
    size: u64
    user_addr: u64
    mmap_offset: u64


class MemReg(Struct):
    """Payload of ADD_MEM_REG and REM_MEM_REG."""

    padding: u64
    guest_addr: u64
    size: u64
    user_addr: u64
    mmap_offset: u64

    @property
    def region(self) -> MemoryRegion:
        """Without the padding."""
        return MemoryRegion(self.guest_addr, self.size, self.user_addr, self.mmap_offset)

    @classmethod
    def of(cls, region: MemoryRegion) -> Self:
        """With the padding."""
        return cls(0, region.guest_addr, region.size, region.user_addr, region.mmap_offset)


class IotlbMessage(Struct, pad=6):
    """Payload of IOTLB_MSG, in either direction: ``struct vhost_iotlb_msg``, 32 bytes. *uaddr* is the front-end's."""

    iova: u64
    size: u64
    uaddr: u64
    perm: u8
    type: u8


MISS, UPDATE, INVALIDATE = 1, 2, 3
"""Types of an IOTLB message (VHOST_IOTLB_* of linux/vhost_types.h)."""


class _TableHead(Struct):
    count: u32
    padding: u32


@immutable
class MemTable(Payload):
    """Payload of SET_MEM_TABLE: 1 to 8 regions."""

    regions: tuple[MemoryRegion, ...]

    def pack(self) -> bytes:
        return _TableHead(len(self.regions), 0).pack() + b"".join(r.pack() for r in self.regions)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Self:
        head_size, size = _TableHead.layout.size, MemoryRegion.layout.size
        if len(data) < head_size:
            raise ValueError(f"memory table of {len(data)} bytes")
        count = _TableHead.unpack(data[:head_size]).count
        if count > MAX_REGIONS:
            raise ValueError(f"{count} memory regions, at most {MAX_REGIONS} are allowed")
        if len(data) < head_size + count * size:
            raise ValueError(f"{count} memory regions announced in {len(data)} bytes")
        return cls(tuple(MemoryRegion.unpack(data[at : at + size]) for at in range(head_size, head_size + count * size, size)))


_CONFIG_HEAD = struct.Struct("=III")


@immutable
class ConfigSpace(Payload):
    """Payload of GET_CONFIG and SET_CONFIG: u32 offset, size, flags, then the bytes. An empty one is an error reply."""

    offset: int
    flags: int
    data: bytes

    def pack(self) -> bytes:
        return _CONFIG_HEAD.pack(self.offset, len(self.data), self.flags) + self.data

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Self:
        if len(data) < _CONFIG_HEAD.size:
            raise ValueError(f"configuration payload of {len(data)} bytes")
        offset, size, flags = _CONFIG_HEAD.unpack_from(data)
        if size > MAX_CONFIG or len(data) < _CONFIG_HEAD.size + size:
            raise ValueError(f"configuration payload announces {size} bytes and brings {len(data) - _CONFIG_HEAD.size} (at most {MAX_CONFIG})")
        return cls(offset, flags, bytes(data[_CONFIG_HEAD.size : _CONFIG_HEAD.size + size]))


@dataclass(frozen=True)
class Legacy:
    """One message from front-end to back-end. *reply* None: only acknowledged, if asked for."""

    number: int
    name: str
    request: type[Payload] = Empty
    reply: type[Payload] | None = None
    needs: P | None = None
    fds: tuple[int, int] = (0, 0)


# fmt: off
GET_FEATURES          = Legacy(1, "GET_FEATURES", reply=U64)
SET_FEATURES          = Legacy(2, "SET_FEATURES", U64)
SET_OWNER             = Legacy(3, "SET_OWNER")
RESET_OWNER           = Legacy(4, "RESET_OWNER")
SET_MEM_TABLE         = Legacy(5, "SET_MEM_TABLE", MemTable, fds=(0, MAX_REGIONS))
SET_VRING_NUM         = Legacy(8, "SET_VRING_NUM", VringState)
SET_VRING_ADDR        = Legacy(9, "SET_VRING_ADDR", VringAddr)
SET_VRING_BASE        = Legacy(10, "SET_VRING_BASE", VringState)
GET_VRING_BASE        = Legacy(11, "GET_VRING_BASE", VringState, VringState)
SET_VRING_KICK        = Legacy(12, "SET_VRING_KICK", U64, fds=(0, 1))
SET_VRING_CALL        = Legacy(13, "SET_VRING_CALL", U64, fds=(0, 1))
SET_VRING_ERR         = Legacy(14, "SET_VRING_ERR", U64, fds=(0, 1))
GET_PROTOCOL_FEATURES = Legacy(15, "GET_PROTOCOL_FEATURES", reply=U64)
SET_PROTOCOL_FEATURES = Legacy(16, "SET_PROTOCOL_FEATURES", U64)
GET_QUEUE_NUM         = Legacy(17, "GET_QUEUE_NUM", reply=U64, needs=P.MQ)
SET_VRING_ENABLE      = Legacy(18, "SET_VRING_ENABLE", VringState)
SET_BACKEND_REQ_FD    = Legacy(21, "SET_BACKEND_REQ_FD", needs=P.BACKEND_REQ, fds=(1, 1))
IOTLB_MSG             = Legacy(22, "IOTLB_MSG", IotlbMessage, needs=P.BACKEND_REQ)
GET_CONFIG            = Legacy(24, "GET_CONFIG", ConfigSpace, ConfigSpace, P.CONFIG)
SET_CONFIG            = Legacy(25, "SET_CONFIG", ConfigSpace, needs=P.CONFIG)
RESET_DEVICE          = Legacy(34, "RESET_DEVICE", needs=P.RESET_DEVICE)
GET_MAX_MEM_SLOTS     = Legacy(36, "GET_MAX_MEM_SLOTS", reply=U64, needs=P.CONFIGURE_MEM_SLOTS)
ADD_MEM_REG           = Legacy(37, "ADD_MEM_REG", MemReg, needs=P.CONFIGURE_MEM_SLOTS, fds=(1, 1))
REM_MEM_REG           = Legacy(38, "REM_MEM_REG", MemReg, needs=P.CONFIGURE_MEM_SLOTS, fds=(0, 1))
SET_STATUS            = Legacy(39, "SET_STATUS", U64, needs=P.STATUS)
GET_STATUS            = Legacy(40, "GET_STATUS", reply=U64, needs=P.STATUS)
# fmt: on

BACKEND_IOTLB = 1
"""IOTLB_MSG from back-end to front-end, on the socket of SET_BACKEND_REQ_FD: a MISS."""
BACKEND_CONFIG_CHANGE = 2
"""CONFIG_CHANGE_MSG, on the same socket."""

BY_NUMBER: dict[int, Legacy] = {row.number: row for row in list(globals().values()) if isinstance(row, Legacy)}
_FDS = {row.number: row.fds for row in BY_NUMBER.values() if row is not SET_MEM_TABLE and (row.request is not U64 or row.fds != (0, 1))}
"""Least and most descriptors of those whose content does not matter for it."""

_OTHER_NAMES = {
    6: "SET_LOG_BASE",
    7: "SET_LOG_FD",
    19: "SEND_RARP",
    20: "NET_SET_MTU",
    23: "SET_VRING_ENDIAN",
    26: "CREATE_CRYPTO_SESSION",
    27: "CLOSE_CRYPTO_SESSION",
    28: "POSTCOPY_ADVISE",
    29: "POSTCOPY_LISTEN",
    30: "POSTCOPY_END",
    31: "GET_INFLIGHT_FD",
    32: "SET_INFLIGHT_FD",
    33: "GPU_SET_SOCKET",
    35: "VRING_KICK",
    41: "GET_SHARED_OBJECT",
    42: "SET_DEVICE_STATE_FD",
    43: "CHECK_DEVICE_STATE",
    44: "GET_SHMEM_CONFIG",
    45: "GET_VRING_BASE_SKIP_DRAIN",
}


def message_name(number: int) -> str:
    """``SET_VRING_NUM (8)``, ``GET_STATUS (0x8001af71)``, ``request 99``."""
    if row := BY_NUMBER.get(number):
        return f"{row.name} ({number})"
    if other := _OTHER_NAMES.get(number):
        return f"{other} ({number})"
    if number == ops.IOTLB:
        return f"IOTLB message ({number:#x})"
    if op := ops.by_message(number, b""):
        return f"{op.name} ({number:#x})"
    return f"request {number:#x}"


def legacy_fds(number: int, payload: bytes) -> tuple[int, int]:
    """Least and most descriptors of a legacy message."""
    if (always := _FDS.get(number)) is not None:
        return always
    row = BY_NUMBER.get(number)
    if row is None:
        return 0, MAX_REGIONS
    if row.request is U64:
        announced = len(payload) == 8 and not int.from_bytes(payload, "little") & NOFD
        return (1, 1) if announced else (0, 0)
    count = min(int.from_bytes(payload[:4], "little"), MAX_REGIONS)
    return count, count


__all__ = ["BY_NUMBER", "EMPTY", "ConfigSpace", "IotlbMessage", "Legacy", "MemReg", "MemTable", "MemoryRegion", "legacy_fds", "message_name"]
