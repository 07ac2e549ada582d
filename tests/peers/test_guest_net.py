# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The network model's wires with real ends: QEMU guests on taps and on passt, this kernel's network stack, QEMU's netdevs, readers of captures."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cable import frame
from tests.support.driven import opened
from tests.support.guest import QEMU, run_guest
from tests.support.netns import namespace
from tests.support.programs import program
from tests.support.seen import Seen
from tests.support.tally import tallied
from tests.support.tapped import tap_name, tapped
from vdpa_bridge import Target
from vdpa_bridge.drivers import NetDriver
from vdpa_bridge.models import NetModel
from vdpa_bridge.models.net import Exchange
from vdpa_bridge.netdev import UserNetdev
from vdpa_bridge.vhost_user.server import Server

pytestmark = pytest.mark.peers

MAC = "52:54:00:12:34:56"
HERE, THERE = "10.9.0.1", "10.9.0.2"
SIZE = 3 << 20


def qemu(path: Path, *options: str, queues: int = 1) -> list[str]:
    """A virtio-net of QEMU's on our socket; without MSI-X, which QEMU 7.2 under TCG crashes with (see test_guest_devices)."""
    return [
        *("-chardev", f"socket,id=c0,path={path}"),
        *("-netdev", f"vhost-user,id=n0,chardev=c0,queues={queues}"),
        *("-device", ",".join([f"virtio-net-pci,netdev=n0,mac={MAC},romfile=,vectors=0", *options])),
    ]


@contextlib.contextmanager
def served(target: str, path: Path) -> Iterator[NetModel]:
    """The model behind a socket at *path*."""
    device = Target.parse(target)
    device.open().close()
    assert device.model is not None
    try:
        assert isinstance(device.model.model, NetModel)
        with Server(device.open, str(path)):
            yield device.model.model
    finally:
        device.close()


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


@pytest.fixture
def file(short_dir: Path) -> bytes:
    """Bytes for transfers, which are in a file ``www/file`` as well."""
    data = os.urandom(SIZE)
    (short_dir / "www").mkdir()
    (short_dir / "www" / "file").write_bytes(data)
    return data


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files, and logs nothing."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        pass


@contextlib.contextmanager
def http_server(directory: Path) -> Iterator[int]:
    """Files of *directory* on a port of this machine's loopback."""
    handler = functools.partial(Quiet, directory=str(directory))
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def need(*programs: str) -> None:
    """Skip where one is missing."""
    for name in programs:
        if shutil.which(name) is None:
            pytest.skip(f"no {name}: tools/setup peers installs it")


TRANSFER = f"""
    ip addr add {THERE}/24 dev eth0; ip link set eth0 up
    ping -c 2 -s 1400 {HERE} | grep -o '[0-9]* packets received'
    wget -q -O /file http://{HERE}:8000/file && echo got $(md5sum < /file)
    nc {HERE} 9000 < /file
"""


@pytest.mark.parametrize("offloads", [True, False])
def test_guest_on_a_tap(short_dir: Path, file: bytes, seen: Seen, offloads: bool) -> None:
    """TCP both ways: with offloads, segments longer than the MTU cross; without, none does, and every checksum is made."""
    name, path = tap_name(), short_dir / "s"
    off = [] if offloads else [f"{name}=off" for name in ("csum", "guest_csum", "mrg_rxbuf")]
    with (
        served(f"model:net?tap={name}&mac={MAC}", path) as model,
        namespace("a") as outside,
    ):
        outside.take(name, f"{HERE}/24")
        with outside.http(short_dir / "www", HERE), outside.sink(HERE) as sink:
            result = run_guest(TRANSFER, modules=["virtio_net"], qemu_args=qemu(path, *off), timeout=90)
            assert result.status == 0, result.output + result.errors + result.log
            assert "2 packets received" in result.output
            assert f"got {md5(file)}" in result.output
            assert sink.communicate(timeout=10)[0].strip() == md5(file)
        assert isinstance(model.path, Exchange)
        assert model.threads == 1
        sent, received = model.path.sent, model.path.received
        assert (sent.dropped, received.dropped) == (0, 0)
        if offloads:
            assert sent.large > 10
            assert received.large > 10
        else:
            assert (sent.large, received.large) == (0, 0)
            assert sent.frames > SIZE // 1500
    if offloads:
        seen("clients", "QEMU", "net", "model", "split", "tap")


