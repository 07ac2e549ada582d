# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A client of a disk that is made of bytes, in either mode: its memory is a plain memfd, its ring is written by pwrite.

Rule of this file: nothing of ours stands between a test and what the server sees, so that a test can shrink the memory, fill an
eventfd or leave in the middle of a message while requests are under way.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from typing import Self

from vdpa_bridge import ops
from vdpa_bridge.device import RingSetup
from vdpa_bridge.flags import Feature, Status
from vdpa_bridge.flags import ProtocolFeature as P
from vdpa_bridge.ops import Call
from vdpa_bridge.vhost_user import messages as m
from vdpa_bridge.vhost_user.framing import NEED_REPLY, VERSION, frame
from vdpa_bridge.wire import EMPTY, U8, U64, IotlbUpdate, Iova, Payload, VringAddr, VringState

from .raw import Raw

SIZE = 1 << 16
RING = 16
STEP = 4
"""Requests that are made available together."""
DESC, AVAIL, USED, HEADERS = 0, 1024, 2048, 3072
"""The first page: a ring, and the headers of requests. Data pages follow."""
BASE = 0x100000
"""Where the device finds the memory."""
USER = 0x7F0000000000
"""Where a legacy client says it has it."""
MODES = ["vdpa", "legacy"]
PROTOCOL = P.REPLY_ACK | P.CONFIG | P.CONFIGURE_MEM_SLOTS | P.STATUS
PATIENCE = 5.0


