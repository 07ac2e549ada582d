# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The relay over models: devices with hardware's limits get one when a client needs it; who lies on either side costs a reset.

That a relay is a device like any other is a matter of tests/contract, where it is a home.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from click.testing import CliRunner

from vdpa_bridge import Device, Feature, FeatureError, ops
from vdpa_bridge.backends import relay_rings
from vdpa_bridge.backends.base import Backend, Capability
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.backends.relay import RelayBackend, carried, relayed
from vdpa_bridge.backends.relay_memory import Room
from vdpa_bridge.cli import main
from vdpa_bridge.drivers import BlkDriver, BlkRequest, NetDriver
from vdpa_bridge.drivers.base import Driver
from vdpa_bridge.drivers.ring import Pending
from vdpa_bridge.flags import Status
from vdpa_bridge.memory import Region
from vdpa_bridge.models import Model, make_model
from vdpa_bridge.ops import Op
from vdpa_bridge.vhost_user.server import Server
from vdpa_bridge.virtio.ids import DeviceId
from vdpa_bridge.wire import EMPTY, U64, IotlbUpdate, Iova, IovaRange, VringState

from ..support.bridge import REFUSED, bridging, run_client, start_client
from ..support.homes import OPTIONS, connector, socket_path
from ..support.limited import LAST, LimitedDevice

FAR = 1 << 57
"""Beyond any IOMMU."""


@contextmanager
def limited(kind: str = "blk") -> Iterator[LimitedDevice]:
    device = LimitedDevice(make_model(kind, OPTIONS[kind]), f"limited {kind}")
    try:
        yield device
    finally:
        device.close()


