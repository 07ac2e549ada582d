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

_SERVING = ("vdpa_bridge.backends", "vdpa_bridge.models", "vdpa_bridge.vhost_user", "vdpa_bridge.virtio")
_OF_PYTHON = ("linecache", "tokenize", "traceback", "unicodedata", "encodings.idna")


def preload() -> None:
    """Have everything that serving takes."""
    for name in _SERVING:
        for module in pkgutil.iter_modules(importlib.import_module(name).__path__, f"{name}."):
            importlib.import_module(module.name)
    for name in _OF_PYTHON:
        importlib.import_module(name)
    time.localtime()
    with contextlib.suppress(OSError):  # another libc
        ctypes.CDLL("libgcc_s.so.1")  # by which glibc ends a thread (pthread_exit)
