# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Frames between real rings and a wire: receive buffers merged, headers checked, neither side overrun, none waited for in a loop."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.cable import Cable, device, frame, native
from tests.support.driven import opened, quiet
from vdpa_bridge.drivers import Driver
from vdpa_bridge.drivers.base import RING_FEATURES, Posted
from vdpa_bridge.flags import Feature
from vdpa_bridge.models import NetModel
from vdpa_bridge.models.net import Exchange, offload
from vdpa_bridge.netdev import HEADER, LONGEST, PLAIN
from vdpa_bridge.virtio.features import NetFeature as F

__all__ = ["native", "quiet"]  # autouse fixtures

RX, TX = 0, 1
HOST = F.CSUM | F.HOST_TSO4 | F.HOST_TSO6 | F.HOST_ECN | F.HOST_UFO | F.HOST_USO
GUEST = F.GUEST_CSUM | F.GUEST_TSO4 | F.GUEST_TSO6 | F.GUEST_ECN | F.GUEST_UFO | F.GUEST_USO4 | F.GUEST_USO6


@contextmanager
def wired(cable: Cable, wanted: int = F.MRG_RXBUF, rings: int = RING_FEATURES, **options: int) -> Iterator[tuple[Driver, NetModel]]:
    model = device(cable)
    with opened(model) as there, Driver(there, wanted=wanted, ring_features=rings, **options) as driver:
        yield driver, model


def tally(model: NetModel) -> tuple[int, int]:
    """Frames dropped on the way out and on the way in."""
    assert isinstance(model.path, Exchange)
    return model.path.sent.dropped, model.path.received.dropped


def header(flags: int = 0, gso: int = 0, length: int = 0, size: int = 0, start: int = 0, offset: int = 0) -> bytes:
    return struct.pack("<BBHHHHH", flags, gso, length, size, start, offset, 0)


# Receive buffers -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    frames=st.lists(st.integers(14, 9000), min_size=1, max_size=12),
    room=st.lists(st.lists(st.integers(1, 900), min_size=1, max_size=3), min_size=40, max_size=60),
    turns=st.integers(1, 5),
    rings=st.sampled_from([0, Feature.RING_INDIRECT_DESC, Feature.RING_EVENT_IDX, Feature.RING_PACKED, RING_FEATURES]),
)
def test_frames_lie_in_as_many_buffers_as_they_say(frames: list[int], room: list[list[int]], turns: int, rings: int) -> None:
    """Buffers of any sizes, which come at any time: what they hold together is what was sent, in order."""
    cable = Cable()
    with wired(cable, rings=rings) as (driver, _):
        sent = [frame(number, size) for number, size in enumerate(frames)]
        posted: list[Posted] = []
        for turn in range(turns):
            posted += [driver.post(RX, [], sizes) for sizes in room[turn::turns]]
            for data in sent[turn::turns] if turn else sent[0::turns]:
                cable.far.send(PLAIN + data)
        total = sum(sum(sizes) for sizes in room)
        order = [number for turn in range(turns) for number in range(turn, len(frames), turns)]
        fitting, left = 0, total
        while fitting < len(order) and left - 900 * 3 * (fitting + 1) >= HEADER + frames[order[fitting]]:
            left -= HEADER + frames[order[fitting]]
            fitting += 1
        got = merged(driver, posted, fitting)
        assert got == [sent[number] for number in order[:fitting]]


def merged(driver: Driver, posted: list[Posted], count: int) -> list[bytes]:
    """The first *count* frames in buffers that were given back in order."""
    frames: list[bytes] = []
    at = 0
    while len(frames) < count:
        first = posted[at]
        driver.wait(lambda first=first: first.written >= 0, "a frame")  # type: ignore[misc]
        pieces: list[bytes] = []
        number, data = 0, b""
        while not number or len(pieces) < number:
            buffer = posted[at]
            assert buffer.written >= 0, "all buffers of a frame come at once"
            pieces.append(b"".join(buffer.data)[: buffer.written])
            at += 1
            if len(data := b"".join(pieces)) >= HEADER:
                number = int.from_bytes(data[10:HEADER], "little")
                assert number >= len(pieces)
        assert data[:10] == bytes(10)
        frames.append(data[HEADER:])
    return frames


def test_longest_frame_over_many_buffers() -> None:
    cable = Cable()
    with wired(cable, queue_size=256) as (driver, _):
        data = frame(3, LONGEST)
        cable.far.send(PLAIN + data)
        posted = [driver.post(RX, [], [1000]) for _ in range(66)]
        assert merged(driver, posted, 1) == [data]
        assert [buffer.written for buffer in posted] == [1000] * 65 + [HEADER + LONGEST - 65000]


def test_frame_waits_for_the_last_buffer_without_a_loop() -> None:
    cable = Cable()
    with wired(cable) as (driver, _):
        cable.far.send(PLAIN + frame(1, 1000))
        for count in range(3):
            posted = driver.post(RX, [], [300])
            time.sleep(0.05)
            driver.poll()
            assert posted.written == -1, f"{count + 1} buffers are too few"
        looks = cable.looks
        time.sleep(0.1)
        assert cable.looks == looks <= 8
        last = driver.post(RX, [], [300])
        driver.wait(lambda: last.written >= 0, "the frame")
        assert last.written == HEADER + 1000 - 900


