# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""NBD servers as processes: qemu-nbd and nbdkit, each on a UNIX socket that it may find left by another."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from tests.support.sockets import listens

PATIENCE = 10.0


class NbdServer:
    """*command*, which listens at *path*, until it is killed or the test is over."""

    def __init__(self, path: Path, *command: str) -> None:
        self.path = path
        path.unlink(missing_ok=True)
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + PATIENCE
        while not listens(path):
            assert self.process.poll() is None, f"{command[0]} ended"
            assert time.monotonic() < end, f"{command[0]} does not start"
            time.sleep(0.02)

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"

    def target(self, **options: str) -> str:
        """The disk that it makes, as a target."""
        return "&".join([f"model:blk?nbd={quote(self.uri)}", *(f"{name.replace('_', '-')}={value}" for name, value in options.items())])

    def stop(self, stopped: bool) -> None:
        """Let it be silent, or answer again."""
        self.process.send_signal(signal.SIGSTOP if stopped else signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def running(server: NbdServer) -> Iterator[NbdServer]:
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def qemu_nbd(path: Path, image: Path, *options: str) -> Iterator[NbdServer]:
    command = ["qemu-nbd", "--format=raw", f"--socket={path}", "--persistent", "--shared=8", "--discard=unmap", *options, str(image)]
    with running(NbdServer(path, *command)) as server:
        yield server


@contextmanager
def nbdkit(path: Path, *arguments: str) -> Iterator[NbdServer]:
    with running(NbdServer(path, "nbdkit", "--foreground", "--unix", str(path), *arguments)) as server:
        yield server
