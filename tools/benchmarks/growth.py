# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""How figures grow, for ``tools/bench data``: with requests in flight, their size, queues and devices; ours next to the newest qemu-storage-daemon.

Rule of this file: a series is what JSON keeps, and knows nothing of pictures. A point is the median of a few turns, shorter than
those of rows with goals; lines take turns at each point, and what others disturbed is measured again as in rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from control import plain_sampler
from disks import DEPTH, MODES, SIZE, daemons, directory, image, load, serve, serve_file, storage
from drive import on_cpu
from insides import clients, own_memory, serve_all
from quiet import Turns, turns
from rows import OURS, Sample, Servers, Span, say

Point = dict[str, float]
"""What was measured at once, by key: ``rate``, ``client`` and ``server`` (shares of a CPU), ``cpu`` (microseconds of the server's CPU time per request), ..."""
Series = dict[str, Any]
DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BLOCKS = (512, 4096, 16384, 65536, 262144, 1 << 20)
QUEUES = (1, 2, 3, 4)
DEVICES = (1, 10, 50, 100, 200)
TICK = 0.01
"""Seconds: what a file's time is good for."""
ROUNDS = 400
"""Messages of which a round trip is the average."""
IOPS = {"key": "rate", "label": "reads per second", "more": True}
CPU = {"key": "cpu", "label": "server's CPU time per read, µs", "more": False}


def series(name: str, title: str, axis: str, panels: list[dict[str, Any]], taken: Iterable[tuple[int, Turns[Point]]]) -> Series:
    """What JSON keeps of the turns at each point: ``lines[NAME][KEY]`` has median, least and most of each point."""
    say(f"growth: {title}")
    points, many = zip(*taken, strict=True)
    lines: dict[str, dict[str, list[list[float]]]] = {}
    for line in many[0].results[0]:
        lines[line] = {}
        for key in many[0].results[0][line]:
            values = [[turn[line][key] for turn in one.results] for one in many]
            lines[line][key] = [[float(f"{of(some):.4g}") for of in (statistics.median, min, max)] for some in values]
    return {
        "name": name,
        "title": title,
        "axis": axis,
        "panels": panels,
        "points": points,
        "lines": lines,
        "turns": len(many[0].results),
        "disturbed": round(sum(one.disturbed for one in many) / sum(len(one.results) for one in many), 3),
    }


def point(sample: Sample, scale: float = 1.0) -> Point:
    """Of reads: the rate in units of 1 / *scale* reads."""
    assert sample.client is not None
    assert sample.server is not None
    return {"rate": sample.rate * scale, "client": sample.client, "server": sample.server, "cpu": 1e6 * sample.server / max(sample.rate, 1.0)}


def shorter(span: Span) -> Span:
    """What a point is given of a row's time."""
    return replace(span, seconds=span.seconds * 0.4, warmup=0.1, turns=min(span.turns, 3))


def grown(points: Iterable[int], lines: Mapping[str, Callable[[int], Point]], span: Span, pids: Iterable[int]) -> Iterator[tuple[int, Turns[Point]]]:
    """All lines at each point, of servers that run all the time."""
    for at in points:
        yield at, turns({name: partial(line, at) for name, line in lines.items()}, span.turns, pids, span.patience(len(lines)))


def null_disks(span: Span, cpus: tuple[int, int], left_out: dict[str, str]) -> Iterator[Series]:
    """By requests in flight, and by queues."""
    span = shorter(span)
    with directory() as place, Servers(cpus[0], left_out) as servers:
        servers.start(OURS, serve(f"model:blk?engine=null&size=256M&queues={QUEUES[-1]}", place / "ours"), place / "ours")
        paths = {OURS: place / "ours"}
        name, program = list(daemons().items())[-1]
        paths[name] = place / "theirs"
        servers.start(name, storage(program, paths[name], f"driver=null-co,size={SIZE},read-zeroes=on", queues=QUEUES[-1]), paths[name])

        def deep(who: str, poll: bool, depth: int) -> Point:
            return point(load(paths[who], servers.pids[who], cpus[1], span, depth=depth, poll=poll))

        def wide(who: str, queues: int) -> Point:
            return point(load(paths[who], servers.pids[who], cpus[1], span, queues=queues))

        lines = {f"{who}, {mode}": partial(deep, who, poll) for who in servers.pids for mode, poll in MODES.items()}
        taken = grown(DEPTHS, lines, span, servers.pids.values())
        yield series("depth", "null disk, reads of 4 KiB, one queue", "requests in flight", [IOPS, CPU], taken)
        taken = grown(QUEUES, {who: partial(wide, who) for who in servers.pids}, span, servers.pids.values())
        yield series("queues", f"null disk, reads of 4 KiB, {DEPTH} in flight on each queue, event", "queues", [IOPS, CPU], taken)