def test_guest_on_a_tap_of_a_sandboxed_program(short_dir: Path, file: bytes) -> None:
    """The same TCP both ways, with the tap's queue in a process that can reach nothing else."""
    name, path = tap_name(), short_dir / "s"
    with program("net", "--socket-path", str(path), "--tap", name, "-v") as server, namespace("p") as outside:
        server.logs("ready")
        outside.take(name, f"{HERE}/24")
        with outside.http(short_dir / "www", HERE), outside.sink(HERE) as sink:
            result = run_guest(TRANSFER, modules=["virtio_net"], qemu_args=qemu(path), timeout=90)
            assert result.status == 0, result.output + result.errors + result.log
            assert "2 packets received" in result.output
            assert f"got {md5(file)}" in result.output
            assert sink.communicate(timeout=10)[0].strip() == md5(file)
        server.end()
        assert "lost" not in server.log


def test_guest_on_a_tap_with_two_queues(short_dir: Path, file: bytes, seen: Seen) -> None:
    """Each of two CPUs sends over a pair of its own, and the kernel answers over that. Afterwards one pair has all, as the other left the tap."""
    script = f"""
        ip addr add {THERE}/24 dev eth0; ip link set eth0 up
        for cpu in 1 2; do taskset $cpu wget -q -O /file http://{HERE}:8000/file && md5sum < /file; done
    """
    name, path = tap_name(), short_dir / "s"
    with (
        tallied(f"model:net?tap={name}&mac={MAC}&pairs=2") as (opener, chains),
        Server(opener, str(path)),
        namespace("m") as outside,
    ):
        outside.take(name, f"{HERE}/24")
        for options, queues in ((("mq=on",), 2), ((), 1)):
            before = Counter(chains)
            with outside.http(short_dir / "www", HERE):
                result = run_guest(script, modules=["virtio_net"], qemu_args=qemu(path, *options, queues=queues), cpus=2, timeout=90)
            assert result.status == 0, result.output + result.errors + result.log
            assert result.output.count(md5(file)) == 2
            used = {index for index, count in (chains - before).items() if count > 5}
            assert used == set(range(2 * queues)), chains
    seen("clients", "QEMU", "net", "model", "multi-queue")


def test_guest_with_user_networking(short_dir: Path, file: bytes, seen: Seen) -> None:
    """passt gives an address, and takes the guest to a server on this machine's loopback. (Ports that Debian 12's passt forwards
    are open, but what the guest answers does not arrive.)"""
    script = """
        ip link set eth0 up
        udhcpc -i eth0 -n -q -f -t 10 -s /lease || exit 1
        wget -q -O /file http://$(cat /router):PORT/file && echo got $(md5sum < /file)
    """
    lease = "#!/bin/sh\n[ $1 = bound ] || exit 0\nip addr add $ip/$mask dev eth0; ip route add default via $router; echo $router > /router\n"
    need("passt")
    with http_server(short_dir / "www") as port, served(f"model:net?user=on&mac={MAC}", short_dir / "s"):
        result = run_guest(
            script.replace("PORT", str(port)),
            modules=["virtio_net"],
            files={"lease": lease.encode()},
            qemu_args=qemu(short_dir / "s"),
            timeout=90,
        )
    assert result.status == 0, result.output + result.errors + result.log
    assert f"got {md5(file)}" in result.output
    seen("clients", "QEMU", "net", "model", "split")


@pytest.mark.parametrize("threads", [0, 1])
def test_system_to_system(short_dir: Path, file: bytes, threads: int) -> None:
    """A kernel's tap, the model or its engine, vhost-user, our driver, a tap of another namespace."""
    near, path = tap_name(), short_dir / "s"
    with (
        served(f"model:net?tap={near}&mtu=4000&threads={threads}", path) as model,
        namespace("n") as here,
        namespace("f") as there,
        tapped(f"vhost-user:{path}?type=net") as far,
    ):
        here.take(near, f"{HERE}/24")
        there.take(far.name, f"{THERE}/24")
        assert "2 packets received" in there.run("busybox", "ping", "-c", "2", "-s", "3900", HERE)
        with here.http(short_dir / "www", HERE):
            fetch = there.command("busybox", "wget", "-q", "-O", "-", f"http://{HERE}:8000/file")
            got = subprocess.run(fetch, check=True, capture_output=True, timeout=60).stdout
        assert got == file
        assert isinstance(model.path, Exchange)
        assert model.path.received.dropped == 0


