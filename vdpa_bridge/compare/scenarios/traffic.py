# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Data through a device and back, checked byte by byte; and what a disk had before is put back.

Patterns are the same on every target and in every run, and no part of them repeats.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

from ...drivers import BlkDriver, Driver, NetDriver
from ..record import Run

AREA = 1 << 20
"""Bytes at the start of a disk that are written to."""
_ETHERTYPE = bytes.fromhex("88b5")
"""Local experimental use (IEEE 802)."""
BROADCAST = b"\xff" * 6


def pattern(length: int, seed: int = 1) -> bytes:
    """Bytes that look like no others."""
    return random.Random(seed).randbytes(length)


def same(got: bytes, sent: bytes) -> str:
    """``same data``, or where it differs first."""
    if got == sent:
        return "same data"
    first = next((at for at, (a, b) in enumerate(zip(got, sent, strict=False)) if a != b), min(len(got), len(sent)))
    return f"differs at {first}"


def frame(nic: NetDriver, length: int, seed: int = 1, to: bytes = BROADCAST) -> bytes:
    """An Ethernet frame of *length* bytes."""
    return to + mac_of(nic) + _ETHERTYPE + pattern(length - 14, seed)


def mac_of(nic: NetDriver) -> bytes:
    """The device's address, or a local one where it has none."""
    return bytes.fromhex(nic.mac.replace(":", "") or "020000000001")


def echo(run: Run, nic: NetDriver, sent: bytes) -> bytes:
    """Send a frame and wait for what comes; for nothing where the network does not loop."""
    nic.send(sent)
    return nic.receive() if run.place.loops else b""


def came(run: Run, got: bytes, sent: bytes) -> str:
    """As ``same``; ``sent`` where nothing can come."""
    return same(got, sent) if run.place.loops else "sent"


def rewrite(disk: BlkDriver, offset: int, data: bytes) -> bytes:
    """Write and read back."""
    disk.write(offset, data)
    return disk.read(offset, len(data))


@contextmanager
def borrowed(run: Run, disk: BlkDriver, case: str = "") -> Iterator[None]:
    """The first AREA bytes may be written to; putting back what was there is a step as well."""
    before = run.must("read", f"what is there {case}".rstrip(), lambda: disk.read(0, min(AREA, disk.info.size)))
    try:
        yield
    finally:
        run.step("write", f"what was there {case}".rstrip(), lambda: disk.write(0, before))


def check_traffic(run: Run, case: str) -> None:
    """One round trip of data with a driver of its own: the device works. Types without such a driver are brought up only."""
    if run.is_blk:
        with run.must("bring up", f"disk {case}", lambda: BlkDriver(run.device)) as disk, borrowed(run, disk, case):
            data = pattern(4096, 7)
            run.step("write", f"and read back {case}", lambda: rewrite(disk, 0, data), show=lambda got: same(got, data))
    elif run.is_net:
        with run.must("bring up", f"nic {case}", lambda: NetDriver(run.device)) as nic:
            data = frame(nic, 600, 7)
            run.step("send", f"and receive {case}", lambda: echo(run, nic, data), show=lambda got: came(run, got, data))
    else:
        run.must("bring up", f"all queues {case}", lambda: Driver(run.device)).close()
