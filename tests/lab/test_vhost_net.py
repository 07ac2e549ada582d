# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The kernel's own vhost-net on a tap: what a driver sends the network of this machine receives, and the other way round."""

from __future__ import annotations

import errno
import os
import random
import select
import shutil
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdpa_bridge import Device, connect, ops
from vdpa_bridge.backends.vhost_kernel import most_mappings
from vdpa_bridge.device import RingSetup
from vdpa_bridge.drivers import NetDriver
from vdpa_bridge.drivers.net import WANTED
from vdpa_bridge.drivers.ring import Pending
from vdpa_bridge.errors import DeviceBroken
from vdpa_bridge.flags import BackendFeature as B
from vdpa_bridge.flags import Status
from vdpa_bridge.memory import Region
from vdpa_bridge.virtio.config import parse_mac
from vdpa_bridge.virtio.features import NetFeature as F
from vdpa_bridge.wire import RO, RW, IotlbInvalidate, IotlbUpdate, Iova, VringState

from ..peers.test_testpmd import bounce
from ..support import taps
from ..support.bridge import Bridge, bridging
from ..support.seen import Seen
from ..support.tapped import attribute, exists, ip

pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(taps.missing()), reason=taps.missing())]
RX, TX = 0, 1
RUNNING = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
STATION = bytes.fromhex("0200000000fe")
BROADCAST = b"\xff" * 6


@pytest.fixture
def tap() -> Iterator[str]:
    with taps.tap() as name:
        yield name


@pytest.fixture
def device(tap: str) -> Iterator[Device]:
    with connect(f"vhost-net:{tap}") as device:
        yield device


@pytest.fixture(scope="module")
def echo_bridge() -> Iterator[Bridge]:
    """A NIC on a tap that gives every frame back, served by another process."""
    with taps.tap(echo=True) as name, bridging(f"vhost-net:{name}") as bridge:
        yield bridge


def frames(count: int, seed: int = 1) -> list[bytes]:
    """Of all sizes, each with its number."""
    rng = random.Random(seed)
    return [BROADCAST + STATION + b"\x88\xb5" + at.to_bytes(4, "big") + rng.randbytes(42 + at * 37 % 1455) for at in range(count)]


@pytest.mark.parametrize("wanted", [WANTED, WANTED | F.MRG_RXBUF], ids=["plain", "mergeable"])
def test_frames_both_ways(tap: str, device: Device, wanted: int, seen: Seen) -> None:
    """Byte for byte, in order, again after a restart; the interface has counted them and nothing else."""
    there, back = frames(300, 1), frames(300, 2)
    with taps.wire(tap) as wire, NetDriver(device, wanted=wanted, queue_size=64) as nic:
        assert bool(nic.features & F.MRG_RXBUF) == bool(wanted & F.MRG_RXBUF)
        before = taps.counters(tap)
        for _ in range(2):
            for at in range(0, 300, 30):
                nic.send_many(there[at : at + 30])
                for frame in back[at : at + 30]:
                    wire.send(frame)
                assert [wire.recv(2048) for _ in range(30)] == there[at : at + 30]
                assert nic.receive_many(30) == back[at : at + 30]
            nic.restart()
        after = taps.counters(tap)
    got = {key: after[key] - before[key] for key in before}
    assert (got["rx_packets"], got["rx_bytes"]) == (600, 2 * sum(map(len, there)))
    assert (got["tx_packets"], got["tx_bytes"]) == (600, 2 * sum(map(len, back)))
    assert not got["rx_dropped"] + got["tx_dropped"] + got["rx_errors"] + got["tx_errors"]
    seen("devices", "net", "net", "vhost-net", "split", "restart")


def test_suspend_keeps_the_place(tap: str, device: Device, seen: Seen) -> None:
    """Nothing leaves a suspended device; what waits on either side goes on its way with RESUME, without a kick."""
    with taps.wire(tap, timeout=5) as wire, NetDriver(device) as nic:
        for number in range(5):
            nic.send(frames(1, number)[0])
            wire.recv(2048)
        nic.suspend()
        assert device.get_vring_base(TX) == 5
        assert device.get_vring_base(RX) == 0
        out, back = frames(2, 7)
        nic.post(TX, [bytes(nic.header) + out])
        wire.send(back)
        assert not select.select([wire], [], [], 0.1)[0]
        assert device.get_vring_base(TX) == 5
        nic.resume()
        assert wire.recv(2048) == out
        assert nic.receive() == back
    seen("devices", "net", "net", "vhost-net", "pause")


def test_one_ring_off(tap: str, device: Device) -> None:
    """The other goes on."""
    with taps.wire(tap, timeout=5) as wire, NetDriver(device) as nic:
        out, back = frames(2, 3)
        device.backend.call(ops.SET_VRING_ENABLE, VringState(RX, 0))
        wire.send(back)
        nic.send(out)
        assert wire.recv(2048) == out
        assert nic.receive_many(1, timeout=0.1) == []
        device.backend.call(ops.SET_VRING_ENABLE, VringState(RX, 1))
        assert nic.receive() == back