@pytest.fixture
def path(caplog: pytest.LogCaptureFixture) -> Iterator[str]:
    """A disk with hardware's limits, served."""
    caplog.set_level(logging.INFO, "vdpa_bridge")
    with limited() as device, socket_path() as path, Server(device.open, path):
        yield path


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Why there was a relay, each time."""
    return [record.getMessage() for record in caplog.records if "relayed from now on" in record.getMessage()]


# When it comes in ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--mem-table",), ("--turns", 3), ("--depth", 32, "--bytes", 65536)], ids=["slots", "table", "turns", "deep"])
def test_what_the_device_can_have_passes_it_by(path: str, caplog: pytest.LogCaptureFixture, options: tuple[str, ...]) -> None:
    run_client(path, "--requests", 60, *options)
    assert reasons(caplog) == []


@pytest.mark.parametrize("options", [(), ("--mem-table",), ("--turns", 3), ("--depth", 32, "--bytes", 65536)], ids=["slots", "table", "turns", "deep"])
def test_memory_out_of_reach(path: str, caplog: pytest.LogCaptureFixture, options: tuple[str, ...]) -> None:
    run_client(path, "--requests", 60, "--memory-at", FAR, *options)
    (why,) = reasons(caplog)
    assert f"leaves the IOVA range [0x0, {LAST:#x}]" in why
    run_client(path, "--requests", 60)
    assert len(reasons(caplog)) == 1


@pytest.mark.parametrize("options", [(), ("--mem-table",)], ids=["slots", "table"])
def test_memory_out_of_reach_under_a_running_ring(path: str, caplog: pytest.LogCaptureFixture, options: tuple[str, ...]) -> None:
    """The ring goes on where it was, behind the relay now."""
    run_client(path, "--requests", 60, "--grow", "--grow-at", FAR, *options)
    assert len(reasons(caplog)) == 1


def test_ring_that_goes_on_where_it_stood(path: str, caplog: pytest.LogCaptureFixture) -> None:
    run_client(path, "--requests", 60, "--turns", 3, "--keep-index")
    (why,) = reasons(caplog)
    assert "SET_VRING_BASE" in why


def test_packed_rings_can_be_stopped_and_go_on(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """A device that does not tell where they stand would leave the client without an answer."""
    data = random.Random(1).randbytes(65536)
    with Device(connector(path, "blk", "off")()) as device, BlkDriver(device, ring_features=Feature.RING_PACKED) as disk:
        assert disk.features & Feature.RING_PACKED
        disk.write(0, data)
        for _ in range(3):
            disk.suspend()
            base = device.get_vring_base(0)
            assert base & 0xFFFF == base >> 16 != 0x8000
            disk.resume()
            assert disk.read(0, len(data)) == data
    (why,) = reasons(caplog)
    assert "packed rings" in why


def test_split_rings_can_be_stopped_and_go_on(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """No relay until the ring has to start elsewhere than at 0."""
    with Device(connector(path, "blk", "off")()) as device, BlkDriver(device) as disk:
        disk.write(0, b"x" * 512)
        disk.suspend()
        assert device.get_vring_base(0) == 1
        assert reasons(caplog) == []
        disk.resume()
        assert disk.read(0, 512) == b"x" * 512
    assert len(reasons(caplog)) == 1


def test_never_when_it_is_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    with limited() as device, socket_path() as path, Server(device.open, path, relay=False):
        run_client(path, "--memory-at", FAR, status=REFUSED)
        run_client(path, "--requests", 20, "--turns", 2, "--keep-index", status=REFUSED)
        run_client(path, "--requests", 20)
    assert reasons(caplog) == []


def test_clients_in_vdpa_mode_are_told_the_range(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """And keep to it, so that nothing has to be in between."""
    with Device(connector(path, "blk", "require")()) as device:
        assert device.identify().iova_range == IovaRange(Iova(0), Iova(LAST))
        device.own()
        with Region(Iova(FAR), 4096) as region, pytest.raises(OSError) as refused:
            device.map([region.update()])
        assert refused.value.errno == errno.EINVAL
    assert reasons(caplog) == []


def test_what_a_relay_cannot_cure_is_said_as_it_is(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """A region that its file does not fill: no way to the device makes it larger."""
    with Device(connector(path, "blk", "off")()) as device, Region(Iova(1 << 20), 4096) as region:
        device.own()
        with pytest.raises(OSError, match=r"IOTLB_UPDATE|region"):
            device.backend.call(ops.IOTLB_UPDATE, IotlbUpdate(Iova(1 << 20), 1 << 20, region.fd))


def test_client_killed_behind_a_relay(path: str, caplog: pytest.LogCaptureFixture) -> None:
    for seed in (1, 2):
        with start_client(path, "--requests", 10_000_000, "--depth", 32, "--memory-at", FAR, "--seed", seed) as client:
            end = time.monotonic() + 10
            while len(reasons(caplog)) < seed:
                assert client.poll() is None
                assert time.monotonic() < end
                time.sleep(0.01)
            client.kill()
    run_client(path, "--requests", 50, "--memory-at", FAR)


def test_server_knows_why() -> None:
    with limited() as hardware, socket_path() as path, Server(hardware.open, path) as server:
        with Device(connector(path, "blk", "off")()) as device, BlkDriver(device, ring_features=Feature.RING_PACKED):
            assert server.session is not None
            assert "packed rings" in server.session.relayed
        with Device(connector(path, "blk", "off")()) as device, BlkDriver(device):
            assert server.session is not None
            assert server.session.relayed == ""


def test_network_with_hardware_limits(caplog: pytest.LogCaptureFixture) -> None:
    """All three queues; receive buffers that the device keeps are taken back when the rings are stopped, and given again."""
    caplog.set_level(logging.INFO, "vdpa_bridge")
    rng = random.Random(3)
    with limited("net") as hardware, socket_path() as path, Server(hardware.open, path):
        for features in (0, Feature.RING_PACKED):
            with Device(connector(path, "net", "off")()) as device, NetDriver(device, ring_features=features) as nic:
                for _ in range(3):
                    frames = [b"\xff" * 6 + bytes.fromhex(nic.mac.replace(":", "")) + b"\x88\xb5" + rng.randbytes(100 + at) for at in range(20)]
                    nic.send_many(frames)
                    assert nic.receive_many(20) == frames
                    nic.suspend()
                    nic.resume()
    assert len(reasons(caplog)) == 2


# Who lies ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def relay(kind: str) -> Iterator[RelayBackend]:
    device = ModelDevice(make_model(kind, OPTIONS[kind]), f"model:{kind}")
    backend = relayed(device.open(), "for the test")
    try:
        yield backend
    finally:
        backend.close()
        device.close()


def eventually(device: Device, bit: Status) -> None:
    end = time.monotonic() + 5
    while not device.get_status() & bit:
        assert time.monotonic() < end, f"status {device.get_status()!r}"
        time.sleep(0.002)


def test_broken_ring_of_a_client_costs_that_ring(caplog: pytest.LogCaptureFixture) -> None:
    with relay("net") as backend, NetDriver(Device(backend)) as nic:
        ring = nic.ring(2)
        ring.queue.add_many([([(0x7000000000, 2)], [(0x7000000000, 1)], Pending())])
        ring.queue.publish()
        os.eventfd_write(ring.kick, 1)
        eventually(nic.device, Status.NEEDS_RESET)
        assert set(backend._runner.rings) == {0, 1}
        assert "queue 2" in caplog.text
        assert "0x7000000000" in caplog.text
        nic.restart()
        nic.set_mac("02:12:34:56:78:9a")


def test_device_that_lies_costs_a_reset(caplog: pytest.LogCaptureFixture) -> None:
    """It can write our ring as it likes: here an index that says that more is done than it was given."""
    with relay("blk") as backend, BlkDriver(Device(backend)) as disk:
        disk.write(0, b"a" * 512)
        behind = backend._rings_behind[0]
        region = backend._memory._rings
        assert region is not None
        used = Iova(behind.queue.used - region.iova)
        view = region.mapping.address + used + 2
        ctypes.c_uint16.from_address(view).value = 999
        behind.call.signal()
        eventually(disk.device, Status.NEEDS_RESET)
        assert "the device behind the relay" in caplog.text
        disk.restart()
        assert disk.read(0, 512) == b"a" * 512


class Behind(Backend):
    """Passes everything on; tests look at a request, or change an answer."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.name = backend, backend.name
        self.answers: dict[Op[Any, Any], Any] = {}
        self.seen: dict[Op[Any, Any], Any] = {}

    def call(self, op: Op[Any, Any], request: Any) -> Any:
        if op in self.seen:
            self.seen[op](request)
        reply = self.backend.call(op, request)
        return self.answers[op](reply) if op in self.answers else reply

    def capability(self, op: Op[Any, Any]) -> Capability:
        return self.backend.capability(op)

    def close(self) -> None:
        self.backend.close()


