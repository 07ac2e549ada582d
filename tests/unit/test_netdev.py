# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Wires by themselves: sockets whose other side comes, goes and lies; captures of any kind; options that do not go together."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.cable import frame
from tests.support.driven import opened, quiet
from vdpa_bridge.drivers import Driver
from vdpa_bridge.models import NetModel, make_model
from vdpa_bridge.netdev import LONGEST, PLAIN, Capture, DgramNetdev, Playback, StreamClient, StreamServer
from vdpa_bridge.netdev.pcap import frames_of

__all__ = ["quiet"]  # an autouse fixture

LINK = 6
"""Where the status is in the configuration space."""


@contextmanager
def driven(**options: str) -> Iterator[tuple[Driver, NetModel]]:
    model = make_model("net", options)
    assert isinstance(model, NetModel)
    with opened(model) as there, Driver(there) as driver:
        yield driver, model


def receive(driver: Driver, count: int = 1) -> list[bytes]:
    posted = [driver.post(0, [], [2048]) for _ in range(count)]
    driver.wait(lambda: posted[-1].written >= 0, f"{count} frames")
    return [buffer.data[0][12 : buffer.written] for buffer in posted]


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def packed(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


# Datagrams -------------------------------------------------------------------------------------------------------------------


def test_two_devices_on_datagrams(short_dir: Path) -> None:
    """Neither need be there first, and one that comes back is found again."""
    here, there = str(short_dir / "a"), str(short_dir / "b")
    with driven(dgram=f"{here},{there}") as (left, _):
        left.transact(1, [PLAIN, frame(0)])  # lost
        for turn in range(2):
            with driven(dgram=f"{there},{here}") as (right, _):
                left.transact(1, [PLAIN, frame(1)])
                assert receive(right) == [frame(1)]
                right.transact(1, [PLAIN, frame(2 + turn)])
                assert receive(left) == [frame(2 + turn)]
    assert os.listdir(short_dir) == []


def test_datagrams_to_whoever_sent_first(short_dir: Path) -> None:
    path = str(short_dir / "a")
    with driven(dgram=path) as (driver, _):
        for name in ("x", "y"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
                peer.bind(str(short_dir / name))
                peer.settimeout(5)
                peer.sendto(frame(1), path)
                assert receive(driver) == [frame(1)]
                driver.transact(1, [PLAIN, frame(2)])
                assert peer.recv(100) == frame(2)
            driver.transact(1, [PLAIN, frame(3)])  # lost; the next one is found


def test_datagrams_that_are_no_frames(short_dir: Path) -> None:
    path = str(short_dir / "a")
    with driven(dgram=path) as (driver, _), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
        for data in (b"", bytes(13), bytes(LONGEST + 1), frame(1)):
            peer.sendto(data, path)
        assert receive(driver) == [frame(1)]


def test_slow_datagram_peer_is_waited_for(short_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
        peer.bind(str(short_dir / "b"))
        peer.settimeout(5)
        with driven(dgram=f"{short_dir}/a,{short_dir}/b") as (driver, _):
            posted = [driver.post(1, [PLAIN, frame(number)]) for number in range(100)]
            time.sleep(0.1)
            driver.poll()
            assert posted[-1].written == -1, "a datagram socket holds ten or so"
            before = time.process_time()
            time.sleep(0.2)
            assert time.process_time() - before < 0.1
            assert [peer.recv(100) for _ in range(100)] == [frame(number) for number in range(100)]


def test_socket_that_somebody_else_has(short_dir: Path) -> None:
    path = str(short_dir / "a")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(path)
        with pytest.raises(OSError, match=f"cannot bind {path}: Address already in use"):
            DgramNetdev(path)
    DgramNetdev(path).close()  # stale now


# Streams ---------------------------------------------------------------------------------------------------------------------


def test_two_devices_on_a_stream(short_dir: Path) -> None:
    path = str(short_dir / "s")
    with driven(stream=path, server="on") as (left, _):
        assert left.device.get_config(LINK, 2) == b"\0\0"
        for turn in range(2):
            with driven(stream=path) as (right, _):
                right.transact(1, [PLAIN, frame(turn)])
                assert receive(left) == [frame(turn)]
                assert left.device.get_config(LINK, 2)[0] & 1
                sent = [left.post(1, [PLAIN, frame(number, 1400)]) for number in range(100)]
                assert receive(right, 100) == [frame(number, 1400) for number in range(100)]
                left.wait(lambda sent=sent: sent[-1].written >= 0, "frames sent")  # type: ignore[misc]
            until(lambda: left.device.get_config(LINK, 2) == b"\0\0")
            left.transact(1, [PLAIN, frame(9)])  # lost
    assert os.listdir(short_dir) == []


def test_server_that_comes_back(short_dir: Path) -> None:
    path = str(short_dir / "s")
    server = StreamServer(path)
    model = make_model("net", {"stream": path})
    with opened(model) as there, Driver(there) as driver:
        assert there.get_config(LINK, 2) == b"\1\0"
        server.close()
        until(lambda: there.get_config(LINK, 2) == b"\0\0")
        assert model.refresh() == ""
        with socket.create_server(path, family=socket.AF_UNIX) as again:
            assert model.refresh() == "the link is up"
            peer, _ = again.accept()
            with peer:
                driver.transact(1, [PLAIN, frame(1)])
                assert peer.recv(100) == packed(frame(1))
    with pytest.raises(OSError, match=f"cannot connect to {path}: Connection refused"):
        make_model("net", {"stream": path})


@pytest.mark.parametrize("length", [0, 13, LONGEST + 1, 0xFFFFFFFF])
def test_impossible_length_ends_the_connection(short_dir: Path, length: int) -> None:
    path = str(short_dir / "s")
    with driven(stream=path, server="on") as (driver, _):
        for _ in range(2):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
                peer.settimeout(5)
                peer.connect(path)
                peer.sendall(packed(frame(3)) + struct.pack(">I", length) + bytes(20))
                assert receive(driver) == [frame(3)]
                with contextlib.suppress(ConnectionResetError):  # what it had not read yet
                    assert peer.recv(1) == b""


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(14, 3000), max_size=20), cuts=st.lists(st.integers(1, 2000), max_size=40))
def test_frames_in_any_pieces(sizes: list[int], cuts: list[int]) -> None:
    ours, theirs = socket.socketpair()
    wire = StreamServer.__new__(StreamServer)
    super(StreamServer, wire).__init__("test")
    wire._take(ours)
    frames = [frame(number, size) for number, size in enumerate(sizes)]
    data = b"".join(map(packed, frames))
    got: list[bytes] = []
    with ours, theirs:
        for cut in [*cuts, len(data)]:
            theirs.sendall(data[:cut])
            data = data[cut:]
            got += wire.receive(0)
        while len(got) < len(frames):
            got += wire.receive(0)
    assert got == [PLAIN + frame for frame in frames]


def test_slow_stream_peer_gets_whole_frames(short_dir: Path) -> None:
    path = str(short_dir / "s")
    with driven(stream=path, server="on") as (driver, _), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(5)
        peer.connect(path)
        until(lambda: driver.device.get_config(LINK, 2)[0] & 1)
        expected = b""
        for round_ in range(8):
            for number in range(32):
                data = frame(number + round_, 30000)
                expected += packed(data)
                driver.post(1, [PLAIN, data])
            got = b""
            while len(got) < len(expected):
                got += peer.recv(1000003)
                driver.poll()
            assert got == expected
            expected = b""


def test_slow_client_is_no_reason_to_wait(short_dir: Path) -> None:
    path = str(short_dir / "s")
    server = StreamServer(path)
    try:
        client = StreamClient(path)
        server.receive(0)
        sent = 0
        while not client.blocked(0):
            client.send(0, PLAIN + frame(sent, 60000))
            sent += 1
        got = 0
        while got < sent:
            got += len(server.receive(0))
            client.flush(0)
        assert not client.blocked(0)
        client.close()
    finally:
        server.close()


# Captures --------------------------------------------------------------------------------------------------------------------


def classic(frames: list[bytes], order: str = "<", magic: int = 0xA1B23C4D, link: int = 1) -> bytes:
    head = struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 65535, link)
    return head + b"".join(struct.pack(order + "IIII", 1, 2, len(data), len(data)) + data for data in frames)


