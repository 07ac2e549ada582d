# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A client that means harm: from a seed, streams of messages that go deep into a session and then wrong.

Rule of this file: everything follows from the seed. Most messages are well framed and make sense at their place, as nonsense is
refused before it can do anything; values, order, descriptors and cuts go wrong at a rate that is the session's own.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from vdpa_bridge import ops
from vdpa_bridge.flags import Feature, ProtocolFeature
from vdpa_bridge.vhost_user import messages as m
from vdpa_bridge.vhost_user.framing import HEADER, NEED_REPLY, REPLY_FLAGS, VERSION
from vdpa_bridge.vhost_user.vdpa_mode import HELLO_OP
from vdpa_bridge.vhost_user.vdpa_mode import fds_wanted as wanted
from vdpa_bridge.wire import (
    EMPTY,
    U8,
    U64,
    ConfigData,
    ConfigRange,
    IotlbMsg,
    IotlbPayload,
    Iova,
    Payload,
    Struct,
    VringAddr,
    VringFile,
    VringState,
)

from .raw import ENTER, HELLO

FULL = (1 << 64) - 2
"""The largest count of an eventfd: whoever adds to it has to wait."""
MEMORY = 1 << 16
RING = 16
DESC, AVAIL, USED = 0, 1024, 2048
"""Where a ring of RING entries lies in the memory."""
BASE = 0x100000
"""Where the memory lies for the device."""
USER = 0x7F0000000000
"""Where a legacy client says it has it."""
RUNNING = Feature.VERSION_1 | Feature.ACCESS_PLATFORM
OFFERED = ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG | ProtocolFeature.CONFIGURE_MEM_SLOTS | ProtocolFeature.STATUS
OFFERED |= ProtocolFeature.BACKEND_REQ
U64S = (0, 1, 2, 4095, 4096, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1)


