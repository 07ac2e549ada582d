# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Load for disks.

Rule of this file: each queue has a part of the range for itself, so that what one verifies no other overwrites.
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .._virtqueue import BlkLoad, Histogram
from ..drivers.blk import IN, OUT, SECTOR, BlkDriver, BlkRequest
from ..errors import DataError
from ..memory import PAGE, Buffer
from ..virtio.features import BlockFeature
from .threads import Progress, Spent, Timing, latency, merged, run_all

_LARGEST_SEGMENT = 1 << 31
_MOST_VERIFIED = 1 << 26
"""Blocks whose last write can be remembered."""


@dataclass(frozen=True)
class BlkWork:
    """What to ask of a disk: requests of *block* bytes, *depth* in flight on each queue, of which *reads* in 100 are reads; the others
    overwrite the disk. They go to *length* bytes (default: to its end) from *offset* on, in order or at *random*.

    With *verify* each write is marked and each read of what was written compared; at the end, all that was written is read back.
    """

    timing: Timing = field(default_factory=Timing)
    block: int = 4096
    depth: int = 32
    reads: int = 100
    random: bool = True
    offset: int = 0
    length: int | None = None
    verify: bool = False
    seed: int = 0
    """Of places and patterns; 0 for one of chance."""


@dataclass(frozen=True)
class BlkResult:
    """What came of it."""

    spent: Spent
    queues: int
    block: int
    reads: Histogram
    writes: Histogram
    compared: int
    """Reads that were compared with what was written."""
    read_back: int
    """Blocks that were read back at the end."""
    seed: int

    def facts(self) -> dict[str, Any]:
        """As JSON takes it; rates are per second, latencies microseconds from when a request was due, *cpu* is of one CPU."""
        seconds = self.spent.seconds
        requests = self.reads.count + self.writes.count
        of = {"reads": self.reads, "writes": self.writes}
        return {
            "seconds": round(seconds, 6),
            "queues": self.queues,
            "requests": requests,
            "iops": round(requests / seconds, 1),
            "bytes_per_second": round(requests * self.block / seconds),
            "cpu": round(self.spent.cpu / seconds, 4),
            **{name: {"requests": one.count, "iops": round(one.count / seconds, 1), "latency_us": latency(one)} for name, one in of.items()},
            "compared": self.compared,
            "read_back": self.read_back,
            "seed": self.seed,
        }


def blk_memory(work: BlkWork, queues: int) -> int:
    """Bytes that the driver's pool needs for it."""
    return queues * (BlkLoad.memory(work.depth, work.block) + 2 * PAGE)


def _extent(disk: BlkDriver, work: BlkWork, queues: int) -> int:
    """Blocks for each queue; ValueError when the work and the disk do not fit."""
    size = disk.info.size
    length = size - work.offset if work.length is None else work.length
    if work.block < SECTOR or work.block % SECTOR or work.offset % SECTOR or work.offset < 0:
        raise ValueError(f"blocks of {work.block} bytes from {work.offset} on: both are multiples of {SECTOR}")
    if length < 0 or work.offset + length > size:
        raise ValueError(f"{disk.name}: {length} bytes from {work.offset} on leave the disk, which has {size} bytes")
    blocks = length // work.block // queues
    if not blocks:
        raise ValueError(f"{disk.name}: {length} bytes have no room for a block of {work.block} bytes on each of {queues} queues")
    if work.verify and blocks * queues > _MOST_VERIFIED:
        raise ValueError(f"{disk.name}: {blocks * queues} blocks are too many to verify; make them larger, or give a length")
    if not 0 <= work.reads <= 100:
        raise ValueError(f"{work.reads} reads in 100 requests")
    if work.verify and work.reads == 100:
        raise ValueError("to verify, something has to be written: fewer than 100 reads in 100 requests")
    if work.reads < 100 and disk.features & BlockFeature.RO:
        raise ValueError(f"{disk.name} is read-only")
    if -(-work.block // disk.segment) > max(disk.info.seg_max, 1):
        raise ValueError(f"{disk.name} takes {max(disk.info.seg_max, 1)} segments of {disk.segment} bytes, a block of {work.block} is more")
    return blocks


def _page_of(buffer: Buffer) -> tuple[int, int]:
    skip = -buffer.iova % PAGE
    return buffer.address + skip, buffer.iova + skip


def _failure(disk: BlkDriver, generator: BlkLoad) -> Exception:
    """What failed: the data, or a request."""
    if generator.wrong is not None:
        return DataError(errno.EILSEQ, f"{disk.name}: {generator.wrong}")
    write, sector, status = generator.failed
    try:
        BlkRequest(OUT if write else IN, sector, status=status).check(disk.name)
    except OSError as error:
        return error
    raise AssertionError(f"sector {sector} of {disk.name}: status {status} is no failure")


def load_blk(disk: BlkDriver, work: BlkWork, progress: Progress | None = None) -> BlkResult:
    """Put load on all queues of *disk*, whose pool has ``blk_memory`` bytes free.

    ValueError when work and disk do not fit; DataError when something reads back otherwise than it was written, OSError when a request
    fails or the device gives up (see ``run_all``).
    """
    work.timing.check()
    rings = [disk.ring(index) for index in disk.indices]
    blocks = _extent(disk, work, len(rings))
    seed = work.seed or secrets.randbits(62) | 1
    buffers = [disk.pool.take(BlkLoad.memory(work.depth, work.block) + PAGE) for _ in rings]
    generators: list[BlkLoad] = []
    for at, (ring, buffer) in enumerate(zip(rings, buffers, strict=True)):
        interval, goal = work.timing.share(len(rings), at)
        if work.timing.count and not goal:
            continue
        generators.append(
            BlkLoad(
                ring.queue,
                *ring.signals,
                *_page_of(buffer),
                depth=work.depth,
                block=work.block,
                segment=min(disk.segment, _LARGEST_SEGMENT),
                first=(work.offset + at * blocks * work.block) // SECTOR,
                blocks=blocks,
                reads=work.reads,
                random=work.random,
                verify=work.verify,
                seed=seed + at,
                interval=interval,
                goal=goal,
                patience=int(disk.timeout * 1e9),
                poll=work.timing.budget,
                owner=buffer,
            )
        )
    spent = run_all(disk, generators, work.timing, lambda one: _failure(disk, one), lambda: _done(generators), progress)
    reads, writes = (merged([one.latencies[at] for one in generators]) for at in (0, 1))
    compared = sum(one.counts[2] for one in generators)
    read_back = _read_back(disk, generators) if work.verify and work.reads < 100 else 0
    for buffer in buffers:
        disk.pool.give(buffer)
    return BlkResult(spent, len(rings), work.block, reads, writes, compared, read_back, seed)


def _done(generators: Sequence[BlkLoad]) -> int:
    return sum(reads + writes for reads, writes, _ in (one.counts for one in generators))


def _read_back(disk: BlkDriver, generators: Sequence[BlkLoad]) -> int:
    """All blocks that were written, once each; how many."""
    for generator in generators:
        generator.forget()
        generator.sweep()
    run_all(disk, generators, Timing(duration=0), lambda one: _failure(disk, one))
    return sum(one.counts[2] for one in generators)
