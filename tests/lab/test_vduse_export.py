# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Devices from elsewhere as devices of this kernel, by VDUSE: file systems, frames, nodes, and ends of all kinds."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vdpa_bridge import connect, ops
from vdpa_bridge.backends.vhost_vdpa import VhostVdpa
from vdpa_bridge.drivers import BlkDriver
from vdpa_bridge.drivers.base import RING_FEATURES
from vdpa_bridge.flags import Feature, Status
from vdpa_bridge.system.vdpa_bus import bus_device
from vdpa_bridge.wire import EMPTY, U8, U64

from ..support.bridge import bridging
from ..support.homes import storage_daemon
from ..support.seen import Seen

pytestmark = pytest.mark.lab
MIB = 1 << 20
RING_PACKED = 34
SIZE = 16 * MIB


@pytest.fixture(scope="module", autouse=True)
def kernel_modules() -> None:
    if "VDPA_SIM_NET" not in os.environ:
        pytest.skip("no $VDPA_SIM_NET: run it in the lab, tools/lab pytest -m lab tests/lab")
    subprocess.run(["modprobe", "-a", "vduse", "virtio_vdpa", "vhost_vdpa", "virtio_blk", "virtio_net", "ext4", "tun"], check=True, timeout=60)


def until(what: str, true: Callable[[], Any], patience: float = 20) -> Any:
    """What *true* returns as soon as it is something."""
    end = time.monotonic() + patience
    while not (found := true()):
        assert time.monotonic() < end, f"not within {patience:g} s: {what}"
        time.sleep(0.02)
    return found


class Exported:
    """``vdpa-bridge vduse``, running."""

    def __init__(self, name: str, target: str, *options: str) -> None:
        self.name = name
        self._log = Path(os.environ.get("TMPDIR", "/tmp"), f"vduse-{name}.log")
        command = [sys.executable, "-m", "vdpa_bridge", "vduse", name, target, "--json", *options]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True)

    def ready(self) -> dict[str, Any]:
        """What it says when the device is there."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.said()
        return dict(json.loads(line))

    def said(self) -> str:
        """Its log."""
        return self._log.read_text()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its status after a signal."""
        self.process.send_signal(number)
        return self.process.wait(30)


@contextmanager
def exported(name: str, target: str, *options: str) -> Iterator[Exported]:
    """A device for a while. What is left of it afterwards is taken away."""
    process = Exported(name, target, *options)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.end()
        assert process.process.stdout is not None
        process.process.stdout.close()


def gone(name: str) -> bool:
    return not Path("/dev/vduse", name).exists() and bus_device(name) is None


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def mounted(disk: str, place: Path) -> Iterator[None]:
    run("mount", disk, str(place))
    try:
        yield
    finally:
        run("umount", str(place))


def ring_format(name: str) -> str:
    """What the kernel's driver agreed on."""
    (features,) = Path("/sys/bus/vdpa/devices", name).glob("virtio*/features")
    return "packed" if features.read_text()[RING_PACKED] == "1" else "split"


def carries_a_file_system(disk: str, place: Path) -> None:
    """Make one, fill it, look at it with nothing in the page cache, check it."""
    place.mkdir()
    run("mkfs.ext4", "-q", disk)
    files = {f"f{number}": os.urandom(number * 100_001) for number in range(1, 9)}
    with mounted(disk, place):
        for file, data in files.items():
            (place / file).write_bytes(data)
        os.remove(place / "f3")
    Path("/proc/sys/vm/drop_caches").write_text("3")
    with mounted(disk, place):
        assert {path.name for path in place.iterdir()} == {*files, "lost+found"} - {"f3"}
        assert all((place / file).read_bytes() == data for file, data in files.items() if file != "f3")
    run("fsck.ext4", "-fn", disk)


