# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Receiving with descriptors: all that came are there and closed on exec, what did not come is said, waits end."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
from collections.abc import Iterator

import pytest

from vdpa_bridge.vhost_user.framing import close_all
from vdpa_bridge.vhost_user.recvmsg import CHUNK, receive

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_bytes_and_descriptors(pair: Pair) -> None:
    ours, theirs = pair
    with open("/dev/null", "rb") as file:
        socket.send_fds(theirs, [b"two"], [file.fileno(), theirs.fileno()])
        data, fds, lost = receive(ours.fileno(), 2)
        assert (data, lost) == (b"two", False)
        assert [os.fstat(fd).st_ino for fd in fds] == [os.fstat(file.fileno()).st_ino, os.fstat(theirs.fileno()).st_ino]
        assert not any(os.get_inheritable(fd) for fd in fds)
        close_all(fds)
    theirs.send(b"none")
    assert receive(ours.fileno(), 2) == (b"none", [], False)


@pytest.mark.parametrize(("sent", "most"), [(1, 0), (33, 32), (253, 2)])
def test_more_than_there_is_room_for(pair: Pair, sent: int, most: int) -> None:
    """The kernel may fill what alignment leaves with one more."""
    ours, theirs = pair
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(theirs, [b"x"], [theirs.fileno()] * sent)
    data, fds, lost = receive(ours.fileno(), most)
    assert (data, lost) == (b"x", True)
    assert len(fds) in (most, most + most % 2)
    close_all(fds)
    assert len(os.listdir("/proc/self/fd")) == before


def test_room_for_all_that_the_kernel_takes(pair: Pair) -> None:
    ours, theirs = pair
    socket.send_fds(theirs, [b"x"], [theirs.fileno()] * 253)
    data, fds, lost = receive(ours.fileno(), 253)
    assert (data, len(fds), lost) == (b"x", 253, False)
    close_all(fds)
    with pytest.raises(ValueError, match="254 descriptors, of at most 253"):
        receive(ours.fileno(), 254)


def test_at_most_a_chunk(pair: Pair) -> None:
    ours, theirs = pair
    theirs.sendall(bytes(CHUNK + 1))
    assert [len(receive(ours.fileno(), 0)[0]) for _ in range(2)] == [CHUNK, 1]


def test_the_end(pair: Pair) -> None:
    ours, theirs = pair
    theirs.close()
    assert receive(ours.fileno(), 1) == (b"", [], False)
    with pytest.raises(OSError, match="Bad file descriptor") as error:
        receive(-1, 1)
    assert error.value.errno == errno.EBADF


def test_silence(pair: Pair) -> None:
    ours, _ = pair
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, 1000))
    with pytest.raises(BlockingIOError):
        receive(ours.fileno(), 1)


def test_signals(pair: Pair) -> None:
    """A handler runs while it waits; one that returns does not end the wait, one that raises does."""
    ours, theirs = pair
    calls = []

    def handler(number: int, frame: object) -> None:
        calls.append(number)
        if len(calls) == 3:
            raise InterruptedError("enough")
        if len(calls) == 2:
            theirs.send(b"late")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        assert receive(ours.fileno(), 1) == (b"late", [], False)
        assert len(calls) == 2
        with pytest.raises(InterruptedError, match="enough"):
            receive(ours.fileno(), 1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
