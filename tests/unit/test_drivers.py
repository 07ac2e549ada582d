# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The drivers: data, limits and errors on good devices, and what they make of bad ones.

Bad devices are models that do wrong things on real rings, or the test itself writing where only a device may write.
What a test leaves behind is counted for every test (conftest.py).
"""

from __future__ import annotations

import errno
import logging
import os
import random
import struct
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdpa_bridge import ops
from vdpa_bridge.backends.base import Backend, Capability
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.device import Device
from vdpa_bridge.drivers import BlkDriver, BlkRequest, Driver, NetDriver
from vdpa_bridge.drivers.base import Pending
from vdpa_bridge.drivers.pool import Pool, place
from vdpa_bridge.errors import DeviceBroken, FeatureError
from vdpa_bridge.flags import Feature, Status
from vdpa_bridge.memory import Buffer, Region
from vdpa_bridge.models import BlkModel, Model, NetModel, make_model
from vdpa_bridge.models.base import Queue
from vdpa_bridge.ops import Op, Rep, Req
from vdpa_bridge.virtio.features import BlockFeature, NetFeature
from vdpa_bridge.wire import Iova, IovaRange, VringState

MIB = 1 << 20


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No log records from a model's ring thread: for each thread that is not of ``threading``'s making, CPython before 3.13 keeps
    a stand-in that never goes away, and these tests break many devices on purpose."""
    log = logging.getLogger("vdpa_bridge")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    yield
    log.setLevel(before)


@contextmanager
def opened(model: Model) -> Iterator[Device]:
    home = ModelDevice(model, "model:test")
    try:
        with Device(home.open()) as device:
            yield device
    finally:
        home.close()


@contextmanager
def blk(model: Model | None = None, **options: Any) -> Iterator[BlkDriver]:
    with opened(model or make_model("blk", {"size": "16M"})) as device, BlkDriver(device, **options) as disk:
        yield disk


@contextmanager
def net(model: Model | None = None, **options: Any) -> Iterator[NetDriver]:
    with opened(model or make_model("net", {"mac": "52:54:00:00:00:07"})) as device, NetDriver(device, **options) as nic:
        yield nic


class Silent(BlkModel):
    """A disk that takes no request as long as ``deaf`` is set."""

    deaf = True

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        if not self.deaf:
            super().process(queues, index)


def silent() -> Silent:
    model = Silent.from_options({"size": "16M"})
    assert isinstance(model, Silent)
    return model


