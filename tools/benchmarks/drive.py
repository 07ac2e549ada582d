# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What our drivers cost next to clients in C, on the same back-ends in the same run.

Disks: reads of 4 KiB from qemu-storage-daemon, next to userspace/client. Networks: frames of 64 bytes sent into DPDK's vhost
port, which takes and forgets them, next to DPDK's virtio-user; all poll. Back-end and client have a CPU each where there are two.
The ways take turns; figures are medians. "batches" is the native ring alone (``DriverQueue``): chains made once, posted and reaped
in batches. "submit and complete", "read" and "send_many" are the drivers, where every request or frame is made, checked and
copied by Python.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from control import running
from report import Goal, deliver, show_goals
from serve import client

from vdpa_bridge import connect
from vdpa_bridge.drivers import BlkDriver, BlkRequest, NetDriver
from vdpa_bridge.drivers.base import Pending, Segments, drain

BYTES, DISK = 4096, 8 << 20
DEPTHS = (1, 32)
FRAME, BURST = 64, 32
C, BATCHES, SUBMIT, READ, SEND = "client in C", "batches", "submit and complete", "read", "send_many"
MOST = 1.2
_STATUS_AT = 16


class Slot(Pending):
    """A read that is posted again and again."""

    def __init__(self, disk: BlkDriver, number: int) -> None:
        super().__init__()
        self.head, self.data = disk._pool.take(64), disk._pool.take(BYTES)
        struct.pack_into("<IIQ", self.head.data, 0, 0, 0, number * (BYTES // 512))
        self.head.data[_STATUS_AT] = 0xFF
        self.chain: tuple[Segments, Segments, Pending] = (
            [(self.head.iova, _STATUS_AT)],
            [(self.data.iova, BYTES), (self.head.iova + _STATUS_AT, 1)],
            self,
        )


def in_batches(disk: BlkDriver, depth: int, requests: int) -> None:
    """*requests* reads, *depth* in flight; what came back is posted again at once."""
    ring = disk.ring(0)
    queue, poller = ring.queue, select.poll()
    poller.register(ring.call, select.POLLIN)
    slots = [Slot(disk, at) for at in range(depth)]
    ring.submit([slot.chain for slot in slots])
    left = requests
    while left > 0:
        while not (done := queue.reap()):
            if not queue.enable_call():
                if not poller.poll(5000):
                    raise SystemExit("bench: no completion within 5 s")
                drain(ring.call)
            queue.disable_call()
        left -= len(done)
        if left > 0:
            ring.submit([slot.chain for slot, _ in done if isinstance(slot, Slot)])
    while queue.in_flight:
        queue.reap()
    if any(slot.head.data[_STATUS_AT] for slot in slots):
        raise SystemExit("bench: a read failed")
    for slot in slots:
        disk._pool.give(slot.head)
        disk._pool.give(slot.data)


def by_submit(disk: BlkDriver, depth: int, requests: int) -> None:
    """The driver's own way to keep many in flight."""
    buffers = [memoryview(bytearray(BYTES)) for _ in range(depth)]
    for _ in range(requests // depth):
        disk.complete(disk.submit([BlkRequest(0, at * (BYTES // 512), into=into) for at, into in enumerate(buffers)]))


def by_read(disk: BlkDriver, depth: int, requests: int) -> None:
    """One call, one request."""
    for _ in range(requests):
        disk.read(0, BYTES)


def rate(work: Callable[[BlkDriver, int, int], None], path: str, depth: int, requests: int) -> float:
    """Requests per second of a session."""
    with connect(f"vhost-user:{path}?type=blk") as device, BlkDriver(device) as disk:
        work(disk, depth, depth * 4)
        start = time.perf_counter()
        work(disk, depth, requests)
        return requests / (time.perf_counter() - start)


def rate_in_c(path: str, depth: int, requests: int) -> float:
    """The same of the client in C."""
    command = [client(), "--requests", str(requests), "--depth", str(depth), "--bytes", str(BYTES), path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise SystemExit(f"bench: {' '.join(command)}: {done.stderr}")
    return float(json.loads(done.stdout)["reads"]["iops"])


WAYS: dict[str, Callable[[str, int, int], float]] = {
    C: rate_in_c,
    BATCHES: lambda path, depth, requests: rate(in_batches, path, depth, requests),
    SUBMIT: lambda path, depth, requests: rate(by_submit, path, depth, requests),
    READ: lambda path, depth, requests: rate(by_read, path, depth, requests),
}


def row(work: str, depth: int, turns: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of rates, and of the ratio of the client in C to each way in the same turn."""
    rates = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    ratios = {name: statistics.median(turn[C] / turn[name] for turn in turns) for name in turns[0]}
    return {"work": work, "depth": depth, "rates": rates, "ratios": ratios}


def measure(requests: int, repeat: int, cpus: tuple[int, int]) -> list[dict[str, Any]]:
    """One row per depth, for disks."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="vbb") as directory:
        path, disk = Path(directory, "s"), Path(directory, "disk")
        disk.write_bytes(bytes(DISK))
        export = f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={path},writable=on"
        storage = ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=d,filename={disk}", "--export", export]
        os.sched_setaffinity(0, {cpus[0]})
        with running(storage, path):
            os.sched_setaffinity(0, {cpus[1]})
            for depth in DEPTHS:
                ways = {name: way for name, way in WAYS.items() if name != READ or depth == 1}
                turns = [{name: way(str(path), depth, requests) for name, way in ways.items()} for _ in range(repeat)]
                rows.append(row("reads of 4 KiB", depth, turns))
    return rows


class Frame(Pending):
    """A frame that is sent again and again."""

    def __init__(self, nic: NetDriver) -> None:
        super().__init__()
        buffer = nic._pool.take(nic.header + FRAME)
        buffer.data[:] = bytes(nic.header) + b"\xff" * 6 + b"\x02\0\0\0\0\1\x88\xb5" + bytes(FRAME - 14)
        self.chain: tuple[Segments, Segments, Pending] = ([(buffer.iova, buffer.size)], [], self)


def frames_in_batches(nic: NetDriver, depth: int, count: int) -> None:
    """*count* frames or a few more, *depth* with the device."""
    ring = nic.ring(1)
    queue, left, end = ring.queue, count, time.monotonic() + 30
    queue.disable_call()
    ring.submit([Frame(nic).chain for _ in range(depth)])
    while left > 0:
        if done := queue.reap(depth):
            left -= len(done)
            ring.submit([frame.chain for frame, _ in done if isinstance(frame, Frame)])
        elif time.monotonic() > end:
            raise SystemExit("bench: the frames do not go out")
    while queue.in_flight:
        queue.reap(depth)


def frames_by_driver(nic: NetDriver, depth: int, count: int) -> None:
    """The driver's own way."""
    frame = b"\xff" * 6 + b"\x02\0\0\0\0\1\x88\xb5" + bytes(FRAME - 14)
    for _ in range(count // depth):
        nic.send_many([frame] * depth)


def frame_rate(work: Callable[[NetDriver, int, int], None], path: Path, depth: int, count: int) -> float:
    """Frames per second."""
    # testpmd polls on the CPU of the thread that answers, which may have to wait long for its lock
    with connect(f"vhost-user:{path}?type=net&vdpa=off&timeout=30") as device, NetDriver(device) as nic:
        start = time.perf_counter()
        work(nic, depth, count)
        return count / (time.perf_counter() - start)


def testpmd(cpu: int, device: str, *options: str) -> list[str]:
    """A testpmd whose threads all are on *cpu*."""
    eal = ["--lcores", f"0@{cpu},1@{cpu}", "--no-huge", "-m", "256", "--no-pci", "--no-telemetry", "--no-shconf", "--file-prefix", f"vbb{device[:12]}"]
    return ["dpdk-testpmd", *eal, "--vdev", device, "--", "--nb-cores=1", "--auto-start", "--no-flush-rx", "--stats-period=1", "--total-num-mbufs=8192", *options]


def frame_rate_in_c(path: Path, depth: int, cpu: int) -> float:
    """Frames per second that virtio-user sends: the last but one of its own reports."""
    command = testpmd(cpu, f"net_virtio_user0,path={path},queue_size=256", "--forward-mode=txonly", f"--txpkts={FRAME}", f"--burst={depth}")
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        rates: list[float] = []
        for line in process.stdout:
            if found := re.search(r"Tx-pps:\s+(\d+)", line):
                rates.append(float(found[1]))
            if len(rates) == 5:
                break
        process.terminate()
        process.stdout.read()
    if len(rates) < 5:
        raise SystemExit(f"bench: {' '.join(command)} ended early")
    return statistics.median(rates[2:])


def measure_frames(count: int, repeat: int, cpus: tuple[int, int]) -> dict[str, Any]:
    """The row for frames. Those of a burst are in flight together; testpmd has as many as the ring holds."""
    with tempfile.TemporaryDirectory(prefix="vbb") as directory:
        path = Path(directory, "s")
        with running(testpmd(cpus[0], f"net_vhost0,iface={path}", "--forward-mode=rxonly"), path):
            os.sched_setaffinity(0, {cpus[1]})
            ways: dict[str, Callable[[], float]] = {
                C: lambda: frame_rate_in_c(path, BURST, cpus[1]),
                BATCHES: lambda: frame_rate(frames_in_batches, path, BURST, count),
                SEND: lambda: frame_rate(frames_by_driver, path, BURST, count // 10),
            }
            turns = [{name: way() for name, way in ways.items()} for _ in range(repeat)]
    return row("frames of 64 bytes", BURST, turns)


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """What the project holds itself to."""
    return [Goal(f"{row['work']}, {row['depth']} in flight: client in C / {BATCHES}", row["ratios"][BATCHES], MOST) for row in rows]


def show(report: dict[str, Any]) -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110)
    table = Table("work", "way", "in flight", "1/s", "microseconds each", "client in C / this")
    for row in report["rows"]:
        for name, value in row["rates"].items():
            table.add_row(row["work"], name, str(row["depth"]), f"{value:,.0f}", f"{1e6 / value:,.2f}", f"{row['ratios'][name]:.2f}")
    console.print(table)
    show_goals(console, report)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="tools/bench drive", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20000, help="in one sample (default 20000), and fifty times as many frames")
    parser.add_argument("--repeat", type=int, default=7, help="turns, of which the median counts (default 7)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there ('-': standard output) instead of a table")
    arguments = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    pair = (cpus[0], cpus[-1])
    rows = [*measure(arguments.requests, arguments.repeat, pair), measure_frames(50 * arguments.requests, arguments.repeat, pair)]
    report: dict[str, Any] = {"rows": rows, "goals": [asdict(goal) for goal in goals(rows)]}
    deliver(report, arguments.json, show)


if __name__ == "__main__":
    main()
