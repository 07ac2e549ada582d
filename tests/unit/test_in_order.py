# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""VIRTIO_F_IN_ORDER through the whole stack: every way to a model, and models that know nothing of it."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping

import pytest

from tests.support.homes import HOMES
from vdpa_bridge import Device, Feature
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.backends.relay import relayed
from vdpa_bridge.drivers import BlkDriver, BlkRequest, Driver, NetDriver
from vdpa_bridge.drivers.base import RING_FEATURES
from vdpa_bridge.drivers.ring import Posted
from vdpa_bridge.models import Model
from vdpa_bridge.models.base import Queue
from vdpa_bridge.virtio.ids import DeviceId
from vdpa_bridge.virtqueue import Chain

WAYS = {str(home): home for home in HOMES if home.name in ("model", "vdpa", "legacy", "relay")}
LAYOUTS = {
    "split": Feature.IN_ORDER,
    "split, indirect": Feature.IN_ORDER | RING_FEATURES,
    "packed": Feature.IN_ORDER | Feature.RING_PACKED,
    "packed, indirect": Feature.IN_ORDER | Feature.RING_PACKED | RING_FEATURES,
}


@pytest.mark.parametrize("way", [name for name in WAYS if name.endswith("blk")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_disk(way: str, layout: str) -> None:
    rng = random.Random(5)
    with WAYS[way].start("blk") as opener, Device(opener()) as device, BlkDriver(device, ring_features=LAYOUTS[layout], queue_size=16) as disk:
        assert disk.features & Feature.IN_ORDER
        mirror = bytearray(disk.read(0, 1 << 18))
        for _ in range(30):
            length = 512 * rng.choice([1, 3, 64])
            offset = 512 * rng.randrange(((1 << 18) - length) // 512 + 1)
            mirror[offset : offset + length] = data = rng.randbytes(length)
            disk.write(offset, data)
        batch = disk.submit([BlkRequest(0, at * 8, length=4096) for at in range(3)])
        assert [done.data for done in disk.complete(batch)] == [mirror[at : at + 4096] for at in range(0, 3 * 4096, 4096)]
        disk.suspend()
        disk.resume()
        assert disk.read(0, 1 << 18) == mirror
        disk.restart()
        assert disk.read(0, 1 << 18) == mirror


@pytest.mark.parametrize("way", [name for name in WAYS if name.endswith("net")])
@pytest.mark.parametrize("layout", ["split, indirect", "packed, indirect"])
def test_nic(way: str, layout: str) -> None:
    rng = random.Random(6)
    frames = [b"\xff" * 6 + b"\x02\0\0\0\0\x09\x88\xb5" + rng.randbytes(46 + at) for at in range(300)]
    with WAYS[way].start("net") as opener, Device(opener()) as device, NetDriver(device, ring_features=LAYOUTS[layout]) as nic:
        assert nic.features & Feature.IN_ORDER
        got: list[bytes] = []
        for at in range(0, len(frames), 20):
            nic.send_many(frames[at : at + 20])
            got += nic.receive_many(20)
        assert got == frames


class Shuffler(Model):
    """Gives chains back one by one in any order, once it has twelve; each says its number."""

    device_id = DeviceId.RNG
    features = 0
    queue_count = 1

    def __init__(self) -> None:
        self.held: list[Chain] = []
        self.given = 0
        self.rng = random.Random(3)

    def config(self) -> bytes:
        return b""

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        self.held += queues[index].pop()
        while len(self.held) >= 12:
            chain = self.held.pop(self.rng.randrange(len(self.held)))
            queues[index].push([(chain, chain.write(chain.read()))])
            self.given += 1


@pytest.mark.parametrize("behind_relay", [False, True])
@pytest.mark.parametrize("features", [0, Feature.RING_PACKED, Feature.RING_PACKED | RING_FEATURES, RING_FEATURES])
@pytest.mark.parametrize("in_order", [False, True])
def test_models_may_give_chains_back_in_any_order(features: int, in_order: bool, behind_relay: bool) -> None:
    model = Shuffler()
    home = ModelDevice(model, "model:shuffler")
    back: list[int] = []

    class Numbered(Posted):
        def complete(self, written: int) -> None:
            super().complete(written)
            back.append(int.from_bytes(self.data[0][:written], "big"))

    try:
        backend = home.open()
        with (
            Device(relayed(backend) if behind_relay else backend) as device,
            Driver(device, ring_features=features | Feature.IN_ORDER * in_order, queue_size=256) as driver,
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr("vdpa_bridge.drivers.base.Posted", Numbered)
            for number in range(100):
                driver.post(0, [number.to_bytes(4, "big")], [16])
                end = time.monotonic() + 5
                while model.given < number - 10 and time.monotonic() < end:
                    time.sleep(0.0002)
            first = min(int.from_bytes(chain.read(), "big") for chain in model.held)
            driver.wait(lambda: len(back) == (first if in_order else 89), "all that the model gave back")
            assert (back == list(range(len(back)))) == in_order
            assert len(set(back)) == len(back) > 20
    finally:
        home.close()