def test_frame_that_fits_no_buffer_is_lost_alone() -> None:
    """Without MRG_RXBUF a frame has one buffer, which stays for the next one."""
    cable = Cable()
    with wired(cable, wanted=0) as (driver, model):
        posted = [driver.post(RX, [], [200]) for _ in range(2)]
        for size in (60, 500, 188):
            cable.far.send(PLAIN + frame(size, size))
        driver.wait(lambda: posted[1].written >= 0, "two frames")
        assert [buffer.written for buffer in posted] == [72, 200]
        assert [buffer.data[0][10:12] for buffer in posted] == [b"\1\0"] * 2
        assert tally(model) == (0, 1)


class Paper:
    """A chain on paper."""

    def __init__(self, data: bytes = b"", writable: int = 0) -> None:
        self.data, self.writable = data, writable

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        return self.data[offset:][:length]

    def write(self, data: bytes, offset: int = 0) -> int:
        self.data = bytes(data[: self.writable])
        return len(self.data)


class PaperQueue:
    """A queue with these chains."""

    waits = False

    def __init__(self, *chains: Paper) -> None:
        self.chains, self.done = list(chains), list[tuple[Any, int]]()

    def pop(self, limit: int = 64) -> list[Any]:
        taken, self.chains = self.chains[:limit], self.chains[limit:]
        return taken

    def put_back(self, chains: list[Any]) -> None:
        self.chains = chains + self.chains

    def push(self, done: list[tuple[Any, int]]) -> None:
        self.done += done


def test_old_drivers_have_a_shorter_header() -> None:
    """Ten bytes for a driver that takes neither VERSION_1 nor MRG_RXBUF (virtio 1.2, 5.1.6.1)."""
    cable = Cable()
    model = device(cable)
    try:
        model.start(0)
        rx, tx = PaperQueue(Paper(writable=2000)), PaperQueue(Paper(bytes(10) + frame(4)))
        model.process({RX: rx, TX: tx}, TX)
        assert cable.far.recv(100) == PLAIN + frame(4)
        cable.far.send(PLAIN + frame(5))
        model.process({RX: rx, TX: tx}, RX)
        assert [(chain.data, written) for chain, written in rx.done] == [(bytes(10) + frame(5), 70)]
    finally:
        model.close()


@pytest.mark.parametrize("packed", [0, Feature.RING_PACKED])
def test_nothing_is_read_while_there_is_no_room_and_suspend_loses_nothing(packed: int) -> None:
    cable = Cable()
    with wired(cable, rings=packed) as (driver, _):
        for number in range(150):
            cable.far.send(PLAIN + frame(number))
        time.sleep(0.1)
        looks = cable.looks
        time.sleep(0.1)
        assert cable.looks == looks <= 2
        first = [driver.post(RX, [], [2048]) for _ in range(100)]
        driver.wait(lambda: first[-1].written >= 0, "the first frames")
        extra = driver.post(RX, [], [30])
        driver.device.suspend()
        driver.device.resume()
        rest = [driver.post(RX, [], [2048]) for _ in range(50)]
        driver.wait(lambda: rest[-1].written >= 0, "the others")
        assert extra.written == 30
        whole = b"".join(buffer.data[0][: buffer.written] for buffer in [*first, extra, *rest])
        assert whole.count(frame(99)[6:18]) == 1
        assert [number for number in range(150) if frame(number)[6:18] not in whole] == []


# To the wire -----------------------------------------------------------------------------------------------------------------


def test_full_wire_is_waited_for() -> None:
    """Nothing is lost or reordered, and nobody spins while the other side is slow."""
    cable = Cable(room=8 << 10)
    with wired(cable, queue_size=256) as (driver, model):
        posted = [driver.post(TX, [PLAIN, frame(number, 1000)]) for number in range(200)]
        driver.poll()
        time.sleep(0.1)
        driver.poll()
        given = sum(buffer.written >= 0 for buffer in posted)
        assert 0 < given < 60, "what does not fit stays in the ring"
        before = time.thread_time(), time.process_time()
        time.sleep(0.2)
        assert time.process_time() - before[1] < 0.1, "nobody spins"
        assert [cable.far.recv(2000)[HEADER:] for _ in range(200)] == [frame(number, 1000) for number in range(200)]
        driver.wait(lambda: all(buffer.written >= 0 for buffer in posted), "all of it")
        assert tally(model) == (0, 0)


def test_reset_while_the_wire_is_full() -> None:
    cable = Cable(room=4 << 10)
    model = device(cable)
    with opened(model) as there:
        for _ in range(3):
            with Driver(there, queue_size=64) as driver:
                for number in range(30):
                    driver.post(TX, [PLAIN, frame(number, 1000)])
                time.sleep(0.02)
        with Driver(there) as driver:
            cable.far.setblocking(False)
            while cable.said:
                cable.far.recv(2000)
            driver.transact(TX, [PLAIN, frame(77)])
            assert cable.said
            assert cable.far.recv(2000) == PLAIN + frame(77)


