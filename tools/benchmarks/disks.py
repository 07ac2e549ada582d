# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Disks for ``tools/bench data``: ours next to qemu-storage-daemon with one client, our client next to blkio-bench with one disk.

All servers are on the first CPU; clients are on the second, or beside the server where that is what is measured. A disk on a file
lies on tmpfs and is full of data: holes are read from one page of zeroes that is always in the cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from control import running
from drive import on_cpu
from quiet import used
from rows import OURS, Meter, Row, Sample, Servers, Span, Work, of_children, say

from vdpa_bridge import connect
from vdpa_bridge.drivers import BlkDriver
from vdpa_bridge.load import BlkWork, Timing, blk_memory, load_blk

MIB = 1 << 20
SIZE = 256 * MIB
DEPTH = 32
BLKIO = "blkio-bench"
PREADV = "libvhost-user preadv"
MODES = {"event": False, "poll": True}
LOOK = 50e-6
"""Seconds of a look before a sleep."""


def serve(target: str, path: Path) -> list[str]:
    """Our server."""
    return [sys.executable, "-m", "vdpa_bridge", "serve", target, "--socket-path", str(path)]


def storage(program: str, path: Path, blockdev: str, poll: bool = True, queues: int = 1) -> list[str]:
    """qemu-storage-daemon; it polls for a while before it sleeps, unless it is told not to."""
    thread = [] if poll else ["--object", "iothread,id=io,poll-max-ns=0"]
    export = f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={path},writable=on,num-queues={queues}{'' if poll else ',iothread=io'}"
    return [program, *thread, "--blockdev", f"node-name=d,{blockdev}", "--export", export]


def daemons() -> dict[str, str]:
    """Every qemu-storage-daemon there is, by name: the installed one and the one of the newer QEMU."""
    programs = ["qemu-storage-daemon", str(Path(os.environ["VDPA_BRIDGE_NEWER_QEMU"]).parent / "qemu-storage-daemon")]
    found = {}
    for program in programs:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=False)
        if done.returncode == 0:
            found[f"q-s-d {done.stdout.split()[2]}"] = program
    return found


@contextmanager
def directory(prefix: str = "vbb", place: str | None = None) -> Iterator[Path]:
    """A temporary directory with a short name."""
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place) as name:
        yield Path(name)


def load(path: Path, pid: int, cpu: int, span: Span, *, depth: int = DEPTH, block: int = 4096, poll: bool = False, look: float = 0, queues: int = 1) -> Sample:
    """Random reads by our load generator; what it gets per second, and the CPU time of both."""
    work = BlkWork(Timing(span.seconds, span.warmup, poll=poll, poll_for=look), block, depth)
    with (
        on_cpu(cpu),
        connect(f"vhost-user:{path}?type=blk&vdpa=off") as device,
        BlkDriver(device, queues=range(queues), pool_size=blk_memory(work, queues)) as disk,
    ):
        server = Meter(lambda: used(pid))
        result = load_blk(disk, work)
        if not result.reads.count:
            say(f"no read from {path.name} ended within {span.seconds:g} s ({depth} in flight, {'poll' if poll else 'event'})")
        return Sample(result.reads.count / result.spent.seconds, result.spent.cpu / result.spent.seconds, server.share())


def blkio(path: Path, pid: int, cpu: int, span: Span, poll: bool) -> Sample:
    """The same by libblkio's own benchmark, which counts whole seconds."""
    command = ["taskset", "-c", str(cpu), str(Path(os.environ["VDPA_BRIDGE_LIBBLKIO"], BLKIO)), f"--iodepth={DEPTH}", "--readwrite=randread"]
    command += [f"--runtime={max(round(span.seconds), 1)}", *["--poll"] * poll, "virtio-blk-vhost-user", f"path={path}"]
    client, server = Meter(of_children), Meter(lambda: used(pid))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise SystemExit(f"bench: {' '.join(command)}: {done.stderr}")
    return Sample(1e3 * float(json.loads(done.stdout)["aggregate"]["kiops"]), client.share(), server.share())


