# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A wire whose other end a test holds: packets with their headers, as a tap would have them, over a socket pair."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator

import pytest

from vdpa_bridge.models import NetModel
from vdpa_bridge.netdev import HEADER, LONGEST, Netdev

OWN = bytes.fromhex("525400000007")
OTHER = bytes.fromhex("525400000009")


class Cable(Netdev):
    """Its other end is ``far``."""

    def __init__(self, offloads: int = 0, room: int = 1 << 22) -> None:
        super().__init__()
        self.offloads = offloads
        self._near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._near.setblocking(False)
        self._near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        self.far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        self.far.settimeout(5)
        self.looks = 0
        """How often somebody looked for packets."""

    def watched(self, queue: int) -> int:
        return self._near.fileno()

    def receive(self, queue: int) -> list[bytes]:
        self.looks += 1
        packets: list[bytes] = []
        while len(packets) < 64:
            try:
                packets.append(self._near.recv(HEADER + LONGEST))
            except BlockingIOError:
                break
        return packets

    def _form(self, packet: bytes) -> bytes:
        return packet

    def _put(self, queue: int, packet: bytes) -> int:
        return self._near.send(packet)

    def close(self) -> None:
        self._near.close()
        self.far.close()

    @property
    def said(self) -> bool:
        """Whether a packet came out at the far end."""
        return bool(select.select([self.far], [], [], 0.05)[0])


@pytest.fixture(autouse=True, scope="module", params=[False, True], ids=["model", "engine"])
def native(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether queue pairs have an engine."""
    Cable.native = request.param
    yield request.param
    Cable.native = False


def device(cable: Cable, mac: bytes = OWN) -> NetModel:
    return NetModel(mac, wire=cable)


def frame(number: int = 0, length: int = 60, to: bytes = OWN) -> bytes:
    """An Ethernet frame that tells which one it is."""
    return (to + OTHER + b"\x88\xb5" + number.to_bytes(4, "big")).ljust(length, bytes([number % 251]))
