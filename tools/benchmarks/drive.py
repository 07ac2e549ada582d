# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What our block driver costs next to a client in C (userspace/client), on the same qemu-storage-daemon in the same run.

Reads of 4 KiB. Daemon and client have a CPU each where there are two. The ways take turns; figures are medians. "batches" is
the native ring alone (``DriverQueue``): chains made once, posted and reaped in batches. "submit and complete" and "read" are
``BlkDriver``, where every request is made, checked and copied by Python.
"""

from __future__ import annotations

import argparse
import json
import os
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

from control import Goal, running
from serve import client

from vdpa_bridge import connect
from vdpa_bridge.drivers import BlkDriver, BlkRequest
from vdpa_bridge.drivers.base import Pending, Segments, drain

BYTES, DISK = 4096, 8 << 20
DEPTHS = (1, 32)
C, BATCHES, SUBMIT, READ = "client in C", "batches", "submit and complete", "read"
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


def measure(requests: int, repeat: int, cpus: tuple[int, int]) -> list[dict[str, Any]]:
    """One row per depth: medians of rates, and of the ratio of the client in C to each in the same turn."""
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
                rates = {name: statistics.median(turn[name] for turn in turns) for name in ways}
                ratios = {name: statistics.median(turn[C] / turn[name] for turn in turns) for name in ways}
                rows.append({"depth": depth, "rates": rates, "ratios": ratios})
    return rows


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """What the project holds itself to."""
    return [Goal(f"{row['depth']} in flight, client in C / {BATCHES}", row["ratios"][BATCHES], MOST) for row in rows]


def show(report: dict[str, Any]) -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110)
    table = Table("way", "in flight", "1/s", "microseconds each", "client in C / this", title="reads of 4 KiB on qemu-storage-daemon")
    for row in report["rows"]:
        for name, value in row["rates"].items():
            table.add_row(name, str(row["depth"]), f"{value:,.0f}", f"{1e6 / value:,.1f}", f"{row['ratios'][name]:.2f}")
    console.print(table)
    for goal in report["goals"]:
        mark = "reached" if goal["value"] <= goal["most"] else "MISSED"
        console.print(f"{goal['what']}: {goal['value']:.2f} (goal: at most {goal['most']:g}) {mark}")


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="tools/bench drive", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20000, help="in one sample (default 20000)")
    parser.add_argument("--repeat", type=int, default=7, help="turns, of which the median counts (default 7)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there ('-': standard output) instead of a table")
    arguments = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    rows = measure(arguments.requests, arguments.repeat, (cpus[0], cpus[-1]))
    report: dict[str, Any] = {"rows": rows, "goals": [asdict(goal) for goal in goals(rows)]}
    text = json.dumps(report, indent=1)
    if arguments.json == "-":
        print(text)
    elif arguments.json:
        Path(arguments.json).write_text(text)
    else:
        show(report)


if __name__ == "__main__":
    main()
