# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Models that do something outside, at work in a sandbox: what they say that they need is enough."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.homes import socket_path
from tests.support.sandboxed import FRAME, PATIENCE, frame, nic
from tests.support.service import listening
from vdpa_bridge.drivers import BlkDriver, VsockDriver
from vdpa_bridge.targets import connect


@pytest.fixture
def folder() -> Iterator[Path]:
    with socket_path() as path:
        yield Path(path).parent


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


def test_a_disk_with_all_the_threads_that_it_may_have() -> None:
    """Their stacks are memory, too."""
    with connect("child:blk?size=1M&queues=64&threads=64") as device, BlkDriver(device) as disk:
        disk.write(0, b"t" * 512)
        assert disk.read(0, 512) == b"t" * 512
