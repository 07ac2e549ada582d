# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Load for NICs.

Rule of this file: the frames lie in the driver's transmit buffers, made once; what is counted is frames, not what they carry.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from .._virtqueue import LARGEST_BATCH, SHORTEST_FRAME, Histogram, NetLoad
from ..drivers.net import NetDriver
from ..errors import DeviceBroken
from ..virtio.config import parse_mac
from .threads import Progress, Spent, Timing, latency, merged, run_all

ETHERTYPE = bytes.fromhex("88b5")
"""Local experimental use (IEEE 802): no host stack answers it."""
BROADCAST = "ff:ff:ff:ff:ff:ff"
_COUNTED = ("sent", "received", "received_bytes", "ours", "reordered", "foreign", "lost")
"""What ``NetLoad.counts`` has."""
_NOBODY = bytes.fromhex("020000000001")


class Mode(IntEnum):
    """What to do with frames."""

    SEND = 1
    RECEIVE = 2
    ECHO = 3
    """Send them and count those that come back."""


@dataclass(frozen=True)
class NetWork:
    """What to do with a NIC: frames of *frame* bytes from the destination address on, shown to the device *batch* at a time.

    For an echo, at most *window* are out and not back on each queue pair (0: as many as there are buffers), and one that is not back
    when nothing came for *linger* seconds is lost.
    """

    timing: Timing = field(default_factory=Timing)
    mode: Mode = Mode.SEND
    frame: int = 64
    batch: int = 64
    to: str = BROADCAST
    window: int = 0
    linger: float = 0.2


@dataclass(frozen=True)
class NetResult:
    """What came of it; of frames that came back *ours* are meant, *foreign* are others', *reordered* came after one sent later."""

    spent: Spent
    pairs: int
    frame: int
    sent: int
    received: int
    received_bytes: int
    ours: int
    reordered: int
    foreign: int
    lost: int
    latency: Histogram

    def facts(self) -> dict[str, Any]:
        """As JSON takes it; rates are per second, latencies microseconds, *cpu* is of one CPU."""
        seconds = self.spent.seconds
        counts = {name: getattr(self, name) for name in ("sent", "received", "ours", "reordered", "foreign", "lost")}
        return {
            "seconds": round(seconds, 6),
            "pairs": self.pairs,
            **counts,
            "sent_per_second": round(self.sent / seconds),
            "received_per_second": round(self.received / seconds),
            "sent_bits_per_second": round(8 * self.sent * self.frame / seconds),
            "received_bits_per_second": round(8 * self.received_bytes / seconds),
            "cpu": round(self.spent.cpu / seconds, 4),
            "latency_us": latency(self.latency),
        }


def _check(nic: NetDriver, work: NetWork) -> None:
    work.timing.check()
    if not SHORTEST_FRAME <= work.frame <= nic.max_frame:
        raise ValueError(f"frames of {work.frame} bytes; for {nic.name} they have {SHORTEST_FRAME} to {nic.max_frame} (MTU {nic.mtu})")
    if not 1 <= work.batch <= LARGEST_BATCH:
        raise ValueError(f"{work.batch} frames at a time, of at most {LARGEST_BATCH}")
    if work.window < 0 or work.linger <= 0:
        raise ValueError("a window is not negative, and frames are waited for")


def load_net(nic: NetDriver, work: NetWork, progress: Progress | None = None) -> NetResult:
    """Put load on all queue pairs of *nic*.

    ValueError when work and NIC do not fit; OSError when the device gives up (see ``run_all``).
    """
    _check(nic, work)
    source = parse_mac(nic.mac) if nic.mac else _NOBODY
    start = bytes(nic.header) + parse_mac(work.to) + source + ETHERTYPE
    nic.poll()
    generators: list[NetLoad] = []
    for at, pair in enumerate(nic.pairs):
        interval, goal = work.timing.share(len(nic.pairs), at)
        if work.timing.count and not goal:
            continue
        for frame in pair.frames:
            frame[: nic.header + work.frame] = start.ljust(nic.header + work.frame, b"\0")
        generators.append(
            NetLoad(
                pair.outgoing,
                pair.incoming,
                nic.ring(pair.tx).signals,
                nic.ring(pair.rx).signals,
                mode=work.mode,
                header=nic.header,
                frame=work.frame,
                room=nic.header + nic.max_frame,
                batch=work.batch,
                window=work.window or len(pair.data),
                linger=int(work.linger * 1e9),
                seed=secrets.randbits(63),
                interval=interval,
                goal=goal,
                patience=int(nic.timeout * 1e9),
                poll=work.timing.budget,
            )
        )
    spent = run_all(nic, generators, work.timing, lambda one: _headless(nic, one), lambda: _done(generators, work.mode), progress)
    counts = [sum(column) for column in zip(*(one.counts for one in generators), strict=True)]
    named = dict(zip(_COUNTED, counts, strict=True))
    return NetResult(spent, len(nic.pairs), work.frame, latency=merged([one.latency for one in generators]), **named)


def _headless(nic: NetDriver, generator: NetLoad) -> DeviceBroken:
    return nic.headless(generator.headless)


def _done(generators: Sequence[NetLoad], mode: Mode) -> int:
    return sum(one.counts[0 if mode is Mode.SEND else 1] for one in generators)
