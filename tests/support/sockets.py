# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""When a program that was started can be connected to."""

from __future__ import annotations

from pathlib import Path

_ACCEPTS = 0x10000
"""__SO_ACCEPTCON, which /proc/net/unix shows."""


def listens(path: Path) -> bool:
    """Whether somebody listens on *path*, by the kernel's table: the file is there before, and a connection would be one client too many."""
    for line in Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]:
        words = line.split(maxsplit=7)
        if len(words) == 8 and words[7] == str(path) and int(words[3], 16) & _ACCEPTS:
            return True
    return False
