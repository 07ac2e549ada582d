# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Data through the rings of every home: by the drivers, and by hand where a driver would not do what is to be tried."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import struct
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.homes import DISK_SIZE, PAIRS, SERIAL, Home, Opener
from tests.support.seen import Seen
from vdpa_bridge import ops
from vdpa_bridge.backends.base import ABSENT
from vdpa_bridge.device import Device, RingSetup
from vdpa_bridge.differences import documented
from vdpa_bridge.drivers import BlkDriver, BlkRequest, NetDriver
from vdpa_bridge.errors import DeviceBroken, PeerClosed
from vdpa_bridge.memory import Region
from vdpa_bridge.virtio.features import BlockFeature, NetFeature
from vdpa_bridge.virtqueue import DriverQueue, RingLayout
from vdpa_bridge.wire import Iova, VringFile, VringState

IN, OUT, GET_ID = 0, 1, 8
QUIET = 0.05
"""Seconds after which a device that did nothing is taken to do nothing."""


@pytest.fixture
def disk(blk_home: Home, device: Device) -> Iterator[BlkDriver]:
    """A driver on a small ring, so that rings wrap."""
    with BlkDriver(device, queue_size=16, pool_size=1 << 20) as disk:
        yield disk


@pytest.fixture
def nic(net_home: Home, device: Device) -> Iterator[NetDriver]:
    """A driver with few buffers."""
    with NetDriver(device, queue_size=16) as nic:
        yield nic


def pattern(seed: int, length: int) -> bytes:
    """Bytes that are nowhere else."""
    return random.Random(seed).randbytes(length)


# Disks ------------------------------------------------------------------------------------------------------------------


def noted(seen: Seen, home: Home, *words: str) -> None:
    """The driver of the home's device was seen at work."""
    where, reached = home.lives
    seen("devices", home.kind, home.kind, where, *words, *reached)


def test_what_is_written_is_read(blk_home: Home, disk: BlkDriver, seen: Seen) -> None:
    for seed, (offset, length) in enumerate([(0, 512), (512, 4096), (1 << 20, 256 << 10), (DISK_SIZE - 512, 512), (0, 8192)]):
        data = pattern(seed, length)
        disk.write(offset, data)
        disk.flush()
        assert disk.read(offset, length) == data
    assert disk.read(512, 7680) == pattern(4, 8192)[512:]
    noted(seen, blk_home, "split")


def test_many_requests_wrap_the_ring(disk: BlkDriver) -> None:
    for number in range(70):
        data = pattern(number, 512)
        disk.write(number * 512, data)
        assert disk.read(number * 512, 512) == data
    assert disk.read(0, 70 * 512) == b"".join(pattern(number, 512) for number in range(70))


def test_identity(blk_home: Home, disk: BlkDriver) -> None:
    serials = {"sim": "vdpa_blk_sim", "vp": "VPSERIAL", "qsd": "vhost_user_blk"}
    assert disk.get_id() == serials.get(blk_home.name.partition("-")[0], SERIAL)
    assert disk.info.size >= DISK_SIZE


def test_zeroes(disk: BlkDriver) -> None:
    disk.write(0, pattern(1, 16384))
    if not disk.features & BlockFeature.WRITE_ZEROES:
        with pytest.raises(OSError) as refused:
            disk.write_zeroes(4096, 8192)
        assert refused.value.errno == errno.EOPNOTSUPP
        return
    disk.write_zeroes(4096, 8192)
    assert disk.read(0, 16384) == pattern(1, 16384)[:4096] + bytes(8192) + pattern(1, 16384)[12288:]


def test_discard(disk: BlkDriver) -> None:
    """What is discarded may be anything afterwards; its neighbours may not."""
    disk.write(0, pattern(2, 16384))
    if disk.features & BlockFeature.DISCARD:
        disk.discard(4096, 8192)
    assert disk.read(0, 4096) + disk.read(12288, 4096) == pattern(2, 16384)[:4096] + pattern(2, 16384)[12288:]


