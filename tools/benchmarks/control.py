# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the control path costs, home by home, with qemu-storage-daemon in the same run.

Both processes run on one CPU: a wake-up across CPUs costs more than everything measured here. Figures are medians in
microseconds. A bring-up is connect to DRIVER_OK of a disk with one ring and one mapping, of memory that exists already.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vdpa_bridge import Device, Target, ops
from vdpa_bridge.backends.vhost_vdpa import VhostVdpa
from vdpa_bridge.device import RingSetup
from vdpa_bridge.memory import Region
from vdpa_bridge.ops import Absent, Op
from vdpa_bridge.virtqueue import ring_layout
from vdpa_bridge.wire import EMPTY, U32, Empty, IotlbInvalidate, IotlbUpdate, Iova

Figures = dict[str, float]

PAGE = 4096
BATCH = 64
TIOCGPTN = 0x80045430
RING = 128
SETTLE = 0.004
"""Seconds between bring-ups, in which the peer notices that the last one is over."""
COLUMNS = {
    "status": "GET_STATUS",
    "update": "IOTLB update",
    "batched": f"... in a batch of {BATCH}",
    "bring-up": "bring-up",
}
REPO = Path(__file__).resolve().parents[2]


def median_cost(run: Callable[[], object], rounds: int, repeat: int = 7) -> float:
    """Microseconds of one *run*: the median of *repeat* averages over *rounds*."""
    run()
    averages = []
    for _ in range(repeat):
        start = time.perf_counter()
        for _ in range(rounds):
            run()
        averages.append((time.perf_counter() - start) / rounds * 1e6)
    return statistics.median(averages)


def mapping_costs(device: Device, rounds: int) -> Figures:
    """One IOTLB update alone, and one of a batch; what undoes them is not counted."""
    with Region(Iova(1 << 32), PAGE * BATCH) as region:
        many = [IotlbUpdate(Iova(region.iova + i * PAGE), PAGE, region.fd, i * PAGE) for i in range(BATCH)]
        everything = IotlbInvalidate(region.iova, PAGE * BATCH)
        times: dict[str, list[float]] = {"update": [], "batched": []}
        for _ in range(rounds):
            for name, updates in (("update", many[:1]), ("batched", many)):
                start = time.perf_counter()
                device.map(updates)
                times[name].append((time.perf_counter() - start) / len(updates) * 1e6)
                device.backend.call(ops.IOTLB_INVALIDATE, everything)
        return {name: statistics.median(values) for name, values in times.items()}


def bring_up_cost(target: Target, rounds: int) -> float:
    """Connect, identify, negotiate, map, set a ring up, DRIVER_OK."""
    kick, call = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    times = []
    with Region(Iova(1 << 20), 1 << 20) as region:
        desc, avail, used = (region.iova + offset for offset in ring_layout(RING)[:3])
        ring = RingSetup(0, RING, desc, avail, used, kick, call)
        for _ in range(rounds):
            start = time.perf_counter()
            with Device(target.open()) as device:
                device.negotiate(0)
                device.start([ring], [region.update()])
                times.append((time.perf_counter() - start) * 1e6)
            time.sleep(SETTLE)
    os.close(kick)
    os.close(call)
    return statistics.median(times)


