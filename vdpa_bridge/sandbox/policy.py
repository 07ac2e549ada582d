# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a sandbox leaves open, as a value that follows from what models need.

Rule of this file: it decides and does nothing. Whatever a model does not ask for is closed.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable
from dataclasses import dataclass, fields

from ..models.base import Model
from ..models.needs import Needs
from . import syscalls
from .landlock import CONNECT, READ, WRITE, Access
from .seccomp import Rule

_DESCRIPTORS = 64
"""Of the process itself: sockets, log, what threads wait for."""
_DESCRIPTORS_OF_DEVICE = 1024
"""Memory, messages under way, what the model opens."""
_DESCRIPTORS_OF_QUEUE = 8
"""Kick, call, error, each of a session that goes and one that comes."""
_THREADS = 16
"""Of the process: the log, signals, what gives devices back."""
_THREADS_OF_DEVICE = 4
"""Server and rings, and one in a hurry: a nudge, an end."""
_STACK = 8 << 20
"""Bytes of a thread's stack where RLIMIT_STACK does not say (pthread_create(3))."""
_WORKERS = 64
"""Threads of the kernel's own (io_uring), which count as ours."""


@dataclass(frozen=True)
class Policy:
    """For a process that is *devices* models with *queues* queues in all, and what all of them need."""

    needs: Needs
    devices: int
    queues: int
    engines: int
    """Threads that the models have for their queues."""

    @classmethod
    def of(cls, models: Iterable[Model]) -> Policy:
        """The least that all of *models* can live with."""
        every = list(models)
        return cls(_united([model.needs for model in every]), len(every), sum(model.queue_count for model in every), sum(model.threads for model in every))

    @property
    def paths(self) -> dict[str, Access]:
        """What stays of the file system, and what may be done there."""
        found: dict[str, Access] = {}
        wanted = [os.path.abspath(path) for path in self.needs.connect]
        sockets = tuple(path if os.path.isdir(path) else os.path.dirname(path) for path in wanted)  # a new one may come in its place
        for paths, access in ((self.needs.read, READ), (self.needs.write, WRITE), (sockets, CONNECT)):
            for path in paths:
                path = os.path.abspath(path)
                found[path] = found.get(path, Access(0)) | access
        return found

    def check_paths(self) -> None:
        """OSError for one that is not there: a sandbox keeps what is, and what comes later only below a directory."""
        for path in self.paths:
            os.stat(path)

    def rules(self) -> list[Rule]:
        """The system calls that stay, for the process that asks."""
        needs = self.needs
        wanted = syscalls.always(needs.controls)
        for needed, rules in (
            (needs.read, syscalls.reading),
            (needs.write, syscalls.writing),
            (needs.connect, syscalls.connecting),
            (needs.network, syscalls.networking),
            (needs.io_uring, syscalls.io_uring),
        ):
            if needed:
                wanted += rules()
        return list(dict.fromkeys(wanted))

    @property
    def descriptors(self) -> int:
        """How many more may be open than when the sandbox is closed."""
        return _DESCRIPTORS + self.devices * _DESCRIPTORS_OF_DEVICE + self.queues * _DESCRIPTORS_OF_QUEUE

    @property
    def tasks(self) -> int:
        """The same as the kernel counts, where it counts those of this process apart: in a user namespace."""
        return self.threads + _WORKERS

    @property
    def threads(self) -> int:
        """How many there may be."""
        return _THREADS + self.devices * _THREADS_OF_DEVICE + self.engines

    @property
    def memory(self) -> int:
        """Bytes of heap and stacks beyond those when the sandbox is closed."""
        stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
        return self.needs.memory + self.threads * (_STACK if stack == resource.RLIM_INFINITY else stack)

    def facts(self) -> dict[str, object]:
        """All of it, for people and for JSON."""
        limited: dict[str, list[str]] = {}
        for name, arguments in self.rules():
            limited.setdefault(name, []).extend([" and ".join(map(str, arguments))] if arguments else [])
        return {
            "needs": {field.name: value for field in fields(Needs) if (value := getattr(self.needs, field.name))},
            "paths": {path: [flag.name for flag in access] for path, access in self.paths.items()},
            "network": "that of the system" if self.needs.network else "none",
            "memory": self.memory,
            "descriptors": self.descriptors,
            "threads": self.threads,
            "system_calls": {name: limited[name] or "any" for name in sorted(limited)},
        }


def _united(all_needs: list[Needs]) -> Needs:
    """What serves every one: paths, names and switches of each, and the sum of their memory."""

    def names(name: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(each for needs in all_needs for each in getattr(needs, name)))

    return Needs(
        read=names("read"),
        write=names("write"),
        connect=names("connect"),
        network=any(needs.network for needs in all_needs),
        io_uring=any(needs.io_uring for needs in all_needs),
        controls=tuple(dict.fromkeys(number for needs in all_needs for number in needs.controls)),
        modules=names("modules"),
        memory=sum(needs.memory for needs in all_needs),
    )