def block(kind: int, body: bytes, order: str = "<") -> bytes:
    size = 12 + len(body)
    return struct.pack(order + "II", kind, size) + body + struct.pack(order + "I", size)


def next_generation(frames: list[bytes], order: str = "<", link: int = 1) -> bytes:
    out = block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1), order)
    out += block(1, struct.pack(order + "HHI", link, 0, 0), order) + block(5, bytes(8), order)
    for number, data in enumerate(frames):
        padded = data + bytes(-len(data) % 4)
        head = struct.pack(order + "I", len(data)) if number % 2 else struct.pack(order + "IIIII", 0, 0, 0, len(data), len(data))
        out += block(3 if number % 2 else 6, head + padded, order)
    return out


FRAMES = [frame(number, 60 + number) for number in range(20)]
FILES = {
    "pcap": classic(FRAMES, magic=0xA1B2C3D4),
    "pcap of nanoseconds": classic(FRAMES),
    "pcap of another machine": classic(FRAMES, ">"),
    "pcapng": next_generation(FRAMES),
    "pcapng of another machine": next_generation(FRAMES, ">"),
    "pcapng of two sections": next_generation(FRAMES[:7], ">") + next_generation(FRAMES[7:]),
}


@pytest.mark.parametrize("kind", FILES)
def test_frames_are_played(tmp_path: Path, kind: str) -> None:
    """From the beginning for each driver, with a pause when it has no buffers."""
    path = tmp_path / "in"
    path.write_bytes(FILES[kind])
    model = make_model("net", {"pcap-in": str(path)})
    with opened(model) as there:
        for count in (20, 5, 20):
            with Driver(there) as driver:
                assert receive(driver, count) == FRAMES[:count]
                driver.transact(1, [PLAIN, frame(1)])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "ends too early"),
        (b"\x7fELF" + bytes(100), "neither pcap nor pcapng"),
        (classic([])[:23], "ends too early"),
        (classic([], link=105), "link type 105"),
        (next_generation([])[:20], "ends too early"),
        (next_generation([]).replace(b"\x4d\x3c\x2b\x1a", bytes(4)), "a section that is none"),
    ],
)
def test_files_that_are_no_captures(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "in"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words) as raised:
        make_model("net", {"pcap-in": str(path)})
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    "data",
    [
        classic(FRAMES)[:-1],
        classic(FRAMES) + b"\0",
        classic(FRAMES) + struct.pack("<IIII", 0, 0, 0xFFFFFFFF, 0),
        next_generation(FRAMES) + block(6, bytes(19)),
        next_generation(FRAMES) + block(6, struct.pack("<IIIII", 1, 0, 0, 0, 0)),
        next_generation(FRAMES) + block(6, struct.pack("<IIIII", 0, 0, 0, 5, 5)),
        next_generation(FRAMES) + struct.pack("<II", 6, 8) + bytes(20),
        next_generation(FRAMES) + struct.pack("<II", 6, 0xFFFFFFF0),
        next_generation(FRAMES) + next_generation([frame()], link=101),
    ],
)
def test_damaged_captures_end_where_they_are_damaged(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "in"
    path.write_bytes(data)
    with driven(**{"pcap-in": str(path)}) as (driver, _):
        assert receive(driver, 19) == FRAMES[:19]


@settings(max_examples=200, deadline=None)
@given(data=st.one_of(st.binary(max_size=200), st.sampled_from(list(FILES.values())).flatmap(lambda file: st.binary(max_size=9).map(file.__add__))), at=st.integers(0, 300))
def test_any_file_ends(tmp_path_factory: pytest.TempPathFactory, data: bytes, at: int) -> None:
    spoilt = data[:at] + bytes(reversed(data[at : at + 4])) + data[at + 4 :]
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(spoilt)
    with path.open("rb") as file, contextlib.suppress(ValueError):
        assert sum(len(found) for found in frames_of(file)) <= len(spoilt)


def test_capture_of_what_passes(tmp_path: Path) -> None:
    """Both directions, whatever wire it is; what was captured can be played, and is complete at any time."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_bytes(FILES["pcap"])
    with driven(**{"pcap-in": str(source), "pcap-out": str(out)}) as (driver, _):
        receive(driver, 20)
        driver.transact(1, [PLAIN, frame(77)])
        with out.open("rb") as file:
            assert list(frames_of(file)) == [*FRAMES, frame(77)]
        assert out.read_bytes().endswith(struct.pack("<HHIHHI", 2, 4, 2, 0, 0, 32 + 60 + 12))


def test_capture_alone_answers_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with driven(**{"pcap-out": str(out)}) as (driver, _):
        driver.transact(1, [PLAIN, frame(1)])
    playback = Playback(str(out))
    playback.start(0)
    assert playback.receive(0) == [PLAIN + frame(1)]
    assert playback.receive(0) == []
    playback.close()


def test_full_disk_ends_a_capture_and_not_the_device(tmp_path: Path) -> None:
    capture = Capture("/dev/full")
    capture.frame(frame(1), True)
    capture.close()
    with pytest.raises(OSError, match="No such file"):
        Capture(str(tmp_path / "none" / "out"))


# Options ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tap": "a", "stream": "b"}, "tap= and stream=: a device has one wire"),
        ({"dgram": "a", "user": "on"}, "dgram= and user="),
        ({"server": "on"}, "server= goes with stream="),
        ({"tcp-ports": "22", "user": "off"}, "tcp-ports= goes with user="),
        ({"stream": "a", "pairs": "2"}, "pairs=2: a tap and a loop have several queue pairs, stream= has one"),
        ({"pcap-out": "/dev/null", "pairs": "2"}, "pcap-out= has one"),
        ({"link": "sideways"}, "link=sideways; it is up or down"),
        ({"speed": "fast"}, "speed=fast"),
        ({"user": "perhaps"}, "it is on or off"),
        ({"tap": "a/b"}, "no name of an interface"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_model("net", options)


def test_user_networking_without_its_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="needs passt: apt install passt"):
        make_model("net", {"user": "on"})