# Block: data ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"ring_features": 0}, {"queue_size": 4}, {"pool_size": 8192}, {"queue_size": 8, "ring_features": 0}])
def test_bytes_come_back_as_written(options: dict[str, Any]) -> None:
    rng = random.Random(7)
    truth = bytearray(16 * MIB)
    with blk(**options) as disk:
        for _ in range(12):
            offset = rng.randrange(16 * MIB // 512) * 512
            length = min(rng.choice([512, 4096, 131072, 200 * 512, 3 * MIB]), 16 * MIB - offset)
            data = rng.randbytes(length)
            disk.write(offset, data)
            truth[offset : offset + length] = data
        disk.flush()
        assert disk.read(0, 16 * MIB) == truth
        half = bytearray(8 * MIB)
        disk.read_into(8 * MIB, half)
        assert half == truth[8 * MIB :]


def test_info_and_id() -> None:
    with blk(make_model("blk", {"size": "16M", "serial": "a serial"})) as disk:
        assert (disk.info.size, disk.info.capacity, disk.info.block_size) == (16 * MIB, 32768, 512)
        assert (disk.info.physical_block_size, disk.info.opt_io_size, disk.info.readonly) == (4096, 131072, False)
        assert (disk.info.size_max, disk.info.seg_max, disk.info.queues) == (0, 254, 1)
        assert {"WRITE_ZEROES", "VERSION_1"} <= set(disk.info.features)
        assert disk.get_id() == "a serial"
        assert repr(disk) == "<BlkDriver model:test: block, queues [0]>"


def test_write_zeroes_and_discard() -> None:
    with blk() as disk:
        disk.write(0, b"x" * MIB)
        disk.write_zeroes(4096, 8192)
        disk.write_zeroes(512 * 1024, 4096, unmap=True)
        disk.discard(0, 4096)
        data = disk.read(0, MIB)
        expected = bytearray(b"x" * MIB)
        expected[4096:12288] = bytes(8192)
        expected[512 * 1024 : 516 * 1024] = bytes(4096)
        assert data[4096:] == expected[4096:]


def test_long_zeroes_are_cut_to_the_limit() -> None:
    """The model takes 64 MiB in a request; asked for more in one, it would refuse."""
    with blk(make_model("blk", {"size": "200M"})) as disk:
        disk.write(199 * MIB, b"x" * MIB)
        disk.write_zeroes(512, 200 * MIB - 1024)
        assert disk.read(199 * MIB, MIB) == bytes(MIB - 512) + b"x" * 512


@pytest.mark.parametrize("call", ["read", "write", "discard", "write_zeroes"])
@pytest.mark.parametrize(("offset", "length"), [(1, 512), (0, 511), (16 * MIB, 512), (16 * MIB - 512, 1024), (-512, 512), (0, 17 * MIB)])
def test_wrong_ranges_are_the_callers_mistake(call: str, offset: int, length: int) -> None:
    with blk() as disk, pytest.raises(ValueError, match=r"multiples of 512|leaves the disk, which has 16777216 bytes"):
        getattr(disk, call)(offset, bytes(length) if call == "write" else length)


def test_errors_of_the_device_name_the_sector() -> None:
    with blk() as disk:
        for call, verb in ((disk.read, "read"), (disk.write, "write"), (disk.discard, "discard"), (disk.write_zeroes, "write_zeroes")):
            argument: Any = bytes(1024) if verb == "write" else 1024
            with pytest.raises(OSError, match=f"{verb} of 2 sectors at sector 32767 on model:test: .*status 1") as caught:
                call(16 * MIB - 512, argument, unchecked=True)
            assert caught.value.errno == errno.EIO
        batch = disk.submit([BlkRequest(99)])
        (request,) = disk.complete(batch)
        with pytest.raises(OSError, match=r"request of type 99 on model:test: .*status 2") as unsupported:
            request.check(disk.name)
        assert unsupported.value.errno == errno.EOPNOTSUPP
        assert disk.read(0, 512) == bytes(512)


def test_readonly_disk(tmp_path: Any) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"r" * 4096)
    with blk(make_model("blk", {"file": str(image), "readonly": "on"})) as disk:
        assert disk.info.readonly
        assert disk.read(0, 4096) == b"r" * 4096
        with pytest.raises(OSError, match="write of 1 sectors at sector 0"):
            disk.write(0, bytes(512))
        for call in (disk.discard, disk.write_zeroes):
            with pytest.raises(OSError, match="not among the features agreed on") as caught:
                call(0, 512)
            assert caught.value.errno == errno.EOPNOTSUPP


def test_failed_write_stops_what_was_not_sent() -> None:
    with blk(pool_size=64 << 10) as disk:
        with pytest.raises(OSError, match="write of"):
            disk.write(12 * MIB, bytes(8 * MIB), unchecked=True)
        assert disk.read(0, 4096) == bytes(4096)


# Block: many requests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", [0, Feature.RING_INDIRECT_DESC, Feature.RING_EVENT_IDX, Feature.RING_INDIRECT_DESC | Feature.RING_EVENT_IDX])
def test_batches(ring: int) -> None:
    with blk(ring_features=ring) as disk:
        writes = [BlkRequest(1, sector, bytes([sector % 251]) * 512) for sector in range(3000)]
        done = disk.complete(disk.submit(writes))
        assert {id(r) for r in done} == {id(r) for r in writes}
        assert {r.status for r in writes} == {0}
        reads = [BlkRequest(0, sector, length=512) for sector in range(3000)]
        batch, seen = disk.submit(reads), 0
        while seen < 3000:
            some = disk.complete(batch, count=min(700, 3000 - seen))
            assert len(some) >= min(700, 3000 - seen)
            seen += len(some)
        assert all(request.data == bytes([request.sector % 251]) * 512 for request in reads)
        assert disk.complete(batch) == []


