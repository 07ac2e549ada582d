# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Eventfds shared with somebody who misuses them."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator

import pytest

from vdpa_bridge.eventfd import EventFd, kick

FULL = (1 << 64) - 2


@pytest.fixture
def theirs() -> Iterator[int]:
    """A blocking eventfd, which is what a hostile peer would pass."""
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def test_it_is_a_descriptor_of_our_own(theirs: int) -> None:
    ours = EventFd(theirs)
    assert ours.fd != theirs
    ours.signal()
    ours.signal()
    assert os.eventfd_read(theirs) == 2
    ours.close()
    ours.close()
    ours.signal()
    os.fstat(theirs)


def test_what_is_no_eventfd() -> None:
    memory = os.memfd_create("eventfd", os.MFD_CLOEXEC)
    pipe = os.pipe2(os.O_CLOEXEC)
    try:
        for fd in (memory, *pipe):
            with pytest.raises(OSError, match="not an eventfd") as refused:
                EventFd(fd)
            assert refused.value.errno == errno.EINVAL
    finally:
        for fd in (memory, *pipe):
            os.close(fd)


@pytest.mark.parametrize("fd", [1 << 20, -2, 1 << 30])
def test_what_is_not_open(fd: int) -> None:
    with pytest.raises(OSError) as refused:
        EventFd(fd)
    assert refused.value.errno == errno.EBADF


def test_none_is_written_as_minus_one(theirs: int) -> None:
    assert EventFd.borrow(-1) is None
    ours = EventFd.borrow(theirs)
    assert ours is not None
    ours.close()


def test_closing_frees_a_writer_that_is_stuck(theirs: int) -> None:
    """A full counter blocks a write; closing drains it, and waits for nobody."""
    ours = EventFd(theirs)
    os.eventfd_write(theirs, FULL)
    writer = threading.Thread(target=ours.signal)
    writer.start()
    time.sleep(0.02)
    assert writer.is_alive()
    started = time.monotonic()
    ours.close()
    writer.join(5)
    assert not writer.is_alive()
    assert time.monotonic() - started < 2


def test_freeing_never_waits(theirs: int) -> None:
    """Also when somebody else was faster."""
    ours = EventFd(theirs)
    started = time.monotonic()
    ours.free()
    os.eventfd_write(theirs, 5)
    ours.free()
    ours.free()
    ours.close()
    ours.free()
    assert time.monotonic() - started < 1


def test_kick(theirs: int) -> None:
    """Nothing is added to a full counter, for there is an event waiting."""
    kick(theirs)
    assert os.eventfd_read(theirs) == 1
    os.eventfd_write(theirs, FULL)
    kick(theirs)
    assert os.eventfd_read(theirs) == FULL