@pytest.mark.parametrize(
    "sent",
    [
        [b"\0"],
        [PLAIN],
        [PLAIN + bytes(13)],
        [PLAIN, bytes(LONGEST + 1)],
        [PLAIN, bytes(1 << 20)],
        [header(1, start=14, offset=16), frame(0, 60)],
        [header(0, 1, size=1000), frame(0, 3000)],
        [header(1, 1, 54, 1000, 34, 16), frame(0, 3000)],
    ],
)
def test_what_cannot_be_sent_is_counted(sent: Sequence[bytes]) -> None:
    """No frame, or one that leaves work that was not agreed on."""
    cable = Cable()
    with wired(cable, pool_size=4 << 20) as (driver, model):
        driver.transact(TX, sent)
        driver.transact(TX, [header(2, 0, 9, 9, 9, 9), frame(5)])
        assert cable.far.recv(100) == PLAIN + frame(5), "what a header says besides means nothing"
        assert tally(model) == (1, 0)


HEADERS = st.tuples(
    st.integers(0, 255), st.sampled_from([0, 1, 2, 3, 4, 5, 6, 0x80, 0x81, 0x83, 0x84, 0x85]), *[st.one_of(st.integers(0, 80), st.integers(0, 65535))] * 4
)


@settings(max_examples=500, deadline=None)
@given(fields=HEADERS, length=st.integers(0, 200), accepted=st.sets(st.sampled_from([f for f in F if f & (HOST | GUEST)])), out=st.booleans())
def test_headers_leave_nothing_undone_that_was_not_agreed_on(fields: tuple[int, ...], length: int, accepted: set[int], out: bool) -> None:
    features = sum(accepted)
    packet = struct.pack("<BBHHHHH", *fields, 7) + bytes(length)
    checked = (offload.sent if out else offload.received)(packet, features) if out or length >= 14 else None
    if checked is None:
        return
    flags, gso, hdr_len, size, start, offset, buffers = struct.unpack_from("<BBHHHHH", checked)
    assert checked[HEADER:] == packet[HEADER:]
    assert length >= 14
    assert buffers == 0
    csum, ecn = (F.CSUM, F.HOST_ECN) if out else (F.GUEST_CSUM, F.GUEST_ECN)
    kinds = {1: F.HOST_TSO4, 3: F.HOST_UFO, 4: F.HOST_TSO6, 5: F.HOST_USO} if out else {1: F.GUEST_TSO4, 3: F.GUEST_UFO, 4: F.GUEST_TSO6}
    if flags & 1:
        assert features & csum
        assert 14 <= start <= start + offset + 2 <= length
    else:
        assert start == offset == 0
    assert flags & ~1 == 0 or (not out and flags == 2 and features & F.GUEST_CSUM)
    if gso:
        assert size
        assert hdr_len <= length
        assert not gso & 0x80 or (features & ecn and gso & 0x7F in (1, 4))
        if (kind := gso & 0x7F) in kinds:
            assert features & kinds[kind]
        else:
            assert kind == 5
            assert features & (F.GUEST_USO4 | F.GUEST_USO6)
    else:
        assert size == hdr_len == 0


def test_offloads_that_were_agreed_on_pass_both_ways() -> None:
    cable = Cable(HOST | GUEST)
    with wired(cable, wanted=F.MRG_RXBUF | HOST | GUEST) as (driver, model):
        large = header(1, 1, 54, 1448, 34, 16) + frame(9, 9000)
        driver.transact(TX, [large])
        assert cable.far.recv(10000) == large
        posted = [driver.post(RX, [], [4096]) for _ in range(3)]
        cable.far.send(large)
        driver.wait(lambda: posted[2].written >= 0, "the frame")
        assert b"".join(b.data[0][: b.written] for b in posted) == large[:10] + b"\3\0" + large[HEADER:]
        assert isinstance(model.path, Exchange)
        assert (model.path.sent.large, model.path.received.large) == (1, 1)


def test_frames_meant_for_another_driver_are_not_given_to_this_one() -> None:
    """A tap may still hold what its last reader would have finished."""
    cable = Cable(HOST | GUEST)
    with wired(cable) as (driver, model):
        posted = driver.post(RX, [], [9000])
        for head in (header(1, start=14, offset=16), header(1, 1, 54, 1448, 34, 16), header(2)):
            cable.far.send(head + frame(9, 3000))
        driver.wait(lambda: posted.written >= 0, "the complete frame")
        assert posted.data[0][:HEADER] == bytes(10) + b"\1\0", "without GUEST_CSUM no flag is set"
        assert tally(model) == (0, 2)


def test_two_drivers_after_another_get_only_their_own() -> None:
    cable = Cable()
    model = device(cable)
    with opened(model) as there:
        with Driver(there):
            cable.far.send(PLAIN + frame(1))
            time.sleep(0.05)
        with Driver(there) as driver:
            cable.far.send(PLAIN + frame(2))
            posted = driver.post(RX, [], [2048])
            driver.wait(lambda: posted.written >= 0, "a frame")
            assert posted.data[0][HEADER : HEADER + 60] == frame(2)
