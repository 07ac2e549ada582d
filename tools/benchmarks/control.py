# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the control path costs, home by home, with qemu-storage-daemon in the same run.

Both processes run on one CPU: a wake-up across CPUs costs more than everything measured here. Figures are medians in
microseconds. A bring-up is connect to DRIVER_OK of a disk with one ring and one mapping, of memory that exists already.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from report import Goal, deliver, show_goals

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
COLUMNS = {
    "status": "GET_STATUS",
    "update": "IOTLB update",
    "batched": f"... in a batch of {BATCH}",
    "bring-up": "bring-up",
}


REPO = Path(__file__).resolve().parents[2]


def average(run: Callable[[], object], rounds: int) -> float:
    """Microseconds of one *run*, over *rounds*."""
    run()
    start = time.perf_counter()
    for _ in range(rounds):
        run()
    return (time.perf_counter() - start) / rounds * 1e6


def medians(samplers: dict[str, Callable[[], Figures]], repeat: int) -> dict[str, Figures]:
    """Each figure's median. The samplers take turns, so that whatever disturbs the machine disturbs all alike."""
    samples: dict[str, list[Figures]] = {name: [] for name in samplers}
    for _ in range(repeat):
        for name, sample in samplers.items():
            samples[name].append(sample())
    return {name: {key: statistics.median(one[key] for one in many) for key in many[0]} for name, many in samples.items()}


def mapping_costs(device: Device) -> Figures:
    """One IOTLB update alone, and one of a batch; what undoes them is not counted."""
    figures: Figures = {}
    with Region(Iova(1 << 32), PAGE * BATCH) as region:
        many = [IotlbUpdate(Iova(region.iova + i * PAGE), PAGE, region.fd, i * PAGE) for i in range(BATCH)]
        everything = IotlbInvalidate(region.iova, PAGE * BATCH)
        for name, updates, turns in (("update", many[:1], 10), ("batched", many, 1)):
            spent = 0.0
            for _ in range(turns):
                start = time.perf_counter()
                try:
                    device.map(updates)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    return figures  # a legacy peer with few slots
                spent += time.perf_counter() - start
                device.backend.call(ops.IOTLB_INVALIDATE, everything)
            figures[name] = spent / turns / len(updates) * 1e6
    return figures


def give_way() -> None:
    """Let the server, which shares the CPU, put the last session away; that is not part of the next bring-up."""
    for _ in range(4):
        os.sched_yield()


def bring_ups(target: Target, rounds: int) -> float:
    """Connect, identify, negotiate, map, set a ring up, DRIVER_OK."""
    kick, call = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    spent = 0.0
    with Region(Iova(1 << 20), 1 << 20) as region:
        desc, avail, used = (region.iova + offset for offset in ring_layout(RING)[:3])
        ring = RingSetup(0, RING, desc, avail, used, kick, call)
        for _ in range(rounds):
            start = time.perf_counter()
            with Device(target.open()) as device:
                device.negotiate(0)
                device.start([ring], [region.update()])
                spent += time.perf_counter() - start
            give_way()
    os.close(kick)
    os.close(call)
    return spent / rounds * 1e6


