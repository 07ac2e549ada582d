# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What can be wrong with a vhost-user back-end: its socket, its other clients, the words it speaks.

Rule of this file: one connection is all that is made, as some back-ends end with their client.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..backends.base import Backend
from ..errors import NotOffered, PeerClosed, PeerTimeout, RemoteProtocolError, reason
from ..system.permission import how_to_grant, who_may
from ..system.processes import Process, named, open_files
from ..system.unix_sockets import clients_of, listening_sockets
from .causes import (
    BUSY,
    MEMORY_NOT_SHARED,
    NO_SOCKET,
    NO_VDPA_MODE,
    NOT_A_BACKEND,
    NOT_A_SOCKET,
    PATH_TOO_LONG,
    PERMISSION,
    SILENT,
    SOCKET_DEAD,
)
from .examination import Check, Examination, Problem, Unknown, Wishes

LONGEST_PATH = 107
"""sun_path less its NUL."""
_GUEST_MEMORY = 16 << 20
"""No VMM gives a guest less; nothing else of a VMM is private and as large."""

VMMS: tuple[tuple[str, str], ...] = (
    (r"qemu|kvm", "-object memory-backend-memfd,id=mem,size=SIZE,share=on -numa node,memdev=mem (libvirt: <memoryBacking><access mode='shared'/>)"),
    (r"cloud-hypervisor", "--memory size=SIZE,shared=on"),
)
"""Programs that run guests, and how each is told to share the guest's memory."""


class SocketExamination(Examination):
    """Of whoever listens at *path*; *options* are the target's."""

    def __init__(self, opener: Callable[[], Backend], wishes: Wishes, path: str, options: Mapping[str, str]) -> None:
        super().__init__(opener, wishes)
        self._path = path
        self._options = options
        self._files = open_files()

    def checks(self) -> Sequence[Check]:
        """From the path to the device."""
        return [
            Check("path", self.path),
            Check("socket", self.socket),
            Check("permission", self.permission),
            Check("other clients", self.clients, alone=True),
            Check("answers", self.opens),
            *self.device_checks(),
        ]

    def path(self) -> str:
        """Whether a socket can have it."""
        length = len(os.fsencode(self._path))
        if length > LONGEST_PATH:
            directory, name = os.path.split(self._path)
            raise Problem(PATH_TOO_LONG, f"the path has {length} bytes", directory=directory, name=name)
        return f"{length} bytes, {LONGEST_PATH} are possible"

    def socket(self) -> str:
        """Whether there is one."""
        try:
            mode = os.stat(self._path).st_mode
        except PermissionError:
            raise Problem(PERMISSION, f"a directory of {self._path} is closed to this user", f"sudo chmod o+x {os.path.dirname(self._path)}") from None
        except OSError as error:
            raise Problem(NO_SOCKET, f"{self._path}: {os.strerror(error.errno or errno.ENOENT)}") from None
        if not stat.S_ISSOCK(mode):
            raise Problem(NOT_A_SOCKET, f"{self._path} is no socket")
        return "there"

    def permission(self) -> str:
        """Whether this user may connect."""
        if not os.access(self._path, os.W_OK):
            raise Problem(PERMISSION, f"{self._path} belongs to {who_may(self._path)}", how_to_grant(self._path))
        return "may connect"

    def _others(self) -> list[Process]:
        found = clients_of(self._path, self._files)
        if found is None:
            raise Unknown("the kernel does not say who is connected (no unix_diag)", "modprobe unix_diag")
        return [process for process in found if process.pid != os.getpid()]

    def clients(self) -> str:
        """Who else is connected, and whether their memory can be reached."""
        others = self._others()
        for process in others:
            share = next((how for pattern, how in VMMS if re.search(pattern, process.program)), "")
            if share and (size := private_memory(process.pid)):
                says = f"{process} keeps its guest's memory private: {size >> 20} MiB of it"
                raise Problem(MEMORY_NOT_SHARED, says, share)
        return named(others) or "none"

    def opens(self) -> str:
        """Whether somebody answers, in a mode that we may use."""
        try:
            transport = self.open().backend.facts().get("transport", "")
        except NotOffered as error:
            raise Problem(NO_VDPA_MODE, str(error)) from None
        except PeerTimeout as error:
            raise self._silence(str(error)) from None
        except PeerClosed as error:
            raise Problem(NOT_A_BACKEND, str(error), "drop vdpa=off: it may serve vDPA mode only" if self._options.get("vdpa") == "off" else "") from None
        except RemoteProtocolError as error:
            raise Problem(NOT_A_BACKEND, str(error)) from None
        except OSError as error:
            raise self._no_connection(error) from None
        return f"{transport}, served by {self._owners() or 'somebody who is hidden from us'}"

    def _owners(self) -> str:
        where = os.path.realpath(self._path)
        return named([owner for found in listening_sockets(self._files) if os.path.realpath(found.path) == where for owner in found.owners])

    def _silence(self, says: str) -> Problem:
        try:
            others = named(self._others())
        except Unknown:
            others = ""
        if others:
            return Problem(BUSY, f"{says}; it serves {others}", holder=others)
        return Problem(SILENT, says, holder=self._owners() or "who listens")

    def _no_connection(self, error: OSError) -> Problem | OSError:
        says = reason(error)
        if error.errno == errno.ECONNREFUSED:
            return Problem(SOCKET_DEAD, says, path=self._path)
        if error.errno == errno.EPROTOTYPE:
            return Problem(NOT_A_SOCKET, f"{self._path} is a socket of another type: vhost-user has stream sockets")
        if error.errno in (errno.EAGAIN, errno.ETIMEDOUT):
            return self._silence(says)
        return error


def private_memory(pid: int) -> int:
    """Bytes of a VMM's largest private mapping when it shares none as large as a guest's memory, else 0. Unknown when it may not be read."""
    private = shared = 0
    try:
        with Path(f"/proc/{pid}/maps").open() as maps:
            for line in maps:
                span, perm, *_ = line.split(maxsplit=2)
                first, last = (int(number, 16) for number in span.split("-"))
                if perm.startswith("rw-s"):
                    shared = max(shared, last - first)
                elif perm.startswith("rw-p"):
                    private = max(private, last - first)
    except OSError:
        raise Unknown(f"the memory of pid {pid} may not be looked at", "the same as root") from None
    return private if private >= _GUEST_MEMORY > shared else 0
