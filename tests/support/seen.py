# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What tests saw working, for the tables of docs/clients.md and docs/devices.md.

Rule of this file: a test says what it saw (fixture ``seen``), ``seen.jsonl`` keeps it, and a test that passes must have said
exactly what is kept for it. So the tables have no row that no test says, and lack none; only versions are what they were.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

REPO = Path(__file__).resolve().parents[2]
KEPT = REPO / "tests" / "seen.jsonl"
HEADS = {
    "clients": ("client", "device", "served from", "seen working", "by"),
    "devices": ("driver", "device", "at home in", "seen working", "by"),
}
WORDS = {
    "split": "data in split rings",
    "packed": "data in packed rings",
    "in order": "rings with IN_ORDER accepted",
    "multi-queue": "several queues or queue pairs, each seen carrying data",
    "restart": "the device reset and brought up again on one connection, features chosen anew",
    "reboot": "the guest resets itself; connection and data stay",
    "reconnect": "the server goes and comes back; the client goes on where it was",
    "pause": "rings stopped and started again where they stood",
    "config change": "the device's configuration changes and the client notices",
    "control queue": "commands (address, number of queue pairs), carried out by the device or by a VMM before it",
    "memory table": "memory by SET_MEM_TABLE",
    "memory slots": "memory by ADD_MEM_REG",
    "memory hotplug": "memory added while rings run",
    "IOMMU": "addresses translated by a virtual IOMMU, misses answered",
    "successor": "the next client is served after this one is killed or vanishes",
    "events": "what happens outside reaches the client unasked: edges of lines",
    "doorbell": "kicks by a store into a page of the device",
    "tap": "an interface of this system: frames of its network stack and the answers",
    "vDPA mode": "operations verbatim (VHOST_USER_PROTOCOL_F_VDPA)",
    "legacy": "stock vhost-user messages",
    "VDUSE": "given to the kernel, and driven through it",
}
"""Everything that can be seen working, in the order of the tables."""

_PROGRAMS = {
    "QEMU": (["qemu-system-x86_64", "--version"], r"version (\S+)"),
    "QEMU, newer": ([os.environ.get("VDPA_BRIDGE_NEWER_QEMU", "qemu-system-x86_64"), "--version"], r"version (\S+)"),
    "libblkio": ([os.path.join(os.environ.get("VDPA_BRIDGE_LIBBLKIO", ""), "version")], r"(\S+)"),
    "virtiofsd": (["/usr/lib/qemu/virtiofsd", "--version"], r"version (\S+)"),
    "vhost-user-gpu": (["qemu-system-x86_64", "--version"], r"version (\S+)"),
    "qemu-storage-daemon": (["qemu-storage-daemon", "--version"], r"version (\S+)"),
    "libvhost-user": (["qemu-system-x86_64", "--version"], r"version (\S+)"),
    "dpdk-testpmd": (["dpdk-testpmd", "-v", "--no-huge", "-m", "64", "--no-pci", "--no-shconf", "--no-telemetry", "--in-memory"], r"DPDK ([\w.-]+)"),
}
"""How a program says its version."""
_KERNEL = ("vdpa_sim", "vp_vdpa", "VDUSE", "vhost-net", "vhost-vsock")
"""Devices of the running kernel, whose version is its release."""


class Sight(NamedTuple):
    """One thing seen working: *who* (a client, a driver) did it with *device* (blk, net ...), which lived *where*."""

    table: str
    who: str
    device: str
    where: str
    word: str


@dataclass
class Seen:
    """What one test saw."""

    sights: set[Sight] = field(default_factory=set)
    versions: dict[str, str] = field(default_factory=dict)

    def __call__(self, table: str, who: str, device: str, where: str, *words: str) -> None:
        """Say at the end of a test: *who* was seen with *device* living *where*; each of WORDS worked."""
        unknown = set(words) - set(WORDS)
        if table not in HEADS or not words or unknown:
            raise ValueError(f"{table}: {unknown or 'nothing'} is not what can be seen; tables: {', '.join(HEADS)}; words: {', '.join(WORDS)}")
        self.sights |= {Sight(table, who, device, where, word) for word in words}

    def version(self, name: str, version: str) -> None:
        """The version of somebody who cannot be asked."""
        self.versions[name] = version