def measure(text: str, rounds: int) -> Figures:
    """All figures of one home."""
    target = Target.parse(text)
    try:
        with Device(target.open()) as device:
            device.own()
            figures = {"status": median_cost(lambda: device.backend.call(ops.GET_STATUS, EMPTY), rounds)}
            figures |= mapping_costs(device, max(20, rounds // 20))
        time.sleep(SETTLE)
        return figures | {"bring-up": bring_up_cost(target, max(20, rounds // 20))}
    finally:
        target.close()


def plain_round_trip(path: str, request: int, rounds: int) -> float:
    """A message without payload and its reply, by nothing but a socket: what a round trip costs at least."""
    message = struct.pack("=III", request, 1, 0)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.settimeout(5)
        sock.setblocking(True)

        def once() -> None:
            sock.sendall(message)
            sock.recv(4096)

        return median_cost(once, rounds)


def stack_costs(rounds: int) -> Figures:
    """A cheap ioctl that needs no device (TIOCGPTN: the number of a pseudo terminal), bare and through the kernel back-end's code."""
    master, slave = os.openpty()
    terminal: Op[Empty, U32] = Op("", TIOCGPTN, Empty, U32, Absent("not an operation"), name="TIOCGPTN")
    backend = VhostVdpa("a pseudo terminal", master)
    buffer = bytearray(4)
    try:
        return {
            "ioctl": median_cost(lambda: fcntl.ioctl(master, TIOCGPTN, buffer), rounds * 5),
            "through the stack": median_cost(lambda: backend.call(terminal, EMPTY), rounds * 5),
        }
    finally:
        os.close(slave)
        backend.close()


@contextlib.contextmanager
def running(arguments: list[str], path: Path) -> Iterator[None]:
    """A server process that listens on *path*; ended by its pid."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 20
        while not path.exists():
            if process.poll() is not None or time.monotonic() > end:
                text = process.stderr.read().decode() if process.stderr and process.poll() is not None else "no socket after 20 s"
                raise SystemExit(f"bench: {' '.join(arguments[:3])}: {text}")
            time.sleep(0.02)
        time.sleep(0.2)
        yield
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stderr:
            process.stderr.close()


def sockets(directory: Path, rounds: int) -> tuple[dict[str, Figures], Figures]:
    """The homes behind sockets, and what plain round trips cost there."""
    ours, theirs, disk = directory / "ours", directory / "qsd", directory / "disk"
    serve = [sys.executable, "-m", "vdpa_bridge", "serve", "model:blk?size=8M", "--socket-path", str(ours)]
    rows: dict[str, Figures] = {}
    plain: Figures = {}
    with running(serve, ours):
        rows["vhost-user, vDPA mode"] = measure(f"vhost-user:{ours}?type=blk&vdpa=require", rounds)
        rows["vhost-user, legacy mode"] = measure(f"vhost-user:{ours}?type=blk&vdpa=off", rounds)
    if shutil.which("qemu-storage-daemon"):
        disk.write_bytes(bytes(8 << 20))
        export = f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={theirs},writable=on"
        with running(
            ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=d,filename={disk}", "--export", export], theirs
        ):
            plain["qemu-storage-daemon"] = plain_round_trip(str(theirs), 1, rounds)
            time.sleep(SETTLE)
            rows["qemu-storage-daemon (legacy)"] = measure(f"vhost-user:{theirs}?type=blk", rounds)
    return rows, plain


def goals(rows: dict[str, Figures], plain: Figures, stack: Figures) -> list[dict[str, object]]:
    """The ratios that the project holds itself to."""
    checks = []
    vdpa, legacy = rows["vhost-user, vDPA mode"], rows["vhost-user, legacy mode"]
    if "qemu-storage-daemon" in plain:
        ratio = vdpa["status"] / plain["qemu-storage-daemon"]
        checks.append({"what": "GET_STATUS in vDPA mode / plain GET_FEATURES of qemu-storage-daemon", "value": ratio, "goal": 1.5})
    checks.append({"what": "bring-up in vDPA mode / in legacy mode, same server", "value": vdpa["bring-up"] / legacy["bring-up"], "goal": 0.5})
    added = stack["through the stack"] - stack["ioctl"]
    checks.append({"what": "what the stack adds to an ioctl (us)", "value": added, "goal": 2.0})
    return checks


def lab_rows(rounds: int) -> dict[str, Figures]:
    """The kernel's simulator and the in-process model, both in the lab's guest (its CPU is emulated: compare within)."""
    with tempfile.TemporaryDirectory(prefix="vbb") as out:
        inner = f"python {Path(__file__).relative_to(REPO)} --homes sim={{}},model=model:blk?size=8M --rounds {rounds} --json $LAB_OUT/r"
        command = [str(REPO / "tools/lab"), "--out", out, "sh", "-c", inner.replace("{}", "$VDPA_SIM_BLK")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
        result = Path(out) / "r"
        if done.returncode or not result.exists():
            print(f"bench: no figures from the lab:\n{done.stdout[-2000:]}{done.stderr[-2000:]}", file=sys.stderr)
            return {}
        rows: dict[str, Figures] = json.loads(result.read_text())["homes"]
        return {f"lab guest: {name}": figures for name, figures in rows.items()}


def show(report: dict[str, object]) -> None:
    """Tables for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110)
    homes: dict[str, Figures] = report["homes"]  # type: ignore[assignment]
    table = Table("microseconds, median", *COLUMNS.values(), title=f"control path, both processes on CPU {report['cpu']}")
    for name, figures in homes.items():
        table.add_row(name, *(f"{figures[key]:,.1f}" for key in COLUMNS))
    console.print(table)
    stack: Figures = report["stack"]  # type: ignore[assignment]
    plain: Figures = report["plain"]  # type: ignore[assignment]
    console.print(f"bare ioctl {stack['ioctl']:.2f} us, through the kernel back-end {stack['through the stack']:.2f} us")
    for name, cost in plain.items():
        console.print(f"plain socket round trip to {name}: {cost:.1f} us")
    for goal in report["goals"]:  # type: ignore[attr-defined]
        mark = "reached" if goal["value"] <= goal["goal"] else "MISSED"
        console.print(f"{goal['what']}: {goal['value']:.2f} (goal: at most {goal['goal']:g}) {mark}")


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="tools/bench control", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", type=int, default=min(os.sched_getaffinity(0)), help="CPU for both processes (default: the first)")
    parser.add_argument("--rounds", type=int, default=2000, help="repetitions of the short measurements (default 2000)")
    parser.add_argument("--no-lab", action="store_true", help="leave out the kernel, which is measured in the lab's guest")
    parser.add_argument("--homes", help="NAME=TARGET,...: measure these targets and nothing else")
    parser.add_argument("--json", metavar="FILE", help="write the figures there ('-': standard output) instead of tables")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {arguments.cpu})
    report: dict[str, object] = {"cpu": arguments.cpu}
    if arguments.homes:
        chosen = dict(entry.split("=", 1) for entry in arguments.homes.split(","))
        report["homes"] = {name: measure(text, arguments.rounds) for name, text in chosen.items()}
    else:
        stack = stack_costs(arguments.rounds)
        rows = {"model, in process": measure("model:blk?size=8M", arguments.rounds)}
        with tempfile.TemporaryDirectory(prefix="vbb") as directory:
            more, plain = sockets(Path(directory), arguments.rounds)
        rows |= more
        checks = goals(rows, plain, stack)
        if not arguments.no_lab:
            rows |= lab_rows(max(200, arguments.rounds // 10))
        report |= {"homes": rows, "plain": plain, "stack": stack, "goals": checks}
    text = json.dumps(report, indent=1)
    if arguments.json == "-":
        print(text)
    elif arguments.json:
        Path(arguments.json).write_text(text)
    else:
        show(report)


if __name__ == "__main__":
    main()