@contextmanager
def altered(model: Model | None = None) -> Iterator[tuple[Behind, RelayBackend]]:
    device = ModelDevice(model or make_model("blk", OPTIONS["blk"]), "model:blk")
    behind = Behind(device.open())
    backend = relayed(behind, "for the test")
    try:
        yield behind, backend
    finally:
        backend.close()
        device.close()


def test_device_that_gives_up_is_seen_to() -> None:
    with altered() as (behind, backend), BlkDriver(Device(backend)) as disk:
        behind.answers[ops.GET_STATUS] = lambda reply: reply.__class__(reply.value | Status.NEEDS_RESET)
        assert disk.device.get_status() & Status.NEEDS_RESET
        assert disk.device.get_status() & Status.DRIVER_OK


def test_device_that_refuses_features_is_seen_to() -> None:
    with altered() as (behind, backend):
        behind.answers[ops.GET_STATUS] = lambda reply: reply.__class__(reply.value & ~Status.FEATURES_OK)
        with pytest.raises(FeatureError):
            BlkDriver(Device(backend))


def test_client_that_says_driver_ok_alone() -> None:
    """The device behind agrees on its features all the same."""
    with altered() as (behind, backend):
        device = Device(backend)
        device.own()
        begun = Status.ACKNOWLEDGE | Status.DRIVER
        accepted: list[int] = []
        behind.seen[ops.SET_FEATURES] = lambda request: accepted.append(request.value)
        device.set_status(begun)
        backend.call(ops.SET_FEATURES, U64(Feature.VERSION_1 | Feature.ACCESS_PLATFORM))
        device.set_status(begun | Status.DRIVER_OK)
        assert accepted == [Feature.VERSION_1 | Feature.ACCESS_PLATFORM]
        assert behind.call(ops.GET_STATUS, EMPTY).value == begun | Status.FEATURES_OK | Status.DRIVER_OK
        assert device.get_status() == begun | Status.DRIVER_OK


def test_features_that_a_relay_does_not_keep_are_not_offered() -> None:
    for feature in (Feature.NOTIFICATION_DATA, Feature.RING_RESET, Feature.SR_IOV, 1 << 41):
        assert not carried(feature | Feature.VERSION_1) & feature
    for kept in (1 << 5, 1 << 23, 1 << 50, 1 << 63, Feature.RING_PACKED, Feature.RING_EVENT_IDX, Feature.ACCESS_PLATFORM, Feature.IN_ORDER):
        assert carried(kept) == kept


class Hoarder(Model):
    """Keeps the first chain of every batch, and gives the others back."""

    device_id = DeviceId.RNG
    features = 0
    queue_count = 1

    def __init__(self, keep: int) -> None:
        self.keep = keep

    def config(self) -> bytes:
        return b""

    def process(self, queues: Any, index: int) -> None:
        chains = queues[index].pop()
        self.kept = chains[: self.keep]
        queues[index].push([(chain, chain.write(b"done")) for chain in chains[self.keep :]])