def test_a_model_carries_a_file_system(tmp_path: Path, seen: Seen) -> None:
    image = tmp_path / "disk.img"
    image.touch()
    os.truncate(image, SIZE)
    with exported("vd0", f"model:blk?file={image}&serial=VDUSESERIAL") as device:
        (disk,) = device.ready()["used_as"]
        assert Path("/sys/block", disk, "serial").read_text().strip() == "VDUSESERIAL"
        rings = ring_format("vd0")
        carries_a_file_system(f"/dev/{disk}", tmp_path / "m")
        assert device.end() == 0, device.said()
        assert gone("vd0")
    assert image.read_bytes()[1080:1082] == b"\x53\xef", "no ext4 in the file"
    seen("devices", "Linux virtio_blk", "blk", "model by VDUSE", rings)


def test_a_foreign_back_end_carries_a_file_system(tmp_path: Path, seen: Seen) -> None:
    with storage_daemon(SIZE) as path, exported("vd1", f"vhost-user:{path}?type=blk&vdpa=off") as device:
        (disk,) = device.ready()["used_as"]
        rings = ring_format("vd1")
        carries_a_file_system(f"/dev/{disk}", tmp_path / "m")
        assert device.end() == 0, device.said()
    assert gone("vd1")
    seen("devices", "Linux virtio_blk", "blk", "qemu-storage-daemon by VDUSE", rings)


def test_frames_through_an_interface(seen: Seen) -> None:
    """The model sends back what it gets; the kernel's driver is between it and us."""
    with exported("vn0", "model:net?mac=02:00:00:00:00:77") as device:
        (interface,) = device.ready()["used_as"]
        assert Path("/sys/class/net", interface, "address").read_text().strip() == "02:00:00:00:00:77"
        Path("/proc/sys/net/ipv6/conf", interface, "disable_ipv6").write_text("1")
        rings = ring_format("vn0")
        run("ip", "link", "set", interface, "up")
        until("the link is up", lambda: Path("/sys/class/net", interface, "operstate").read_text() != "down\n")
        frames = [b"\xff" * 6 + b"\x02\0\0\0\0\x77\x88\xb5" + os.urandom(46 + 14 * at) for at in range(100)]
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as sock:
            sock.bind((interface, 0x88B5))
            sock.settimeout(10)
            for frame in frames:
                sock.send(frame)
                assert sock.recv(4096) == frame
    assert gone("vn0")
    seen("devices", "Linux virtio_net", "net", "model by VDUSE", rings)


def _netns(command: list[str]) -> list[str]:
    """A new network namespace, where the process can be entered by its pid."""
    return ["unshare", "--net", *command]


@pytest.mark.parametrize("by", ["model", "vhost-user"])
def test_a_ping_through_an_interface(by: str, seen: Seen) -> None:
    """Two stacks of this kernel talk by way of the device: one on its interface, in a namespace, one on the tap that the model has for a wire."""
    tap, name = f"vnt{by[0]}", f"vp{by[0]}"
    with contextlib.ExitStack() as stack:
        target = f"model:net?tap={tap}&mac=02:00:00:00:00:78"
        if by == "vhost-user":
            target = f"vhost-user:{stack.enter_context(bridging(target)).path}?vdpa=require"
        device = stack.enter_context(exported(name, target))
        (interface,) = device.ready()["used_as"]
        rings = ring_format(name)
        with subprocess.Popen(_netns(["sleep", "1000"])) as there:
            try:
                until("a namespace of its own", lambda: os.readlink(f"/proc/{there.pid}/ns/net") != os.readlink("/proc/self/ns/net"))
                run("ip", "link", "set", interface, "netns", str(there.pid))
                inside = ["nsenter", "-t", str(there.pid), "-n"]
                run(*inside, "ip", "addr", "add", "192.0.2.1/30", "dev", interface)
                run(*inside, "ip", "link", "set", interface, "up")
                run("ip", "addr", "add", "192.0.2.2/30", "dev", tap)
                run("ip", "link", "set", tap, "up")
                for way in ([], inside):
                    said = run(*way, "busybox", "ping", "-c", "3", "-i", "0.2", "-s", "1400", "-W", "5", "192.0.2.1" if not way else "192.0.2.2")
                    assert "3 packets received" in said
                counters = {key: int(Path("/sys/class/net", tap, "statistics", key).read_text()) for key in ("rx_packets", "tx_packets")}
                assert min(counters.values()) >= 6, f"the pings did not go over the tap: {counters}"
            finally:
                there.kill()
        assert device.end() == 0, device.said()
    assert gone(name)
    seen("devices", "Linux virtio_net", "net", "model by VDUSE", rings, "tap")


