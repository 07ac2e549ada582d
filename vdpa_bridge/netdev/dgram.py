# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A UNIX datagram socket as the other end, a frame a datagram, as QEMU's ``-netdev dgram`` has it.

Rule of this file: the socket is connected whenever there is somebody to connect to: a datagram socket that is not is
always writable, and takes datagrams from anybody.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket

from ..service.listening import SocketFile
from .base import BATCH, LONGEST, PLAIN, SHORTEST, Netdev

_BUFFER = 1 << 20
"""Bytes of datagrams that may be under way; the kernel grants what it allows."""


class DgramNetdev(Netdev):
    """Bound to *local*. Frames go to *remote*, or without one to whoever sent first, until that one is gone."""

    def __init__(self, local: str, remote: str = "") -> None:
        """OSError when *local* cannot be bound. A stale socket there is replaced; nobody need listen at *remote* yet."""
        super().__init__()
        self._local, self._remote = local, remote
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._peer = ""
        self._file: SocketFile | None = None
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            self._clear()
            self._sock.bind(local)
            self._file = SocketFile(local)
        except OSError as error:
            self.close()
            raise OSError(error.errno, f"cannot bind {local}: {error.strerror or error}") from None
        if remote:
            self.reaches = (remote,)
            with contextlib.suppress(OSError):
                self._connect(remote)

    def __str__(self) -> str:
        return f"datagrams of {self._local}"

    def _clear(self) -> None:
        """Remove a socket that nobody holds any more."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(self._local)
            except ConnectionRefusedError:
                os.unlink(self._local)
            except OSError:
                return

    def _connect(self, peer: str) -> None:
        self._sock.connect(peer)
        self._peer = peer

    def watched(self, queue: int) -> int:
        """The socket."""
        return self._sock.fileno()

    def receive(self, queue: int) -> list[bytes]:
        """One datagram each."""
        packets: list[bytes] = []
        while len(packets) < BATCH:
            try:
                frame, sender = self._sock.recvfrom(LONGEST + 1)
            except OSError:
                break
            if not self._peer and not self._remote and isinstance(sender, str) and sender:
                with contextlib.suppress(OSError):
                    self._connect(sender)
            if SHORTEST <= len(frame) <= LONGEST:
                packets.append(PLAIN + frame)
        return packets

    def _put(self, queue: int, packet: bytes) -> int:
        if not self._peer:
            if not self._remote:
                raise OSError(errno.ENOTCONN, "nobody sent a frame yet to answer to")
            self._connect(self._remote)
        try:
            return self._sock.send(packet)
        except (ConnectionError, FileNotFoundError):  # the peer is gone; the kernel has forgotten it, too
            self._peer = ""
            if not self._remote:
                raise
            self._connect(self._remote)
            return self._sock.send(packet)

    def close(self) -> None:
        """The file goes as well."""
        self._sock.close()
        if self._file is not None:
            self._file.remove()