# The interface ---------------------------------------------------------------------------------------------------------------


def test_configuration_is_the_taps(tap: str, device: Device) -> None:
    with NetDriver(device) as nic:
        assert nic.link_up
        assert nic.mtu == 1500
        assert parse_mac(nic.mac)[0] & 3 == 2, "locally administered, of one station"
        assert nic.mac != attribute(tap, "address")
        ip("link", "set", "dev", tap, "down", "mtu", "2000")
        assert not nic.link_up
        nic.restart()
        assert nic.mtu == 2000
        assert device.get_config(8, 2) == b"\x01\0"


def test_address_of_the_target(tap: str) -> None:
    with connect(f"vhost-net:{tap}?mac=52:54:00:12:34:56") as device, NetDriver(device) as nic:
        assert nic.mac == "52:54:00:12:34:56"


def test_targets_that_cannot_be(tap: str) -> None:
    """A tap that others use, an interface that is none; each time with what to do."""
    with connect(f"vhost-net:{tap}"), pytest.raises(OSError, match="another process is attached") as refused:
        connect(f"vhost-net:{tap}")
    assert refused.value.errno == errno.EBUSY
    with pytest.raises(OSError, match="no tap, or one without several queues"):
        connect("vhost-net:lo")


def test_a_queue_of_a_tap_with_several(tap: str) -> None:
    """One of them is enough, for as long as nobody has the others."""
    ip("link", "delete", "dev", tap)
    ip("tuntap", "add", "dev", tap, "mode", "tap", "multi_queue")
    ip("link", "set", "dev", tap, "up")
    with connect(f"vhost-net:{tap}") as device, NetDriver(device) as nic, taps.wire(tap) as wire:
        nic.send(frames(1)[0])
        while (frame := wire.recv(2048))[12:14] != b"\x88\xb5":
            pass
        assert frame == frames(1)[0]


def test_tap_for_the_time_of_a_session(tap: str) -> None:
    """One that nobody made is made, and goes with the device."""
    ip("link", "delete", "dev", tap)
    with connect(f"vhost-net:{tap}") as device, NetDriver(device) as nic:
        assert exists(tap)
        assert not nic.link_up
        nic.send(frames(1)[0])
        ip("link", "set", "dev", tap, "up")
        assert nic.link_up
        with taps.wire(tap) as wire:
            nic.send(frames(2)[1])
            while (frame := wire.recv(2048))[12:14] != b"\x88\xb5":
                pass
        assert frame == frames(2)[1]
    assert not exists(tap)


def test_tap_goes(device: Device, tap: str) -> None:
    """The link is down, the device needs a reset when it sends, and the next start is refused: another tap of that name is no heir."""
    with NetDriver(device) as nic:
        ip("link", "delete", "dev", tap)
        assert not nic.link_up
        with pytest.raises(DeviceBroken, match="NEEDS_RESET"):
            nic.send(frames(1)[0])
        ip("tuntap", "add", "dev", tap, "mode", "tap")
        for _ in range(2):
            device.negotiate(0)
            with pytest.raises(OSError, match="is the interface gone") as refused:
                device.set_status(RUNNING)
            assert refused.value.errno == errno.EBADFD


def checksum(data: bytes) -> int:
    """The internet's (RFC 1071): 0 over data that carries the right one."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data if len(data) % 2 == 0 else data[:-1])) + (data[-1] << 8 if len(data) % 2 else 0)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def pseudo(packet: bytes) -> bytes:
    """What a UDP checksum is over, for an IPv4 packet without options."""
    return packet[12:20] + struct.pack("!HH", 17, len(packet) - 20) + packet[20:]


@pytest.mark.parametrize("offload", [0, F.GUEST_CSUM], ids=["complete", "offloaded"])
def test_sockets_of_this_machine(tap: str, device: Device, offload: int) -> None:
    """UDP to and from the kernel's own network. A driver that completes no checksums gets complete ones."""
    ip("address", "add", "192.0.2.1/24", "dev", tap)
    with NetDriver(device, wanted=WANTED | offload) as nic, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        ip("neighbour", "replace", "192.0.2.2", "lladdr", nic.mac, "dev", tap)
        sock.settimeout(5)
        sock.bind(("192.0.2.1", 7777))
        for size in (1, 100, 1472):
            text = os.urandom(size)
            sock.sendto(text, ("192.0.2.2", 8888))
            while (frame := nic.receive())[12:14] != b"\x08\x00" or frame[23] != 17:
                pass
            packet = frame[14:]
            assert (packet[28:], checksum(packet[:20])) == (text, 0)
            assert (checksum(pseudo(packet)) == 0) == (not offload)
            head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28 + size, size, 0, 64, 17, 0, packet[16:20], packet[12:16])
            head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
            udp = struct.pack("!HHHH", 8888, 7777, 8 + size, 0) + text[::-1]
            udp = udp[:6] + struct.pack("!H", checksum(pseudo(head + udp))) + udp[8:]
            nic.send(frame[6:12] + frame[:6] + b"\x08\x00" + head + udp)
            assert sock.recv(2048) == text[::-1]


