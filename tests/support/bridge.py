# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A device served by a process of its own, and a client that has none of our code, for the tests of whole bridges.

Rule of this file: what it starts it ends, by its process; what a process said is in the error when something goes wrong.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vdpa_bridge import Device, Target

SOURCES = Path(__file__).resolve().parents[2] / "userspace" / "client"
REFUSED, NOT_COMPLETED, WRONG_DATA = 1, 3, 4
"""Exit statuses of the C client."""


def node(name: str) -> str:
    """The device node of *name* (SIM_BLK, VP_NET, ...)."""
    variable = f"VDPA_{name}"
    if variable not in os.environ:
        pytest.skip(f"no ${variable}: run it in the lab, tools/lab pytest -m lab tests/lab")
    return os.environ[variable]


@functools.cache
def client_program(name: str = "vhost-blk-client") -> str:
    """A client in C, built if it is not there or older than its sources."""
    program = SOURCES / "build" / name
    newest = max(file.stat().st_mtime for file in SOURCES.iterdir() if file.suffix in (".c", ".h"))
    if not program.exists() or program.stat().st_mtime < newest:
        if not shutil.which("gcc"):
            pytest.skip("no gcc for userspace/client: tools/setup base installs it")
        out = Path(tempfile.gettempdir(), f"vhost-blk-client-{os.getuid()}")
        subprocess.run(["make", "-s", "-C", str(SOURCES), f"OUT={out}"], check=True, timeout=100)
        program = out / name
    return str(program)


@contextmanager
def start_client(path: str, *options: object, program: str = "vhost-blk-client") -> Iterator[subprocess.Popen[str]]:
    """The C client, running; killed with the block."""
    command = [client_program(program), *map(str, options), path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def run_client(path: str, *options: object, status: int = 0, program: str = "vhost-blk-client") -> dict[str, Any]:
    """What the C client reports; it has to end with *status*, and its words are under ``error``."""
    with start_client(path, *options, program=program) as process:
        out, error = process.communicate(timeout=60)
    assert process.returncode == status, f"client ended with {process.returncode}: {error}"
    return {**(json.loads(out) if out else {}), "error": error}


@dataclass
class Bridge:
    """``vdpa-bridge serve``, running."""

    target: str
    path: str
    log: Path
    process: subprocess.Popen[str]

    @property
    def kind(self) -> str:
        """What serves the data, for the tables of what was seen working."""
        named = {os.environ.get(f"VDPA_{place}_{kind}"): word for place, word in (("SIM", "vdpa_sim"), ("VP", "vp_vdpa")) for kind in ("BLK", "NET")}
        return named.get(self.target, self.target)

    def device(self, kind: str, vdpa: str = "off", timeout: float = 10) -> Device:
        """A front-end of ours on it."""
        return Device(Target.parse(f"vhost-user:{self.path}?type={kind}&vdpa={vdpa}&timeout={timeout}").open())

    def settle(self) -> None:
        """Return when the last client's session is over: the next one is answered only then."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(self.path)
            sock.sendall(struct.pack("=III", 1, 1, 0))
            assert sock.recv(64), f"the server hung up: {self.said()}"

    def release(self) -> None:
        """Return when the device is free for others to open."""
        self.settle()
        if not self.target.startswith("/dev/"):
            return
        end = time.monotonic() + 10
        while True:
            try:
                os.close(os.open(self.target, os.O_RDWR | os.O_CLOEXEC))
                return
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def said(self) -> str:
        """The log so far. It is written beside the service: it is complete when nothing came for a while."""
        text, quiet = self.log.read_text(), 0
        while quiet < 6:
            time.sleep(0.05)
            now = self.log.read_text()
            text, quiet = now, quiet + 1 if now == text else 0
        return text

    def works(self) -> None:
        """The next client is served, whatever happened to the last one."""
        run_client(self.path, "--requests", 20)

    def expenses(self) -> dict[str, int]:
        """What the process did so far: context switches and CPU ticks of all its threads, read and write calls.

        Threads named vhost- are the kernel's, at work for a vhost node of the process; they run nothing of it.
        """
        root = Path(f"/proc/{self.process.pid}")
        total = {"switches": 0, "calls": 0, "ticks": 0}
        for task in (root / "task").iterdir():
            try:
                name, status, stat = ((task / file).read_text() for file in ("comm", "status", "stat"))
            except (FileNotFoundError, ProcessLookupError):
                continue  # a thread that ended meanwhile
            if name.startswith("vhost-"):
                continue
            total["switches"] += sum(int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line)
            fields = stat.rsplit(")", 1)[1].split()
            total["ticks"] += int(fields[11]) + int(fields[12])
        for line in (root / "io").read_text().splitlines():
            if line.startswith(("syscr", "syscw")):
                total["calls"] += int(line.split()[1])
        return total

    def rest(self) -> dict[str, int]:
        """``expenses``, once it sleeps for good: it looks once more at a client that says nothing for a second."""
        end = time.monotonic() + 20
        now, quiet = self.expenses(), 0
        while quiet < 25:
            assert time.monotonic() < end, "the serving process does not come to rest"
            time.sleep(0.05)
            before, now = now, self.expenses()
            quiet = quiet + 1 if now == before else 0
        return now


def limited(memlock: int) -> list[str]:
    """What runs the command that follows with *memlock* bytes to pin and without the right to more, root or not."""
    return ["prlimit", f"--memlock={memlock}:{memlock}", "setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource"]


@contextmanager
def bridging_all(targets: Sequence[str], *options: str, memlock: int | None = None) -> Iterator[list[Bridge]]:
    """*targets* served to others by one process; which may not raise its RLIMIT_MEMLOCK above *memlock* bytes."""
    with tempfile.TemporaryDirectory(prefix="vb") as directory:
        paths, log = [f"{directory}/{at}" for at in range(len(targets))], Path(directory, "log")
        pairs = [f"{path}={target}" for path, target in zip(paths, targets, strict=True)]
        command = [sys.executable, "-m", "vdpa_bridge", "serve", *pairs, *options]
        if memlock is not None:
            command = [*limited(memlock), *command]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True)
        try:
            end = time.monotonic() + 60
            while log.read_text().count("serving") < len(targets):
                assert process.poll() is None, f"no server for {targets}: {log.read_text()}"
                assert time.monotonic() < end, f"no server for {targets} within 60 s: {log.read_text()}"
                time.sleep(0.05)
            bridges = [Bridge(target, path, log, process) for target, path in zip(targets, paths, strict=True)]
            for bridge in bridges:
                bridge.release()  # it has opened the device for the first client already, and gives it back after it
            yield bridges
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


@contextmanager
def bridging(target: str, *options: str, memlock: int | None = None) -> Iterator[Bridge]:
    """*target* served to others by a process of its own."""
    with bridging_all([target], *options, memlock=memlock) as (bridge,):
        yield bridge