def test_requests_beyond_the_end(disk: BlkDriver) -> None:
    sectors = disk.info.capacity
    for request in (BlkRequest(IN, sectors, length=512), BlkRequest(OUT, sectors, pattern(3, 512)), BlkRequest(IN, sectors - 1, length=1024)):
        (done,) = disk.complete(disk.submit([request]))
        assert done.status == 1
    assert disk.read(0, 512) is not None


def test_data_survives_reset_and_reopening(blk_home: Home, opener: Opener, seen: Seen) -> None:
    data = pattern(5, 4096)
    with Device(opener()) as device, BlkDriver(device) as disk:
        disk.write(8192, data)
        disk.restart()
        assert disk.read(8192, 4096) == data
    with Device(opener()) as device, BlkDriver(device) as disk:
        assert disk.read(8192, 4096) == data
    noted(seen, blk_home, "restart")


def test_two_drivers_of_one_opening(blk_home: Home, device: Device) -> None:
    """Bring-up, use, end, bring-up: an opening takes more than one driver."""
    for seed in range(3):
        with BlkDriver(device, queue_size=8 << seed) as disk:
            disk.write(0, pattern(seed, 1024))
            assert disk.read(0, 1024) == pattern(seed, 1024)


def test_reset_with_requests_under_way(blk_home: Home, disk: BlkDriver) -> None:
    if documented(blk_home.traits, "SET_STATUS", "reset with requests under way"):
        return
    for seed in range(3):
        disk.submit([BlkRequest(OUT, 64 + n, pattern(n, 512)) for n in range(4)])
        disk.restart()
        disk.write(0, pattern(seed, 512))
        assert disk.read(0, 512) == pattern(seed, 512)


def test_unmapped_buffer_harms_nobody(blk_home: Home, opener: Opener) -> None:
    """The request may fail, the queue may break, the device may ask for a reset; after a reset it is as before."""
    with Device(opener()) as device, BlkDriver(device) as disk:
        disk.write(0, pattern(9, 512))
        _read_into_nowhere(disk)
        if documented(blk_home.traits, "SET_STATUS", "reset after an unmapped address"):
            with pytest.raises(PeerClosed):
                disk.restart()
        else:
            disk.restart()
            assert disk.read(0, 512) == pattern(9, 512)
    with Device(opener()) as device, BlkDriver(device) as disk:
        assert disk.read(0, 512) == pattern(9, 512)


def _read_into_nowhere(disk: BlkDriver) -> None:
    header = disk._pool.take(64)
    struct.pack_into("<IIQ", header.data, 0, IN, 0, 0)
    nowhere = 0x7000000000
    ring = disk.ring(0)
    ring.queue.add_many([([(header.iova, 16)], [(nowhere, 512), (header.iova + 32, 1)], _Ignored())])  # type: ignore[list-item]
    if ring.queue.publish():
        os.eventfd_write(ring.kick, 1)
    with contextlib.suppress(DeviceBroken, TimeoutError):
        disk.wait(lambda: False, "nothing", timeout=QUIET)


class _Ignored:
    """A token for a chain that may or may not come back."""

    def complete(self, written: int) -> None:
        """Nothing depends on it."""


# Rings that are stopped, started, moved ---------------------------------------------------------------------------------------


def stays(disk: BlkDriver, request: BlkRequest) -> bool:
    """Whether the request is not served for a while."""
    deadline = time.monotonic() + QUIET
    while time.monotonic() < deadline:
        disk.poll()
        if request.status >= 0:
            return False
        time.sleep(0.002)
    return True


def test_suspended_device_serves_nothing(disk: BlkDriver) -> None:
    """What is kicked meanwhile is served after RESUME, without another kick."""
    disk.write(0, pattern(1, 512))
    if not disk.device.can_suspend:
        with pytest.raises(OSError) as refused:
            disk.suspend()
        assert refused.value.errno == errno.EOPNOTSUPP
        return
    for _ in range(3):
        disk.suspend()
        request = BlkRequest(IN, 0, length=512)
        batch = disk.submit([request])
        assert stays(disk, request)
        disk.resume()
        disk.complete(batch)
        assert (request.status, request.data) == (0, pattern(1, 512))


