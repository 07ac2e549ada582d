# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""NOTIFICATION_DATA: kicks by doorbell that say how far the ring is, and nothing of it where kicks are eventfds."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from vdpa_bridge import Device, Feature
from vdpa_bridge.backends.model import ModelBackend, ModelDevice
from vdpa_bridge.drivers import Driver
from vdpa_bridge.drivers.base import RING_FEATURES
from vdpa_bridge.errors import FeatureError
from vdpa_bridge.memory import PAGE, Doorbell
from vdpa_bridge.models import make_model


class Belled(ModelBackend):
    """A model with a page for each of its first *bells* queues; whoever looks there has to kick it."""

    def __init__(self, device: ModelDevice, bells: int) -> None:
        super().__init__(device, lambda: None)
        self._offered |= int(Feature.NOTIFICATION_DATA)
        self.bells = bells
        self.pages = os.memfd_create("doorbells", os.MFD_CLOEXEC)
        os.ftruncate(self.pages, PAGE * bells)

    def doorbell(self, index: int) -> Doorbell | None:
        return Doorbell(self.pages, index) if index < self.bells else None

    def rung(self, index: int) -> tuple[int, int]:
        """The queue, and how far it is."""
        return struct.unpack("<HH", os.pread(self.pages, 4, index * PAGE))

    def close(self) -> None:
        super().close()
        os.close(self.pages)


@pytest.fixture(params=[1, 3])
def belled(request: pytest.FixtureRequest) -> Iterator[Belled]:
    home = ModelDevice(make_model("net", {}), "model:belled")
    backend = Belled(home, request.param)
    yield backend
    home.close()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("belled", [3], indirect=True)
def test_kicks_say_how_far_the_ring_is(belled: Belled, packed: bool) -> None:
    """Each chain of the control queue takes one entry in a table; the ring of 4 is gone round."""
    features = RING_FEATURES | (Feature.RING_PACKED if packed else 0)
    with Device(belled) as device, Driver(device, ring_features=features, queue_size=4) as driver:
        assert driver.features & Feature.NOTIFICATION_DATA
        for turn in range(1, 11):
            posted = driver.post(2, [bytes(2)], [1])
            assert belled.rung(2) == (2, turn % 4 | (0x8000 if turn // 4 % 2 == 0 else 0) if packed else turn)
            os.eventfd_write(driver.ring(2).kick, 1)
            driver.wait(lambda posted=posted: posted.written >= 0, "the answer")  # type: ignore[misc]


@pytest.mark.parametrize("belled", [1], indirect=True)
def test_never_without_a_page_for_each_queue(belled: Belled) -> None:
    with Device(belled) as device:
        with Driver(device) as driver:
            assert not driver.features & Feature.NOTIFICATION_DATA
            assert driver.ring(0).doorbell is not None
            assert driver.ring(2).doorbell is None
        for ask in ({"required": Feature.NOTIFICATION_DATA}, {"wanted": Feature.NOTIFICATION_DATA}, {"doorbells": False, "required": Feature.NOTIFICATION_DATA}):
            with pytest.raises(FeatureError, match="a doorbell page for every queue"):
                Driver(device, **ask)  # type: ignore[arg-type]


@pytest.mark.parametrize("belled", [3], indirect=True)
def test_not_when_doorbells_are_switched_off(belled: Belled) -> None:
    with Device(belled) as device, Driver(device, doorbells=False) as driver:
        assert not driver.features & Feature.NOTIFICATION_DATA
        assert driver.transact(2, [bytes(2)], [1]) == (1, [b"\1"])


def test_models_do_not_offer_it() -> None:
    home = ModelDevice(make_model("net", {}), "model:net")
    try:
        with Device(home.open()) as device:
            assert not device.get_features() & Feature.NOTIFICATION_DATA
    finally:
        home.close()