class Bare:
    """Connects to *path*; ``bring_up`` makes the device run. Owns its socket, memory and eventfds; ``call`` blocks its writers."""

    def __init__(self, path: str, mode: str, timeout: float = 10.0) -> None:
        self.mode = mode
        self.raw = Raw(path, timeout)
        self.memory = os.memfd_create("bare", os.MFD_CLOEXEC)
        os.ftruncate(self.memory, SIZE)
        self.kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_CLOEXEC)
        self._offered = 0

    # Messages --------------------------------------------------------------------------------------------------------------

    def tell(self, row: m.Legacy, payload: Payload = EMPTY, *fds: int) -> int:
        """A legacy message that is acknowledged: 0, or 1 when it was refused. ConnectionError when the server hangs up."""
        self.raw.send(frame(row.number, b"" if payload is EMPTY else payload.pack(), VERSION | NEED_REPLY), fds)
        return U64.unpack(self._reply()).value

    def _reply(self) -> bytes:
        answer = self.raw.reply()
        if answer is None:
            raise ConnectionError("the server hung up")
        return answer[2]

    def start(self) -> None:
        """Choose the mode and accept features."""
        if self.mode == "vdpa":
            self.raw.enter()
            self._carry_out([(ops.SET_OWNER, EMPTY), (ops.SET_STATUS, U8(3)), (ops.SET_FEATURES, U64(3 << 32)), (ops.SET_STATUS, U8(11))])
        else:
            self.raw.send(frame(m.GET_PROTOCOL_FEATURES.number))
            assert U64.unpack(self._reply()).value & PROTOCOL == PROTOCOL
            assert self.tell(m.SET_PROTOCOL_FEATURES, U64(PROTOCOL)) == 0
            assert self.tell(m.SET_FEATURES, U64(Feature.VERSION_1 | 1 << 30)) == 0

    def share(self, at: int = 0, size: int = SIZE, fd: int | None = None) -> int:
        """Map the memory at BASE + *at*: what the server says to it, an errno in vDPA mode."""
        fd = self.memory if fd is None else fd
        if self.mode == "vdpa":
            return self.raw.ask(ops.IOTLB_UPDATE, IotlbUpdate(Iova(BASE + at), size, fd))  # type: ignore[arg-type]
        return self.tell(m.ADD_MEM_REG, m.MemReg.of(m.MemoryRegion(BASE + at, size, USER + at, 0)), fd)

    def ring(self, desc: int = DESC, avail: int = AVAIL, used: int = USED) -> int:
        """Set the ring up and let the device run: 0, or what the server says to the first thing it refuses."""
        if self.mode == "vdpa":
            calls = RingSetup(0, RING, BASE + desc, BASE + avail, BASE + used, self.kick, self.call).calls()
            return next((error for op, request in [*calls, (ops.SET_STATUS, U8(15))] if (error := self.raw.ask(op, request))), 0)  # type: ignore[arg-type]
        steps: list[tuple[m.Legacy, Payload, list[int]]] = [
            (m.SET_VRING_NUM, VringState(0, RING), []),
            (m.SET_VRING_BASE, VringState(0, 0), []),
            (m.SET_VRING_ADDR, VringAddr(0, 0, Iova(USER + desc), Iova(USER + used), Iova(USER + avail), 0), []),
            (m.SET_VRING_KICK, U64(0), [self.kick]),
            (m.SET_VRING_CALL, U64(0), [self.call]),
            (m.SET_VRING_ENABLE, VringState(0, 1), []),
        ]
        return next((error for row, payload, fds in steps if (error := self.tell(row, payload, *fds))), 0)

    def _carry_out(self, calls: list[Call]) -> None:
        for op, request in calls:
            error = self.raw.ask(op, request)
            assert error == 0, f"{op.name}: {os.strerror(error)}"

    def bring_up(self) -> Self:
        """All of it."""
        self.start()
        assert self.share() == 0
        assert self.ring() == 0
        return self

    def status(self) -> int:
        """The device status byte."""
        if self.mode == "vdpa":
            self.raw.send(frame(ops.GET_STATUS.number))
            return self._reply()[8]
        self.raw.send(frame(m.GET_STATUS.number))
        return U64.unpack(self._reply()).value

    def reset(self) -> int:
        """Status 0: what the server says."""
        if self.mode == "vdpa":
            return self.raw.ask(ops.SET_STATUS, U8(0))  # type: ignore[arg-type]
        return self.tell(m.SET_STATUS, U64(0))

    def needs_reset(self, deadline: float = PATIENCE) -> bool:
        """Whether the device comes to say so; it is kicked meanwhile."""
        end = time.monotonic() + deadline
        while not self.status() & Status.NEEDS_RESET:
            if time.monotonic() > end:
                return False
            self.ring_bell()
            time.sleep(0.002)
        return True

    # The ring --------------------------------------------------------------------------------------------------------------

    def fill(self, sector: int = 0, kind: int = 0, data_at: int = BASE + 4096, header_at: int = BASE + HEADERS) -> None:
        """STEP requests (*kind* 0 read, 1 write, 8 get the serial number) of 512 bytes each in the descriptor table; they can be offered over and over."""
        table = b"".join(
            struct.pack("<QIHH", header_at, 16, 1, 3 * n + 1)
            + struct.pack("<QIHH", data_at + 4096 * n, 512, 1 | 2 * (kind != 1), 3 * n + 2)
            + struct.pack("<QIHH", header_at + 64 + n, 1, 2, 0)
            for n in range(STEP)
        )
        os.pwrite(self.memory, table, DESC)
        os.pwrite(self.memory, struct.pack("<IIQ", kind, 0, sector), HEADERS)
        os.pwrite(self.memory, struct.pack("<4H", 0, 3, 6, 9) * (RING // STEP), AVAIL + 4)

    def offer(self, index: int) -> None:
        """Make requests available up to *index*, and kick."""
        os.pwrite(self.memory, struct.pack("<H", index & 0xFFFF), AVAIL + 2)
        self.ring_bell()

    def ring_bell(self) -> None:
        """Kick; a full counter is an event as well."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self.kick, 1)

    @property
    def done(self) -> int:
        """What the device has used so far."""
        return int(struct.unpack("<H", os.pread(self.memory, 2, USED + 2))[0])

    def statuses(self) -> bytes:
        """What became of the last STEP requests."""
        return os.pread(self.memory, STEP, HEADERS + 64)

    def wait_done(self, index: int) -> None:
        """Until the device got there."""
        end = time.monotonic() + PATIENCE
        while self.done != index:
            assert time.monotonic() < end, f"the device used {self.done} requests, not {index}"
            time.sleep(0.0005)

    def wait_beyond(self, index: int) -> None:
        """Until the device got past there: it need not go on when nobody hears of it."""
        end = time.monotonic() + PATIENCE
        while not 0 < (self.done - index) & 0xFFFF < 1 << 15:
            assert time.monotonic() < end, f"the device used {self.done} requests, not more than {index}"
            time.sleep(0.0005)

    def close(self) -> None:
        """Vanish."""
        self.raw.sock.close()
        for fd in (self.memory, self.kick, self.call):
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