def file_disks(span: Span, cpus: tuple[int, int], left_out: dict[str, str]) -> Iterator[Series]:
    """By bytes of a request, from a file in memory."""
    span = shorter(span)
    with directory() as place, image() as file, Servers(cpus[0], left_out) as servers:
        served = serve_file(file, dict(list(daemons().items())[-1:]), place, servers)

        def large(who: str, block: int) -> Point:
            return point(served[who](cpus[1], span, depth=8, block=block, poll=True), block / (1 << 20))

        panels = [IOPS | {"label": "MiB per second"}, CPU]
        taken = grown(BLOCKS, {who: partial(large, who) for who in served}, span, servers.pids.values())
        yield series("block", "disk on tmpfs, 8 in flight, one queue, poll", "bytes of a request", panels, taken)


def daemon(program: str, paths: list[Path]) -> list[str]:
    """A qemu-storage-daemon with many disks."""
    command = [program]
    for at, path in enumerate(paths):
        command += ["--blockdev", f"node-name=d{at},driver=null-co,size={SIZE},read-zeroes=on"]
        command += ["--export", f"type=vhost-user-blk,id=e{at},node-name=d{at},addr.type=unix,addr.path={path},writable=on"]
    return command


def crowd(who: str, command: list[str], paths: list[Path], servers: Servers) -> float:
    """Start a process with many disks, put a client on each but the first: seconds from its start to its last socket."""
    began = time.time()
    if not servers.start(who, command, paths[-1]):
        return 0.0
    servers.enter_context(clients(paths[1:]))
    return max(round(max(path.stat().st_ctime for path in paths) - began, 2), TICK)


def busy(path: Path, pid: int, start: float, span: Span, cpus: tuple[int, int]) -> Point:
    """A disk among many of a process that took *start* seconds to start."""
    with on_cpu(cpus[0]):
        trip = plain_sampler(str(path), ROUNDS)()["round trip"]
    return point(load(path, pid, cpus[1], span)) | {"trip": trip, "memory": own_memory(pid) / (1 << 20), "start": start}


def devices(span: Span, cpus: tuple[int, int], left_out: dict[str, str]) -> Iterator[Series]:
    """By disks in a process, of which one is busy."""
    span = shorter(span)
    name, program = list(daemons().items())[-1]

    def taken() -> Iterator[tuple[int, Turns[Point]]]:
        for count in DEVICES:
            with directory() as place, Servers(cpus[0], left_out) as servers:
                paths = {who: [place / f"{key}{at}" for at in range(count)] for who, key in ((OURS, "o"), (name, "q"))}
                commands = {OURS: serve_all(paths[OURS]), name: daemon(program, paths[name])}
                starts = {who: crowd(who, commands[who], paths[who], servers) for who in paths}
                ways = {who: partial(busy, paths[who][0], pid, starts[who], span, cpus) for who, pid in servers.pids.items()}
                yield count, turns(ways, span.turns, servers.pids.values(), span.patience(len(ways)))

    panels = [
        IOPS | {"label": "reads per second of one disk"},
        {"key": "trip", "label": "round trip of a message, µs", "more": False},
        {"key": "memory", "label": "process's own memory, MiB", "more": False},
        {"key": "start", "label": "start to last socket, s", "more": False},
    ]
    yield series("devices", "disks with clients in one process, one of them busy", "disks", panels, taken())


GROWTH = (null_disks, file_disks, devices)
