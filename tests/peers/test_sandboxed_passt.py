# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A network device with a passt of its own, from within a sandbox."""

from __future__ import annotations

import os
import select
import shutil
from pathlib import Path

import pytest

from tests.support.sandboxed import ME, PATIENCE, nic

pytestmark = pytest.mark.peers


@pytest.mark.skipif(not shutil.which("passt"), reason="needs passt: run tools/setup peers")
def test_a_user_network() -> None:
    """passt is a program: it runs outside, started before, and ends with the device."""
    with nic(user="on") as driver:
        assert driver.link_up
        pid = driver.device.backend.facts()["process"]
        assert isinstance(pid, int)
        (passt,) = (int(child) for child in children(pid) if b"passt" in Path(f"/proc/{child}/cmdline").read_bytes())
        watched = os.pidfd_open(passt)
        who_has = bytes.fromhex("0001 0800 06 04 0001") + ME + bytes((10, 0, 2, 15)) + bytes(6) + bytes((10, 0, 2, 2))
        driver.send(b"\xff" * 6 + ME + b"\x08\x06" + who_has.ljust(46, b"\0"))
        while (answer := driver.receive(PATIENCE))[12:14] != b"\x08\x06":
            pass
        assert answer[28:32] == bytes((10, 0, 2, 2))
    try:
        assert select.select([watched], [], [], PATIENCE)[0]
    finally:
        os.close(watched)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
