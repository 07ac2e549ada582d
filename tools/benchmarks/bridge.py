# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a bridge costs requests: a client in C on a kernel disk, directly, through ``vdpa-bridge serve`` and through its relay, in the lab.

The same program and the same ring code (userspace/client) open /dev/vhost-vdpa-N themselves or let the bridge do it; they
take turns. Figures are medians of requests per second, writes and verified reads of 4 KiB, and of the ratio in each turn:
the lab's CPU is emulated, the ratios count. The simulator is shown without a goal: it is a thread of the kernel that works
in the address space of whoever owns the device (vdpasim_bind_mm), so a client that is not the owner costs it a change of
address space per wake-up, which is dear under emulation. Hardware has nothing of the kind. The relay (--relay on) has no goal
either: every request wakes it twice, where a bridge that passes through does nothing.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from control import REPO, running
from report import Goal, deliver, show_goals
from serve import client

HARDWARE = "vp_vdpa (virtio-pci behind an IOMMU)"
DISKS = {"vdpa_sim_blk": "VDPA_SIM_BLK", HARDWARE: "VDPA_VP_BLK"}
DEPTHS = (1, 8)
MOST = 1.1


def wait_until_free(node: str) -> None:
    """The server gives the device back a moment after its client has gone."""
    end = time.monotonic() + 10
    while True:
        try:
            os.close(os.open(node, os.O_RDWR))
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > end:
                raise SystemExit(f"bench: {node}: {error.strerror}") from None
            time.sleep(0.01)


def sample(place: str, depth: int, requests: int) -> dict[str, float]:
    """Requests per second of one session at *place*, a node or a socket."""
    command = [client(), "--requests", str(requests), "--depth", str(depth), place]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise SystemExit(f"bench: {' '.join(command)}: {done.stderr}")
    report = json.loads(done.stdout)
    return {kind: report[kind]["iops"] for kind in ("writes", "reads")}


def measure(node: str, requests: int, repeat: int) -> list[dict[str, Any]]:
    """One row per depth and kind of request."""
    samples: dict[tuple[int, str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="vbb") as directory, ExitStack() as servers:
        places = {"direct": node}
        for way, relay in (("bridge", "off"), ("relay", "on")):
            path = Path(directory, way)
            places[way] = str(path)
            wait_until_free(node)
            servers.enter_context(running([sys.executable, "-m", "vdpa_bridge", "serve", node, "--socket-path", str(path), "--relay", relay], path))
            sample(str(path), 1, 10)  # the server has the device open for its first client
        for turn in range(repeat + 1):
            ways = list(places.items())
            for depth in DEPTHS:
                for way, place in ways if turn % 2 else reversed(ways):
                    wait_until_free(node)
                    for kind, rate in sample(place, depth, requests).items():
                        if turn:
                            samples.setdefault((depth, kind, way), []).append(rate)
    rows = []
    for depth, kind in ((depth, kind) for depth in DEPTHS for kind in ("writes", "reads")):
        rates = {way: samples[depth, kind, way] for way in places}
        ratio, relayed = (statistics.median(one / other for one, other in zip(rates["direct"], rates[way], strict=True)) for way in ("bridge", "relay"))
        medians = {way: statistics.median(rates[way]) for way in places}
        rows.append({"depth": depth, "kind": kind, **medians, "ratio": ratio, "relay_ratio": relayed})
    return rows


def in_the_lab(requests: int, repeat: int) -> dict[str, list[dict[str, Any]]]:
    """Measured by this program in the guest."""
    client()
    with tempfile.TemporaryDirectory(prefix="vbb") as out:
        inner = f"exec python {Path(__file__).relative_to(REPO)} --here --requests {requests} --repeat {repeat} --json $LAB_OUT/r"
        done = subprocess.run(
            [str(REPO / "tools/lab"), "--guest", "--out", out, "sh", "-c", inner], capture_output=True, text=True, timeout=600, check=False
        )
        result = Path(out) / "r"
        if done.returncode or not result.exists():
            raise SystemExit(f"bench: no figures from the lab:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        disks: dict[str, list[dict[str, Any]]] = json.loads(result.read_text())["disks"]
        return disks


def goals(disks: dict[str, list[dict[str, Any]]]) -> list[Goal]:
    """For hardware, all kinds of requests together: a single one of them is at the mercy of the emulation."""
    return [Goal(f"{HARDWARE}: direct / bridge", statistics.geometric_mean(row["ratio"] for row in disks[HARDWARE]), MOST)] if HARDWARE in disks else []


def show(report: dict[str, Any]) -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=130)
    columns = ("disk", "requests", "in flight", "direct, 1/s", "bridge, 1/s", "direct / bridge", "relay, 1/s", "direct / relay")
    table = Table(*columns, title="requests of 4 KiB, median rates, in the lab")
    for name, rows in report["disks"].items():
        for row in rows:
            figures = f"{row['direct']:,.0f}", f"{row['bridge']:,.0f}", f"{row['ratio']:.2f}", f"{row['relay']:,.0f}", f"{row['relay_ratio']:.2f}"
            table.add_row(name, row["kind"], str(row["depth"]), *figures)
    console.print(table)
    show_goals(console, report)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="tools/bench bridge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000, help="of each kind in one sample (default 3000)")
    parser.add_argument("--repeat", type=int, default=8, help="turns, of which the median counts (default 8)")
    parser.add_argument("--here", action="store_true", help="on this kernel, with the nodes in $VDPA_SIM_BLK and $VDPA_VP_BLK, instead of in the lab")
    parser.add_argument("--json", metavar="FILE", help="write the figures there ('-': standard output) instead of a table")
    arguments = parser.parse_args()
    if arguments.here:
        nodes = {name: os.environ[variable] for name, variable in DISKS.items() if variable in os.environ}
        if not nodes:
            parser.error("--here: neither $VDPA_SIM_BLK nor $VDPA_VP_BLK is set")
        disks = {name: measure(node, arguments.requests, arguments.repeat) for name, node in nodes.items()}
    else:
        disks = in_the_lab(arguments.requests, arguments.repeat)
    report: dict[str, Any] = {"disks": disks, "goals": [asdict(goal) for goal in goals(disks)]}
    deliver(report, arguments.json, show)


if __name__ == "__main__":
    main()