def test_batch_mixes_good_and_bad() -> None:
    with blk() as disk:
        requests = [BlkRequest(0, 0, length=512), BlkRequest(0, 1 << 40, length=512), BlkRequest(77), BlkRequest(4)]
        disk.complete(disk.submit(requests))
        assert [request.status for request in requests] == [0, 1, 2, 0]


def test_request_that_can_never_fit_is_refused() -> None:
    with blk(pool_size=8192) as disk, pytest.raises(ValueError, match="fits neither"):
        disk.submit([BlkRequest(0, 0, length=9000)])


class Picky(BlkModel):
    """Takes 3 segments of 1536 bytes, says so, and refuses what is longer."""

    def __init__(self, fd: int, **options: Any) -> None:
        super().__init__(fd, **options)
        self.features |= BlockFeature.SIZE_MAX
        self.longest = 0

    def config(self) -> bytes:
        config = bytearray(super().config())
        struct.pack_into("<II", config, 8, 1536, 3)
        return bytes(config)

    def _serve(self, chain: Any) -> int:
        self.longest = max(self.longest, chain.readable - 16, chain.writable - 1)
        return super()._serve(chain)


@pytest.mark.parametrize("ring", [0, Feature.RING_INDIRECT_DESC])
def test_requests_keep_to_what_the_device_takes(ring: int) -> None:
    model = Picky.from_options({"size": "1M"})
    assert isinstance(model, Picky)
    with blk(model, ring_features=ring, queue_size=16) as disk:
        data = os.urandom(100 * 512)
        disk.write(512, data)
        assert disk.read(512, len(data)) == data
        assert model.longest == 3 * 1536
        assert disk._cut(0x1000, 4000) == [(0x1000, 1536), (0x1600, 1536), (0x1C00, 928)]


def test_several_queues_work_at_once() -> None:
    with blk(make_model("blk", {"size": "16M", "queues": "3"}), queues=(0, 1, 2), queue_size=8) as disk:
        requests = [BlkRequest(1, sector, bytes([sector % 256]) * 512) for sector in range(500)]
        disk.complete(disk.submit(requests))
        assert disk.read(0, 500 * 512) == b"".join(r.payload for r in requests)
        assert all(disk.device.backend.call(ops.GET_VRING_BASE, VringState(i, 0)).num for i in range(3))


# Life cycle ----------------------------------------------------------------------------------------------------------------


def test_suspend_keeps_requests_and_resume_serves_them() -> None:
    with blk() as disk:
        disk.write(0, b"b" * 512)
        disk.suspend()
        base = disk.device.get_vring_base(0)
        batch = disk.submit([BlkRequest(0, 0, length=512) for _ in range(20)])
        with pytest.raises(TimeoutError, match=r"20 requests within 0.1 s; device status .*DRIVER_OK"):
            disk.complete(batch, timeout=0.1)
        assert disk.device.get_vring_base(0) == base
        disk.resume()
        assert [request.data for request in disk.complete(batch)] == [b"b" * 512] * 20
        assert disk.read(0, 512) == b"b" * 512


@pytest.mark.parametrize("ring", [0, Feature.RING_EVENT_IDX])
def test_restart_forgets_what_was_in_flight(ring: int) -> None:
    model = silent()
    with blk(model, ring_features=ring, timeout=0.1) as disk:
        for _ in range(3):
            model.deaf = True
            lost = disk.submit([BlkRequest(0, 0, length=4096) for _ in range(300)])
            with pytest.raises(TimeoutError, match="model:test: no end of 300 requests"):
                disk.complete(lost)
            model.deaf = False
            disk.restart()
            assert disk.read(0, 65536) == bytes(65536)
            assert lost.left == 300


