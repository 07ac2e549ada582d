# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What our server costs a legacy client, next to qemu-storage-daemon, with a client written in C (userspace/client).

Client and server run on one CPU: a wake-up across CPUs costs more than everything measured here. The servers take turns,
so that whatever disturbs the machine disturbs both; with real-time priority, where that is allowed, what else runs there
counts for little. Figures are medians in microseconds: one GET_FEATURES and its reply; one bring-up from connect to the
answer behind SET_VRING_ENABLE, memory and one ring included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from control import REPO, Figures, running
from report import Goal, deliver, show_goals

CLIENT = REPO / "userspace" / "client"
NAMES = {"message_us": "GET_FEATURES", "bring_up_us": "bring-up"}
OURS, THEIRS = "vdpa-bridge serve model:blk", "qemu-storage-daemon"


def client() -> str:
    """The C client, built where make builds it."""
    subprocess.run(["make", "-s", "-C", str(CLIENT)], check=True, timeout=120)
    return str(CLIENT / "build" / "vhost-blk-client")


def measure(rounds: int, repeat: int) -> dict[str, Figures]:
    """The medians of both servers."""
    program = client()
    with tempfile.TemporaryDirectory(prefix="vbb") as directory:
        ours, theirs, disk = (Path(directory, name) for name in ("ours", "qsd", "disk"))
        disk.write_bytes(bytes(8 << 20))
        export = f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={theirs},writable=on"
        serve = [sys.executable, "-m", "vdpa_bridge", "serve", "model:blk?size=8M", "--socket-path", str(ours)]
        storage = ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=d,filename={disk}", "--export", export]
        samples: dict[str, list[Figures]] = {OURS: [], THEIRS: []}
        with running(serve, ours), running(storage, theirs):
            for _ in range(repeat + 1):
                for name, path in ((OURS, ours), (THEIRS, theirs)):
                    done = subprocess.run([program, "--control", str(rounds), str(path)], capture_output=True, text=True, timeout=120, check=False)
                    if done.returncode:
                        raise SystemExit(f"bench: {name}: {done.stderr}")
                    samples[name].append(json.loads(done.stdout))
    return {name: {key: statistics.median(one[key] for one in many[1:]) for key in NAMES} for name, many in samples.items()}


def goals(figures: dict[str, Figures]) -> list[Goal]:
    """The ratios that the project holds itself to."""
    ours, theirs = figures[OURS], figures[THEIRS]
    return [
        Goal("GET_FEATURES, ours / qemu-storage-daemon", ours["message_us"] / theirs["message_us"], 1.5),
        Goal("bring-up, ours / qemu-storage-daemon", ours["bring_up_us"] / theirs["bring_up_us"], 1.2),
    ]


def show(report: dict[str, Any]) -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110)
    table = Table("microseconds, median", *NAMES.values(), title=f"a legacy client in C and its server, both on CPU {report['cpu']}")
    for name, figures in report["servers"].items():
        table.add_row(name, *(f"{figures[key]:,.1f}" for key in NAMES))
    console.print(table)
    show_goals(console, report)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="tools/bench serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", type=int, default=min(os.sched_getaffinity(0)), help="CPU for both processes (default: the first)")
    parser.add_argument("--rounds", type=int, default=2000, help="messages in one sample; a twentieth of them bring-ups (default 2000)")
    parser.add_argument("--repeat", type=int, default=15, help="samples, of which the median counts (default 15)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there ('-': standard output) instead of a table")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {arguments.cpu})
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    figures = measure(arguments.rounds, arguments.repeat)
    report: dict[str, Any] = {"cpu": arguments.cpu, "servers": figures, "goals": [asdict(goal) for goal in goals(figures)]}
    deliver(report, arguments.json, show)


if __name__ == "__main__":
    main()
