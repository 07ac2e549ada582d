# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A vDPA device as an interface of this system: what the kernel's network stack sends crosses the device, and the answers come back."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.device import Device
from vdpa_bridge.drivers.tap import TapDriver
from vdpa_bridge.models.base import Queue
from vdpa_bridge.models.net import NetModel
from vdpa_bridge.tap import Tap
from vdpa_bridge.virtio.features import NetFeature

from ..support.bridge import bridging, node
from ..support.seen import Seen
from ..support.tapped import Wire, attribute, bounce, exists, ip, tap_name, tapped

pytestmark = pytest.mark.lab

RX, TX = 0, 1
KIND = b"\x88\xb5"
"""Local experimental use: no stack answers it."""


# Whole ways ------------------------------------------------------------------------------------------------------------------


def test_ping_crosses_a_pci_function(seen: Seen) -> None:
    """ping -> this system's stack -> tap -> our driver -> /dev/vhost-vdpa-N (vp_vdpa, IOMMU) -> the emulated NIC's network, and back: captured."""
    out = Path(os.environ.get("LAB_OUT", "/tmp"))
    with tapped(node("VP_NET"), "--up") as tap:
        ip("address", "add", "10.0.2.15/24", "dev", tap.name)
        with Wire(tap.name) as wire:
            ping = ["busybox", "ping", "-c", "3", "-i", "0.2", "-s", "900", "-W", "5", "-I", tap.name, "10.0.2.2"]
            done = subprocess.run(ping, capture_output=True, text=True, timeout=60, check=False)
            while wire.look(0.2):
                pass
            wire.write_pcap(out / "ping.pcap")
        assert "3 packets received, 0% packet loss" in done.stdout, done.stdout + done.stderr
        echoes = [(sent, frame) for _, sent, frame in wire.seen if frame[12:14] == b"\x08\x00" and frame[23] == socket.IPPROTO_ICMP]
        asked = [frame for sent, frame in echoes if sent]
        answered = [frame for sent, frame in echoes if not sent]
        assert ([frame[34] for frame in asked], [frame[34] for frame in answered]) == ([8] * 3, [0] * 3)
        mine, theirs = bytes((10, 0, 2, 15)), bytes((10, 0, 2, 2))
        for question, answer in zip(asked, answered, strict=True):
            assert (question[26:34], answer[26:34]) == (mine + theirs, theirs + mine)
            assert question[38:] == answer[38:], "identifier, sequence number and 900 bytes"
            assert answer[:6].hex(":") == attribute(tap.name, "address")
        said = tap.end()
    assert "stopped by SIGTERM: sent" in said
    assert tap.process.returncode == 0
    seen("devices", "net", "net", "vp_vdpa", "split", "tap")


@contextmanager
def target(home: str) -> Iterator[str]:
    """Networks that loop back."""
    if home == "sim":
        yield node("SIM_NET")
        return
    with bridging("model:net?mtu=1400") as bridge:
        yield f"vhost-user:{bridge.path}?type=net&vdpa=require"


@pytest.mark.parametrize("home", ["sim", "vdpa"])
def test_frames_cross(home: str, seen: Seen) -> None:
    """Of all sizes, in bursts, every byte of them; the interface has the device's address and MTU, and goes with the process."""
    rng = random.Random(9)
    with target(home) as place, tapped(place, "--up") as tap:
        mtu = int(attribute(tap.name, "mtu"))
        mac = attribute(tap.name, "address")
        assert f"(mac {mac}, mtu {mtu})" in tap.ready
        assert (mac, mtu) == ("02:aa:bb:cc:dd:01", 1500) if home == "sim" else ("02:00:00:00:00:01", 1400)
        sizes = [46, mtu, *(rng.randrange(46, mtu) for _ in range(150))]
        frames = [b"\xff" * 6 + bytes.fromhex(mac.replace(":", "")) + KIND + at.to_bytes(2, "big") + rng.randbytes(size - 2) for at, size in enumerate(sizes)]
        with Wire(tap.name) as wire:
            assert bounce(wire, frames) == frames
        assert "dropped 0, received" in tap.end(signal.SIGINT)
        assert tap.process.returncode == 0
        assert not exists(tap.name)
    seen("devices", "net", "net", *(["vdpa_sim", "split"] if home == "sim" else ["vdpa-bridge", "split", "vDPA mode"]), "tap")


# Ends ------------------------------------------------------------------------------------------------------------------------


def test_interface_is_taken_away() -> None:
    with tapped("model:net", "--up") as tap:
        ip("link", "delete", tap.name)
        said = tap.process.communicate(timeout=30)[1]
        assert f"tap {tap.name}: " in said
        assert "is the interface gone?" in said
        assert tap.process.returncode == 1


def test_device_is_taken_away() -> None:
    with bridging("model:net") as bridge, tapped(f"vhost-user:{bridge.path}?type=net", "--up") as tap:
        bridge.process.kill()
        said = tap.process.communicate(timeout=30)[1]
        assert "closed the connection" in said
        assert tap.process.returncode == 1
        assert not exists(tap.name)


