# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The host's end of a console's ports, and the driver's, as tests use them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from vdpa_bridge.drivers import ConsoleDriver

PATIENCE = 10.0


@contextmanager
def client(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(path)
        yield sock


def take(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        more = sock.recv(count - len(data))
        assert more, f"the end after {len(data)} bytes"
        data += more
    return bytes(data)


def read(driver: ConsoleDriver, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        data += driver.read(PATIENCE)
    return bytes(data)


@contextmanager
def terminal(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)
