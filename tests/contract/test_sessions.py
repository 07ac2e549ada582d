# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a device may do beyond being brought up and reset: rest with requests under way, take rings late, keep mappings, keep queues apart.

Rule of this file: where a home lacks something, the test sees it say so.
"""

from __future__ import annotations

import errno
import os
import random
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.homes import Home, Opener
from vdpa_bridge import ops
from vdpa_bridge.backends.base import ABSENT
from vdpa_bridge.device import Device, RingSetup
from vdpa_bridge.differences import documented
from vdpa_bridge.drivers import BlkDriver, BlkRequest, NetDriver
from vdpa_bridge.drivers.net import CTRL
from vdpa_bridge.errors import FeatureError
from vdpa_bridge.flags import BackendFeature as B
from vdpa_bridge.flags import Status
from vdpa_bridge.memory import Region
from vdpa_bridge.virtio.config import parse_mac
from vdpa_bridge.virtio.features import NetFeature
from vdpa_bridge.virtqueue import DriverQueue, RingLayout
from vdpa_bridge.wire import IotlbUpdate, Iova, VringState

IN, OUT, GET_ID = 0, 1, 8
SECTOR = 512
RUNNING = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK


# Suspension ----------------------------------------------------------------------------------------------------------------


def test_nothing_is_lost_by_a_rest(blk_home: Home, device: Device) -> None:
    """SUSPEND falls among requests that the device has; each is done exactly once, before or after, and the ring says where it rests."""
    with BlkDriver(device, queue_size=64) as disk:
        if not device.can_suspend:
            assert device.backend.capability(ops.SUSPEND).level == ABSENT
            return
        if documented(blk_home.traits, "SUSPEND", "with requests under way"):
            return
        data = random.Random(7).randbytes(40 * SECTOR)
        posted = 0
        for turn in range(6):
            writes = [BlkRequest(OUT, turn * 40 + n, data[n * SECTOR : (n + 1) * SECTOR]) for n in range(40)]
            batch = disk.submit(writes)
            posted += 40
            disk.suspend()
            disk.poll()
            rest = device.get_vring_base(0)
            done = posted - sum(write.status < 0 for write in writes)
            assert done <= rest <= posted, "what came back was taken, and no more was taken than was posted"
            assert device.get_vring_base(0) == rest, "a device at rest stays where it is"
            disk.resume()
            disk.complete(batch)
            assert [w.status for w in writes] == [0] * 40
        for turn in range(6):
            assert disk.read(turn * len(data), len(data)) == data


# Rings ---------------------------------------------------------------------------------------------------------------------


class Single:
    """One queue of a device by hand: a ring, a page for data, a kick. The device must be closed before it is."""

    def __init__(self, iova: int = 0x200000, num: int = 8) -> None:
        self.region = Region(Iova(iova), 64 << 10)
        layout = RingLayout.contiguous(num)
        self.area = self.region.allocate(layout.size, 4096)
        self.kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.buffer = self.region.allocate(4096, 4096)
        self.renew(num)

    def renew(self, num: int = 8) -> None:
        """The ring as it is before the first request."""
        self.area.data[:] = bytes(self.area.size)
        self.queue: DriverQueue[str] = DriverQueue(self.area.address, self.area.size, self.area.iova, num, owner=self.region)

    def setup(self, index: int = 0) -> RingSetup:
        queue = self.queue
        return RingSetup(index, queue.num, queue.desc, queue.avail, queue.used, self.kick)

    def post(self, readable: list[tuple[int, int]], writable: list[tuple[int, int]]) -> None:
        """A chain of pieces of the data page, by offset and length."""
        iova = self.buffer.iova
        self.queue.add_many([([(iova + at, size) for at, size in readable], [(iova + at, size) for at, size in writable], "")])
        self.queue.publish()
        os.eventfd_write(self.kick, 1)

    def identify(self) -> None:
        """A GET_ID request."""
        struct.pack_into("<IIQ", self.buffer.data, 0, GET_ID, 0, 0)
        self.buffer.data[64:96] = b"\xff" * 32
        self.post([(0, 16)], [(64, 20), (95, 1)])

    def done(self, within: float = 5.0) -> bool:
        """Whether the chain came back."""
        deadline = time.monotonic() + within
        while not self.queue.reap():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def close(self) -> None:
        os.close(self.kick)
        self.region.close()


@contextmanager
def single(opener: Opener) -> Iterator[tuple[Device, Single]]:
    """A device and a ring for it."""
    ring = Single()
    device = Device(opener())
    try:
        yield device, ring
    finally:
        device.close()
        ring.close()


def test_ring_that_is_enabled_late(blk_home: Home, opener: Opener) -> None:
    """ENABLE_AFTER_DRIVER_OK: the device starts without the ring, which works from its enabling and the next kick on."""
    with single(opener) as (device, ring):
        device.negotiate(0)
        if not device.backend_features & B.ENABLE_AFTER_DRIVER_OK:
            return
        for op, request in ring.setup().calls(enable=False):
            device.backend.call(op, request)
        device.map([ring.region.update()])
        device.set_status(RUNNING)
        ring.identify()
        assert not ring.done(within=0.05)
        device.backend.call(ops.SET_VRING_ENABLE, VringState(0, 1))
        os.eventfd_write(ring.kick, 1)
        assert ring.done()
        assert ring.buffer.data[95] == 0


def test_mappings_that_persist_work(blk_home: Home, opener: Opener) -> None:
    """IOTLB_PERSIST: after a reset the device works in what was mapped before it, and the mapping is not made again."""
    with single(opener) as (device, ring):
        device.negotiate(0)
        if not device.backend_features & B.IOTLB_PERSIST:
            return
        device.start([ring.setup()], [ring.region.update()])
        for _ in range(3):
            ring.identify()
            assert ring.done()
            assert ring.buffer.data[95] == 0
            ring.renew()
            device.negotiate(0)
            device.start([ring.setup()])


def test_descriptors_are_in_no_group_of_their_own(device: Device) -> None:
    """GET_VRING_DESC_GROUP is for devices that offer DESC_ASID."""
    assert not device.identify().backend_features & B.DESC_ASID
    device.own()
    with pytest.raises(OSError) as refused:
        device.backend.call(ops.GET_VRING_DESC_GROUP, VringState(0, 0))
    assert refused.value.errno == errno.EOPNOTSUPP
    assert device.backend.capability(ops.GET_VRING_DESC_GROUP).level == ABSENT


# Address spaces ------------------------------------------------------------------------------------------------------------


def test_isolated_control_queue(net_home: Home, device: Device) -> None:
    """In an address space of its own it sets the address, before and after a reset; frames go on in the other one."""
    limits = device.identify()
    if limits.address_spaces < 2 or not limits.backend_features & B.IOTLB_ASID:
        with pytest.raises(FeatureError, match="one address space" if limits.features & NetFeature.CTRL_VQ else "no control queue"):
            NetDriver(device, isolate_cvq=True, queue_size=16)
        assert device.get_status() == 0
        return
    with NetDriver(device, isolate_cvq=True, queue_size=16) as nic:
        old, me = nic.mac, parse_mac(nic.mac)
        for number in (1, 2):
            new = f"02:12:34:56:78:{number:02x}"
            nic.set_mac(new)
            assert device.get_config(0, 6) == parse_mac(new)
            frame = parse_mac(new) + me + b"\x88\xb5" + bytes([number]) * 46
            nic.send(frame)
            assert nic.receive() == frame
            nic.restart()
        nic.set_mac(old)
        assert device.get_config(0, 6) == me


def test_control_queue_sees_its_own_address_space_alone(net_home: Home, opener: Opener) -> None:
    """A command that lies in memory of the data queues does not reach it."""
    with single(opener) as (device, ring):
        limits = device.identify()
        if limits.address_spaces < 2 or not limits.backend_features & B.IOTLB_ASID:
            assert limits.groups == limits.address_spaces == 1
            return
        region, data = ring.region, ring.buffer
        for asid, answers in ((1, True), (0, False)):
            ring.renew()
            device.negotiate(NetFeature.CTRL_VQ | NetFeature.CTRL_MAC_ADDR)
            group = device.group_of(CTRL)
            assert group != device.group_of(0)
            data.data[:9] = bytes((1, 1)) + device.get_config(0, 6) + b"\xff"
            updates = [IotlbUpdate(region.iova, 4096, region.fd, asid=1), IotlbUpdate(data.iova, 4096, region.fd, data.iova - region.iova, asid=asid)]
            device.start([ring.setup(CTRL)], updates, spaces={group: 1})
            ring.post([(0, 2), (2, 6)], [(8, 1)])
            assert ring.done(within=5 if answers else 0.05) or not answers
            assert (data.data[8] == 0) == answers
            device.reset()
            device.unmap(updates)


def test_reset_puts_groups_back(net_home: Home, opener: Opener) -> None:
    """Into address space 0: a driver that knows nothing of groups finds all its queues there."""
    with single(opener) as (device, ring):
        device.negotiate(0)
        if device.identify().address_spaces < 2 or not device.backend_features & B.IOTLB_ASID:
            return
        device.backend.call(ops.SET_GROUP_ASID, VringState(device.group_of(CTRL), 1))
        device.negotiate(NetFeature.CTRL_VQ | NetFeature.CTRL_MAC_ADDR)
        ring.buffer.data[:9] = bytes((1, 1)) + device.get_config(0, 6) + b"\xff"
        device.start([ring.setup(CTRL)], [ring.region.update()])
        ring.post([(0, 2), (2, 6)], [(8, 1)])
        assert ring.done()
        assert ring.buffer.data[8] == 0
