# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""DPDK's virtio-user on a kernel NIC behind a bridge: frames leave a file, are looped back by the device, and are all there."""

from __future__ import annotations

import shutil
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
