# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What all drivers share: life cycle, time limits, any chain on any queue, and what they make of bad devices.

Bad devices are models that do wrong things on real rings, or the test itself writing where only a device may write.
What a test leaves behind is counted for every test (conftest.py).
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Mapping
from typing import Any

import pytest

from tests.support.driven import MIB, blk, opened, quiet, silent
from vdpa_bridge import ops
from vdpa_bridge.backends.base import Backend, Capability
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.device import Device
from vdpa_bridge.drivers import BlkDriver, BlkRequest, Driver, NetDriver
from vdpa_bridge.drivers.ring import Pending
from vdpa_bridge.errors import DeviceBroken, FeatureError
from vdpa_bridge.flags import Feature, Status
from vdpa_bridge.models import BlkModel, make_model
from vdpa_bridge.models.base import Queue
from vdpa_bridge.ops import Op, Rep, Req

__all__ = ["quiet"]  # an autouse fixture

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
        with pytest.raises(FeatureError, match="does not offer RING_RESET"):
            Driver(device, required=Feature.RING_RESET)
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
    area = disk._spaces[0].rings[0]
    at = ring.used - area.iova
    struct.pack_into("<II", area.data, at + 4, *entry)
    struct.pack_into("<H", area.data, at + 2, idx)


@pytest.mark.parametrize(("idx", "entry"), [(1, (7, 1)), (1, (300, 1)), (9, (0, 1))])
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


def test_a_disk_may_count_too_many_bytes_as_written() -> None:
    """The status says how a request ended, and nobody wrote one."""
    with blk(silent(), ring_features=0) as disk:
        batch = disk.submit([BlkRequest(0, 0, length=512)])
        spoil_used(disk, 1, (0, 600))
        disk.complete(batch)
        with pytest.raises(OSError, match="left no status"):
            batch.failed.check("the disk")


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


def test_status_is_driver_ok_while_driven() -> None:
    with blk() as disk:
        running = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
        assert disk.device.get_status() == running


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