def test_timeout_of_a_posted_chain_names_the_queue() -> None:
    model = silent()
    with blk(model) as disk:
        before = disk._pool.free
        with pytest.raises(TimeoutError, match=r"1 readable and 2 writable buffers on queue 0 within 0.05 s"):
            disk.transact(0, [bytes(16)], [512, 1], timeout=0.05)
        assert disk._pool.free < before, "memory that the device may still write to is not used again"
        model.deaf = False
        os.eventfd_write(disk.ring(0).kick, 1)
        disk.wait(lambda: disk._pool.free == before, "the late answer")


@pytest.mark.parametrize("call", ["read", "flush", "restart", "suspend", "resume", "submit", "transact", "poll"])
def test_closed_driver_says_so(call: str) -> None:
    with opened(make_model("blk", {"size": "1M"})) as device:
        disk = BlkDriver(device)
        ring = disk.ring(0)
        disk.close()
        disk.close()
        arguments = {"read": (0, 512), "submit": ([],), "transact": (0, [b"x"])}.get(call, ())
        with pytest.raises(ValueError, match="closed"):
            getattr(disk, call)(*arguments)
        with pytest.raises(AttributeError):
            ring.submit([])
        assert device.get_status() == 0


def test_device_serves_one_driver_after_another() -> None:
    with opened(make_model("blk", {"size": "1M"})) as device:
        for turn in range(3):
            with BlkDriver(device) as disk:
                assert disk.read(0, 512) == bytes([turn]) * 512
                disk.write(0, bytes([turn + 1]) * 512)


def test_wrong_device_type_or_queue() -> None:
    with opened(make_model("net", {})) as device:
        with pytest.raises(FeatureError, match="model:test is a net device, not block"):
            BlkDriver(device)
        with pytest.raises(ValueError, match="3 queues, there is no queue 3"):
            Driver(device, queues=[0, 3])
        with pytest.raises(FeatureError, match="does not offer RING_PACKED"):
            Driver(device, required=Feature.RING_PACKED)
        with Driver(device, queues=[2]) as driver, pytest.raises(ValueError, match="no queue 0, only 2"):
            driver.transact(0, [b"x"])


class Failing(Backend):
    """Passes operations on, up to one that fails."""

    def __init__(self, inner: Backend, fails_at: int) -> None:
        self.name, self._inner, self.left = inner.name, inner, fails_at

    def call(self, op: Op[Req, Rep], request: Req) -> Rep:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.EIO, f"{op.name} fails as told")
        return self._inner.call(op, request)

    def capability(self, op: Op[Any, Any]) -> Capability:
        return self._inner.capability(op)

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize("driver", [BlkDriver, NetDriver])
def test_bring_up_that_fails_anywhere_leaves_the_device_at_rest(driver: type[Driver]) -> None:
    """Every operation of a bring-up fails once; conftest counts what is left behind."""
    home = ModelDevice(make_model("blk" if driver is BlkDriver else "net", {}), "model:test")
    failures, at = 0, 1
    while True:
        backend = Failing(home.open(), at)
        with Device(backend) as device:
            try:
                with driver(device):
                    break
            except OSError as error:
                failures += "fails as told" in str(error)
            assert device.get_status() == 0
        at += 1
    assert failures == at - 1 > 15
    home.close()


# Devices that misbehave ----------------------------------------------------------------------------------------------------


def spoil_used(disk: Driver, idx: int, entry: tuple[int, int] = (0, 0)) -> None:
    """Write a used ring as only the device may."""
    ring = disk.ring(0).queue
    area = disk._areas[0]
    at = ring.used - area.iova
    struct.pack_into("<II", area.data, at + 4, *entry)
    struct.pack_into("<H", area.data, at + 2, idx)


