# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge serve`` as a process of its own, started by a shell's means or by a service manager's."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.homes import connector
from vdpa_bridge.device import Device
from vdpa_bridge.drivers import BlkDriver

PROGRAM = [sys.executable, "-m", "vdpa_bridge", "serve"]
PATIENCE = 20.0


class Serve:
    """A server process. Its log is read all the time, unless *deaf*."""

    def __init__(self, *arguments: str, command: Sequence[str] = PROGRAM, fds: Sequence[int] = (), deaf: bool = False, **environment: str) -> None:
        self.log = ""
        self.process = subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            pass_fds=fds,
            env=os.environ | environment,
            text=True,
        )
        assert self.process.stdout is not None
        self.out = self.process.stdout
        self._reader = threading.Thread(target=self._read, daemon=True)
        if deaf:
            assert self.process.stderr is not None
            fcntl.fcntl(self.process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        else:
            self.listen()

    def listen(self) -> None:
        """Read the log from now on."""
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line

    def ready(self, count: int = 1) -> list[str]:
        """The lines of stdout that say so."""
        lines = [self.out.readline() for _ in range(count)]
        assert all(lines), f"no line: status {self.process.wait(PATIENCE)}, {self.log}"
        return lines

    def logs(self, pattern: str) -> str:
        """The line of the log that has *pattern*, once it is there."""
        end = time.monotonic() + PATIENCE
        while (found := re.search(f"^.*(?:{pattern}).*$", self.log, re.MULTILINE)) is None:
            assert time.monotonic() < end, f"{pattern!r} was not logged: {self.log}"
            time.sleep(0.01)
        return found[0]

    def wait(self) -> int:
        """The exit status."""
        status = self.process.wait(PATIENCE)
        if self._reader.ident is not None:
            self._reader.join(PATIENCE)
        return status

    def end(self, number: int = signal.SIGTERM) -> float:
        """Ends it, well; the seconds that took."""
        start = time.monotonic()
        self.process.send_signal(number)
        status = self.process.wait(PATIENCE)
        seconds = time.monotonic() - start
        assert (self.wait(), status) == (0, 0), self.log
        return seconds

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        if self._reader.ident is not None:
            self._reader.join(PATIENCE)
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.out.close()


@contextmanager
def serving(*arguments: str, **more: Any) -> Iterator[Serve]:
    server = Serve(*arguments, **more)
    try:
        yield server
    finally:
        server.close()


def refused(*arguments: str, status: int = 1, **more: Any) -> str:
    """What a server says that does not start, and announces nothing."""
    with serving(*arguments, **more) as server:
        assert (server.wait(), server.out.read()) == (status, ""), server.log
        return server.log


def disk(path: Path, vdpa: str = "require") -> Device:
    """A session with the disk behind a socket."""
    return Device(connector(str(path), "blk", vdpa)())


def works(path: Path, mark: bytes = b"w", vdpa: str = "require") -> None:
    """A good client writes and reads."""
    with disk(path, vdpa) as device, BlkDriver(device, queue_size=8, pool_size=65536) as driver:
        driver.write(512, mark * 512)
        assert driver.read(512, 512) == mark * 512


def serial(path: Path) -> str:
    """What the disk calls itself."""
    with disk(path) as device, BlkDriver(device) as driver:
        return driver.get_id()


LAUNCHER = """
import os, sys
fds = [int(fd) for fd in sys.argv[1].split(",")]
high = [os.dup2(fd, 100 + at) for at, fd in enumerate(fds)]
for at, fd in enumerate(high):
    os.dup2(fd, 3 + at)
for fd in high:
    os.close(fd)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=sys.argv[2])
os.execv(sys.executable, [sys.executable, "-m", "vdpa_bridge", "serve", *sys.argv[3:]])
"""


@contextmanager
def launched(sockets: Sequence[socket.socket], names: str, *arguments: str, **more: Any) -> Iterator[Serve]:
    """The service, started as a service manager does, sockets first."""
    fds = [sock.fileno() for sock in sockets]
    command = [sys.executable, "-c", LAUNCHER, ",".join(map(str, fds)), names]
    with serving(*arguments, command=command, fds=fds, **more) as server:
        yield server


@contextmanager
def listening(*paths: Path) -> Iterator[list[socket.socket]]:
    """Sockets at *paths*, for others to take over."""
    sockets = [socket.socket(socket.AF_UNIX) for _ in paths]
    try:
        for sock, path in zip(sockets, paths, strict=True):
            sock.bind(str(path))
            sock.listen()
        yield sockets
    finally:
        for sock in sockets:
            sock.close()
