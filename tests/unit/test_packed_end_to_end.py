# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Packed rings through the whole stack: drivers, every way to a model, suspend and resume, data checked."""

from __future__ import annotations

import random

import pytest

from tests.support.homes import HOMES
from vdpa_bridge import Device, Feature
from vdpa_bridge.drivers.base import RING_FEATURES
from vdpa_bridge.drivers.blk import BlkDriver
from vdpa_bridge.drivers.net import NetDriver

WAYS = {str(home): home for home in HOMES if home.name in ("model", "vdpa", "legacy", "relay")}
LAYOUTS = {"direct": Feature.RING_PACKED, "indirect and events": Feature.RING_PACKED | RING_FEATURES}


@pytest.mark.parametrize("way", [name for name in WAYS if name.endswith("blk")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_disk(way: str, layout: str) -> None:
    rng = random.Random(5)
    with (
        WAYS[way].start("blk") as opener,
        Device(opener()) as device,
        BlkDriver(device, ring_features=LAYOUTS[layout], queue_size=16) as disk,
    ):
        assert disk.features & Feature.RING_PACKED
        mirror = bytearray(disk.read(0, 1 << 20))
        for _ in range(60):
            length = 512 * rng.choice([1, 3, 64, 300])
            offset = 512 * rng.randrange(((1 << 20) - length) // 512 + 1)
            mirror[offset : offset + length] = data = rng.randbytes(length)
            disk.write(offset, data)
        assert disk.read(0, 1 << 20) == mirror
        disk.suspend()
        base = device.get_vring_base(0)
        assert base & 0xFFFF == base >> 16, "nothing is in flight"
        disk.resume()
        assert disk.read(0, 1 << 20) == mirror
        disk.restart()
        assert disk.read(0, 1 << 20) == mirror


@pytest.mark.parametrize("way", [name for name in WAYS if name.endswith("net")])
def test_nic(way: str) -> None:
    rng = random.Random(6)
    frames = [b"\xff" * 6 + b"\x02\0\0\0\0\x09\x88\xb5" + rng.randbytes(46 + at) for at in range(300)]
    with (
        WAYS[way].start("net") as opener,
        Device(opener()) as device,
        NetDriver(device, ring_features=LAYOUTS["indirect and events"]) as nic,
    ):
        assert nic.features & Feature.RING_PACKED
        got: list[bytes] = []
        for at in range(0, len(frames), 20):
            nic.send_many(frames[at : at + 20])
            got += nic.receive_many(20)
        assert got == frames
