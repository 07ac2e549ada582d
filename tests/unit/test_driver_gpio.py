# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Interrupts of our GPIO driver, on our model (virtio 1.2, 5.18.6.8 and 5.18.7)."""

from __future__ import annotations

import pytest

from tests.support.driven import WAYS, in_way, opened, quiet
from vdpa_bridge.drivers import GpioDriver
from vdpa_bridge.errors import FeatureError
from vdpa_bridge.models import Model, make_model
from vdpa_bridge.virtio.gpio import Direction, Irq

__all__ = ["quiet"]  # an autouse fixture


def board() -> Model:
    return make_model("gpio", {"names": "led,button,,spare", "loop": "led:button"})


@pytest.mark.parametrize("way", WAYS)
def test_interrupts_of_our_driver(way: str) -> None:
    with in_way(way, board()) as device, GpioDriver(device, interrupts=True) as gpio:
        for _ in range(2):
            gpio.set_direction(0, Direction.OUT)
            gpio.set_direction(1, Direction.IN)
            gpio.set_interrupt(1, Irq.RISING)
            gpio.set_interrupt(3, Irq.HIGH)
            with pytest.raises(TimeoutError, match="an interrupt"):
                gpio.interrupt(0.05)
            gpio.set_value(0, True)
            assert (gpio.interrupt(), gpio.value(1)) == (1, True)
            with pytest.raises(OSError, match="request 6 for line 1"):
                gpio.set_interrupt(1, Irq.FALLING)
            if way != "legacy":  # whose messages end a device with its last ring, and what it was told of lines
                gpio.suspend()
                gpio.resume()
                with pytest.raises(TimeoutError):
                    gpio.interrupt(0.05)
                gpio.set_value(0, False)
                gpio.set_value(0, True)
                assert gpio.interrupt() == 1
            gpio.set_interrupt(1, Irq.NONE)
            gpio.set_interrupt(1, Irq.FALLING)
            gpio.set_value(0, False)
            assert gpio.interrupt() == 1
            gpio.set_interrupt(1, Irq.NONE)
            gpio.set_interrupt(1, Irq.LOW)
            assert [gpio.interrupt() for _ in range(3)] == [1, 1, 1], "a level lasts"
            gpio.restart()


def test_a_device_without_interrupts() -> None:
    model = board()
    model.features = 0
    with opened(model) as device, pytest.raises(FeatureError, match="does not offer IRQ"):
        GpioDriver(device, interrupts=True)


def test_event_buffers_that_come_back_for_nothing() -> None:
    """The device forgets, behind the driver's back, that the interrupt is enabled."""
    model = board()
    with opened(model) as device, GpioDriver(device, interrupts=True) as gpio:
        gpio.set_interrupt(1, Irq.RISING)
        gpio._request(6, 1, Irq.NONE)
        with pytest.raises(TimeoutError, match=r"come back without one|no end of an interrupt"):
            gpio.interrupt(0.1)
