# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge net TARGET tap NAME`` as a process, what passes its interface, and pcap files of it."""

from __future__ import annotations

import itertools
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

_ETH_P_ALL = 3
_numbers = itertools.count()


def tap_name() -> str:
    """An interface that nobody has; skips where none can be made."""
    if not Path("/dev/net/tun").exists():
        subprocess.run(["modprobe", "tun"], check=False, capture_output=True, timeout=20)
    if os.geteuid() or not Path("/dev/net/tun").exists():
        pytest.skip("taps take root and /dev/net/tun: tools/lab --guest has both")
    return f"vb{os.getpid() % 100000}t{next(_numbers)}"


@dataclass
class Tapped:
    """The process, and its interface."""

    name: str
    process: subprocess.Popen[str]
    ready: str

    def end(self, number: int = 15) -> str:
        """Stop it, and what it said then."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=30)
        return out + err


@contextmanager
def tapped(target: str, *options: str) -> Iterator[Tapped]:
    """Running; it has said that frames pass."""
    name = tap_name()
    command = [sys.executable, "-m", "vdpa_bridge", "net", target, "tap", name, *options]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 60)[0], "no readiness within 60 s"
        line = process.stdout.readline()
        if not line:
            pytest.fail(f"{' '.join(command)}: {process.communicate(timeout=10)[1]}")
        yield Tapped(name, process, line)
    finally:
        process.kill()
        process.communicate()


class Wire:
    """A packet socket on an interface: all that passes, each with the time and whether this system sent it."""

    def __init__(self, interface: str) -> None:
        self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # before it is bound it hears nothing of other interfaces
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._sock.bind((interface, _ETH_P_ALL))
        self.seen: list[tuple[float, bool, bytes]] = []

    def send(self, frame: bytes) -> None:
        """Out of the interface."""
        self._sock.send(frame)

    def look(self, timeout: float = 0.0) -> bool:
        """Note what passed; False when nothing did for *timeout* seconds."""
        if not select.select([self._sock], [], [], timeout)[0]:
            return False
        frame, address = self._sock.recvfrom(70000)
        self.seen.append((time.time(), address[2] == socket.PACKET_OUTGOING, frame))
        return True

    def came(self, ethertype: bytes) -> list[bytes]:
        """What came in, of one kind."""
        return [frame for _, sent, frame in self.seen if not sent and frame[12:14] == ethertype]

    def write_pcap(self, path: Path) -> None:
        """All of it, for tcpdump and its like."""
        with path.open("wb") as file:
            file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 70000, 1))
            for when, _, frame in self.seen:
                file.write(struct.pack("<IIII", int(when), int(when % 1 * 1e6), len(frame), len(frame)) + frame)

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def ip(*words: str) -> None:
    """``ip WORDS``, which has to work."""
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


def exists(interface: str) -> bool:
    """Whether it is there."""
    return Path("/sys/class/net", interface).exists()


def attribute(interface: str, name: str) -> str:
    """What sysfs says of it."""
    return Path("/sys/class/net", interface, name).read_text().strip()


def bounce(wire: Wire, frames: Sequence[bytes], timeout: float = 10.0) -> list[bytes]:
    """Send *frames* in bursts, and what came back of their kind, in order."""
    end = time.monotonic() + timeout
    for at in range(0, len(frames), 16):
        for frame in frames[at : at + 16]:
            wire.send(frame)
        while len(wire.came(frames[0][12:14])) < min(at + 16, len(frames)) and time.monotonic() < end:
            wire.look(0.1)
    return wire.came(frames[0][12:14])
