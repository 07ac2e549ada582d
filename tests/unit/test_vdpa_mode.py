# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Operations as messages of vDPA mode and back; and a front-end whose back-end lies."""

from __future__ import annotations

import errno
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vdpa_bridge import ops
from vdpa_bridge.backends.vhost_user import VhostUserVdpa
from vdpa_bridge.errors import LocalProtocolError, PeerClosed, PeerTimeout, RemoteProtocolError
from vdpa_bridge.vhost_user.connection import Connection
from vdpa_bridge.vhost_user.framing import HEADER, Frame, frame
from vdpa_bridge.vhost_user.vdpa_mode import (
    HELLO_OP,
    MAGIC,
    MAX_PAYLOAD,
    MAX_REQUESTS,
    OUR_HELLO,
    REVISION,
    Hello,
    check_hello,
    fds_wanted,
    parse_reply,
    parse_request,
    reply_bytes,
    request_bytes,
)
from vdpa_bridge.wire import EMPTY, U8, ConfigData, ConfigRange, IotlbUpdate, Iova, VringFile, VringState

STATUS = ops.GET_STATUS.number


def test_numbers_on_the_wire() -> None:
    """The request number is the ioctl's; one example by hand."""
    assert request_bytes(ops.GET_STATUS, EMPTY) == (bytes.fromhex("71af0180 01000000 00000000"), ())
    assert request_bytes(ops.SET_STATUS, U8(7)) == (bytes.fromhex("72af0140 01000000 01000000 07"), ())
    assert request_bytes(ops.SET_VRING_KICK, VringFile(1, 9)) == (bytes.fromhex("20af0840 01000000 08000000 01000000 00000000"), (9,))
    assert reply_bytes(STATUS, 0, U8(7)) == bytes.fromhex("71af0180 05000000 09000000 00000000 00000000 07")
    assert reply_bytes(STATUS, 22) == bytes.fromhex("71af0180 05000000 08000000 16000000 00000000")


@pytest.mark.parametrize(
    ("op", "request_"),
    [
        (ops.GET_FEATURES, EMPTY),
        (ops.SET_VRING_NUM, VringState(3, 128)),
        (ops.SET_VRING_CALL, VringFile(2, -1)),
        (ops.GET_CONFIG, ConfigRange(4, 8)),
        (ops.SET_CONFIG, ConfigData(4, b"abc")),
        (ops.IOTLB_UPDATE, IotlbUpdate(Iova(4096), 8192, 5, 4096, 1, 1)),
    ],
)
def test_request_round_trip(op: ops.Op[Any, Any], request_: Any) -> None:
    data, fds = request_bytes(op, request_)
    number, flags, size = HEADER.unpack_from(data)
    assert size == len(data) - HEADER.size
    assert fds_wanted(number, data[HEADER.size :]) == (len(fds), len(fds))
    assert parse_request(Frame(number, flags, data[HEADER.size :], list(fds))) == (op, request_)


@pytest.mark.parametrize(
    ("payload", "flags", "number"),
    [
        (b"", 5, STATUS),
        (bytes(7), 5, STATUS),
        (bytes(8), 5, STATUS),
        (bytes(10), 5, STATUS),
        (struct.pack("=IIB", 0, 1, 0), 5, STATUS),
        (struct.pack("=IIB", 22, 0, 0), 5, STATUS),
        (struct.pack("=II", 4096, 0), 5, STATUS),
        (struct.pack("=IIB", 0, 0, 7), 1, STATUS),
        (struct.pack("=IIB", 0, 0, 7), 0xD, STATUS),
        (struct.pack("=IIB", 0, 0, 7), 5, STATUS + 1),
    ],
)
def test_replies_that_are_none(payload: bytes, flags: int, number: int) -> None:
    with pytest.raises(RemoteProtocolError, match="GET_STATUS"):
        parse_reply(ops.GET_STATUS, frame(number, payload, flags))


def test_replies() -> None:
    assert parse_reply(ops.GET_STATUS, frame(STATUS, struct.pack("=IIB", 0, 0, 7), 5)) == (0, U8(7))
    assert parse_reply(ops.GET_STATUS, frame(STATUS, struct.pack("=II", 22, 0), 5)) == (22, None)
    assert parse_reply(ops.SET_OWNER, frame(ops.SET_OWNER.number, bytes(8), 5)) == (0, EMPTY)
    with pytest.raises(RemoteProtocolError):
        parse_reply(ops.SET_OWNER, frame(ops.SET_OWNER.number, bytes(9), 5))


def test_hello() -> None:
    check_hello(OUR_HELLO)
    assert HELLO_OP.request.layout.size == 24
    assert MAGIC.to_bytes(8, "little") == b"vhostVDP"
    for wrong in (Hello(0, 1, 4160, 256, 0), Hello(MAGIC, 2, 4160, 256, 0), Hello(MAGIC, 1, 511, 256, 0), Hello(MAGIC, 1, 4160, 15, 0)):
        with pytest.raises(RemoteProtocolError, match="HELLO"):
            check_hello(wrong)


# A back-end that lies -------------------------------------------------------------------------------------------------------------

Script = Callable[[socket.socket], None]


class Peer:
    """The other end of a connection, played by *script* in a thread of its own."""

    def __init__(self, script: Script) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._play, args=(script,))
        self._thread.start()

    def _play(self, script: Script) -> None:
        with self.theirs:
            try:
                script(self.theirs)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the front-end hung up, as it may

    def close(self) -> None:
        self.ours.close()
        self._thread.join(10)