def test_disabled_ring_serves_nothing(blk_home: Home, disk: BlkDriver) -> None:
    """A kick for a disabled ring is lost: it must be given again once the ring is enabled."""
    if any(documented(blk_home.traits, "SET_VRING_ENABLE", scenario) for scenario in ("off", "off while the ring works")):
        return
    disk.write(0, pattern(2, 512))
    call = disk.device.backend.call
    for _ in range(3):
        call(ops.SET_VRING_ENABLE, VringState(0, 0))
        request = BlkRequest(IN, 0, length=512)
        batch = disk.submit([request])
        assert stays(disk, request)
        call(ops.SET_VRING_ENABLE, VringState(0, 1))
        os.eventfd_write(disk.ring(0).kick, 1)
        disk.complete(batch)
        assert request.data == pattern(2, 512)


def test_polling_without_a_call(disk: BlkDriver) -> None:
    """A driver that polls takes the call eventfd away."""
    disk.device.backend.call(ops.SET_VRING_CALL, VringFile(0, -1))
    request = BlkRequest(GET_ID, length=20)
    disk.submit([request])
    deadline = time.monotonic() + 5
    while request.status < 0 and time.monotonic() < deadline:
        disk.poll()
    assert request.status == 0


def test_eventfds_are_exchanged_while_the_ring_works(disk: BlkDriver) -> None:
    call = disk.device.backend.call
    with _eventfd() as kick, _eventfd() as done:
        call(ops.SET_VRING_KICK, VringFile(0, kick))
        call(ops.SET_VRING_CALL, VringFile(0, done))
        ring = disk.ring(0)
        old, ring.kick = ring.kick, kick
        try:
            for _ in range(3):
                request = BlkRequest(GET_ID, length=20)
                disk.submit([request])
                while request.status < 0 and not ring.queue.enable_call():
                    assert select.select([done], [], [], 5)[0], "the new call eventfd is not signalled"
                    os.eventfd_read(done)
                    disk.poll()
                disk.poll()
                assert request.status == 0
        finally:
            ring.kick = old


@contextlib.contextmanager
def _eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


class Bare:
    """Ring 0 of a disk without a driver: it keeps its place when the device is reset."""

    def __init__(self, device: Device, base: int = 0, num: int = 8) -> None:
        self.device = device
        self.region = Region(Iova(0x200000), 64 << 10)
        layout = RingLayout.contiguous(num)
        area = self.region.allocate(layout.size, 4096)
        self.queue: DriverQueue[str] = DriverQueue(area.address, area.size, area.iova, num, base=base, owner=self.region)
        self.buffer = self.region.allocate(1024)
        self.kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def start(self, base: int) -> None:
        """From reset to DRIVER_OK."""
        self.device.negotiate(0)
        with contextlib.suppress(OSError):
            self.device.unmap([self.region.update()])
        q = self.queue
        self.device.start([RingSetup(0, q.num, q.desc, q.avail, q.used, self.kick, -1, base)], [self.region.update()])

    def identify(self) -> bytes:
        """A GET_ID request, polled for."""
        struct.pack_into("<IIQ", self.buffer.data, 0, GET_ID, 0, 0)
        self.buffer.data[64:96] = b"\xff" * 32
        iova = self.buffer.iova
        self.queue.add_many([([(iova, 16)], [(iova + 64, 20), (iova + 95, 1)], "id")])
        self.queue.publish()
        os.eventfd_write(self.kick, 1)
        deadline = time.monotonic() + 5
        while not (done := self.queue.reap()):
            assert time.monotonic() < deadline, f"no answer (device status {self.device.get_status():#x})"
        assert [token for token, _ in done] == ["id"]
        assert self.buffer.data[95] == 0
        return bytes(self.buffer.data[64:84])

    def close(self) -> None:
        """The device must be closed before."""
        os.close(self.kick)
        self.region.close()


@contextlib.contextmanager
def bare(opener: Callable[[], object], base: int = 0) -> Iterator[Bare]:
    """A ring, closed after its device."""
    device = Device(opener())  # type: ignore[arg-type]
    ring = Bare(device, base)
    try:
        yield ring
    finally:
        device.close()
        ring.close()