@pytest.mark.parametrize(("idx", "entry"), [(1, (7, 1)), (1, (300, 1)), (9, (0, 1)), (1, (0, 600))])
def test_used_ring_that_lies_breaks_the_driver_only(idx: int, entry: tuple[int, int]) -> None:
    model = silent()
    with blk(model, ring_features=0) as disk:
        batch = disk.submit([BlkRequest(0, 0, length=512)])
        spoil_used(disk, idx, entry)
        with pytest.raises(DeviceBroken, match="model:test: queue 0: ") as caught:
            disk.complete(batch)
        assert caught.value.errno == errno.EIO
        with pytest.raises(DeviceBroken):
            disk.read(0, 512)
        model.deaf = False
        disk.restart()
        assert disk.read(0, 512) == bytes(512)


def test_device_that_gives_up_is_noticed_at_once() -> None:
    class Crashing(BlkModel):
        def process(self, queues: Mapping[int, Queue], index: int) -> None:
            if queues[index].pop():
                raise RuntimeError("this model has a bug")

    with blk(Crashing.from_options({"size": "1M"})) as disk:
        before = time.monotonic()
        with pytest.raises(DeviceBroken, match="NEEDS_RESET"):
            disk.read(0, 512)
        assert time.monotonic() - before < 0.4, "the configuration interrupt tells it, no timeout has to"


def test_driver_that_breaks_its_ring_is_told() -> None:
    """A chain at an address that is not mapped: the device cannot go on, but says so."""
    with blk() as disk:
        ring = disk.ring(0)
        ring.submit([([(0x7FFF0000, 16)], [], Pending())])
        lost = disk.submit([BlkRequest(4)])
        with pytest.raises(DeviceBroken, match="gave up"):
            disk.complete(lost)
        disk.restart()
        assert disk.read(0, 512) == bytes(512)


def test_reset_by_somebody_else_is_noticed() -> None:
    with blk(timeout=3) as disk:
        disk.device.backend.call(ops.SET_STATUS, ops.SET_STATUS.request(0))
        with pytest.raises(DeviceBroken, match="was reset by somebody else"):
            disk.read(0, 512)
        disk.restart()
        assert disk.read(0, 512) == bytes(512)


@pytest.mark.parametrize("status", [b"", b"\x07"])
def test_status_that_is_missing_or_unknown(status: bytes) -> None:
    class Odd(BlkModel):
        def _serve(self, chain: Any) -> int:
            return int(chain.write(status))

    with blk(Odd.from_options({"size": "1M"})) as disk, pytest.raises(OSError, match=r"left no status|reports status 7"):
        disk.flush()


def test_config_too_short_for_a_disk() -> None:
    class Short(BlkModel):
        def config(self) -> bytes:
            return bytes(7)

    with opened(Short.from_options({"size": "1M"})) as device, pytest.raises(DeviceBroken, match="7 bytes, too short"):
        BlkDriver(device)


# Any chain -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", [0, Feature.RING_INDIRECT_DESC])
def test_transact_takes_any_number_of_buffers(ring: int) -> None:
    with blk(ring_features=ring) as disk:
        header = struct.pack("<IIQ", 1, 0, 3)
        for count in (1, 16, 100, 250):
            data = os.urandom(count * 512)
            pieces = [data[at : at + 512] for at in range(0, len(data), 512)]
            assert disk.transact(0, [header, *pieces], [1]) == (1, [b"\0"])
            assert disk.read(3 * 512, len(data)) == data
        with pytest.raises(ValueError, match="256 buffers"):
            disk.transact(0, [b"x"] * 257)
        with pytest.raises(ValueError, match="none of them empty"):
            disk.transact(0, [b""])
        with pytest.raises(MemoryError, match="no piece of"):
            disk.transact(0, [], [5 * MIB])
        assert disk._pool.free == 4 * MIB


