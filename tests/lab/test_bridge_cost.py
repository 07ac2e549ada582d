# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Requests do not pass through the bridge: while another process makes thousands of them, the bridge's process sleeps.

The kernel has the client's eventfds and memory. What the bridge does is counted by the kernel: context switches of every
thread, read and write calls, CPU time.
"""

from __future__ import annotations

import os

import pytest

from vdpa_bridge.drivers import BlkDriver

from ..support.bridge import Bridge, bridging, run_client

pytestmark = pytest.mark.lab
FEW, MANY = 50, 2050


def test_requests_cost_the_bridge_nothing(disk_bridge: Bridge) -> None:
    """Requests of a driver in this process, between two looks at the bridge's counters: not one context switch."""
    with disk_bridge.device("blk") as device, BlkDriver(device) as disk:
        disk.write(0, os.urandom(4096))
        before = disk_bridge.rest()
        for _ in range(300):
            disk.read(0, 4096)
        assert disk_bridge.expenses() == before


def test_many_requests_cost_the_bridge_what_few_do(disk_bridge: Bridge) -> None:
    """Whole sessions of a foreign client, which differ by 4000 requests only."""

    def session(requests: int) -> dict[str, int]:
        disk_bridge.settle()
        before = disk_bridge.expenses()
        run_client(disk_bridge.path, "--requests", requests)
        disk_bridge.settle()
        after = disk_bridge.expenses()
        return {key: after[key] - before[key] for key in before}

    session(FEW)
    few, many = session(FEW), session(MANY)
    assert few["switches"] > 0, "the bring-up is seen"
    assert many["switches"] <= few["switches"] + 40, "0.01 per request, for what else goes on"
    assert abs(many["calls"] - few["calls"]) <= 10


def test_the_counters_see_who_does_take_part() -> None:
    """A model's rings are served by the process itself, and that shows: the counters are not blind."""
    with bridging("model:blk?size=4M") as bridge, bridge.device("blk") as device, BlkDriver(device) as disk:
        before = bridge.expenses()
        for _ in range(100):
            disk.read(0, 4096)
        assert bridge.expenses()["switches"] - before["switches"] >= 100
