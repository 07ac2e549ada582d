# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Kernel devices given to vhost-user clients by a separate process: what clients do, on the simulators and on a PCI function.

A client's memory goes to the kernel as IOTLB updates, its kick and call eventfds as they are.
"""

from __future__ import annotations

import os
import random
import struct

import pytest

from vdpa_bridge import connect, ops
from vdpa_bridge.drivers import BlkDriver, NetDriver
from vdpa_bridge.drivers.ring import Pending
from vdpa_bridge.flags import Feature
from vdpa_bridge.memory import Region
from vdpa_bridge.virtio.features import BlockFeature
from vdpa_bridge.wire import Iova, VringState

from ..support import bare
from ..support.bare import Bare
from ..support.bridge import REFUSED, Bridge, bridging, node, run_client, start_client
from ..support.seen import Seen

pytestmark = pytest.mark.lab

MODES = pytest.mark.parametrize("vdpa", ["off", "require"], ids=["legacy", "vdpa-mode"])
BROADCAST = b"\xff" * 6
STATION = bytes.fromhex("02aabbccdd77")
WORD = {"off": "legacy", "require": "vDPA mode"}


def exchange(disk: BlkDriver, seed: int, rounds: int = 6) -> None:
    """Write at odd places, read back, all of it."""
    rng = random.Random(seed)
    mirror = bytearray(disk.read(0, 1 << 18))
    for _ in range(rounds):
        length = 512 * rng.choice([1, 3, 8, 100])
        offset = 512 * rng.randrange((len(mirror) - length) // 512)
        data = rng.randbytes(length)
        disk.write(offset, data)
        mirror[offset : offset + length] = data
    disk.flush()
    assert disk.read(0, len(mirror)) == mirror


# Disks -------------------------------------------------------------------------------------------------------------------


@MODES
def test_disk(disk_bridge: Bridge, vdpa: str, seen: Seen) -> None:
    """Data goes in and out, again after a restart, and lies on the device when it is opened without the bridge."""
    data = random.Random(vdpa).randbytes(64 << 10)
    with disk_bridge.device("blk", vdpa) as device, BlkDriver(device) as disk:
        exchange(disk, 1)
        disk.restart()
        exchange(disk, 2)
        disk.write(1 << 20, data)
        disk.flush()
        serial = disk.get_id()
    disk_bridge.release()
    with connect(disk_bridge.target) as device, BlkDriver(device) as disk:
        assert disk.read(1 << 20, len(data)) == data
        assert disk.get_id() == serial
    seen("clients", "vdpa_bridge", "blk", disk_bridge.kind, "split", "restart", WORD[vdpa])


@MODES
def test_other_features_after_a_restart(disk_bridge: Bridge, vdpa: str) -> None:
    """Firmware and the system after it agree on different bits, on one connection."""
    with disk_bridge.device("blk", vdpa) as device:
        for wanted, rings in ((0, 0), (BlockFeature.FLUSH | BlockFeature.SEG_MAX, Feature.RING_INDIRECT_DESC | Feature.RING_EVENT_IDX), (0, 0)):
            with BlkDriver(device, wanted=wanted, ring_features=rings) as disk:
                assert not disk.features & ~(wanted | rings | Feature.VERSION_1 | Feature.ACCESS_PLATFORM)
                exchange(disk, 3, rounds=3)


@MODES
def test_memory_added_while_running(disk_bridge: Bridge, vdpa: str, seen: Seen) -> None:
    """A second region is there at once, and what was there before stays there when it is taken away."""
    with disk_bridge.device("blk", vdpa) as device, BlkDriver(device) as disk, Region(Iova(1 << 32), 1 << 20) as more:
        before = disk.read(0, 4096)
        device.map([more.update()])
        header, data, status = more.allocate(16), more.allocate(4096, 4096), more.allocate(1)
        for kind, text in ((1, b"later " * 682 + b"...."), (0, bytes(4096))):
            header.data[:] = struct.pack("<IIQ", kind, 0, 2048)
            data.data[:], status.data[:] = text, b"\xff"
            where = (data.iova, 4096)
            chain = [(header.iova, 16)] + [where] * (kind == 1), [where] * (kind == 0) + [(status.iova, 1)]
            done = Pending()
            assert disk.ring(0).submit([(*chain, done)]) == 1
            disk.wait(lambda done=done: done.written >= 0, "a request in memory that came later")
            assert bytes(status.data) == b"\0"
        assert bytes(data.data) == b"later " * 682 + b"...."
        device.unmap([more.update()])
        assert disk.read(0, 4096) == before
        assert disk.read(2048 * 512, 4096) == b"later " * 682 + b"...."
    seen("clients", "vdpa_bridge", "blk", disk_bridge.kind, "memory hotplug", WORD[vdpa])


def test_clients_follow_one_another(disk_bridge: Bridge) -> None:
    for turn, vdpa in enumerate(("off", "require", "off")):
        with disk_bridge.device("blk", vdpa) as device, BlkDriver(device) as disk:
            assert disk.read(0, 4096) == bytes([turn]) * 4096 or turn == 0
            disk.write(0, bytes([turn + 1]) * 4096)
            disk.flush()


@pytest.mark.parametrize("options", [(), ("--mem-table",), ("--turns", "3"), ("--depth", "32", "--bytes", "16384")], ids=["slots", "table", "turns", "deep"])
def test_foreign_client(disk_bridge: Bridge, options: tuple[str, ...], seen: Seen) -> None:
    """A client without any of our code: what it reads is what it wrote, and GET_VRING_BASE says how many requests it made."""
    assert run_client(disk_bridge.path, "--requests", 200, *options)["reads"]["requests"] >= 200
    seen("clients", "vhost-blk-client", "blk", disk_bridge.kind, "split", "memory table" if "--mem-table" in options else "memory slots", *["restart"] * ("--turns" in options))


@pytest.mark.parametrize("options", [(), ("--mem-table",)], ids=["slots", "table"])
def test_foreign_client_moves_to_new_memory(disk_bridge: Bridge, options: tuple[str, ...], seen: Seen) -> None:
    """Memory that comes while the ring runs: nothing that was there is touched, so no device has to stop for it."""
    run_client(disk_bridge.path, "--requests", 200, "--grow", *options)
    seen("clients", "vhost-blk-client", "blk", disk_bridge.kind, "memory hotplug", "memory slots" if not options else "memory table")


@pytest.mark.parametrize("mode", bare.MODES)
def test_memory_that_ends_within_a_page(disk_bridge: Bridge, mode: str) -> None:
    """The kernel gets the last page as a whole, and a device reads into it."""
    with Bare(disk_bridge.path, mode) as client:
        end = bare.SIZE - 0x4F0
        os.ftruncate(client.memory, end)
        client.start()
        assert client.share(size=bare.SIZE if mode == "vdpa" else end) == 0
        assert client.ring() == 0
        os.pwrite(client.memory, b"\xff" * 512, bare.SIZE - 4096)
        client.fill(data_at=bare.BASE + bare.SIZE - bare.STEP * 4096)
        client.offer(bare.STEP)
        client.wait_done(bare.STEP)
        assert client.statuses() == bytes(bare.STEP)
        assert os.pread(client.memory, 512, bare.SIZE - 4096) != b"\xff" * 512


def test_client_killed_at_work(disk_bridge: Bridge, seen: Seen) -> None:
    """With requests in flight; the next client gets a device that knows nothing of them."""
    for seed in (5, 6):
        with start_client(disk_bridge.path, "--requests", 10_000_000, "--depth", 32, "--seed", seed) as client:
            before = disk_bridge.expenses()["switches"]
            while disk_bridge.expenses()["switches"] < before + 10:  # the bring-up is behind it
                assert client.poll() is None
            client.kill()
        run_client(disk_bridge.path, "--requests", 100, "--seed", seed)
    seen("clients", "vhost-blk-client", "blk", disk_bridge.kind, "successor")


def test_restart_where_the_ring_stood(sim_blk: Bridge, seen: Seen) -> None:
    run_client(sim_blk.path, "--requests", 50, "--turns", 3, "--keep-index")
    sim_blk.release()
    seen("clients", "vhost-blk-client", "blk", sim_blk.kind, "pause")


def test_hardware_cannot_restart_where_the_ring_stood() -> None:
    """vp_vdpa takes no index but 0: without a relay the client is refused, the log has the reason and the way out, the next one is served."""
    with bridging(node("VP_BLK"), "--relay", "off") as bridge:
        said = run_client(bridge.path, "--requests", 50, "--turns", 2, "--keep-index", status=REFUSED)["error"]
        assert "refuses request" in said
        line = next(line for line in bridge.said().splitlines() if "SET_VRING_BASE" in line)
        assert bridge.target in line
        assert "index 0" in line
        bridge.works()
        bridge.release()


# Networks ----------------------------------------------------------------------------------------------------------------


@MODES
def test_frames_loop_back(sim_net: Bridge, vdpa: str, seen: Seen) -> None:
    """Every byte of them; the control queue works as well."""
    rng = random.Random(4)
    frames = [BROADCAST + STATION + b"\x88\xb5" + rng.randbytes(size) for size in (46, 60, 999, 1500)]
    with sim_net.device("net", vdpa) as device, NetDriver(device) as nic:
        for _ in range(2):
            for frame in frames:
                nic.send(frame)
                assert nic.receive() == frame
            nic.set_mac("02:aa:bb:cc:dd:77")
            own = STATION + STATION + b"\x88\xb5" + rng.randbytes(100)
            nic.send(own)
            assert nic.receive() == own
            nic.set_mac("02:aa:bb:cc:dd:01")
            nic.restart()
    sim_net.release()
    seen("clients", "vdpa_bridge", "net", sim_net.kind, "split", "restart", "control queue", WORD[vdpa])


@MODES
def test_the_network_answers(vp_net: Bridge, vdpa: str, seen: Seen) -> None:
    """A NIC behind an IOMMU, all rings with interrupts: who has 10.0.2.2? Asked again after a restart."""
    with vp_net.device("net", vdpa) as device, NetDriver(device) as nic:
        mac = bytes.fromhex(nic.mac.replace(":", ""))
        ask = BROADCAST + mac + b"\x08\x06" + struct.pack(">HHBBH", 1, 0x800, 6, 4, 1) + mac + bytes((10, 0, 2, 15)) + bytes(6) + bytes((10, 0, 2, 2))
        for _ in range(2):
            nic.send(ask.ljust(60, b"\0"))
            answer = nic.receive()
            while answer[12:14] != b"\x08\x06":
                answer = nic.receive()
            assert answer[:6] == mac
            assert answer[20:22] == b"\0\2"
            assert answer[28:32] == bytes((10, 0, 2, 2))
            nic.restart()
    vp_net.release()
    seen("clients", "vdpa_bridge", "net", vp_net.kind, "split", "restart", WORD[vdpa])


def test_position_of_a_ring_that_the_device_does_not_tell(vp_blk: Bridge) -> None:
    """Legacy mode has GET_VRING_BASE where the kernel driver has none: used.idx is the answer, all that was taken being done."""
    with vp_blk.device("blk") as device, BlkDriver(device) as disk:
        for at in range(7):
            disk.write(at * 512, bytes(512))
        disk.suspend()
        assert device.backend.call(ops.GET_VRING_BASE, VringState(0, 0)).num == 7
    vp_blk.release()
