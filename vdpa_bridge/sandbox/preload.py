# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What Python and libc would read from files later, read now: modules that are imported where they are used, the time zone, a library.

Rule of this file: a module that is not loaded when the sandbox closes is not there.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import pkgutil
import time
from collections.abc import Iterable

_SERVING = ("vdpa_bridge.backends", "vdpa_bridge.vhost_user", "vdpa_bridge.virtio")
"""Packages, with all that is in them. Models are made by then: what those that serve import later, they say (``Needs.modules``)."""
_OF_PYTHON = ("linecache", "tokenize", "traceback", "unicodedata", "encodings.idna")


def preload(needed: Iterable[str] = ()) -> None:
    """Have everything that serving takes, and the modules that models *needed*. ImportError for one of those."""
    for name in _SERVING:
        for module in pkgutil.iter_modules(importlib.import_module(name).__path__, f"{name}."):
            importlib.import_module(module.name)
    for name in (*_OF_PYTHON, *needed):
        importlib.import_module(name)
    time.localtime()
    with contextlib.suppress(OSError):  # another libc
        ctypes.CDLL("libgcc_s.so.1")  # by which glibc ends a thread (pthread_exit)