@pytest.mark.parametrize("base", [0, 7, 0xFFFE])
def test_ring_begins_where_it_is_told(blk_home: Home, opener: Opener, base: int) -> None:
    with bare(opener, base) as ring:
        if base and documented(blk_home.traits, "SET_VRING_BASE", "not 0"):
            with pytest.raises(OSError) as refused:
                ring.start(base)
            assert refused.value.errno == errno.EOPNOTSUPP
            return
        ring.start(base)
        for _ in range(20):
            assert ring.identify().strip(b"\0")


def test_ring_goes_on_where_it_stopped(blk_home: Home, opener: Opener) -> None:
    """Suspend, ask, reset, start again there: what a migration does. The ring's memory stays as it is."""
    with bare(opener) as ring:
        ring.start(0)
        if not ring.device.can_suspend:
            assert ring.device.backend.capability(ops.SUSPEND).level == ABSENT
            return
        expected = 0
        for rounds in (3, 9, 1):
            for _ in range(rounds):
                ring.identify()
            expected += rounds
            ring.device.suspend()
            assert ring.device.get_vring_base(0) == expected
            ring.start(expected)
            ring.identify()
            expected += 1


# Network devices --------------------------------------------------------------------------------------------------------------


def mac_bytes(mac: str) -> bytes:
    """Six bytes."""
    return bytes.fromhex(mac.replace(":", ""))


def test_frames_come_back(net_home: Home, nic: NetDriver, seen: Seen) -> None:
    """The simulators loop back what is sent to all; the emulated NIC's network answers ARP."""
    assert nic.link_up
    me = mac_bytes(nic.mac)
    if net_home.name == "vp":
        question = struct.pack("!HHBBH6s4s6s4s", 1, 0x800, 6, 4, 1, me, bytes([10, 0, 2, 15]), bytes(6), bytes([10, 0, 2, 2]))
        nic.send(b"\xff" * 6 + me + b"\x08\x06" + question)
        answer = nic.receive(timeout=10)
        assert answer[:6] == me
        assert answer[12:14] == b"\x08\x06"
        assert answer[28:32] == bytes([10, 0, 2, 2])
    for seed in range(40 if net_home.name != "vp" else 0):
        frame = b"\xff" * 6 + me + b"\x88\xb5" + pattern(seed, 46 + seed * 20)
        nic.send(frame)
        assert nic.receive() == frame
    noted(seen, net_home, "split")


def test_frames_come_back_on_every_pair(net_home: Home, device: Device, seen: Seen) -> None:
    """Each on the pair that it was sent over. Devices of other makes have one pair, which is tried above."""
    pairs = device.identify().queues // 2 if device.identify().features & NetFeature.MQ else 1
    assert pairs == (PAIRS if not net_home.mark else 1)
    with NetDriver(device, pairs=pairs, queue_size=16) as nic:
        for turn in range(20 if pairs > 1 else 0):
            frames = {pair: b"\xff" * 6 + mac_bytes(nic.mac) + b"\x88\xb5" + pattern(pair, 46 + turn * 20) for pair in range(pairs)}
            for pair, frame in frames.items():
                nic.send(frame, pair=pair)
            assert {pair: nic.receive(pair=pair) for pair in reversed(range(pairs))} == frames
    if pairs > 1:
        noted(seen, net_home, "multi-queue")


def test_address_is_changed_by_the_control_queue(net_home: Home, nic: NetDriver, seen: Seen) -> None:
    if documented(net_home.traits, "GET_VQS_COUNT", "control queue"):
        assert (nic.device.identify().queues, nic.features & NetFeature.CTRL_VQ) == (2, 0)
        with pytest.raises(OSError, match="CTRL_MAC_ADDR") as refused:
            nic.set_mac("02:12:34:56:78:9a")
        assert refused.value.errno == errno.EOPNOTSUPP
        return
    assert nic.features & NetFeature.CTRL_MAC_ADDR
    old = nic.mac
    nic.set_mac("02:12:34:56:78:9a")
    try:
        assert nic.device.get_config(0, 6) == mac_bytes("02:12:34:56:78:9a")
        if net_home.name != "vp":
            frame = mac_bytes("02:12:34:56:78:9a") + mac_bytes(old) + b"\x88\xb5" + bytes(46)
            nic.send(frame)
            assert nic.receive() == frame
    finally:
        nic.set_mac(old)
    noted(seen, net_home, "control queue")