def hoarding(keep: int, chains: int) -> tuple[int, Status]:
    """What GET_VRING_BASE says of a suspended ring of which the device keeps some, and the status then."""
    with altered(Hoarder(keep)) as (_, backend), Driver(Device(backend), queue_size=16) as driver:
        ring = driver.ring(0)
        pool = driver._pool.take(chains * 64)
        ring.queue.add_many([([], [(pool.iova + 64 * at, 8)], Pending()) for at in range(chains)])
        ring.queue.publish()
        os.eventfd_write(ring.kick, 1)
        got = 0
        end = time.monotonic() + 5
        while got < chains - keep:
            got += len(ring.queue.reap())
            assert time.monotonic() < end
        driver.suspend()
        base = backend.call(ops.GET_VRING_BASE, VringState(0, 0)).num
        return base, driver.device.get_status()


def test_chains_that_the_device_keeps_are_taken_back() -> None:
    base, status = hoarding(keep=5, chains=5)
    assert (base, status & Status.NEEDS_RESET) == (0, 0)
    base, status = hoarding(keep=0, chains=5)
    assert (base, status & Status.NEEDS_RESET) == (5, 0)


def test_chains_left_out_break_the_ring(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """There is no index to go on from: the ones behind them are done."""
    monkeypatch.setattr(relay_rings, "_PATIENCE", 0.2)
    _, status = hoarding(keep=2, chains=5)
    assert status & Status.NEEDS_RESET
    assert "not the 2 before them" in caplog.text


def test_reset_with_requests_under_way_frees_everything() -> None:
    with relay("blk") as backend, BlkDriver(Device(backend)) as disk:
        for seed in range(20):
            disk.submit([BlkRequest(1, at, random.Random(seed).randbytes(512)) for at in range(8)])
            disk.restart()
        assert backend.call(ops.GET_STATUS, EMPTY).value & Status.DRIVER_OK
        assert len(backend._memory._room._taken) == 3, "the interrupts' window, the driver's memory, our rings"


# Places ------------------------------------------------------------------------------------------------------------------------


def test_room_is_within_the_limits_and_apart() -> None:
    rng = random.Random(7)
    room = Room(IovaRange(Iova(0), Iova((1 << 32) - 1)))
    taken: dict[int, int] = {}
    for _ in range(2000):
        if taken and rng.random() < 0.4:
            iova = rng.choice(list(taken))
            room.give(Iova(iova), taken.pop(iova))
            continue
        size = 4096 * rng.choice([1, 3, 700, 20000])
        try:
            iova = room.take(size)
        except OSError:
            assert sum(taken.values()) > 1 << 30
            continue
        assert iova >= 1 << 20
        assert iova + size <= 1 << 32
        assert iova + size <= 0xFEE00000 or iova > 0xFEEFFFFF
        assert all(iova + size <= other or other + length <= iova for other, length in taken.items())
        taken[iova] = size


def test_room_of_a_narrow_device() -> None:
    room = Room(IovaRange(Iova(1 << 40), Iova((1 << 40) + 0x2FFF)))
    assert [room.take(0x1000) for _ in range(3)] == [1 << 40, (1 << 40) + 0x1000, (1 << 40) + 0x2000]
    with pytest.raises(OSError, match="no room"):
        room.take(0x1000)
    room.give(Iova((1 << 40) + 0x1000), 0x1000)
    assert room.take(0x1000) == (1 << 40) + 0x1000


def test_room_of_a_wide_device_is_off_the_windows_of_platforms() -> None:
    assert Room(IovaRange(Iova(0), Iova(LAST))).take(4096) == 1 << 32
    assert Room(IovaRange(Iova(0), Iova((1 << 64) - 1))).take(1 << 40) == 1 << 32


def test_show_says_so_through_a_chain() -> None:
    """Clients in vDPA mode are told that their requests pass through the server, or through one behind it."""
    with bridging("model:blk?size=1M", "--relay", "on") as relay, bridging(f"vhost-user:{relay.path}?vdpa=require") as front:
        for server in (relay, front):
            shown = CliRunner().invoke(main, ["show", f"vhost-user:{server.path}?vdpa=require"])
            assert shown.exit_code == 0, shown.output
            assert "relay         by the server: requests pass through its process" in shown.stdout
            server.settle()
    with bridging("model:blk?size=1M") as server:
        assert "relay" not in CliRunner().invoke(main, ["show", f"vhost-user:{server.path}?vdpa=require"]).stdout