def sampler(target: Target, rounds: int) -> Callable[[], Figures]:
    """All figures of one home, once."""

    def sample() -> Figures:
        with Device(target.open()) as device:
            device.own()
            figures = {"status": average(lambda: device.backend.call(ops.GET_STATUS, EMPTY), rounds)}
            figures |= mapping_costs(device)
        give_way()
        return figures | {"bring-up": bring_ups(target, max(2, rounds // 40))}

    return sample


def plain_sampler(path: str, rounds: int) -> Callable[[], Figures]:
    """GET_FEATURES and its reply, by nothing but a socket: what a round trip costs at least."""
    message = struct.pack("=III", 1, 1, 0)

    def sample() -> Figures:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)

            def once() -> None:
                sock.sendall(message)
                sock.recv(4096)

            return {"round trip": average(once, rounds)}

    return sample


def stack_sampler(rounds: int) -> Callable[[], Figures]:
    """A cheap ioctl that needs no device (TIOCGPTN: the number of a pseudo terminal), bare and through the kernel back-end's code."""
    terminal: Op[Empty, U32] = Op("", TIOCGPTN, Empty, U32, Absent("not an operation"), name="TIOCGPTN")

    def sample() -> Figures:
        master, slave = os.openpty()
        backend = VhostVdpa("a pseudo terminal", master)
        buffer = bytearray(4)
        try:
            return {
                "ioctl": average(lambda: fcntl.ioctl(master, TIOCGPTN, buffer), rounds * 5),
                "through the stack": average(lambda: backend.call(terminal, EMPTY), rounds * 5),
            }
        finally:
            os.close(slave)
            backend.close()

    return sample


@contextlib.contextmanager
def running(arguments: list[str], path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server process that listens on *path*; ended by its pid. What it says goes to a file: a pipe that nobody reads stops
    whoever fills it (DPDK's vhost logs each message, and then answers no more)."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)
        try:
            end = time.monotonic() + 20
            while not path.exists():
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    text = log.read().decode(errors="replace") if process.poll() is not None else "no socket after 20 s"
                    raise SystemExit(f"bench: {' '.join(arguments[:3])}: {text}")
                time.sleep(0.02)
            time.sleep(0.2)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def host_figures(directory: Path, rounds: int, repeat: int) -> dict[str, Figures]:
    """Every home that needs no kernel module, and what they are compared with."""
    ours, theirs, disk = directory / "ours", directory / "qsd", directory / "disk"
    serve = [sys.executable, "-m", "vdpa_bridge", "serve", "model:blk?size=8M", "--socket-path", str(ours)]
    disk.write_bytes(bytes(8 << 20))
    export = f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={theirs},writable=on"
    storage = ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=d,filename={disk}", "--export", export]
    model = Target.parse("model:blk?size=8M")
    samplers = {
        "model, in process": sampler(model, rounds),
        "vhost-user, vDPA mode": sampler(Target.parse(f"vhost-user:{ours}?type=blk&vdpa=require"), rounds),
        "vhost-user, legacy mode": sampler(Target.parse(f"vhost-user:{ours}?type=blk&vdpa=off"), rounds),
        "qemu-storage-daemon (legacy)": sampler(Target.parse(f"vhost-user:{theirs}?type=blk"), rounds),
        "plain": plain_sampler(str(theirs), rounds),
        "stack": stack_sampler(rounds),
    }
    with running(serve, ours), running(storage, theirs):
        figures = medians(samplers, repeat)
    model.close()
    return figures


def goals(rows: dict[str, Figures], plain: Figures, stack: Figures) -> list[Goal]:
    """The ratios that the project holds itself to."""
    vdpa, legacy = rows["vhost-user, vDPA mode"], rows["vhost-user, legacy mode"]
    return [
        Goal("GET_STATUS in vDPA mode / plain GET_FEATURES of qemu-storage-daemon", vdpa["status"] / plain["round trip"], 1.5),
        Goal("bring-up in vDPA mode / in legacy mode, same server", vdpa["bring-up"] / legacy["bring-up"], 0.5),
        Goal("what the stack adds to an ioctl, microseconds", stack["through the stack"] - stack["ioctl"], 2.0),
    ]


def lab_rows(rounds: int, repeat: int) -> dict[str, Figures]:
    """The kernel's simulator and the in-process model, both in the lab's guest (its CPU is emulated: compare within)."""
    with tempfile.TemporaryDirectory(prefix="vbb") as out:
        inner = f"python {Path(__file__).relative_to(REPO)} --homes sim={{}},model=model:blk?size=8M --rounds {rounds} --repeat {repeat} --json $LAB_OUT/r"
        command = [str(REPO / "tools/lab"), "--out", out, "sh", "-c", inner.replace("{}", "$VDPA_SIM_BLK")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
        result = Path(out) / "r"
        if done.returncode or not result.exists():
            print(f"bench: no figures from the lab:\n{done.stdout[-2000:]}{done.stderr[-2000:]}", file=sys.stderr)
            return {}
        rows: dict[str, Figures] = json.loads(result.read_text())["homes"]
        return {f"lab guest: {name}": figures for name, figures in rows.items()}


def show(report: dict[str, Any]) -> None:
    """Tables for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110)
    table = Table("microseconds, median", *COLUMNS.values(), title=f"control path, both processes on CPU {report['cpu']}")
    for name, figures in report["homes"].items():
        table.add_row(name, *(f"{figures[key]:,.1f}" if key in figures else "too few slots" for key in COLUMNS))
    console.print(table)
    if "plain" in report:
        stack = report["stack"]
        console.print(f"plain socket round trip to qemu-storage-daemon: {report['plain']['round trip']:.1f} us")
        console.print(f"bare ioctl: {stack['ioctl']:.2f} us, through the kernel back-end: {stack['through the stack']:.2f} us")
    show_goals(console, report)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="tools/bench control", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", type=int, default=min(os.sched_getaffinity(0)), help="CPU for both processes (default: the first)")
    parser.add_argument("--rounds", type=int, default=1500, help="operations in one sample (default 1500)")
    parser.add_argument("--repeat", type=int, default=15, help="samples, of which the median counts (default 15)")
    parser.add_argument("--no-lab", action="store_true", help="leave out the kernel, which is measured in the lab's guest")
    parser.add_argument("--homes", help="NAME=TARGET,...: measure these targets and nothing else")
    parser.add_argument("--json", metavar="FILE", help="write the figures there ('-': standard output) instead of tables")
    arguments = parser.parse_args()
    rounds, repeat = arguments.rounds, arguments.repeat
    os.sched_setaffinity(0, {arguments.cpu})
    report: dict[str, Any] = {"cpu": arguments.cpu}
    if arguments.homes:
        targets = {name: Target.parse(text) for name, text in (entry.split("=", 1) for entry in arguments.homes.split(","))}
        report["homes"] = medians({name: sampler(target, rounds) for name, target in targets.items()}, repeat)
        for target in targets.values():
            target.close()
    else:
        with tempfile.TemporaryDirectory(prefix="vbb") as directory:
            rows = host_figures(Path(directory), rounds, repeat)
        plain, stack = rows.pop("plain"), rows.pop("stack")
        checks = [asdict(goal) for goal in goals(rows, plain, stack)]
        if not arguments.no_lab:
            rows |= lab_rows(max(40, rounds // 40), max(3, repeat // 3))
        report |= {"homes": rows, "plain": plain, "stack": stack, "goals": checks}
    deliver(report, arguments.json, show)


if __name__ == "__main__":
    main()
