# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What our drivers cost next to clients in C, on the same back-ends in the same run.

Disks: reads of 4 KiB from qemu-storage-daemon, next to userspace/client. Networks: frames of 64 bytes sent into DPDK's vhost
port, which takes and forgets them, next to DPDK's virtio-user; all poll. Back-end and client have a CPU each where there are two.
The ways take turns, each in a session of its own; figures are medians of turns that nothing else on the machine disturbed.
"load generator" is `vdpa-bridge bench`; its frames are made once and stamped, testpmd makes each anew. "submit and complete", "read"
and "send_many" are the drivers: a Python object for each request or frame, checked and copied.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from control import running
from quiet import Turns, turns
from report import Goal, deliver, show_goals
from serve import client

from vdpa_bridge import connect
from vdpa_bridge.drivers import BlkDriver, BlkRequest, NetDriver
from vdpa_bridge.load import BlkWork, NetWork, Timing, load_blk, load_net

BYTES, DISK = 4096, 8 << 20
DEPTHS = (1, 32)
FRAME, BURST, MANY = 64, 32, 256
"""Bytes of a frame; frames that testpmd makes at once; frames in one call of ``send_many``."""
RING = 256
SECONDS = 2.0
WARMUP = 0.2
C, LOAD, SUBMIT, READ, SEND = "client in C", "load generator", "submit and complete", "read", "send_many"
MOST = 1.2


