# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""UNIX sockets that listen, whose they are, and who is connected to them.

Rule of this file: nobody is connected to. /proc/net/unix names sockets by the path they were bound to; only the kernel's
socket diagnosis (netlink) tells which file a socket stands behind and which two ends belong together.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from .processes import HIDDEN, OpenFiles, Process

_ACCEPTS = 0x10000
_CONNECTED = 3


@dataclass(frozen=True)
class Listening:
    """A stream socket that listens at a path."""

    path: str
    inode: int
    """Of the socket, as in /proc/PID/fd."""
    clients: int
    """Connections that its owner has accepted."""
    owners: tuple[Process, ...]


def listening_sockets(files: OpenFiles) -> list[Listening]:
    """All of them with a path that can be connected to, by path."""
    found: list[tuple[str, int]] = []
    accepted: dict[str, int] = {}
    for line in Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]:
        words = line.split(maxsplit=7)
        if len(words) < 8 or words[7].startswith("@") or int(words[4], 16) != socket.SOCK_STREAM:
            continue
        if int(words[3], 16) & _ACCEPTS:
            found.append((words[7], int(words[6])))
        elif int(words[5], 16) == _CONNECTED:
            accepted[words[7]] = accepted.get(words[7], 0) + 1
    sockets = []
    for bound, inode in found:
        owners = tuple(files.of_socket(inode))
        sockets.append(Listening(_absolute(bound, owners), inode, accepted.get(bound, 0), owners))
    return sorted(sockets, key=lambda found: found.path)


def _absolute(path: str, owners: tuple[Process, ...]) -> str:
    """A relative path is relative to where its owner stands, if that can be seen."""
    if path.startswith("/") or not owners:
        return path
    try:
        return os.path.normpath(os.path.join(os.readlink(f"/proc/{owners[0].pid}/cwd"), path))
    except OSError:
        return path


def clients_of(path: str, files: OpenFiles) -> list[Process] | None:
    """The processes connected to the socket at *path*, HIDDEN for those that cannot be seen; None when the kernel does not say (no unix_diag)."""
    from pyroute2.netlink.diag import UDIAG_SHOW_PEER, UDIAG_SHOW_VFS, DiagSocket
    from pyroute2.netlink.exceptions import NetlinkError

    inode = os.stat(path).st_ino
    try:
        with DiagSocket() as diagnosis:
            diagnosis.bind()
            sockets = list(diagnosis.get_sock_stats(family=socket.AF_UNIX, show=UDIAG_SHOW_PEER | UDIAG_SHOW_VFS))
    except (NetlinkError, OSError):
        return None
    peers = [s.get_attr("UNIX_DIAG_PEER") for s in sockets if (file := s.get_attr("UNIX_DIAG_VFS")) and file["udiag_vfs_ino"] == inode & 0xFFFFFFFF]
    return [process for peer in peers if peer for process in files.of_socket(peer) or [HIDDEN]]
