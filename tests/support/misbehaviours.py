# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a model can do to its own process, which is to be felt by nobody else."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable

FOREIGN: list[int] = []
"""The address of ``mov $20, %eax; int $0x80; ret``, which a model has made before."""
MISBEHAVIOURS: dict[str, Callable[[], None]] = {}
"""What a model may do to itself, by name."""


def misbehaviour(function: Callable[[], None]) -> Callable[[], None]:
    """Puts it into the table."""
    MISBEHAVIOURS[function.__name__.removeprefix("_")] = function
    return function


@misbehaviour
def _crash() -> None:
    ctypes.string_at(0)


@misbehaviour
def _foreign_call() -> None:
    """getpid by the numbers of the 32-bit i386, which mean other calls than ours."""
    if ctypes.CFUNCTYPE(ctypes.c_int)(FOREIGN[0])() <= 0:
        raise OSError(errno.ENOSYS, "no 32-bit calls")


@misbehaviour
def _loop() -> None:
    while True:
        pass


@misbehaviour
def _loop_with_lock() -> None:
    """Without giving Python's lock away: no signal handler runs any more."""
    (ctypes.PyDLL(None).sleep)(3600)


@misbehaviour
def _eat_memory() -> None:
    hoard = []
    while True:
        hoard.append(b"x" * (16 << 20))


@misbehaviour
def _eat_threads() -> None:
    while True:
        threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()


@misbehaviour
def _eat_descriptors() -> None:
    while True:
        os.eventfd(0)


@misbehaviour
def _fill_log() -> None:
    for number in range(30_000):
        logging.getLogger("vdpa_bridge").error("line %d of far too many", number)


@misbehaviour
def _abuse_link() -> None:
    """Speak to the process outside as nobody should."""
    for fd in range(3, 256):
        try:
            sock = socket.socket(fileno=os.dup(fd))
        except OSError:
            continue
        with sock:
            if sock.type == socket.SOCK_SEQPACKET:
                for _ in range(3000):
                    socket.send_fds(sock, [b"who"], [0, 1, 2])
                for words in (b"who", b"tell ", b"tell MAINPID=1\nFDSTORE=1\nSTATUS=still here\nX=1", b"\xff" * 60000, b"tell STATUS=\xff"):
                    sock.send(words)
                return
    raise OSError(errno.ENOENT, "no link")


@misbehaviour
def _leave() -> None:
    os.write(2, b"[" * 1900 + b"\n" + b"{}\n")
    os._exit(200)


@misbehaviour
def _fail() -> None:
    raise KeyError("the model is wrong")