@pytest.fixture
def play() -> Iterator[Callable[..., VhostUserVdpa]]:
    """Connect to a scripted back-end; HELLO is answered unless *hello* says otherwise."""
    peers: list[Peer] = []

    def start(script: Script, hello: bytes | None = reply_bytes(HELLO_OP.number, 0, OUR_HELLO)) -> VhostUserVdpa:
        def whole(sock: socket.socket) -> None:
            sock.recv(2 * HEADER.size + 8 + HELLO_OP.request.layout.size, socket.MSG_WAITALL)
            if hello is not None:
                sock.sendall(hello)
            script(sock)

        peers.append(Peer(whole))
        return VhostUserVdpa(Connection(peers[-1].ours, "liar", 0.3))

    yield start
    for peer in peers:
        peer.close()


def nothing(sock: socket.socket) -> None:
    """Say no more."""


def answer(data: bytes) -> Script:
    """Wait for a request, which may have come beside HELLO, send *data*, hang up."""

    def script(sock: socket.socket) -> None:
        sock.settimeout(5)
        sock.recv(65536)
        sock.sendall(data)

    return script


@pytest.mark.parametrize(
    "hello",
    [
        reply_bytes(HELLO_OP.number, errno.EPROTO),
        reply_bytes(HELLO_OP.number, 0, Hello(MAGIC, REVISION + 1, MAX_PAYLOAD, MAX_REQUESTS, 0)),
        reply_bytes(HELLO_OP.number, 0, Hello(1, REVISION, MAX_PAYLOAD, MAX_REQUESTS, 0)),
        reply_bytes(STATUS, 0, U8(1)),
        frame(16, bytes(8), 5),
        frame(0, b"", 1),
    ],
)
def test_wrong_hello(play: Callable[..., VhostUserVdpa], hello: bytes) -> None:
    with pytest.raises(RemoteProtocolError), play(nothing, hello) as backend:
        backend.call(ops.GET_STATUS, EMPTY)


def test_no_hello(play: Callable[..., VhostUserVdpa]) -> None:
    with pytest.raises(PeerClosed, match="closed the connection"), play(nothing, None) as backend:
        backend.call(ops.GET_STATUS, EMPTY)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", PeerClosed),
        (reply_bytes(STATUS, 0, U8(1))[:-1], PeerClosed),
        (reply_bytes(STATUS, 0, U8(1))[:5], PeerClosed),
        (reply_bytes(ops.GET_DEVICE_ID.number, 0, U8(1)), RemoteProtocolError),
        (reply_bytes(STATUS, 0), RemoteProtocolError),
        (frame(STATUS, bytes(9), 1), RemoteProtocolError),
        (HEADER.pack(STATUS, 5, 0xFFFFFFFF), RemoteProtocolError),
        (HEADER.pack(STATUS, 6, 9), RemoteProtocolError),
    ],
)
def test_wrong_answers(play: Callable[..., VhostUserVdpa], data: bytes, error: type[Exception]) -> None:
    """The error names the peer and the operation; the connection is dead afterwards."""
    backend = play(answer(data))
    with pytest.raises(error, match="GET_STATUS") as raised:
        backend.call(ops.GET_STATUS, EMPTY)
    assert isinstance(raised.value, RemoteProtocolError)
    backend.close()


def test_no_answer(play: Callable[..., VhostUserVdpa]) -> None:
    """A wait ends after the timeout, says so, and every later call fails at once."""

    def silent(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.recv(65536)

    backend = play(silent)
    with pytest.raises(PeerTimeout, match=r"liar.*GET_STATUS.*0\.3 s"):
        backend.call(ops.GET_STATUS, EMPTY)
    with pytest.raises(PeerTimeout, match="dead"):
        backend.call(ops.GET_STATUS, EMPTY)
    backend.close()


def test_answer_in_pieces(play: Callable[..., VhostUserVdpa]) -> None:
    def dribble(sock: socket.socket) -> None:
        sock.recv(65536)
        for byte in reply_bytes(STATUS, 0, U8(11)):
            sock.sendall(bytes([byte]))

    with play(dribble) as backend:
        assert backend.call(ops.GET_STATUS, EMPTY) == U8(11)


def test_limits_of_the_peer_are_kept(play: Callable[..., VhostUserVdpa]) -> None:
    """No message longer, no more requests under way, than its HELLO allows."""
    under_way: list[int] = []

    def counting(sock: socket.socket) -> None:
        buffer, count = b"", 0
        while data := sock.recv(65536):
            buffer += data
            sock.setblocking(False)
            try:
                while more := sock.recv(65536):
                    buffer += more
            except BlockingIOError:
                pass
            sock.setblocking(True)
            count = len(buffer) // HEADER.size
            under_way.append(count)
            sock.sendall(reply_bytes(STATUS, 0, U8(1)) * count)
            buffer = buffer[count * HEADER.size :]

    backend = play(counting, reply_bytes(HELLO_OP.number, 0, Hello(MAGIC, REVISION, 512, 16, 0)))
    assert backend.call_many([(ops.GET_STATUS, EMPTY)] * 50) == [U8(1)] * 50
    assert max(under_way) <= 16
    with pytest.raises(LocalProtocolError, match="512"):
        backend.call(ops.SET_CONFIG, ConfigData(0, bytes(600)))
    with pytest.raises(LocalProtocolError, match="512"):
        backend.call_many([(ops.GET_STATUS, EMPTY), (ops.SET_CONFIG, ConfigData(0, bytes(600)))])
    with pytest.raises(struct.error):
        backend.call_many([(ops.GET_STATUS, EMPTY), (ops.SET_VRING_KICK, VringFile(0, 0)), (ops.SET_VRING_NUM, VringState(-1, 0))])
    assert backend.call(ops.GET_STATUS, EMPTY) == U8(1)
    backend.close()
