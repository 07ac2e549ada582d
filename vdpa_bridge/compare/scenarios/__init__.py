# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What is compared. A scenario gets a Run with a fresh session and leaves the device to be reset."""

from __future__ import annotations

from collections.abc import Callable

from ..record import Run
from .bringup import bringup
from .config import config
from .io import io
from .restart import restart
from .status import status
from .wrong import wrong

SCENARIOS: dict[str, Callable[[Run], None]] = {
    "bringup": bringup,
    "config": config,
    "status": status,
    "io": io,
    "wrong": wrong,
    "restart": restart,
}
"""By the name that --scenario takes, in the order in which they run."""
