# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Load on the devices of every home: nothing is lost, torn or goes elsewhere, with events and polled."""

from __future__ import annotations

import pytest

from tests.support.homes import DISK_SIZE, Home
from vdpa_bridge.device import Device
from vdpa_bridge.drivers import BlkDriver, NetDriver
from vdpa_bridge.load import BlkWork, Mode, NetWork, Timing, load_blk, load_net

LONG = 20.0
"""Seconds that nothing may take; kernel threads share a CPU with a client that polls."""


@pytest.mark.parametrize("poll", [False, True])
def test_a_disk_keeps_what_it_is_given(blk_home: Home, device: Device, poll: bool) -> None:
    with BlkDriver(device, queue_size=64, timeout=LONG) as disk:
        work = BlkWork(Timing(duration=0, count=1500, poll=poll), depth=16, reads=50, length=min(DISK_SIZE, 1 << 20), verify=True)
        result = load_blk(disk, work)
        assert result.reads.count + result.writes.count == 1500
        assert min(result.compared, result.read_back) > 0


@pytest.mark.parametrize("poll", [False, True])
def test_a_network_brings_frames_back(net_home: Home, device: Device, poll: bool) -> None:
    """The simulators loop back what is sent to all; behind the emulated NIC nobody answers."""
    echo = net_home.name != "vp"
    with NetDriver(device, queue_size=64, timeout=LONG) as nic:
        timing = Timing(duration=0, count=1000, poll=poll)
        result = load_net(nic, NetWork(timing, Mode.ECHO if echo else Mode.SEND, batch=8, window=16, linger=5))
        assert (result.sent, result.ours, result.lost) == (1000, 1000 if echo else 0, 0)
