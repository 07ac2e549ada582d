# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Processes: what they are called, and who has a file open.

Rule of this file: what another user's process has open may be hidden from us, so "nobody" counts only when all could be read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

_INTERPRETERS = ("python", "perl", "ruby", "node", "sh", "bash")


@dataclass(frozen=True)
class Process:
    """A process, by number and by what a user calls it."""

    pid: int
    program: str

    def __str__(self) -> str:
        return f"{self.program} (pid {self.pid})" if self.pid else self.program


HIDDEN = Process(0, "a process of another user")
"""Stands for one that must be there and cannot be seen."""


def program_name(pid: int) -> str:
    """What a process was started as; for a script, the script's name and not its interpreter's. ``?`` when it is gone."""
    try:
        words = [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") if word]
        if not words:
            return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "?"
    name = os.path.basename(words[0])
    return printable((name.startswith(_INTERPRETERS) and _script(words[1:])) or name)


def printable(text: str) -> str:
    """*text*, which somebody else chose, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _script(words: list[str]) -> str:
    """What an interpreter runs; nothing if that has no name."""
    rest = iter(words)
    for word in rest:
        if word == "-c":
            return ""
        if word == "-m":
            return next(rest, "")
        if word in ("-W", "-X"):
            next(rest, "")
        elif not word.startswith("-"):
            return os.path.basename(word)
    return ""


@dataclass
class OpenFiles:
    """Who has what open, by the text of the link in /proc/PID/fd: ``/dev/vhost-vdpa-0``, ``socket:[123]``."""

    pids: dict[str, set[int]] = field(default_factory=dict)
    complete: bool = True
    """False when some processes could not be read."""

    def of(self, link: str) -> list[Process]:
        """The processes that have it open."""
        return [Process(pid, program_name(pid)) for pid in sorted(self.pids.get(link, ()))]

    def of_socket(self, inode: int) -> list[Process]:
        """The processes that have a socket open, by its inode in /proc/net/unix."""
        return self.of(f"socket:[{inode}]")


def open_files() -> OpenFiles:
    """All devices and sockets that are open now, as far as this user may see."""
    found = OpenFiles()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            entries = os.listdir(f"/proc/{pid}/fd")
        except PermissionError:
            found.complete = False
            continue
        except OSError:
            continue  # it is gone
        for entry in entries:
            try:
                link = os.readlink(f"/proc/{pid}/fd/{entry}")
            except OSError:
                continue
            if link.startswith(("/dev/", "socket:")):
                found.pids.setdefault(link, set()).add(int(pid))
    return found


def named(processes: list[Process]) -> str:
    """``qemu-system-x86_64 (pid 12), vdpa-bridge (pid 13)``."""
    return ", ".join(map(str, processes))