def test_interface_that_persists() -> None:
    """Made beforehand, used by one after the other, and there afterwards."""
    name = tap_name()
    ip("tuntap", "add", "dev", name, "mode", "tap")
    try:
        for _ in range(2):
            with opened(NetModel(bytes.fromhex("020000000055")), name):
                assert attribute(name, "address") == "02:00:00:00:00:55"
            assert exists(name)
    finally:
        ip("link", "delete", name)


def test_interfaces_that_cannot_be_had() -> None:
    """Each with what to do about it."""
    name = tap_name()
    with pytest.raises(OSError, match="interface of that name that is no tap"):
        Tap("lo")
    with Tap(name), pytest.raises(OSError, match="another process is attached"):
        Tap(name)
    for wrong in ("", "x" * 16, "a/b", "a b", "..", "tab\there"):
        with pytest.raises(ValueError, match="is no name of an interface"):
            Tap(wrong)
    command = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-m", "vdpa_bridge", "net", "model:net", "tap", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"ip tuntap add dev {name} mode tap" in done.stderr


# Offloads --------------------------------------------------------------------------------------------------------------------


class Scribe(NetModel):
    """Keeps what is sent, and gives back what a test puts into ``answers``, header and all."""

    def __init__(self, features: int) -> None:
        super().__init__(bytes.fromhex("020000000077"))
        self.features = super().features | features
        self.kept: list[bytes] = []
        self.answers: list[bytes] = []

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        if index != TX or RX not in queues:
            return
        if not (sent := queues[TX].pop()):
            return
        self.kept += [chain.read() for chain in sent]
        answers, self.answers = self.answers, []
        queues[RX].push([(room, room.write(answer)) for room, answer in zip(queues[RX].pop(len(answers)), answers, strict=True)])
        queues[TX].push([(chain, 0) for chain in sent])


@contextmanager
def opened(model: NetModel, name: str) -> Iterator[TapDriver]:
    """*model* forwarding to the interface, in a thread."""
    home = ModelDevice(model, "model:test")
    stop = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        with Tap(name) as tap, Device(home.open()) as device, TapDriver(device, tap) as nic:
            tap.set_up()
            thread = threading.Thread(target=nic.forward, args=(stop,))
            thread.start()
            try:
                yield nic
            finally:
                os.eventfd_write(stop, 1)
                thread.join(20)
    finally:
        home.close()
        os.close(stop)


def checksum(data: bytes) -> int:
    """The Internet's, of an even number of bytes; 0 when one is inside and right."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@pytest.mark.parametrize("offers", [True, False], ids=["csum", "plain"])
def test_checksums_are_left_to_who_makes_them(offers: bool) -> None:
    """A datagram of this system comes with an unfinished checksum, and says so, exactly when the device finishes them."""
    name = tap_name()
    model = Scribe(NetFeature.CSUM if offers else 0)
    with opened(model, name), Wire(name) as wire, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        ip("address", "add", "198.51.100.1/24", "dev", name)
        ip("neighbour", "add", "198.51.100.2", "lladdr", "02:00:00:00:00:99", "dev", name)
        sock.sendto(b"even", ("198.51.100.2", 9))
        while not [frame for frame in model.kept if frame[12 + 23 : 12 + 24] == b"\x11" and frame[12 + 30 : 12 + 34] == bytes((198, 51, 100, 2))]:
            assert wire.look(10), "no datagram"
        (frame,) = [frame for frame in model.kept if frame[12 + 30 : 12 + 34] == bytes((198, 51, 100, 2))]
    header, packet = frame[:12], frame[12 + 14 :]
    pseudo = packet[12:20] + struct.pack("!HH", 17, len(packet) - 20)
    assert header == (struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 6, 0) if offers else bytes(12))
    assert (checksum(pseudo + packet[20:]) == 0) != offers


@pytest.mark.parametrize("offers", [True, False], ids=["guest-csum", "plain"])
def test_headers_of_frames_that_come(offers: bool) -> None:
    """A header that makes no sense costs the frame where headers have a meaning, and nothing where none was agreed on."""
    name = tap_name()
    model = Scribe(NetFeature.GUEST_CSUM if offers else 0)
    me = bytes.fromhex("020000000077")
    good = [b"\xff" * 6 + me + KIND + bytes([at]) * 60 for at in range(3)]
    nonsense = struct.pack("<BBHHHHH", 1, 0, 0, 0, 9999, 60000, 1)
    with opened(model, name) as nic, Wire(name) as wire:
        model.answers = [bytes(12) + good[0], nonsense + good[1], bytes(12) + good[2]]
        wire.send(b"\xff" * 6 + me + b"\x88\xb6" + bytes(60))
        while len(wire.came(KIND)) < 3 - offers:
            assert wire.look(10), "frames are missing"
    assert wire.came(KIND) == ([good[0], good[2]] if offers else good)
    assert nic.came.dropped == offers
