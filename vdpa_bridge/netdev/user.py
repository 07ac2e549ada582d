# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""User networking: passt, which turns a device's frames into sockets of this system, without privilege or interfaces (passt(1)).

Rule of this file: the process belongs to its object, has one end of a socket pair and nothing else of ours, and ends with
it, whatever way we end: it leaves when its socket is closed.
"""

from __future__ import annotations

import contextlib
import fcntl
import select
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Sequence

from .stream import StreamNetdev

_PROGRAM = "passt"
_PATIENCE = 10.0
"""Seconds that it may take to start, and to end."""
_PROBE = (b"\xff" * 6 + bytes(6) + b"\x88\xb5").ljust(60, b"\0")
"""A frame that means nothing (IEEE 802, local experimental): whoever reads it is there."""
_SIOCOUTQ = 0x5411
"""Bytes that the other side has not read (unix(7))."""
_NOISE = "Failed to send"
"""How a line begins that says there is no system log (passt of 2023)."""


class UserNetdev(StreamNetdev):
    """A passt of its own."""

    def __init__(self, options: Sequence[str] = ()) -> None:
        """*options* are passt's. FileNotFoundError that names the package, OSError with what passt says when it does not start."""
        program = shutil.which(_PROGRAM)
        if program is None:
            raise FileNotFoundError(f"user networking needs {_PROGRAM}: apt install passt")
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                command = [program, "--foreground", "--quiet", *options, "--fd", str(theirs.fileno())]
                self._process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._said, close_fds=True
                )
        except BaseException:
            ours.close()
            self._said.close()
            raise
        self.pid = self._process.pid
        super().__init__(f"{_PROGRAM} (pid {self.pid})")
        self._take(ours)
        try:
            self._await_reader(ours)
        except BaseException:
            self.close()
            raise

    def _await_reader(self, sock: socket.socket) -> None:
        """Until it has read what is sent."""
        with contextlib.suppress(OSError):  # it has ended, which is seen below
            sock.send(struct.pack(">I", len(_PROBE)) + _PROBE)
        end = time.monotonic() + _PATIENCE
        while struct.unpack("i", fcntl.ioctl(sock, _SIOCOUTQ, bytes(4)))[0] and time.monotonic() < end:
            time.sleep(0.002)
        poller = select.poll()
        poller.register(sock, 0)  # the end of the other side, and errors
        if poller.poll(0) or time.monotonic() >= end:
            raise OSError(f"{self}: {self._ended('it reads no frames')}")

    def _ended(self, why: str) -> str:
        """What became of the process, and what it said last."""
        try:
            status = f"it ended with status {self._process.wait(1)}"
        except subprocess.TimeoutExpired:
            status = why
        self._said.seek(0)
        lines = [line for line in self._said.read().decode(errors="replace").splitlines() if line.strip() and not line.startswith(_NOISE)]
        return f"{status}: {lines[-1].strip()}" if lines else status

    def close(self) -> None:
        """End it."""
        super().close()
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._said.close()