def by_submit(disk: BlkDriver, depth: int, requests: int) -> None:
    """The driver's own way to keep many in flight."""
    buffers = [memoryview(bytearray(BYTES)) for _ in range(depth)]
    for _ in range(requests // depth):
        disk.complete(disk.submit([BlkRequest(0, at * (BYTES // 512), into=into) for at, into in enumerate(buffers)]))


def by_read(disk: BlkDriver, depth: int, requests: int) -> None:
    """One call, one request."""
    for _ in range(requests):
        disk.read(0, BYTES)


def rate_of_load(path: str, depth: int, requests: int) -> float:
    """Requests per second of the load generator, in the same order as those of the client in C."""
    with connect(f"vhost-user:{path}?type=blk") as device, BlkDriver(device) as disk:
        load_blk(disk, BlkWork(Timing(duration=0, count=depth * 4), BYTES, depth, random=False))
        result = load_blk(disk, BlkWork(Timing(duration=0, count=requests), BYTES, depth, random=False))
        return result.reads.count / result.spent.seconds


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
    LOAD: rate_of_load,
    SUBMIT: lambda path, depth, requests: rate(by_submit, path, depth, requests),
    READ: lambda path, depth, requests: rate(by_read, path, depth, requests),
}


@contextlib.contextmanager
def on_cpu(cpu: int) -> Iterator[None]:
    """This process, and what it starts, on one CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def row(work: str, depth: int, taken: Turns[float]) -> dict[str, Any]:
    """Medians and ranges of rates, and the median of the ratio of the client in C to each way in the same turn."""
    results = taken.results
    rates = {name: [turn[name] for turn in results] for name in results[0]}
    return {
        "work": work,
        "depth": depth,
        "rates": {name: statistics.median(many) for name, many in rates.items()},
        "ranges": {name: [min(many), max(many)] for name, many in rates.items()},
        "ratios": {name: statistics.median(turn[C] / turn[name] for turn in results) for name in rates},
        "turns": len(results),
        "disturbed": taken.disturbed,
        "note": taken.note,
    }


def measure(requests: int, repeat: int, cpus: tuple[int, int]) -> list[dict[str, Any]]:
    """One row per depth, for disks."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="vbb") as directory:
        path, disk = Path(directory, "s"), Path(directory, "disk")
        disk.write_bytes(os.urandom(DISK))
        export = f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={path},writable=on"
        storage = ["taskset", "-c", str(cpus[0]), "qemu-storage-daemon", "--blockdev", f"driver=file,node-name=d,filename={disk}", "--export", export]
        with running(storage, path) as server, on_cpu(cpus[1]):
            for depth in DEPTHS:
                ways = {name: partial(way, str(path), depth, requests) for name, way in WAYS.items() if name != READ or depth == 1}
                rows.append(row("reads of 4 KiB", depth, turns(ways, repeat, [server.pid])))
    return rows


def frames_by_driver(nic: NetDriver, seconds: float) -> int:
    """The driver's own way."""
    many, done, end = [_frame()] * MANY, 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        nic.send_many(many)
        done += MANY
    return done


def _frame() -> bytes:
    return b"\xff" * 6 + b"\x02\0\0\0\0\1\x88\xb5" + bytes(FRAME - 14)


def frame_rate(work: Callable[[NetDriver, float], int], path: Path) -> float:
    """Frames per second of a session."""
    with connect(f"vhost-user:{path}?type=net&vdpa=off") as device, NetDriver(device) as nic:
        start = time.perf_counter()
        return work(nic, SECONDS) / (time.perf_counter() - start)


def frame_rate_of_load(path: Path) -> float:
    """Frames per second of the load generator."""
    with connect(f"vhost-user:{path}?type=net&vdpa=off") as device, NetDriver(device) as nic:
        result = load_net(nic, NetWork(Timing(duration=SECONDS, warmup=WARMUP, poll=True), frame=FRAME, batch=2 * BURST))
        return result.sent / result.spent.seconds


def testpmd(main: int, worker: int, device: str, *options: str) -> list[str]:
    """A testpmd that forwards on the CPU *worker*. Its main thread, asleep but for a report each second, and those that answer a
    peer's messages are on the CPU *main*, off the worker that polls."""
    eal = ["--lcores", f"0@{main},1@{worker}", "--no-huge", "-m", "256", "--no-pci", "--no-telemetry", "--no-shconf", "--file-prefix", f"vbb{device[:12]}"]
    return ["dpdk-testpmd", *eal, "--vdev", device, "--", "--nb-cores=1", "--auto-start", "--no-flush-rx", "--stats-period=1", "--total-num-mbufs=8192", *options]


def frame_rate_in_c(path: Path, cpus: tuple[int, int]) -> float:
    """Frames per second that virtio-user sends, by its own reports of a second each, without the first."""
    command = testpmd(*cpus, f"net_virtio_user0,path={path},queue_size={RING}", "--forward-mode=txonly", f"--txpkts={FRAME}", f"--burst={BURST}")
    rates: list[float] = []
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"Tx-pps:\s+(\d+)", line):
                rates.append(float(found[1]))
            if len(rates) == 4:
                break
        process.terminate()
        process.stdout.read()
    if len(rates) < 4:
        raise SystemExit(f"bench: {' '.join(command)} ended early")
    return statistics.mean(rates[2:])


def measure_frames(repeat: int, cpus: tuple[int, int]) -> dict[str, Any]:
    """The row for frames. The back-end forwards on the first CPU; all clients send from the second."""
    with tempfile.TemporaryDirectory(prefix="vbb") as directory:
        path = Path(directory, "s")
        back_end, client_cpu = cpus
        with running(testpmd(client_cpu, back_end, f"net_vhost0,iface={path}", "--forward-mode=rxonly"), path) as server, on_cpu(client_cpu):
            ways: dict[str, Callable[[], float]] = {
                C: lambda: frame_rate_in_c(path, cpus),
                LOAD: lambda: frame_rate_of_load(path),
                SEND: lambda: frame_rate(frames_by_driver, path),
            }
            return row("frames of 64 bytes", RING // 2, turns(ways, repeat, [server.pid]))


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """What the project holds itself to; of rows that say something, as most of their turns were left alone."""
    told = [row for row in rows if 2 * row["disturbed"] < row["turns"]]
    return [Goal(f"{row['work']}, {row['depth']} in flight: client in C / {LOAD}", row["ratios"][LOAD], MOST) for row in told]


def show(report: dict[str, Any]) -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=130)
    table = Table("work", "way", "in flight", "1/s", "least", "most", "microseconds each", "client in C / this")
    for row in report["rows"]:
        for name, value in row["rates"].items():
            least, most = row["ranges"][name]
            cells = (f"{value:,.0f}", f"{least:,.0f}", f"{most:,.0f}", f"{1e6 / value:,.3f}", f"{row['ratios'][name]:.2f}")
            table.add_row(row["work"], name, str(row["depth"]), *cells)
    console.print(table)
    for row in report["rows"]:
        console.print(f"{row['work']}, {row['depth']} in flight: {row['note']}")
    show_goals(console, report)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="tools/bench drive", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20000, help="to a disk, in one sample (default 20000)")
    parser.add_argument("--repeat", type=int, default=7, help="turns, of which the median counts (default 7)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there ('-': standard output) instead of a table")
    arguments = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    pair = (cpus[0], cpus[-1])
    rows = [*measure(arguments.requests, arguments.repeat, pair), measure_frames(arguments.repeat, pair)]
    report: dict[str, Any] = {"rows": rows, "goals": [asdict(goal) for goal in goals(rows)]}
    deliver(report, arguments.json, show)


if __name__ == "__main__":
    main()
