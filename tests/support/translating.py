# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A client of a disk whose guest has an IOMMU: every address of its is an IOVA that the server has to ask for.

Rule of this file: as in ``bare``, a test says each message itself; ``serve`` alone answers as a good client does.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from typing import Self

from vdpa_bridge.flags import Feature
from vdpa_bridge.flags import ProtocolFeature as P
from vdpa_bridge.vhost_user import messages as m
from vdpa_bridge.vhost_user.framing import HEADER, NEED_REPLY, REPLY_FLAGS, VERSION, frame
from vdpa_bridge.wire import RO, RW, U64, WO, Iova, VringAddr, VringState

from .bare import AVAIL, DESC, HEADERS, PATIENCE, PROTOCOL, RING, SIZE, STEP, USED, USER, Bare

PAGE = 4096
IOVA = 0xFFFF0000
"""Where the guest sees its first page; far from where its memory lies in the table of regions."""
PAGES = SIZE // PAGE
BOTH = PROTOCOL | P.BACKEND_REQ

Question = tuple[int, int]
"""IOVA and permission of a miss."""


def page_at(page: int) -> int:
    """Which page of the memory the guest has at its page *page*: the first in its place, the others backwards."""
    return (PAGES - page) % PAGES


class Translating(Bare):
    """Connects to *path*. Owns the back-end channel as well: ``channel``."""

    def __init__(self, path: str, features: int = 0) -> None:
        super().__init__(path, "legacy")
        self.channel, self._theirs = socket.socketpair()
        self.channel.settimeout(PATIENCE)
        self.features = Feature.VERSION_1 | Feature.ACCESS_PLATFORM | 1 << 30 | features
        self.misses: list[Question] = []
        """All that were read."""

    def offered(self) -> int:
        """The device's features as they are offered now."""
        self.raw.send(frame(m.GET_FEATURES.number))
        return U64.unpack(self._reply()).value

    def start(self) -> None:
        """In the order of QEMU: the channel, then the features."""
        assert self.tell(m.SET_PROTOCOL_FEATURES, U64(BOTH)) == 0
        assert self.tell(m.SET_BACKEND_REQ_FD, m.EMPTY, self._theirs.fileno()) == 0
        assert self.tell(m.SET_FEATURES, U64(self.features)) == 0

    def ring(self, desc: int = DESC, avail: int = AVAIL, used: int = USED) -> int:
        """Of IOVAs."""
        for row, payload, *fds in (
            (m.SET_VRING_NUM, VringState(0, RING)),
            (m.SET_VRING_BASE, VringState(0, 0)),
            (m.SET_VRING_ADDR, VringAddr(0, 0, Iova(IOVA + desc), Iova(IOVA + used), Iova(IOVA + avail), 0)),
            (m.SET_VRING_KICK, U64(0), self.kick),
            (m.SET_VRING_CALL, U64(0), self.call),
            (m.SET_VRING_ENABLE, VringState(0, 1)),
        ):
            if error := self.tell(row, payload, *fds):  # type: ignore[arg-type]
                return error
        return 0

    def fill(self, sector: int = 0, kind: int = 0, data_at: int = IOVA + PAGE, header_at: int = IOVA + HEADERS) -> None:
        super().fill(sector, kind, data_at, header_at)

    def data(self, n: int, first: int = 1) -> int:
        """Where the data of request *n* lies in the memory, when the guest has it from its page *first* on."""
        return page_at(first + n) * PAGE

    # Translations ----------------------------------------------------------------------------------------------------------

    def ask(self) -> Question | None:
        """The next miss; None when there is none for a while. A change of the status, as a configuration change is told, is passed over."""
        try:
            while HEADER.unpack(head := self.channel.recv(HEADER.size)) == (m.BACKEND_CONFIG_CHANGE, VERSION, 0):
                pass
        except TimeoutError:
            return None
        assert HEADER.unpack(head) == (m.BACKEND_IOTLB, VERSION | NEED_REPLY, 32)
        miss = m.IotlbMessage.unpack(self.channel.recv(32))
        assert (miss.type, miss.size, miss.uaddr, miss.iova % PAGE) == (m.MISS, 0, 0, 0)
        self.misses.append((miss.iova, miss.perm))
        return miss.iova, miss.perm

    def silent(self, seconds: float = 0.1) -> bool:
        """Whether the server asks for nothing for so long."""
        self.channel.settimeout(seconds)
        try:
            return self.ask() is None
        finally:
            self.channel.settimeout(PATIENCE)

    def answer(self, value: int = 0) -> None:
        """To the oldest miss that was not answered yet."""
        self.channel.sendall(frame(m.BACKEND_IOTLB, U64(value).pack(), REPLY_FLAGS))

    def update(self, page: int, perm: int = RW, count: int = 1) -> int:
        """Map pages of the guest, neighbours in its memory when there are several: what the server says."""
        return self.tell(m.IOTLB_MSG, m.IotlbMessage(IOVA + page * PAGE, count * PAGE, USER + page_at(page) * PAGE, perm, m.UPDATE))

    def invalidate(self, iova: int, size: int) -> int:
        """What the server says."""
        return self.tell(m.IOTLB_MSG, m.IotlbMessage(iova, size, 0, 0, m.INVALIDATE))

    def unmap(self, page: int) -> None:
        """One page."""
        assert self.invalidate(IOVA + page * PAGE, PAGE) == 0

    def serve(self, index: int) -> None:
        """Answer misses until the device has used so many."""
        deadline = time.monotonic() + PATIENCE
        while self.done != index & 0xFFFF:
            assert time.monotonic() < deadline, f"the device used {self.done} requests, not {index}; it asked for {self.misses}"
            self.channel.settimeout(0.002)
            if miss := self.ask():
                page, offset = divmod(miss[0] - IOVA, PAGE)
                assert 0 <= page < PAGES
                assert not offset
                assert self.update(page) == 0
                self.answer()
            self.channel.settimeout(PATIENCE)

    def round(self, index: int, sector: int, content: bytes) -> None:
        """Write STEP pieces of 512 bytes, read them into other pages, and compare; *index* was used before."""
        for n in range(STEP):
            os.pwrite(self.memory, content[512 * n : 512 * n + 512], self.data(n))
        self.fill(sector, kind=1)
        self._all_of_them(index + STEP)
        self.fill(sector, kind=0, data_at=IOVA + 8 * PAGE)
        self._all_of_them(index + 2 * STEP)
        last = content[512 * (STEP - 1) : 512 * STEP]  # all requests are for the same sector
        assert last == os.pread(self.memory, 512, self.data(0, first=8))

    def _all_of_them(self, index: int) -> None:
        os.pwrite(self.memory, b"\xff" * STEP, HEADERS + 64)
        self.offer(index)
        self.serve(index)
        assert self.statuses() == bytes(STEP)

    def stop(self) -> int:
        """Stop the ring: its base."""
        self.raw.send(frame(m.GET_VRING_BASE.number, VringState(0, 0).pack()))
        return struct.unpack("=II", self._reply())[1]  # type: ignore[no-any-return]

    def close(self) -> None:
        super().close()
        self.channel.close()
        self._theirs.close()

    def __enter__(self) -> Self:
        return self


__all__ = ["BOTH", "IOVA", "PAGE", "RO", "WO", "Translating", "page_at"]
