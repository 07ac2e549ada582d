# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A network device on a tap from within a sandbox, whose network is another one."""

from __future__ import annotations

import select

import pytest

from tests.support.sandboxed import FRAME, PATIENCE, frame, nic
from tests.support.taps import tap, wire

pytestmark = pytest.mark.lab


def test_frames_pass_and_the_tap_is_told_what_the_driver_accepts() -> None:
    with tap() as name, nic(tap=name) as driver, wire(name) as end:
        assert driver.link_up
        end.send(FRAME)
        assert frame(driver) == FRAME
        driver.send(FRAME)
        assert select.select([end], [], [], PATIENCE)[0]
        assert end.recv(2048) == FRAME
