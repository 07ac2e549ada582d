# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What has no peer, or one in the same program, for ``tools/bench data``: the ring alone, a model in Python, memory of served devices."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from disks import directory
from drive import BURST, FRAME, on_cpu
from quiet import Turns, Watch
from rings import measure as measure_rings
from rows import OURS, Row, Sample, Servers, Span, Work

from vdpa_bridge import connect
from vdpa_bridge.drivers import BlkDriver, NetDriver
from vdpa_bridge.load import NetWork, Timing, load_net

BARE = "bare loop in C"
DEVICES = 200
POOL = 1 << 20
"""Bytes that each client shares."""


def rings(span: Span, cpus: tuple[int, int], left_out: dict[str, str]) -> Iterator[Row]:
    """Both ends of a ring on one thread. The program takes turns itself, so this is one turn of medians."""
    watch = Watch()
    measured = measure_rings(cpus[0])
    share = watch.share()
    for row in measured:
        if row["batch"] == 1 or row["tables"] != "direct" or row["events"] != "event_idx":
            continue
        work = Work("rings", f"ring, {row['layout']}, chain of {row['chain']}, batch of {row['batch']}", "ns/chain", most=1.3)
        yield work.row(Turns([{OURS: Sample(row["core"]), BARE: Sample(row["bare"])}], [share], 0))


def python(span: Span, cpus: tuple[int, int], left_out: dict[str, str]) -> Iterator[Row]:
    """A model in this process, whose thread has the first CPU; the load generator has the second."""

    def chains() -> Sample:
        with contextlib.ExitStack() as stack:
            with on_cpu(cpus[0]):
                device = stack.enter_context(connect(f"model:{Path(__file__).parent / 'untouched.py'}"))
            stack.enter_context(on_cpu(cpus[1]))
            nic = stack.enter_context(NetDriver(device))
            result = load_net(nic, NetWork(Timing(span.seconds, span.warmup, poll=True), frame=FRAME, batch=BURST))
            return Sample(result.sent / result.spent.seconds)

    yield Work("python", "model in plain Python, batches of 32", "chains/s", least=1e6).take({OURS: chains}, span)


def own_memory(pid: int) -> int:
    """Bytes of memory that a process has for itself; what it shares with clients is not among them."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    assert found, status
    return 1024 * int(found[1])


def serve_all(paths: list[Path]) -> list[str]:
    """Our server with a disk on each path."""
    return [sys.executable, "-m", "vdpa_bridge", "serve", *(f"{path}=model:blk?engine=null&size=64M" for path in paths)]


@contextlib.contextmanager
def many(count: int, cpus: tuple[int, int]) -> Iterator[tuple[int, list[Path]]]:
    """A server's pid and its sockets: one process with *count* disks."""
    with directory() as place, Servers(cpus[0], {}) as servers:
        paths = [place / f"{at}" for at in range(count)]
        yield servers.start(OURS, serve_all(paths), paths[-1]), paths


@contextlib.contextmanager
def clients(paths: list[Path]) -> Iterator[None]:
    """A client for each, which has read once."""
    with contextlib.ExitStack() as stack:
        for path in paths:
            device = stack.enter_context(connect(f"vhost-user:{path}?type=blk&vdpa=off"))
            disk = stack.enter_context(BlkDriver(device, pool_size=POOL))
            disk.read(0, 4096)
        yield


def memory(span: Span, cpus: tuple[int, int], left_out: dict[str, str]) -> Iterator[Row]:
    """What each of many devices adds to a process, with a client on each: the difference to a process with one."""
    sizes = []
    for count in (1, DEVICES):
        with many(count, cpus) as (pid, paths), clients(paths):
            sizes.append(own_memory(pid))
    each = (sizes[1] - sizes[0]) / (DEVICES - 1) / (1 << 20)
    work = Work("memory", f"memory of each of {DEVICES} served disks in one process", "MiB", most=2.0)
    yield work.row(Turns([{OURS: Sample(each)}], [0.0], 0)) | {"note": "one comparison; CPU time of others does not matter, and was not watched"}