def test_qemu_joins_two_wires(short_dir: Path) -> None:
    """QEMU's -netdev dgram and -netdev stream are the other ends; its hub passes frames from one to the other."""
    dgram, theirs, stream = short_dir / "d", short_dir / "q", short_dir / "s"
    command = [QEMU, "-machine", "none", "-nodefaults", "-display", "none"]
    command += ["-netdev", f"dgram,id=a,local.type=unix,local.path={theirs},remote.type=unix,remote.path={dgram}"]
    command += ["-netdev", f"stream,id=b,server=on,addr.type=unix,addr.path={stream}"]
    command += ["-netdev", "hubport,id=pa,hubid=0,netdev=a", "-netdev", "hubport,id=pb,hubid=0,netdev=b"]
    with opened(NetModel.from_options({"dgram": f"{dgram},{theirs}"})) as left:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            end = time.monotonic() + 20
            while not stream.is_socket():
                assert process.poll() is None, process.communicate()[1].decode()
                assert time.monotonic() < end
                time.sleep(0.05)
            with opened(NetModel.from_options({"stream": str(stream)})) as right, NetDriver(left) as one, NetDriver(right) as other:
                frames = [frame(number, 60 + 13 * number) for number in range(100)]
                for sender, receiver in ((one, other), (other, one)):
                    for at in range(0, 100, 10):
                        sender.send_many(frames[at : at + 10])
                        assert receiver.receive_many(10) == frames[at : at + 10]
        finally:
            process.kill()
            process.communicate()


READERS = {
    "tcpdump": ["tcpdump", "-nn", "-r"],
    "tshark": ["tshark", "-n", "-T", "fields", "-e", "frame.len", "-e", "eth.type", "-e", "frame.packet_flags_direction", "-r"],
}


@pytest.mark.parametrize("reader", READERS)
def test_captures_are_read_by_others(tmp_path: Path, reader: str) -> None:
    """And theirs by us: tcpdump rewrites ours as pcap, which is played again."""
    need(reader)
    out, again = tmp_path / "out.pcapng", tmp_path / "again.pcap"
    frames = [frame(number, 60 + number) for number in range(50)]
    with opened(NetModel.from_options({"pcap-out": str(out)})) as device, NetDriver(device) as nic:
        nic.send_many(frames)
    shown = subprocess.run([*READERS[reader], out], check=True, capture_output=True, text=True, timeout=60).stdout.splitlines()
    shown = [line for line in shown if not line.startswith("\t")]  # tcpdump's bytes of what it does not know
    assert len(shown) == 50
    if reader == "tshark":
        assert shown[7].split() == ["67", "0x88b5", "0x00000002"], "sent by the driver"
    else:
        assert "ethertype Unknown (0x88b5), length 67" in shown[7]
        subprocess.run(["tcpdump", "-nn", "-r", out, "-w", again], check=True, capture_output=True, timeout=60)
        with opened(NetModel.from_options({"pcap-in": str(again)})) as device, NetDriver(device) as nic:
            assert nic.receive_many(50) == frames


def test_passt_that_fails_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """At the start by its own words; later the link goes down, and the log says how it ended."""
    need("passt")
    with pytest.raises(OSError, match=r"passt \(pid \d+\): it ended with status 1: Invalid port specifier 99999"):
        NetModel.from_options({"user": "on", "tcp-ports": "99999"})
    model = NetModel.from_options({"user": "on"})
    assert isinstance(model.path, Exchange)
    assert isinstance(model.path.wire, UserNetdev)
    with opened(model) as device, NetDriver(device), caplog.at_level(logging.WARNING):
        assert device.get_config(6, 2) == b"\1\0"
        os.kill(model.path.wire.pid, signal.SIGKILL)
        end = time.monotonic() + 5
        while device.get_config(6, 2) != b"\0\0" and time.monotonic() < end:
            time.sleep(0.01)
        assert device.get_config(6, 2) == b"\0\0"
    assert f"passt (pid {model.path.wire.pid}): it ended with status -9" in caplog.text


def test_passt_ends_with_its_device() -> None:
    """Also when its device's process is killed."""
    need("passt")
    code = "import sys; from vdpa_bridge.netdev import UserNetdev; wire = UserNetdev(); print(wire.pid, flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert Path(f"/proc/{pid}/comm").read_text().startswith("passt")
    process.kill()
    process.communicate()
    end = time.monotonic() + 10
    while runs(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not runs(pid)


def runs(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
