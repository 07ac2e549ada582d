# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Kernel modules: whether one is there, could be loaded, or was never built."""

from __future__ import annotations

import os
import re
from pathlib import Path

MODULES = Path("/lib/modules")


def is_loaded(name: str) -> bool:
    """Loaded or built in."""
    return Path("/sys/module", name).exists() or bool(_listed(name, "modules.builtin"))


def can_load(name: str) -> bool | None:
    """Whether the running kernel's module directory has it; None when there is no such directory to look at."""
    return _listed(name, "modules.dep")


def _listed(name: str, listing: str) -> bool | None:
    try:
        lines = (MODULES / os.uname().release / listing).read_text().splitlines()
    except OSError:
        return None
    wanted = re.compile(rf"/{name.replace('_', '[-_]')}\.ko(\.\w+)?$")
    return any(wanted.search(line.partition(":")[0]) for line in lines)