def program_version(name: str) -> str:
    """What the program says, or the release of the kernel for its devices; empty for names that have no version."""
    if name in _KERNEL:
        return f"Linux {platform.release()}"
    if name not in _PROGRAMS:
        return ""
    command, pattern = _PROGRAMS[name]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False)
    found = re.search(pattern, done.stdout + done.stderr)
    if found is None:
        raise RuntimeError(f"{' '.join(command)} does not say its version:\n{done.stdout}{done.stderr}")
    return found[1]


# The file ------------------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What tests saw, by their ids, and the versions of those who were seen."""

    tests: dict[str, set[Sight]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path = KEPT) -> Record:
        """One JSON object a line: a test with its sights, or a name with its version."""
        record = cls()
        for line in path.read_text().splitlines() if path.exists() else []:
            entry: dict[str, Any] = json.loads(line)
            if "test" in entry:
                record.tests[entry["test"]] = {Sight(*sight) for sight in entry["seen"]}
            else:
                record.versions[entry["name"]] = entry["version"]
        return record

    def save(self, path: Path) -> None:
        """Sorted, so that two changes meet only where they touch the same test."""
        lines = [{"name": name, "version": version} for name, version in sorted(self.versions.items())]
        tests = [{"test": test, "seen": sorted(sights)} for test, sights in sorted(self.tests.items())]
        path.write_text("".join(json.dumps(entry) + "\n" for entry in [*lines, *tests]))

    def merge(self, run: Record) -> None:
        """Take what a run saw: its tests anew, those that saw nothing not at all; versions of nobody are dropped."""
        self.tests = {test: sights for test, sights in (self.tests | run.tests).items() if sights}
        names = {name for sights in self.tests.values() for sight in sights for name in (sight.who, sight.where)}
        self.versions = {name: version for name, version in (self.versions | run.versions).items() if name in names}

    def gone(self) -> list[str]:
        """Tests that are not there any more; those of the lab and of homes that are missing here are."""
        files = sorted({test.partition("::")[0] for test in self.tests})
        files = [file for file in files if (REPO / file).exists()]
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "--every-home", "-p", "no:cacheprovider", *files]
        done = subprocess.run(command, cwd=REPO, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
        return sorted(set(self.tests) - set(done.stdout.splitlines()))

    def add(self, test: str, seen: Seen) -> None:
        """A test has passed."""
        self.tests[test] = set(seen.sights)
        for sight in seen.sights:
            for name in (sight.who, sight.where):
                if name not in self.versions and (version := seen.versions.get(name) or program_version(name)):
                    self.versions[name] = version


def rows(table: str, record: Record) -> Iterator[list[str]]:
    """The rows of *table*, as text: what is the same but for the thing seen is one row."""
    found: dict[tuple[str, str, str], tuple[set[str], set[str]]] = {}
    for test, sights in record.tests.items():
        for sight in sights:
            if sight.table == table:
                words, files = found.setdefault(sight[1:4], (set(), set()))
                words.add(sight.word)
                files.add(test.partition("::")[0].removeprefix("tests/"))
    for (who, device, where), (words, files) in sorted(found.items()):
        yield [_named(who, record), device, _named(where, record), ", ".join(in_order(words)), ", ".join(f"`{file}`" for file in sorted(files))]


def in_order(words: Iterable[str]) -> list[str]:
    """In the order of WORDS."""
    return sorted(words, key=list(WORDS).index)


def _named(name: str, record: Record) -> str:
    return f"{name} {record.versions.get(name, '')}".strip()
