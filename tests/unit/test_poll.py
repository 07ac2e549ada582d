# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Models that look at their rings for a while before they sleep (``?poll=``)."""

from __future__ import annotations

import os
from collections.abc import Mapping

import pytest

from vdpa_bridge import Device, Target
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.drivers import BlkDriver, Driver, NetDriver
from vdpa_bridge.drivers.base import RING_FEATURES
from vdpa_bridge.drivers.ring import drain
from vdpa_bridge.flags import Feature
from vdpa_bridge.models import RngModel
from vdpa_bridge.models.base import Queue
from vdpa_bridge.models.options import parse_duration

LONG = 10_000_000


class Kicked(RngModel):
    """Counts how often it is asked."""

    asked = 0

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        self.asked += 1
        super().process(queues, index)


@pytest.mark.parametrize("features", [0, RING_FEATURES, Feature.RING_PACKED, Feature.RING_PACKED | RING_FEATURES])
def test_chains_are_found_without_a_kick(features: int) -> None:
    """What is published while the thread looks is served though nobody kicks; once it sleeps, kicks are asked for."""
    model = Kicked()
    home = ModelDevice(model, "model:rng", LONG)
    found = 0
    try:
        with Device(home.open()) as device, Driver(device, ring_features=features) as driver:
            queue = driver.ring(0).queue
            for _ in range(100):
                driver.transact(0, [], [8])
                drain(driver.ring(0).kick)
                posted = driver.post(0, [], [8])
                driver.wait(lambda posted=posted: posted.written == 8, "random bytes")  # type: ignore[misc]
                try:
                    os.eventfd_read(driver.ring(0).kick)
                except BlockingIOError:
                    found += 1
            assert queue.in_flight == 0
            assert model.asked >= 200
        assert found > 0
    finally:
        home.close()


@pytest.mark.parametrize("kind", ["blk?size=1M&poll=50us", "net?poll=1ms", "rng?poll=off"])
def test_devices_work_as_ever(kind: str) -> None:
    target = Target.parse(f"model:{kind}")
    try:
        with Device(target.open()) as device:
            if "blk" in kind:
                with BlkDriver(device) as disk:
                    disk.write(0, b"x" * 4096)
                    assert disk.read(0, 4096) == b"x" * 4096
                    disk.suspend()
                    disk.resume()
                    assert disk.read(0, 512) == b"x" * 512
            elif "net" in kind:
                with NetDriver(device) as nic:
                    for number in range(50):
                        frame = b"\xff" * 6 + bytes(54) + bytes([number])
                        nic.send(frame)
                        assert nic.receive() == frame
    finally:
        target.close()


def test_durations() -> None:
    assert [parse_duration("poll", text) for text in ("off", "0", "50us", "10ms")] == [0, 0, 50_000, 10_000_000]
    for wrong in ("50", "us", "11ms", "-1us", "1s", ""):
        with pytest.raises(ValueError, match="such as 50us"):
            parse_duration("poll", wrong)