class Stock:
    """Descriptors of every kind, opened once and lent to whoever sends them."""

    def __init__(self) -> None:
        self._close = contextlib.ExitStack()
        directory = self._close.enter_context(tempfile.TemporaryDirectory(prefix="vb"))
        self.fds: dict[str, int] = {}
        memory = self._memory("memory", MEMORY)
        self._memory("short memory", 4096)
        self._memory("odd memory", 5000)
        self._memory("no memory", 0)
        self._memory("named like an [eventfd]", 8192, "[eventfd]")
        self._add("read-only memory", os.open(f"/proc/self/fd/{memory}", os.O_RDONLY | os.O_CLOEXEC))
        self._add("kick", os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._add("call", os.eventfd(0, os.EFD_CLOEXEC))
        self._add("semaphore", os.eventfd(5, os.EFD_CLOEXEC | os.EFD_SEMAPHORE))
        os.eventfd_write(self._add("full", os.eventfd(0, os.EFD_CLOEXEC)), FULL)
        for name, fd in zip(("pipe's end", "pipe's beginning"), os.pipe2(os.O_CLOEXEC), strict=True):
            self._add(name, fd)
        deaf, broken = os.pipe2(os.O_CLOEXEC)
        os.close(deaf)
        self._add("broken pipe", broken)
        self._add("directory", os.open(directory, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY))
        self._add("null", os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))
        here, there = socket.socketpair()
        self._add("socket", here.detach())
        self._add("other end", there.detach())
        here, there = socket.socketpair()
        there.close()
        self._add("lonely socket", here.detach())
        self._add("datagram socket", socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach())
        with socket.socket(socket.AF_UNIX) as named:
            named.bind(f"{directory}/s")
            self._add("name of a socket", os.open(f"{directory}/s", os.O_PATH | os.O_CLOEXEC))

    def _add(self, name: str, fd: int) -> int:
        self._close.callback(os.close, fd)
        self.fds[name] = fd
        return fd

    def _memory(self, name: str, size: int, called: str = "hostile") -> int:
        fd = self._add(name, os.memfd_create(called, os.MFD_CLOEXEC))
        os.ftruncate(fd, size)
        return fd

    def __getitem__(self, name: str) -> int:
        return self.fds[name]

    def scribble(self, data: bytes, at: int = 0) -> None:
        """Write into the memory."""
        os.pwrite(self.fds["memory"], data, at)

    def refresh(self) -> None:
        """Undo what a device, or a session before, has done to what is shared."""
        fds = self.fds
        for end in ("socket", "other end"):
            with socket.socket(fileno=os.dup(fds[end])) as sock, contextlib.suppress(BlockingIOError):
                while sock.recv(1 << 16, socket.MSG_DONTWAIT):
                    pass
        os.ftruncate(fds["memory"], MEMORY)
        for name in ("kick", "full"):
            with contextlib.suppress(BlockingIOError):
                os.preadv(fds[name], [bytearray(8)], -1, os.RWF_NOWAIT)
        os.eventfd_write(fds["full"], FULL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._close.close()


@dataclass
class Chunk:
    """What one sendmsg sends: bytes, and the names of descriptors from the stock."""

    data: bytes
    fds: list[str] = field(default_factory=list)


class Hostile:
    """Makes sessions. *mode* is ``vdpa`` or ``legacy``; *rate* is the share of values that are wrong."""

    def __init__(self, seed: str) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.rate = self.random.choice((0.005, 0.02, 0.1))
        self.mode = self.random.choice(("vdpa", "vdpa", "legacy", "legacy"))
        self.translates = self.mode == "legacy" and self.random.random() < 0.5
        """Whether its guest has an IOMMU, if the server has a part for it."""
        self.features = 1 << 32 | 1 << 30 | self.translates << 33

    # Values ----------------------------------------------------------------------------------------------------------------

    def wrong(self) -> bool:
        """Whether the next thing is to be wrong."""
        return self.random.random() < self.rate

    def number(self, bits: int = 64) -> int:
        """A number that somebody may have forgotten."""
        pick = self.random
        value = pick.choice(U64S) if pick.random() < 0.7 else pick.getrandbits(pick.choice((4, 8, 16, 32, 64)))
        return value & ((1 << bits) - 1)

    def index(self) -> int:
        return self.number(32) if self.wrong() else self.random.choice((0, 0, 0, 1, 2))

    def address(self) -> int:
        if self.wrong():
            return self.number()
        base = USER if self.mode == "legacy" and not self.translates else BASE
        return base + self.random.choice((0, 0, AVAIL, USED, 4096, MEMORY - 4096, MEMORY))

    def event(self) -> str:
        return self.random.choice(list(_STOCK_NAMES)) if self.wrong() else self.random.choice(("kick", "call", "semaphore", "full"))

    def memory(self) -> str:
        return self.random.choice(list(_STOCK_NAMES)) if self.wrong() else "memory"

    def status(self) -> int:
        return self.number(8) if self.wrong() else self.random.choice((0, 1, 3, 11, 15, 15))

    def field_of(self, name: str, bits: int, op: str) -> int:
        """A value for a struct's field by its name."""
        pick = self.random
        if self.wrong():
            return self.number(bits)
        match name:
            case "index":
                return self.index() & 0xFFFFFFFF
            case "num" if "ENABLE" in op:
                return pick.choice((0, 1, 1))
            case "num" if "BASE" in op or "GROUP" in op:
                return pick.choice((0, 0, 1, 2))
            case "num":
                return pick.choice((RING, 8, 256))
            case "desc" | "avail" | "used":
                return (USER if self.mode == "legacy" and not self.translates else BASE) + {"desc": DESC, "avail": AVAIL, "used": USED}[name]
            case "value" if "STATUS" in op:
                return self.status()
            case "value" if op == "SET_FEATURES":
                return int(RUNNING | pick.choice((0, Feature.RING_INDIRECT_DESC, Feature.RING_EVENT_IDX)))
            case "value" if op == "SET_BACKEND_FEATURES":
                return pick.choice((0x2, 0x7E, 0x17E))
            case "fd":
                return pick.choice((0, 0, -1)) & 0xFFFFFFFF
            case "iova":
                return BASE + 4096 * pick.choice((0, 0, *range(15)))
            case "size":
                return pick.choice((4096, 4096, 4096, 8192, MEMORY))
            case "uaddr":
                return USER + 4096 * pick.choice((0, 0, *range(15)))
            case "perm":
                return pick.choice((1, 2, 3, 3, 3))
            case "type":
                return pick.choice((2, 2, 2, 3))
            case _:
                return 0

    def struct_of(self, kind: type[Struct], op: str) -> bytes:
        """The bytes of a struct with such values."""
        codes = [code for code in kind.layout.format if code in "BHIQi"]
        values: list[int] = []
        for name, code in zip(kind.names, codes, strict=True):
            bits = 8 * struct.calcsize("=" + code)
            value = self.field_of(name, bits, op)
            values.append(value - (1 << bits) if code == "i" and value >> (bits - 1) & 1 else value)
        return kind.layout.pack(*values)

    # Messages --------------------------------------------------------------------------------------------------------------

    def payload(self, kind: type[Payload], op: str) -> bytes:
        """A payload of the right kind; hardly ever one of the wrong size."""
        pick = self.random
        if pick.random() < self.rate / 4:
            return pick.randbytes(pick.choice((0, 1, 4, 7, 8, 9, 39, 40, 72, 73, 300)))
        if issubclass(kind, IotlbPayload):
            perm = self.number(8) if self.wrong() else pick.choice((1, 2, 3, 3))
            iova = self.address() if pick.random() < 0.3 else BASE
            size = self.number() if self.wrong() else pick.choice((4096, MEMORY, MEMORY))
            if kind is ops.IOTLB_INVALIDATE.request and pick.random() < 0.2:
                iova, size = 0, (1 << 63) - 1
            return IotlbMsg(2, pick.choice((0, 0, 0, 1)), Iova(iova), size, pick.choice((0, 0, 4096)), perm, kind.msgtype).pack()
        if kind is m.MemTable:
            count = self.number(32) if self.wrong() else pick.choice((0, 1, 1, 1, 2))
            return struct.pack("=II", count, 0) + b"".join(self.region(n) for n in range(min(count, 9)))
        if kind is m.MemReg:
            return bytes(8) + self.region(pick.choice((0, 1, 2, 3)))
        if kind in (ConfigRange, ConfigData, m.ConfigSpace):
            data = pick.randbytes(self.number(10) if self.wrong() else pick.choice((1, 4, 8)))
            offset, length = pick.choice((0, 8, 32)), len(data)
            if self.wrong():
                offset, length = self.number(32), self.number(32)
            head = struct.pack("=II", offset, length)
            return head if kind is ConfigRange else head + data if kind is ConfigData else head + bytes(4) + data
        assert issubclass(kind, Struct)
        return self.struct_of(kind, op)

    def region(self, at: int) -> bytes:
        """A region of a legacy client's memory."""
        values = [BASE + at * MEMORY, MEMORY, USER + at * MEMORY, 0]
        if self.wrong():
            values[self.random.randrange(4)] = self.number()
        return struct.pack("=QQQQ", *values)

    def message(self, number: int, payload: bytes, flags: int = VERSION) -> Chunk:
        """Framed, with the descriptors that it announces."""
        pick = self.random
        size = len(payload)
        if pick.random() < self.rate / 4:
            size = max(0, size + pick.choice((-1, 1, 4, 5000, 0xFFFF0000)))
        if pick.random() < self.rate / 4:
            flags = self.number(32)
        count, _ = wanted(number, payload)
        if pick.random() < self.rate / 4:
            count = pick.choice((0, 1, 2, 8, 31, 33))
        memory = number in (ops.IOTLB, m.SET_MEM_TABLE.number, m.ADD_MEM_REG.number)
        fds = [self.memory() if memory else self.event() for _ in range(count)]
        if number == m.SET_BACKEND_REQ_FD.number and not self.wrong():
            fds = ["socket"] * count
        return Chunk(HEADER.pack(number, flags, size & 0xFFFFFFFF) + payload, fds)

    def operation(self, op: ops.Op[Any, Any]) -> Chunk:
        """Some request of this operation."""
        return self.message(op.number, self.payload(op.request, op.name) if op.request is not type(EMPTY) else b"")

    def legacy(self, row: m.Legacy) -> Chunk:
        """Some message of legacy vhost-user."""
        if row.request is type(EMPTY):
            payload = b""
        elif row in (m.SET_VRING_KICK, m.SET_VRING_CALL, m.SET_VRING_ERR):
            payload = U64(self.number() if self.wrong() else self.random.choice((0, 0, 1, m.NOFD))).pack()
        elif row is m.SET_FEATURES:
            payload = U64(self.number() if self.wrong() else self.random.choice((1 << 32, self.features))).pack()
        elif row is m.SET_PROTOCOL_FEATURES:
            payload = U64(self.number() if self.wrong() else OFFERED).pack()
        else:
            payload = self.payload(row.request, row.name)
        return self.message(row.number, payload, VERSION | self.random.choice((0, NEED_REPLY)))

    def anything(self) -> Chunk:
        """Some message of the session's mode; now and then of the other, of none, or no message at all."""
        pick = self.random
        if pick.random() < self.rate / 2:
            return pick.choice((Chunk(pick.randbytes(pick.randrange(1, 40))), self.message(self.number(32), pick.randbytes(8)), Chunk(HELLO), Chunk(ENTER)))
        if (self.mode == "vdpa") != (pick.random() < self.rate / 4):
            return self.operation(pick.choice(ops.TABLE))
        return self.legacy(pick.choice(list(m.BY_NUMBER.values())))

    # Sessions --------------------------------------------------------------------------------------------------------------

    def bring_up(self) -> list[Chunk]:
        """All that makes a device run, with a wrong value here and there."""
        if self.mode == "vdpa":
            calls: list[tuple[ops.Op[Any, Any], Payload, str]] = [
                (ops.SET_OWNER, EMPTY, ""),
                (ops.SET_BACKEND_FEATURES, U64(0x7E), ""),
                (ops.SET_STATUS, U8(3), ""),
                (ops.SET_FEATURES, U64(RUNNING), ""),
                (ops.SET_STATUS, U8(11), ""),
                (ops.IOTLB_UPDATE, _Message(IotlbMsg(2, 0, Iova(BASE), MEMORY, 0, 3, 2)), "memory"),
                (ops.SET_VRING_NUM, VringState(0, RING), ""),
                (ops.SET_VRING_ADDR, VringAddr(0, 0, Iova(BASE + DESC), Iova(BASE + USED), Iova(BASE + AVAIL), 0), ""),
                (ops.SET_VRING_KICK, VringFile(0, 0), "kick"),
                (ops.SET_VRING_CALL, VringFile(0, 0), self.event()),
                (ops.SET_VRING_ENABLE, VringState(0, 1), ""),
                (ops.SET_STATUS, U8(15), ""),
            ]
            chunks = [Chunk(ENTER + HELLO)]
            for op, request, fd in calls:
                good = Chunk(_framed(op.number, request), [fd] if fd else [])
                chunks.append(self.operation(op) if self.wrong() else good)
        else:
            at = BASE if self.translates else USER
            told: list[tuple[m.Legacy, Payload, str]] = [
                (m.SET_PROTOCOL_FEATURES, U64(OFFERED), ""),
                (m.SET_BACKEND_REQ_FD, EMPTY, "socket"),
                (m.SET_FEATURES, U64(self.features), ""),
                (m.SET_MEM_TABLE, m.MemTable((m.MemoryRegion(BASE, MEMORY, USER, 0),)), "memory"),
                (m.SET_VRING_NUM, VringState(0, RING), ""),
                (m.SET_VRING_ADDR, VringAddr(0, 0, Iova(at + DESC), Iova(at + USED), Iova(at + AVAIL), 0), ""),
                (m.SET_VRING_KICK, U64(0), "kick"),
                (m.SET_VRING_CALL, U64(0), self.event()),
                (m.SET_VRING_ENABLE, VringState(0, 1), ""),
            ]
            if self.translates:  # the ring, and some or all of the rest
                told += [(m.IOTLB_MSG, m.IotlbMessage(BASE + 4096 * n, 4096, USER + 4096 * n, 3, m.UPDATE), "") for n in range(self.random.choice((1, 4, 16)))]
            chunks = [self.legacy(row) if self.wrong() else Chunk(_framed(row.number, request), [fd] if fd else []) for row, request, fd in told]
        if self.wrong():
            self.random.shuffle(chunks)
        return chunks

    def session(self) -> list[Chunk]:
        """What this client sends, cut and glued as it likes."""
        pick = self.random
        chunks = self.bring_up() if pick.random() < 0.8 else [Chunk(ENTER + HELLO)] if self.mode == "vdpa" else []
        chunks += [self.anything() for _ in range(pick.choice((0, 10, 40, 80)))]
        if pick.random() < 0.1:
            chunks[-1:] = [Chunk(chunks[-1].data[: pick.randrange(1, 12)], chunks[-1].fds)] if chunks else []
        return list(self._cut(chunks))

    def _cut(self, chunks: list[Chunk]) -> Iterator[Chunk]:
        """Descriptors stay with the first byte of their message; nothing is glued behind them, as a socket does not either."""
        pick = self.random
        glued = Chunk(b"")
        for chunk in chunks:
            glued = Chunk(glued.data + chunk.data, chunk.fds)
            if chunk.fds or pick.random() < 0.7:
                if pick.random() < 0.1 and len(chunk.data) > 1:
                    at = len(glued.data) - len(chunk.data) + pick.randrange(1, len(chunk.data))
                    yield Chunk(glued.data[:at], glued.fds)
                    glued = Chunk(glued.data[at:])
                yield glued
                glued = Chunk(b"")
        if glued.data:
            yield glued

    def answer(self) -> bytes:
        """What it says on the back-end channel."""
        if self.wrong():
            return self.random.randbytes(self.random.choice((1, 12, 20, 200)))
        return struct.pack("=IIIQ", m.BACKEND_IOTLB, REPLY_FLAGS, 8, self.random.choice((0, 0, 0, 1)))

    def ring(self) -> bytes:
        """Memory for DESC to USED: descriptors that may be good, and an available ring that offers them."""
        pick = self.random
        if pick.random() < 0.2:
            return pick.randbytes(4096)
        table = b"".join(
            struct.pack(
                "<QIHH",
                BASE + 4096 * pick.randrange(1, 15) if not self.wrong() else self.number(),
                pick.choice((1, 16, 512, 4096)) if not self.wrong() else self.number(32),
                pick.choice((0, 1, 2, 3)) if not self.wrong() else self.number(16),
                pick.randrange(RING) if not self.wrong() else self.number(16),
            )
            for _ in range(RING)
        )
        heads = [pick.randrange(RING) if not self.wrong() else self.number(16) for _ in range(RING)]
        offered = pick.choice((0, 1, 4, RING)) if not self.wrong() else self.number(16)
        return table.ljust(AVAIL, b"\0") + struct.pack(f"<HH{RING}H", 0, offered, *heads).ljust(USED - AVAIL, b"\0") + bytes(2048)


@dataclass(frozen=True)
class _Message(Payload):
    """An IOTLB message as it goes through a socket."""

    message: IotlbMsg

    def pack(self) -> bytes:
        return self.message.pack()


def _framed(number: int, request: Payload) -> bytes:
    payload = b"" if request is EMPTY else request.pack()
    return HEADER.pack(number, VERSION, len(payload)) + payload


with Stock() as _stock:
    _STOCK_NAMES = tuple(_stock.fds)

__all__ = ["BASE", "FULL", "HELLO_OP", "MEMORY", "USER", "Chunk", "Hostile", "Stock"]