def null_disks(span: Span, cpus: tuple[int, int], left_out: dict[str, str]) -> Iterator[Row]:
    """What requests cost without a medium: across two CPUs, and on one, where no wake-up hides the code."""
    with directory() as place, Servers(cpus[0], left_out) as servers:
        servers.start(OURS, serve("model:blk?engine=null&size=256M", place / "ours"), place / "ours")
        paths = {OURS: place / "ours"}
        for name, program in daemons().items():
            for how, poll in (("", True), (", no polling", False)):
                paths[name + how] = path = place / f"q{len(paths)}"
                servers.start(name + how, storage(program, path, f"driver=null-co,size={SIZE},read-zeroes=on", poll), path)

        def ways(cpu: int, depth: int, poll: bool) -> dict[str, Callable[[], Sample]]:
            return {name: partial(load, paths[name], pid, cpu, span, depth=depth, poll=poll) for name, pid in servers.pids.items()}

        for mode, poll in MODES.items():
            work = Work("blk", f"null disk, {DEPTH} in flight, {mode}", "IOPS", least=1.5)
            yield work.take(ways(cpus[1], DEPTH, poll), span, servers.pids.values())
        yield Work("blk", "null disk, 1 in flight, both on one CPU", "IOPS", least=1.2).take(ways(cpus[0], 1, False), span, servers.pids.values())


@contextmanager
def image(size: int = SIZE) -> Iterator[Path]:
    """A file on tmpfs, full of data."""
    with directory(place="/dev/shm") as place:
        file = place / "disk"
        with file.open("wb") as out:
            for _ in range(size // MIB):
                out.write(os.urandom(MIB))
        yield file


def libvhost_user(file: Path, server: int, cpu: int, span: Span, **how: Any) -> Sample:
    """The same of libvhost-user's disk, which calls preadv where it takes the request, and serves one client in its life."""
    with directory() as place:
        path = place / "s"
        command = [os.environ["VDPA_BRIDGE_VHOST_USER_BLK"], "--socket-path", str(path), "--blk-file", str(file)]
        with running(["taskset", "-c", str(server), *command], path) as process:
            return load(path, process.pid, cpu, span, **how)


def serve_file(file: Path, programs: dict[str, str], place: Path, servers: Servers) -> dict[str, Callable[..., Sample]]:
    """All ways to read a file, with what ``load`` takes behind its pid."""
    commands = {OURS: serve(f"model:blk?file={file}", place / "ours")}
    paths = {OURS: place / "ours"}
    for name, program in programs.items():
        for how in ("io_uring", "threads"):
            paths[f"{name} {how}"] = path = place / f"q{len(paths)}"
            commands[f"{name} {how}"] = storage(program, path, f"driver=file,filename={file},aio={how}")
    for name, command in commands.items():
        servers.start(name, command, paths[name])
    ways: dict[str, Callable[..., Sample]] = {name: partial(load, paths[name], pid) for name, pid in servers.pids.items()}
    return ways | {PREADV: partial(libvhost_user, file, servers.cpu)}


def file_disks(span: Span, cpus: tuple[int, int], left_out: dict[str, str]) -> Iterator[Row]:
    """Reads of data that is in memory: what a page cache serves."""
    with directory() as place, image() as file, Servers(cpus[0], left_out) as servers:
        served = serve_file(file, daemons(), place, servers)
        for mode, poll in MODES.items():
            ways = {name: partial(way, cpus[1], span, poll=poll) for name, way in served.items()}
            yield Work("blk", f"disk on tmpfs, {DEPTH} in flight, {mode}", "IOPS", least=1.3).take(ways, span, servers.pids.values())


def clients(span: Span, cpus: tuple[int, int], left_out: dict[str, str]) -> Iterator[Row]:
    """Our driver next to libblkio, which knows no look before a sleep, on the newest qemu-storage-daemon and on our own server."""
    with directory() as place, Servers(cpus[0], left_out) as servers:
        servers.start(OURS, serve("model:blk?engine=null&size=256M", place / "ours"), place / "ours")
        paths = {OURS: place / "ours"}
        name, program = list(daemons().items())[-1]
        paths[name] = place / "qsd"
        servers.start(name, storage(program, paths[name], f"driver=null-co,size={SIZE},read-zeroes=on"), paths[name])
        for served, pid in servers.pids.items():
            for mode, look in (("event", 0.0), (f"event after a look of {1e6 * LOOK:.0f} us", LOOK), ("poll", 0.0)):
                path, poll = paths[served], MODES.get(mode, False)
                ways = {OURS: partial(load, path, pid, cpus[1], span, poll=poll, look=look), BLKIO: partial(blkio, path, pid, cpus[1], span, poll)}
                work = Work("drivers", f"null disk of {served}, {DEPTH} in flight, {mode}", "IOPS", least=1.0)
                yield work.take(ways, span, servers.pids.values())
