# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a model needs from its process once it is made, as a value: the less, the tighter it can be locked up.

Rule of this file: a model opens its files, taps and sockets when it is made. Only what it opens, connects to or starts
later is a need.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """Nothing by default. Paths are absolute; a directory stands for what is below it."""

    read: tuple[str, ...] = ()
    """Files and directories that are opened later, for reading."""
    write: tuple[str, ...] = ()
    """The same for reading and writing, and to make and remove files in."""
    connect: tuple[str, ...] = ()
    """UNIX sockets, or directories of them, that are connected to or made later."""
    network: bool = False
    """Sockets of the network, opened later."""
    io_uring: bool = False
    """The io_uring system calls."""
    controls: tuple[int, ...] = ()
    """Requests by ioctl(2) on descriptors that it has."""
    modules: tuple[str, ...] = ()
    """Python modules that are imported later, by their full names."""
    memory: int = 256 << 20
    """Bytes of heap beyond what the process has when the model is made. What it shares with drivers does not count."""
