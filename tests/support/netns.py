# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Network namespaces for taps, so that this machine's own network neither helps nor suffers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from .tapped import ip

_SERVER = """
import hashlib, socket, sys
with socket.create_server((sys.argv[1], 9000)) as server:
    server.settimeout(120)
    print("ready", flush=True)
    peer, _ = server.accept()
    digest = hashlib.md5(usedforsecurity=False)
    while data := peer.recv(1 << 20):
        digest.update(data)
    print(digest.hexdigest())
"""
"""Takes one connection's bytes on port 9000, and says their digest."""


@dataclass(frozen=True)
class Namespace:
    """One end of the wire."""

    name: str

    def command(self, *words: str | Path) -> list[str]:
        """WORDS, to be run in it."""
        return ["ip", "netns", "exec", self.name, *map(str, words)]

    def run(self, *words: str) -> str:
        """What WORDS print; they have to work."""
        return subprocess.run(self.command(*words), check=True, capture_output=True, text=True, timeout=60).stdout

    def take(self, interface: str, address: str) -> None:
        """Move an interface in, up, with *address* (and its prefix)."""
        ip("link", "set", interface, "netns", self.name)
        self.run("ip", "addr", "add", address, "dev", interface)
        self.run("ip", "link", "set", interface, "up")

    @contextmanager
    def http(self, directory: Path, address: str) -> Iterator[None]:
        """The files of *directory* on port 8000."""
        process = subprocess.Popen(
            self.command(sys.executable, "-u", "-m", "http.server", "8000", "--directory", directory, "--bind", address),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(b"Serving HTTP")
            yield
        finally:
            process.kill()
            process.communicate()

    @contextmanager
    def sink(self, address: str) -> Iterator[subprocess.Popen[str]]:
        """Takes what one connection to port 9000 brings, and prints its MD5."""
        process = subprocess.Popen(self.command(sys.executable, "-c", _SERVER, address), stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()
            process.communicate()


@contextmanager
def namespace(label: str) -> Iterator[Namespace]:
    """A new one; skips where none can be made."""
    if os.geteuid():
        pytest.skip("network namespaces take root")
    made = Namespace(f"vb{os.getpid()}{label}")
    ip("netns", "add", made.name)
    try:
        made.run("ip", "link", "set", "lo", "up")
        yield made
    finally:
        ip("netns", "delete", made.name)
