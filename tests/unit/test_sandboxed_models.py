# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Models that do something outside, at work in a sandbox: what they say that they need is enough."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlencode

import pytest

from tests.support.homes import socket_path
from tests.support.service import listening
from tests.support.tapped import ip, tap_name
from tests.support.taps import wire
from vdpa_bridge.drivers import NetDriver, VsockDriver
from vdpa_bridge.targets import connect

PATIENCE = 10.0
ME, OTHER = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
FRAME = b"\xff" * 6 + OTHER + b"\x88\xb5" + b"through the wall".ljust(50, b".")


@pytest.fixture
def folder() -> Iterator[Path]:
    with socket_path() as path:
        yield Path(path).parent


@contextmanager
def nic(**options: str) -> Iterator[NetDriver]:
    with connect(f"child:net?{urlencode(options)}") as device, NetDriver(device) as driver:
        yield driver


def frame(driver: NetDriver) -> bytes:
    """The next one of ours that comes."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if (received := driver.receive(end - time.monotonic()))[12:14] == b"\x88\xb5":
            return received
    raise TimeoutError("no frame came")


def test_a_stream_that_is_connected_to_anew(folder: Path) -> None:
    """The server of the wire comes back, at another socket of the same name; the file of the one in the sandbox goes with it."""
    path = folder / "wire"
    with ExitStack() as stack:
        server = stack.enter_context(nic(stream=str(path), server="on"))
        with nic(stream=str(path)) as client:
            client.send(FRAME)
            assert frame(server) == FRAME
            stack.close()
            assert not path.exists()
            with nic(stream=str(path), server="on") as server:
                pid = client.device.backend.facts()["process"]
                assert isinstance(pid, int)
                end = time.monotonic() + PATIENCE
                while not client.link_up:
                    assert time.monotonic() < end
                    os.kill(pid, signal.SIGHUP)
                    time.sleep(0.05)
                server.send(FRAME)
                assert frame(client) == FRAME
    assert not path.exists()


def test_datagrams_by_relative_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is sent to may come later."""
    monkeypatch.chdir(folder)
    (folder / "left").mkdir()
    (folder / "right").mkdir()
    with nic(dgram="left/a,right/b") as left, nic(dgram="right/b,left/a") as right:
        left.send(FRAME)
        assert frame(right) == FRAME
        right.send(FRAME)
        assert frame(left) == FRAME
    assert [list((folder / side).iterdir()) for side in ("left", "right")] == [[], []]


def test_sockets_of_a_guest(folder: Path) -> None:
    """It connects to a port of the host, and the host to one of its ports."""
    uds = f"{folder}/v"
    with connect(f"child:vsock?cid=7&uds={uds}") as device, VsockDriver(device) as guest, listening(Path(f"{uds}_80")) as (host,):
        host.settimeout(PATIENCE)
        with guest.connect(80) as stream:
            there, _ = host.accept()
            with there:
                stream.send(b"out")
                assert there.recv(8) == b"out"
                there.send(b"in")
                assert stream.receive() == b"in"
        guest.listen(22)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(uds)
            client.send(b"CONNECT 22\n")
            with guest.accept(22) as stream:
                assert client.recv(64).startswith(b"OK ")
                client.send(b"hello")
                assert stream.receive() == b"hello"
    assert not Path(uds).exists()


@pytest.mark.skipif(os.getuid() != 0 or not Path("/dev/net/tun").exists() or not shutil.which("ip"), reason="needs root, /dev/net/tun and ip")
def test_a_tap(folder: Path) -> None:
    """In the network that the process is no part of any more; what the driver accepts is told to it."""
    name = tap_name()
    try:
        with nic(tap=name) as driver:
            assert driver.link_up
            with wire(name) as end:
                end.send(FRAME)
                assert frame(driver) == FRAME
                driver.send(FRAME)
                assert select.select([end], [], [], PATIENCE)[0]
    finally:
        if Path("/sys/class/net", name).exists():
            ip("link", "delete", "dev", name)


@pytest.mark.skipif(not shutil.which("passt"), reason="needs passt: apt-get install passt")
def test_a_user_network(folder: Path) -> None:
    """passt is a program: it runs outside, started before, and ends with the device."""
    with nic(user="on") as driver:
        assert driver.link_up
        pid = driver.device.backend.facts()["process"]
        assert isinstance(pid, int)
        (passt,) = (int(child) for child in children(pid) if b"passt" in Path(f"/proc/{child}/cmdline").read_bytes())
        watched = os.pidfd_open(passt)
        who_has = bytes.fromhex("0001 0800 06 04 0001") + ME + bytes((10, 0, 2, 15)) + bytes(6) + bytes((10, 0, 2, 2))
        driver.send(b"\xff" * 6 + ME + b"\x08\x06" + who_has.ljust(46, b"\0"))
        while (answer := driver.receive(PATIENCE))[12:14] != b"\x08\x06":
            pass
        assert answer[28:32] == bytes((10, 0, 2, 2))
    try:
        assert select.select([watched], [], [], PATIENCE)[0]
    finally:
        os.close(watched)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
