# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Relays in front of kernel devices: what hardware behind an IOMMU cannot have, a client has all the same, and its data is right."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator

import pytest

from vdpa_bridge import Device, connect
from vdpa_bridge.backends.relay import relayed
from vdpa_bridge.backends.vhost_vdpa import VhostVdpa
from vdpa_bridge.drivers import BlkDriver, NetDriver
from vdpa_bridge.drivers.base import Driver
from vdpa_bridge.drivers.ring import Pending
from vdpa_bridge.flags import Feature
from vdpa_bridge.memory import INTERRUPTS, U64_MAX, Region
from vdpa_bridge.wire import Iova

from ..support.bridge import Bridge, bridging, node, run_client, start_client
from .test_bridge import exchange

pytestmark = pytest.mark.lab

FAR = 1 << 57
PACKED = Feature.RING_PACKED | Feature.RING_INDIRECT_DESC | Feature.RING_EVENT_IDX


@pytest.fixture
def hardware(vp_blk: Bridge) -> Iterator[Bridge]:
    """A disk on PCI, served with the defaults; its node is free afterwards."""
    yield vp_blk
    vp_blk.release()


def relays(bridge: Bridge, before: str = "") -> list[str]:
    """What the log said of relays since."""
    return [line for line in bridge.said()[len(before) :].splitlines() if "relayed from now on" in line]


@pytest.mark.parametrize("options", [(), ("--mem-table",), ("--turns", 3, "--keep-index"), ("--depth", 32, "--bytes", 65536)], ids=["slots", "table", "turns", "deep"])
def test_memory_out_of_reach(hardware: Bridge, options: tuple[str, ...]) -> None:
    before = hardware.said()
    run_client(hardware.path, "--requests", 200, "--memory-at", FAR, *options)
    (why,) = relays(hardware, before)
    assert "leaves the IOVA range" in why


@pytest.mark.parametrize("options", [(), ("--mem-table",)], ids=["slots", "table"])
def test_memory_in_the_interrupts_window(hardware: Bridge, options: tuple[str, ...]) -> None:
    """The kernel would map it, and the device would send interrupts instead of data: nothing of that is left to happen."""
    before = hardware.said()
    run_client(hardware.path, "--requests", 200, "--memory-at", INTERRUPTS[0] - 8192, *options)
    (why,) = relays(hardware, before)
    assert "which the IOMMU reserves (msi)" in why
    assert f"{INTERRUPTS[0]:#x}" in why


def test_memory_out_of_reach_under_a_running_ring(hardware: Bridge) -> None:
    before = hardware.said()
    run_client(hardware.path, "--requests", 200, "--grow", "--grow-at", FAR)
    assert len(relays(hardware, before)) == 1


def test_ring_that_goes_on_where_it_stood(hardware: Bridge) -> None:
    before = hardware.said()
    run_client(hardware.path, "--requests", 100, "--turns", 3, "--keep-index")
    (why,) = relays(hardware, before)
    assert "SET_VRING_BASE" in why


def test_what_the_device_can_have_passes_it_by(hardware: Bridge) -> None:
    before = hardware.said()
    run_client(hardware.path, "--requests", 100, "--turns", 2)
    assert relays(hardware, before) == []


def test_packed_rings_of_hardware_are_stopped_and_go_on(hardware: Bridge) -> None:
    """Where they stand is asked for and right, and no request is lost."""
    with hardware.device("blk") as device, BlkDriver(device, ring_features=PACKED) as disk:
        assert disk.features & Feature.RING_PACKED
        for seed in range(3):
            exchange(disk, seed, rounds=3)
            disk.suspend()
            base = device.get_vring_base(0)
            assert base & 0xFFFF == base >> 16
            disk.resume()


def test_network_of_hardware_with_packed_rings(vp_net: Bridge) -> None:
    with vp_net.device("net") as device, NetDriver(device, ring_features=PACKED) as nic:
        for address in ("02:aa:bb:cc:dd:0a", "02:aa:bb:cc:dd:0b"):
            nic.set_mac(address)
            nic.suspend()
            nic.resume()
    vp_net.release()


@pytest.mark.parametrize("kind", ["SIM_BLK", "VP_BLK"])
def test_always_when_asked_for(kind: str) -> None:
    """Clients of both modes; the status says it. A client that dies at work leaves a device that the next one has."""
    with bridging(node(kind), "--relay", "on") as bridge:
        for vdpa in ("off", "require"):
            with bridge.device("blk", vdpa) as device, BlkDriver(device) as disk:
                exchange(disk, 4)
                disk.suspend()
                disk.resume()
                if vdpa == "require":
                    assert device.identify().iova_range.last == U64_MAX
        with start_client(bridge.path, "--requests", 10_000_000, "--depth", 32) as client:
            before = bridge.expenses()["switches"]
            while bridge.expenses()["switches"] < before + 1000:
                assert client.poll() is None
            os.kill(bridge.process.pid, signal.SIGUSR1)
            assert "relay: asked for" in bridge.said()
            client.kill()
        bridge.works()
        assert "Traceback" not in bridge.said()
        bridge.release()
    with connect(node(kind)) as device, BlkDriver(device) as disk:
        disk.read(0, 512)


def test_hostile_ring_reaches_no_hardware() -> None:
    """What no driver posts breaks its ring at the relay; the device is as before after a reset, by way of the relay or without."""
    for far in (FAR, INTERRUPTS[0]):
        with Device(relayed(VhostVdpa(node("VP_BLK")))) as device, Driver(device, queue_size=16) as driver, Region(Iova(far), 4096):
            ring = driver.ring(0)
            ring.queue.add_many([([(far, 16)], [(far + 16, 512)], Pending())])
            ring.queue.publish()
            os.eventfd_write(ring.kick, 1)
            end = time.monotonic() + 10
            while not device.get_status() & 0x40:
                assert time.monotonic() < end
                time.sleep(0.01)
    with connect(node("VP_BLK")) as device, BlkDriver(device) as disk:
        data = random.Random(9).randbytes(4096)
        disk.write(4096, data)
        assert disk.read(4096, 4096) == data
