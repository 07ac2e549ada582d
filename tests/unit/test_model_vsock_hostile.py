# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The socket model and what no guest, and no client of the host, may do to it: packets by hand, floods, nonsense."""

from __future__ import annotations

import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.driven import opened, quiet
from tests.support.homes import socket_path
from vdpa_bridge.drivers import Driver, VsockDriver
from vdpa_bridge.drivers.base import Posted
from vdpa_bridge.models import VsockModel, make_model
from vdpa_bridge.models.vsock import MOST, MOST_CALLERS, MOST_RESETS
from vdpa_bridge.models.vsock_connection import WINDOW

__all__ = ["quiet"]  # an autouse fixture

REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
HEADER = struct.Struct("<QQIIIHHIII")


class Packet(NamedTuple):
    port: int
    op: int
    peer: int = 2
    peer_port: int = 7
    kind: int = 1
    flags: int = 0
    data: bytes = b""


class Guest:
    """Packets by hand, from context 3. It gives as many receive buffers as it is told to."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.boxes: list[Posted] = []

    def give(self, count: int = 32, size: int = 2048) -> None:
        self.boxes += [self.driver.post(0, (), [size]) for _ in range(count)]

    def send(self, packet: Packet, *, cid: int = 3, length: int | None = None, window: int = WINDOW, taken: int = 0) -> None:
        size = len(packet.data) if length is None else length
        head = HEADER.pack(cid, packet.peer, packet.port, packet.peer_port, size, packet.kind, packet.op, packet.flags, window, taken)
        assert self.driver.transact(1, [head + packet.data])[0] == 0

    def came(self) -> list[Packet]:
        self.driver.poll()
        done = [box for box in self.boxes if box.written >= 0]
        self.boxes = [box for box in self.boxes if box.written < 0]
        return [self._read(box.data[0][: box.written]) for box in done if box.written]

    def _read(self, data: bytes) -> Packet:
        peer, cid, peer_port, port, length, kind, op, flags, _, _ = HEADER.unpack_from(data)
        assert (cid, length) == (3, len(data) - HEADER.size)
        return Packet(port, op, peer, peer_port, kind, flags, data[HEADER.size :])

    def expect(self, *wanted: Packet) -> None:
        """These packets and no others are the next to come."""
        found: list[Packet] = []

        def have_come() -> bool:
            found.extend(self.came())
            return len(found) >= len(wanted)

        self.driver.wait(have_come, f"{wanted}")
        assert found == list(wanted)

    def connect(self, port: int) -> None:
        self.send(Packet(port, REQUEST))
        self.expect(Packet(port, RESPONSE))


@pytest.fixture
def uds() -> Iterator[str]:
    with socket_path() as path:
        yield path


@contextmanager
def guest(model: VsockModel) -> Iterator[Guest]:
    with opened(model) as device, Driver(device, queues=(0, 1), pool_size=4 << 20, timeout=10) as driver:
        yield Guest(driver)


@pytest.fixture
def served(uds: str) -> Iterator[tuple[Guest, socket.socket]]:
    """A guest with buffers, and a listener at port 7."""
    with socket.socket(socket.AF_UNIX) as listener, guest(VsockModel(3, uds)) as by_hand:
        listener.bind(f"{uds}_7")
        listener.listen(2 * MOST)
        listener.settimeout(10)
        by_hand.give()
        yield by_hand, listener


def read(listener: socket.socket, count: int) -> bytes:
    """The first *count* bytes of the next connection, which is closed then."""
    sock, _ = listener.accept()
    with sock:
        sock.settimeout(10)
        return sock.recv(count, socket.MSG_WAITALL)


@pytest.mark.parametrize(
    "op", [0, RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 8, 0xFFFF], ids=lambda op: f"op{op}"
)
def test_what_belongs_to_no_connection_is_reset(served: tuple[Guest, socket.socket], op: int) -> None:
    by_hand, _ = served
    by_hand.send(Packet(1000, op, flags=3))
    by_hand.expect(Packet(1000, RST))
    by_hand.send(Packet(1000, RST))
    by_hand.connect(1001)


@pytest.mark.parametrize(
    ("wrong", "more"),
    [
        (Packet(1000, REQUEST, kind=2), {}),
        (Packet(1000, REQUEST, kind=0), {}),
        (Packet(1000, REQUEST, peer=4), {}),
        (Packet(1000, REQUEST, peer=1 << 63), {}),
        (Packet(1000, REQUEST, peer_port=8), {}),
        (Packet(1000, REQUEST), {"cid": 4}),
        (Packet(1000, REQUEST), {"length": 1}),
        (Packet(1000, REQUEST), {"length": 0xFFFFFFFF}),
    ],
)
def test_wrong_requests_are_reset(served: tuple[Guest, socket.socket], wrong: Packet, more: dict[str, int]) -> None:
    by_hand, listener = served
    by_hand.send(wrong, **more)
    by_hand.expect(wrong._replace(op=RST))
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()


@pytest.mark.parametrize(
    ("wrong", "more"),
    [
        (Packet(1000, REQUEST), {}),
        (Packet(1000, RESPONSE), {}),
        (Packet(1000, 0), {}),
        (Packet(1000, 99), {}),
        (Packet(1000, RW, data=b"abc"), {"length": 4}),
        (Packet(1000, RW, data=b"abc"), {"length": 0xFFFFFFFF}),
        (Packet(1000, RW, data=b"abc", kind=2), {}),
        (Packet(1000, RW, data=b"abc"), {"cid": 5}),
    ],
)
def test_what_has_no_place_in_a_connection_ends_it(served: tuple[Guest, socket.socket], wrong: Packet, more: dict[str, int]) -> None:
    """What came before it arrives, what is wrong does not."""
    by_hand, listener = served
    by_hand.connect(1000)
    by_hand.send(Packet(1000, RW, data=b"good"))
    by_hand.send(wrong, **more)
    by_hand.expect(wrong._replace(op=RST, data=b""))
    assert read(listener, 64) == b"good"
    by_hand.connect(1000)


def test_packets_shorter_than_their_header_are_nobodys(served: tuple[Guest, socket.socket]) -> None:
    by_hand, _ = served
    for length in (1, HEADER.size - 1):
        assert by_hand.driver.transact(1, [bytes(length)])[0] == 0
    assert by_hand.driver.transact(1, [], [64])[0] == 0, "nothing is written into what is to be sent"
    by_hand.connect(1000)


def test_more_than_the_device_has_room_for(served: tuple[Guest, socket.socket]) -> None:
    by_hand, _ = served
    by_hand.connect(1000)
    for _ in range(2 * WINDOW // 65536 + 8):  # what the socket takes comes on top
        by_hand.send(Packet(1000, RW, data=bytes(65536)))
    packets = by_hand.came()
    assert Packet(1000, RST) in packets
    assert set(packets) <= {Packet(1000, RST), Packet(1000, CREDIT_UPDATE)}
    by_hand.connect(1001)


def test_what_comes_after_the_end(served: tuple[Guest, socket.socket]) -> None:
    by_hand, listener = served
    by_hand.connect(1000)
    by_hand.send(Packet(1000, SHUTDOWN, flags=2))
    by_hand.send(Packet(1000, RW, data=b"late"))
    by_hand.expect(Packet(1000, RST))
    assert read(listener, 64) == b""


def test_an_end_in_two_steps_and_one_with_no_flag(served: tuple[Guest, socket.socket]) -> None:
    by_hand, listener = served
    by_hand.connect(1000)
    for flags in (0, 1, 0, 1, 2):
        by_hand.send(Packet(1000, SHUTDOWN, flags=flags))
    by_hand.expect(Packet(1000, RST))
    assert read(listener, 64) == b""


@pytest.mark.parametrize(("window", "taken"), [(0, 0), (100, 0xFFFFFFFF), (0xFFFFFFFF, 1 << 31), (5, 5)])
def test_credit_that_makes_no_sense_stops_one_connection(served: tuple[Guest, socket.socket], window: int, taken: int) -> None:
    """The guest says that it took what was never sent, or has no room; the others go on, and so does this one when it sees reason."""
    by_hand, listener = served
    by_hand.send(Packet(1000, REQUEST), window=0)
    by_hand.expect(Packet(1000, RESPONSE), Packet(1000, CREDIT_REQUEST))
    sock, _ = listener.accept()
    with sock:
        sock.sendall(b"0123456789")
        by_hand.send(Packet(1000, CREDIT_UPDATE), window=window, taken=taken)
        time.sleep(0.02)
        sent = b"".join(packet.data for packet in by_hand.came())
        assert len(sent) <= window
        by_hand.connect(1001)
        by_hand.send(Packet(1000, CREDIT_UPDATE), window=1000, taken=len(sent))
        if sent != b"0123456789":
            by_hand.expect(Packet(1000, RW, data=b"0123456789"[len(sent) :]))


def test_buffers_too_small_go_back_and_others_are_used(served: tuple[Guest, socket.socket]) -> None:
    """The data then comes in the pieces for which there is room."""
    by_hand, listener = served
    by_hand.connect(1000)
    for box in by_hand.boxes:
        assert box.written < 0
    sock, _ = listener.accept()
    with sock:
        for _ in range(31):
            sock.sendall(b"x")
            by_hand.driver.wait(lambda: bool(by_hand.came()), "a packet")
        by_hand.give(3, size=HEADER.size)
        by_hand.give(2, size=HEADER.size + 3)
        by_hand.give(1, size=1)
        by_hand.give(1)
        sock.sendall(b"abcdefgh")
        by_hand.expect(*(Packet(1000, RW, data=data) for data in (b"abc", b"def", b"gh")))
        assert by_hand.boxes == []


def test_a_guest_without_buffers_is_served_and_what_it_missed_is_bounded(uds: str) -> None:
    """It can still send; once it gives buffers, it gets its answers and the data that waited."""
    with socket.socket(socket.AF_UNIX) as listener, guest(VsockModel(3, uds)) as by_hand:
        listener.bind(f"{uds}_7")
        listener.listen()
        by_hand.send(Packet(1, REQUEST))
        sock, _ = listener.accept()
        with sock:
            sock.sendall(b"waiting")
            by_hand.send(Packet(1, RW, data=b"sent"))
            assert sock.recv(64) == b"sent"
            for port in range(2, 3 + 2 * MOST_RESETS):
                by_hand.send(Packet(port, RW))
            packets: list[Packet] = []
            while len(packets) < MOST_RESETS + 2:
                by_hand.give(200 - len(by_hand.boxes))
                by_hand.driver.wait(lambda: bool(packets.extend(by_hand.came()) or len(by_hand.boxes) < 200), "packets")
            assert packets[0] == Packet(1, RESPONSE)
            assert packets[1 : 1 + MOST_RESETS] == [Packet(port, RST) for port in range(2, 2 + MOST_RESETS)]
            assert packets[1 + MOST_RESETS :] == [Packet(1, RW, data=b"waiting")]


def test_a_flood_of_connections(served: tuple[Guest, socket.socket]) -> None:
    """There are so many and no more; those that the host has ended make room for others; a reset gives all descriptors back."""
    by_hand, listener = served
    before = len(os.listdir("/proc/self/fd"))
    answers: list[Packet] = []
    for port in range(MOST + 100):
        by_hand.send(Packet(port, REQUEST))
        answers += by_hand.came()
        by_hand.give(32 - len(by_hand.boxes))
    by_hand.driver.wait(lambda: bool(answers.extend(by_hand.came()) or len(answers) == MOST + 100), "all answers")
    assert answers == [Packet(port, RESPONSE if port < MOST else RST) for port in range(MOST + 100)]
    sock, _ = listener.accept()
    sock.close()
    by_hand.expect(Packet(0, SHUTDOWN, flags=3))
    by_hand.give()
    by_hand.connect(5000)
    by_hand.send(Packet(0, RW, data=b"to one that had to go"))
    by_hand.expect(Packet(0, RST))
    by_hand.driver.restart()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_flood_of_clients(uds: str) -> None:
    """The oldest of those that say nothing have to go; those that do are served, as many as there may be."""
    with opened(VsockModel(3, uds)) as device, VsockDriver(device) as driver:
        driver.listen(9)
        clients = []
        try:
            for _ in range(MOST_CALLERS + 10):
                client = socket.socket(socket.AF_UNIX)
                clients.append(client)
                client.settimeout(10)
                client.connect(uds)
            for client in clients[:10]:
                assert client.recv(1) == b""
            for client in clients[10:]:
                client.sendall(b"CONNECT 9\n")
                with driver.accept(9):
                    assert client.recv(64).startswith(b"OK ")
        finally:
            for client in clients:
                client.close()


def test_a_path_that_is_taken(uds: str) -> None:
    with opened(VsockModel(3, uds)), pytest.raises(OSError, match="listens there"):
        VsockModel(4, uds)
    VsockModel(4, uds).close()
    assert not os.path.exists(uds)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cid": "2"}, "cid=2; it is a number from 3"),
        ({"cid": "4294967295"}, "from 3 to 4294967294"),
        ({"peers": "4"}, "it is written CID:PATH,CID:PATH"),
        ({"peers": "x:/tmp/y"}, "peers=x"),
        ({"udz": "/x"}, "no option udz; there is: cid, peers, uds"),
    ],
)
def test_wrong_options_are_named(options: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_model("vsock", options)


def test_needs(uds: str) -> None:
    model = make_model("vsock", {"uds": uds, "peers": f"4:{uds}4,5:/run/five"})
    assert model.needs.connect == (os.path.dirname(uds), f"{uds}4", "/run/five")
    model.close()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32), st.lists(st.sampled_from(("packet", "buffers", "host")), min_size=20, max_size=120))
def test_whatever_comes_the_device_goes_on(seed: int, steps: list[str]) -> None:
    """Packets that are nearly right, with few buffers, while the host comes and goes: no queue breaks, and a good guest is served then."""
    rng = random.Random(seed)
    with socket_path() as uds, socket.socket(socket.AF_UNIX) as listener, guest(VsockModel(3, uds)) as by_hand:
        listener.bind(f"{uds}_7")
        listener.listen(64)
        listener.setblocking(False)
        socks: list[socket.socket] = []
        for step in steps:
            if step == "packet":
                data = rng.randbytes(rng.choice((0, 0, 3, 5000, 60_000)))
                peer, peer_port = rng.choice((2, 2, 2, 9)), rng.choice((7, 7, 7, 8, 1 << 30))
                packet = Packet(rng.randrange(3), rng.choice((1, 1, 1, 2, 3, 4, 5, 5, 5, 6, 7, 8)), peer, peer_port, rng.choice((1,) * 9 + (2,)), rng.randrange(4), data)
                by_hand.send(packet, length=rng.choice((None,) * 9 + (1 << 31,)), window=rng.choice((0, 10, WINDOW, 0xFFFFFFFF)), taken=rng.choice((0, 3, 1 << 31)))
            elif step == "buffers":
                by_hand.came()
                by_hand.give(min(rng.randrange(4), 30 - len(by_hand.boxes)), rng.choice((44, 45, 2048)))
            else:
                try:
                    socks.append(listener.accept()[0])
                    socks[-1].setblocking(False)
                except BlockingIOError:
                    pass
                for sock in rng.sample(socks, min(len(socks), 2)):
                    _disturb(sock, rng)
        for sock in socks:
            sock.close()
        by_hand.driver.restart()
        by_hand.boxes.clear()
        by_hand.give()
        while by_hand.driver.poll():
            pass
        listener.close()
        by_hand.send(Packet(1, REQUEST, peer_port=12))
        by_hand.expect(Packet(1, RST, peer_port=12))


def _disturb(sock: socket.socket, rng: random.Random) -> None:
    try:
        match rng.randrange(5):
            case 0:
                sock.close()
            case 1:
                sock.shutdown(socket.SHUT_WR)
            case 2:
                sock.send(rng.randbytes(rng.choice((1, 3000, 200_000))))
            case _:
                sock.recv(rng.choice((1, 100_000)))
    except OSError:  # closed before, by either end
        pass