# Wrong drivers ---------------------------------------------------------------------------------------------------------------


def test_address_that_is_not_mapped(tap: str, device: Device, caplog: pytest.LogCaptureFixture) -> None:
    """The device asks for a reset, says why, and is as new after it. Kicks do no more."""
    with taps.wire(tap) as wire, NetDriver(device) as nic:
        ring = nic.ring(TX)
        ring.queue.add_many([([(0x700000000000, 100)], [], Pending())])
        ring.queue.publish()
        os.eventfd_write(ring.kick, 1)
        with pytest.raises(DeviceBroken, match="NEEDS_RESET"):
            nic.receive()
        for _ in range(100):
            os.eventfd_write(ring.kick, 1)
        assert "0x700000000000 is not mapped" in caplog.text
        assert caplog.text.count("needs a reset") == 1
        nic.restart()
        (frame,) = frames(1)
        nic.send(frame)
        assert wire.recv(2048) == frame


def test_memory_of_a_working_ring_goes(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    """The kernel finds the ring no more, and touches nothing that may lie there now."""
    with NetDriver(device) as nic:
        device.backend.call(ops.IOTLB_INVALIDATE, IotlbInvalidate(Iova(0), (1 << 64) - 1))
        os.eventfd_write(nic.ring(TX).kick, 1)
        with pytest.raises(DeviceBroken, match="NEEDS_RESET"):
            nic.receive()
        assert "is not mapped" in caplog.text
        nic.restart()
        nic.send(frames(1)[0])


def test_ring_in_memory_that_may_only_be_read(device: Device) -> None:
    """The permission of a mapping holds for the kernel, too."""
    device.negotiate(0)
    with Region(Iova(0x100000), 1 << 16) as region:
        setup = RingSetup(TX, 16, region.iova, region.iova + 4096, region.iova + 8192)
        with pytest.raises(DeviceBroken, match="NEEDS_RESET"):
            device.start([setup], [region.update(RO)])
        device.negotiate(0)
        device.unmap([region.update()])
        device.start([setup], [region.update(RW)])
        device.reset()


def test_more_mappings_than_the_kernel_holds(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would forget the oldest in silence. Its limit is what it says, and takes long to reach."""
    assert most_mappings() == int(Path("/sys/module/vhost/parameters/max_iotlb_entries").read_text())
    limit = 16
    monkeypatch.setattr(device.backend, "_most", limit)
    device.own()
    with Region(Iova(0), 4096) as page:
        many = [IotlbUpdate(Iova(n * 8192), 4096, page.fd) for n in range(limit + 1)]
        device.map(many[:-1])
        with pytest.raises(OSError, match="max_iotlb_entries") as refused:
            device.map(many[-1:])
        assert refused.value.errno == errno.ENOSPC
        device.unmap(many[:1])
        device.map(many[-1:])


# Served ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vdpa", ["off", "require"], ids=["legacy", "vdpa-mode"])
def test_served(echo_bridge: Bridge, vdpa: str) -> None:
    """To a client in another process, whose frames the serving process never sees: not one context switch, no call."""
    with echo_bridge.device("net", vdpa) as device, NetDriver(device) as nic:
        nic.send(frames(1)[0])
        assert nic.receive() == frames(1)[0]
        before = echo_bridge.rest()
        for frame in frames(200):
            nic.send(frame)
            assert nic.receive() == frame
        assert echo_bridge.expenses() == before
        nic.restart()
        nic.send(frames(1)[0])
        assert nic.receive() == frames(1)[0]
    echo_bridge.settle()


@pytest.mark.skipif(not shutil.which("dpdk-testpmd"), reason="needs dpdk-testpmd: run tools/setup dpdk")
def test_served_to_testpmd(echo_bridge: Bridge, seen: Seen) -> None:
    with tempfile.TemporaryDirectory(prefix="vb") as directory:
        assert bounce(echo_bridge.path, Path(directory), frames(100)) == frames(100)
    echo_bridge.settle()
    seen("clients", "dpdk-testpmd", "net", "vhost-net", "split", "memory table")


def test_backend_features(device: Device) -> None:
    """What the kernel's IOTLB has, and what a stop and a start of its rings amount to."""
    device.own()
    assert device.backend_features & (B.SUSPEND | B.RESUME) == B.SUSPEND | B.RESUME
    assert not device.backend_features & B.IOTLB_ASID
