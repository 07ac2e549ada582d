# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Models, engines and clients that look at their rings for a while before they sleep (``?poll=``, ``--poll-for``)."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from random import Random

import pytest

from vdpa_bridge import Device, Target
from vdpa_bridge.backends import workers
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.backends.workers import DEFAULT_POLL
from vdpa_bridge.drivers import BlkDriver, Driver, NetDriver
from vdpa_bridge.drivers.base import RING_FEATURES
from vdpa_bridge.drivers.ring import drain
from vdpa_bridge.engines import Gate, Loop
from vdpa_bridge.flags import Feature
from vdpa_bridge.load import BlkWork, Timing, load_blk
from vdpa_bridge.models import RngModel
from vdpa_bridge.models.base import Queue
from vdpa_bridge.models.options import parse_duration
from vdpa_bridge.virtqueue import Poll

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


@pytest.mark.parametrize("packed", [0, Feature.RING_PACKED])
def test_an_engine_finds_chains_without_a_kick(packed: int) -> None:
    target = Target.parse("model:blk?size=1M&poll=10ms")
    found = 0
    try:
        with Device(target.open()) as device, BlkDriver(device, ring_features=RING_FEATURES | packed) as disk:
            kick = disk.ring(0).kick
            for number in range(300):
                disk.write(0, bytes([number % 251]) * 512)
                drain(kick)
                assert disk.read(0, 512) == bytes([number % 251]) * 512
                try:
                    os.eventfd_read(kick)
                except BlockingIOError:
                    found += 1
    finally:
        target.close()
    assert found > 0


@pytest.mark.parametrize(("option", "budget"), [("", DEFAULT_POLL), ("&poll=off", 0), ("&poll=200us", 200_000)])
def test_an_engine_has_the_budget(option: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def loop(gate: Gate, budget: int) -> Loop:
        made.append(budget)
        return Loop(gate, budget)

    monkeypatch.setattr(workers, "Loop", loop)
    target = Target.parse(f"model:blk?size=1M{option}")
    try:
        with Device(target.open()) as device, BlkDriver(device) as disk:
            assert disk.read(0, 512) == bytes(512)
    finally:
        target.close()
    assert made == [budget]


@pytest.mark.parametrize("patience", ["off", "30us"])
def test_no_wake_up_is_lost(patience: str) -> None:
    """Both sides sleep after pauses of any length, or are found looking."""
    random = Random(patience)
    target = Target.parse(f"model:blk?size=1M&engine=null&poll={patience}")
    try:
        with Device(target.open()) as device, BlkDriver(device, timeout=5) as disk:
            for _ in range(60):
                rate = random.choice([500, 8000, 20000, 40000, 0])
                timing = Timing(duration=0, count=50, rate=rate, poll_for=random.choice([0.0, 10e-6, 50e-6]))
                assert load_blk(disk, BlkWork(timing, 512, random.choice([1, 2, 16]))).reads.count == 50
    finally:
        target.close()


def test_an_operation_ends_a_look() -> None:
    """Whoever wants the device's lock has it at once, however long a model would look."""
    with Gate() as gate:
        poll = Poll(60_000_000_000)
        home = ModelDevice(RngModel(), "model:rng")
        try:
            with Device(home.open()) as device, Driver(device) as driver:
                driver.transact(0, [], [8])
                entered = threading.Event()

                def enter() -> None:
                    with gate:
                        entered.set()

                thread = threading.Thread(target=enter)
                thread.start()
                assert poll.look([home.runner.rings[0].queue], gate) == []
                assert poll.window == 60_000_000_000, "it was not in vain"
        finally:
            home.close()
    thread.join(10)
    assert entered.is_set()


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