def test_full_ring_is_a_memory_error() -> None:
    model = silent()
    with blk(model, queue_size=4, ring_features=0) as disk:
        disk.post(0, [b"x" * 16], [1])
        disk.post(0, [b"x" * 16], [1])
        before = disk._pool.free
        with pytest.raises(MemoryError, match="queue 0 has 0 descriptors left, 2 are wanted"):
            disk.post(0, [b"x" * 16], [1])
        assert disk._pool.free == before


# Net -----------------------------------------------------------------------------------------------------------------------


def frame(number: int = 0, length: int = 60) -> bytes:
    return (b"\xff" * 6 + bytes(6) + b"\x08\x00" + number.to_bytes(4, "big")).ljust(length, b"\x33")


@pytest.mark.parametrize("options", [{}, {"ring_features": 0}, {"queue_size": 4}, {"pool_size": 16384}])
def test_frames_in_order(options: dict[str, Any]) -> None:
    with net(**options) as nic:
        frames = [frame(n, 60 + n % 1400) for n in range(3000)]
        nic.send_many(frames)
        assert nic.receive_many(3000) == frames
        nic.send(frames[5])
        assert nic.receive() == frames[5]
        assert nic.receive_many(1, timeout=0.02) == []
        with pytest.raises(TimeoutError, match=r"model:test: no end of the arrival of a frame within 0.02 s"):
            nic.receive(timeout=0.02)


def test_frame_lengths() -> None:
    with net(make_model("net", {"mtu": "100"})) as nic:
        assert (nic.mtu, nic.max_frame, nic.header) == (100, 118, 12)
        for length in (13, 119):
            with pytest.raises(ValueError, match="14 to 118"):
                nic.send_many([frame(), bytes(length)])
        nic.send_many([frame(1)[:14], frame(2, 118)])
        assert [len(f) for f in nic.receive_many(2)] == [14, 118]


def test_address_and_link() -> None:
    with net() as nic:
        assert (nic.mac, nic.link_up) == ("52:54:00:00:00:07", True)
        nic.set_mac("52:54:00:aa:bb:cc")
        assert nic.mac == "52:54:00:aa:bb:cc" == nic._config()["mac"]
        with pytest.raises(ValueError, match="not a MAC address"):
            nic.set_mac("52-54-00-aa-bb-cc")
        to_us = bytes.fromhex("525400aabbcc") + frame()[6:]
        nic.send(to_us)
        assert nic.receive() == to_us
        nic.restart()
        assert nic.mac == "52:54:00:aa:bb:cc"
        nic.send(frame(3))
        assert nic.receive() == frame(3)


def test_no_control_queue() -> None:
    with net(wanted=NetFeature.MAC | NetFeature.MTU) as nic:
        with pytest.raises(OSError, match="CTRL_MAC_ADDR") as caught:
            nic.set_mac("52:54:00:aa:bb:cc")
        assert caught.value.errno == errno.EOPNOTSUPP
        nic.send(frame())
        assert nic.receive() == frame()
        assert nic.info["features"] == ["MTU", "MAC", "RING_INDIRECT_DESC", "RING_EVENT_IDX", "VERSION_1", "ACCESS_PLATFORM"]


def test_suspended_nic_keeps_frames() -> None:
    with net() as nic:
        nic.suspend()
        with pytest.raises(TimeoutError, match="transmission"):
            nic.send(frame(1), timeout=0.05)
        nic.resume()
        assert nic.receive() == frame(1)
        nic.send_many(frame(n) for n in range(2, 400))
        assert nic.receive_many(398) == [frame(n) for n in range(2, 400)]


def send_and_receive(nic: NetDriver) -> bytes:
    nic.send(frame())
    return nic.receive()


