# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The service manager's side: sockets that it passes, and what it wants to hear (sd_listen_fds(3), sd_notify(3)).

Rule of this file: the environment is read once and then cleaned, so that nothing is taken twice; a manager that does not
listen costs nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping, Sequence

from .listening import Listener
from .spec import DeviceSpec

_FIRST_FD = 3


def passed_fds(environment: MutableMapping[str, str] | None = None) -> list[tuple[str, int]]:
    """(name, descriptor) of each socket passed to this process, or nothing; ValueError for variables that make no sense."""
    environment = os.environ if environment is None else environment
    pid, count, names = (environment.pop(f"LISTEN_{key}", "") for key in ("PID", "FDS", "FDNAMES"))
    if not count or pid != str(os.getpid()):
        return []
    if not count.isdecimal() or int(count) > 65536:
        raise ValueError(f"LISTEN_FDS={count} is not a number of descriptors")
    fds = range(_FIRST_FD, _FIRST_FD + int(count))
    given = names.split(":") if names else [""] * len(fds)
    if len(given) != len(fds):
        raise ValueError(f"LISTEN_FDNAMES={names} has {len(given)} names for LISTEN_FDS={count}")
    with contextlib.suppress(OSError):  # one that is not open is complained about when it is used
        for fd in fds:
            os.set_inheritable(fd, False)
    return list(zip(given, fds, strict=True))


def assign(passed: Sequence[tuple[str, int]], specs: Sequence[DeviceSpec]) -> dict[str, Listener]:
    """Which passed socket is whose, by the device's name: the socket has it too, or is bound to the device's path, or both are alone.

    ValueError for a socket that is nobody's, and for a device that has neither socket nor path.
    """
    found: dict[str, Listener] = {}
    for name, fd in passed:
        listener = Listener.adopt(fd, f"fd {fd}")
        bound = listener.bound_to
        owner = (
            next((spec for spec in specs if spec.name == name), None)
            or next((spec for spec in specs if spec.socket_path and os.path.abspath(spec.socket_path) == bound), None)
            or (specs[0] if len(passed) == len(specs) == 1 and specs[0].socket_path is None else None)
        )
        if owner is None:
            raise ValueError(f"the passed socket {name or fd!r} ({bound}) is of no device; there is: {', '.join(spec.name for spec in specs)}")
        if owner.name in found:
            raise ValueError(f"two passed sockets are of the device {owner.name}")
        found[owner.name] = listener
    for spec in specs:
        if spec.name not in found and spec.socket_path is None:
            raise ValueError(f"{spec.target} has no socket: give --socket-path, PATH=TARGET or --fd, or have one passed (LISTEN_FDS) as {spec.name}")
    return found


class Notifier:
    """Tells the service manager how things are; tells nobody when there is none."""

    def __init__(self, environment: MutableMapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        address = environment.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address.startswith(("/", "@")) else None

    @property
    def heard(self) -> bool:
        """Whether there is a service manager that listens."""
        return self._sock is not None

    def send(self, *lines: str) -> None:
        """``send("READY=1", "STATUS=2 devices")``. Never waits and never fails."""
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.sendto("\n".join(lines).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL, self._address)

    def reloading(self) -> None:
        """A reload begins; READY=1 ends it (Type=notify-reload)."""
        self.send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def close(self) -> None:
        """Say no more."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
