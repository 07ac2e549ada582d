# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A network device in a sandboxed child, and frames by which it is seen at work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlencode

from vdpa_bridge.drivers import NetDriver
from vdpa_bridge.targets import connect

PATIENCE = 10.0
ME, OTHER = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
FRAME = b"\xff" * 6 + OTHER + b"\x88\xb5" + b"through the wall".ljust(50, b".")


@contextmanager
def nic(**options: str) -> Iterator[NetDriver]:
    with connect(f"child:net?{urlencode(options)}") as device, NetDriver(device) as driver:
        yield driver


def frame(driver: NetDriver) -> bytes:
    """The next one of ours that comes."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if (received := driver.receive(end - time.monotonic()))[12:14] == b"\x88\xb5":
            return received
    raise TimeoutError("no frame came")