class Merging(NetModel):
    """Gives each frame back 100 bytes a buffer (virtio 1.2, 5.1.6.4), and waits for buffers; or says a wrong number of them."""

    features = NetModel.features | NetFeature.MRG_RXBUF
    said: int | None = None

    def __init__(self) -> None:
        super().__init__(bytes(6))
        self.parts: deque[bytes] = deque()

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        while index < 2:
            if not self.parts:
                sent = queues[1].pop(1)
                if not sent:
                    return
                data = sent[0].read()[12:]
                queues[1].push([(sent[0], 0)])
                count = -(-len(data) // 100) if self.said is None else self.said
                self.parts.extend((bytes(10) + count.to_bytes(2, "little") + data[at : at + 100])[0 if not at else 12 :] for at in range(0, len(data), 100))
            buffers = queues[0].pop(len(self.parts))
            if not buffers:
                return
            queues[0].push([(buffer, buffer.write(self.parts.popleft())) for buffer in buffers])


def test_merged_buffers_are_one_frame() -> None:
    with net(Merging(), wanted=NetFeature.MRG_RXBUF) as nic:
        frames = [frame(n, 60 + n) for n in range(1000)]
        nic.send_many(frames)
        assert nic.receive_many(1000) == frames


@pytest.mark.parametrize("count", [0, 60000])
def test_impossible_number_of_merged_buffers(count: int) -> None:
    model = Merging()
    model.said = count
    with net(model, wanted=NetFeature.MRG_RXBUF) as nic, pytest.raises(DeviceBroken, match=f"in {count} buffers"):
        send_and_receive(nic)


def test_received_buffer_without_a_header() -> None:
    class Headless(NetModel):
        def process(self, queues: Mapping[int, Queue], index: int) -> None:
            if index == 1:
                queues[1].push([(chain, 0) for chain in queues[1].pop()])
                queues[0].push([(chain, 11) for chain in queues[0].pop(1)])

    with net(Headless(bytes(6))) as nic, pytest.raises(DeviceBroken, match="with 11 bytes"):
        send_and_receive(nic)


# Memory --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "last", "size", "iova"),
    [
        (0, (1 << 64) - 1, 1 << 20, 1 << 20),
        (0, 0xFFFFF, 0x1000, 0x1000),
        (0x2000, 0xFFFFF, 0x10000, 0x2000),
        (0x123456, 1 << 40, 0x1000, 0x124000),
        (0, 1 << 40, 0xFEE00000, 0xFEF00000),
        (0xFEE00000, 1 << 40, 0x1000, 0xFEF00000),
        (0xFEE00000, 0xFEF00FFF, 0x1000, 0xFEF00000),
        (1 << 32, 1 << 40, 0x1000, 1 << 32),
    ],
)
def test_place(first: int, last: int, size: int, iova: int) -> None:
    assert place(IovaRange(Iova(first), Iova(last)), size) == iova


@pytest.mark.parametrize(("first", "last"), [(0, 0x1FFE), (0, 0xFFF), (0xFEE00000, 0xFEEFFFFF), (0x1000, 0)])
def test_place_without_room(first: int, last: int) -> None:
    with pytest.raises(ValueError, match="no room for 0x1000 bytes"):
        place(IovaRange(Iova(first), Iova(last)), 0x1000)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5000), st.integers(0, 100)), max_size=60))
def test_pool_never_gives_a_byte_twice(steps: list[tuple[bool, int, int]]) -> None:
    with Region(Iova(0x10000), 32768) as region:
        pool = Pool(region.allocate(32768))
        out: list[Buffer] = []
        for take, size, pick in steps:
            if take:
                try:
                    buffer = pool.take(size)
                except MemoryError:
                    continue
                assert buffer.size == size == len(buffer.data)
                assert buffer.iova % 64 == 0
                assert buffer.iova - 0x10000 == buffer.address - region.mapping.address
                assert all(buffer.iova >= o.iova + o.size or buffer.iova + size <= o.iova for o in out)
                out.append(buffer)
            elif out:
                pool.give(out.pop(pick % len(out)))
        for buffer in out:
            pool.give(buffer)
        assert pool.free == 32768
        assert pool.take(32768).size == 32768


def test_status_is_driver_ok_while_driven() -> None:
    with blk() as disk:
        running = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
        assert disk.device.get_status() == running
