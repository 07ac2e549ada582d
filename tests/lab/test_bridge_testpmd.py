# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""DPDK's virtio-user on a kernel NIC behind a bridge: frames leave a file, are looped back by the device, and are all there."""

from __future__ import annotations

import shutil
import struct
import tempfile
from pathlib import Path

import pytest

from ..peers.test_testpmd import bounce, make_frames
from ..support.bridge import Bridge
from ..support.seen import Seen

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(not shutil.which("dpdk-testpmd"), reason="needs dpdk-testpmd: run tools/setup dpdk"),
]


def test_frames_byte_for_byte(sim_net: Bridge, seen: Seen) -> None:
    """Few enough for the receive ring: the simulator drops what finds no buffer."""
    frames = make_frames(6, 60)
    with tempfile.TemporaryDirectory(prefix="vb") as directory:
        assert bounce(sim_net.path, Path(directory), frames) == frames
    sim_net.release()
    seen("clients", "dpdk-testpmd", "net", "vdpa_sim", "split", "memory table")


def test_hardware_that_does_not_reach_its_addresses(vp_net: Bridge) -> None:
    """virtio-user gives addresses of its process, here of 45 bits; the IOMMU has 39. By way of a relay the network answers: who has 10.0.2.2?"""
    before = vp_net.said()
    mac = b"\x02\0\0\0\0\x01"
    ask = b"\xff" * 6 + mac + b"\x08\x06" + struct.pack(">HHBBH", 1, 0x800, 6, 4, 1) + mac + bytes((10, 0, 2, 15)) + bytes(6) + bytes((10, 0, 2, 2))
    with tempfile.TemporaryDirectory(prefix="vb") as directory:
        answers = bounce(vp_net.path, Path(directory), [ask.ljust(60, b"\0")], eal=["--base-virtaddr=0x100000000000"])
    assert any(answer[12:14] == b"\x08\x06" and answer[28:32] == bytes((10, 0, 2, 2)) for answer in answers)
    assert "leaves the IOVA range" in vp_net.said()[len(before) :]
    vp_net.release()