def test_a_node_for_drivers_in_user_space(seen: Seen) -> None:
    """The client's own memory goes on to the device: no copy on the way. Who has the node open is told at the end."""
    with exported("vd2", "model:blk?size=8M", "--driver", "vhost_vdpa") as device:
        (node,) = device.ready()["used_as"]
        for packed in (False, True, False):
            with connect(node) as vdpa, BlkDriver(vdpa, ring_features=RING_FEATURES | Feature.RING_PACKED * packed) as disk:
                assert bool(vdpa.features & Feature.RING_PACKED) == packed
                data = os.urandom(300 * 1024)
                disk.write(MIB, data)
                assert disk.read(MIB, len(data)) == data
        with exported("vd2", "model:blk?size=8M") as second:
            assert second.process.wait(60) == 1
            assert "vdpa-bridge mgmt dev del vd2" in second.said()
        Path("/sys/class/vduse/vd2/msg_timeout").write_text("1")
        with connect(node) as vdpa, BlkDriver(vdpa) as disk:
            disk.write(0, b"x" * 512)
            assert disk.read(0, 512) == b"x" * 512, "the second process did no harm"
            assert device.end() == 1
            assert str(os.getpid()) in device.said()
            assert not gone("vd2")
    run("vdpa", "dev", "del", "vd2")
    seen("devices", "blk", "blk", "model by VDUSE", "split", "packed", "restart")


def test_the_kernel_notices_a_larger_disk(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.touch()
    os.truncate(image, SIZE)
    with bridging(f"model:blk?file={image}") as server, exported("vd4", f"vhost-user:{server.path}?vdpa=require") as device:
        (disk,) = device.ready()["used_as"]
        sectors = Path("/sys/block", disk, "size")
        assert int(sectors.read_text()) == SIZE // 512
        os.truncate(image, 2 * SIZE)
        server.process.send_signal(signal.SIGHUP)
        until("the kernel sees the new size", lambda: int(sectors.read_text()) == 2 * SIZE // 512)
    assert gone("vd4")


def test_killed_and_started_again() -> None:
    """A process that dies leaves its device; once that is off the bus, the next one takes the name over."""
    with exported("vd6", "model:blk?size=8M", "--driver", "none") as device:
        device.ready()
        device.end(signal.SIGKILL)
    assert Path("/dev/vduse/vd6").exists()
    with exported("vd6", "model:blk?size=8M", "--driver", "vhost_vdpa") as device:
        device.ready()
        with connect("vdpa:vd6") as vdpa, BlkDriver(vdpa) as disk:
            disk.write(512, b"z" * 512)
            assert disk.read(512, 512) == b"z" * 512
    assert gone("vd6")


def test_features_and_start_in_one_write() -> None:
    """A driver may set FEATURES_OK and DRIVER_OK together: the device has the features before it starts."""
    features = Feature.VERSION_1 | Feature.ACCESS_PLATFORM | Feature.RING_PACKED
    with exported("vd7", "model:blk?size=8M", "--driver", "vhost_vdpa", "--trace") as device:
        (node,) = device.ready()["used_as"]
        with VhostVdpa(node) as backend:
            for op, request in (
                (ops.SET_OWNER, EMPTY),
                (ops.SET_FEATURES, U64(features)),
                (ops.SET_STATUS, U8(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK)),
            ):
                backend.call(op, request)
            said = device.said()
        accepted, started = said.index(f"SET_FEATURES(value={features:#x})"), said.index("SET_STATUS(value=15")
        assert accepted < started
    assert gone("vd7")
