# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The kernel's own vhost-vsock: a driver here talks with AF_VSOCK sockets of this machine, which see it as a machine of its own."""

from __future__ import annotations

import errno
import os
import random
import socket
import threading
from collections.abc import Iterator

import pytest

from vdpa_bridge import connect, ops
from vdpa_bridge.drivers.vsock import VsockDriver
from vdpa_bridge.virtio.vsock import EVENT, RX, TX
from vdpa_bridge.wire import VringState

from ..support import taps
from ..support.bridge import bridging
from ..support.seen import Seen

pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(taps.missing()), reason=taps.missing())]
LONG = 2_000_000
"""More than both ends hold for a connection."""


@pytest.fixture
def target() -> str:
    taps.load()
    return f"vhost-vsock:{taps.new_cid()}"


@pytest.fixture
def driver(target: str) -> Iterator[VsockDriver]:
    with connect(target) as device, VsockDriver(device) as driver:
        yield driver


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        listener.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        listener.listen()
        listener.settimeout(5)
        yield listener


def port_of(sock: socket.socket) -> int:
    port: int = sock.getsockname()[1]
    return port


def exchange(driver: VsockDriver, listener: socket.socket, length: int = LONG) -> None:
    """A connection, *length* bytes that the host gives back as they come, and its orderly end."""

    def echo() -> None:
        with peer:
            while data := peer.recv(1 << 16):
                peer.sendall(data)

    with driver.connect(port_of(listener)) as stream:
        peer, name = listener.accept()
        peer.settimeout(20)
        thread = threading.Thread(target=echo)
        thread.start()
        try:
            assert name == (driver.cid, stream.ends.port)
            data, back = random.Random(length).randbytes(length), bytearray()
            for at in range(0, length, 50_000):
                stream.send(data[at : at + 50_000])
                while len(back) < min(at + 50_000, length):
                    back += stream.receive()
            assert back == data
            stream.shutdown()
            assert stream.receive() == b""
        finally:
            stream.close()
            thread.join(20)


def test_driver_calls(driver: VsockDriver, listener: socket.socket, seen: Seen) -> None:
    exchange(driver, listener)
    exchange(driver, listener, 1)
    seen("devices", "vsock", "vsock", "vhost-vsock", "split")


def test_host_calls(driver: VsockDriver) -> None:
    driver.listen(1234)
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        assert sock.connect_ex((driver.cid, 1234)) == errno.EINPROGRESS
        with driver.accept(1234) as stream:
            sock.settimeout(5)
            stream.send(b"driver here")
            assert sock.recv(100) == b"driver here"
            sock.sendall(b"host here")
            assert stream.receive() == b"host here"


def test_nobody_listens(driver: VsockDriver) -> None:
    with pytest.raises(ConnectionRefusedError):
        driver.connect(4_000_000_000)


def test_suspend_keeps_connections_and_reset_ends_them(driver: VsockDriver, listener: socket.socket, seen: Seen) -> None:
    """What comes while the device rests is not lost; a reset is an end that the host's socket is told of."""
    stream = driver.connect(port_of(listener))
    peer, _ = listener.accept()
    with peer:
        peer.settimeout(5)
        driver.suspend()
        assert driver.device.get_vring_base(TX) == 1
        peer.sendall(b"meanwhile")
        with pytest.raises(TimeoutError):
            stream.receive(timeout=0.1)
        driver.resume()
        assert stream.receive() == b"meanwhile"
        driver.restart()
        with pytest.raises(ConnectionResetError):
            peer.recv(1)
        with pytest.raises(ConnectionResetError):
            stream.receive()
    exchange(driver, listener, 10_000)
    seen("devices", "vsock", "vsock", "vhost-vsock", "pause", "restart")


@pytest.mark.parametrize("index", [RX, TX])
def test_both_rings_or_none(driver: VsockDriver, listener: socket.socket, index: int) -> None:
    """The kernel serves them together: with one disabled, the other rests. The event ring is not its affair."""
    call = driver.device.backend.call
    call(ops.SET_VRING_ENABLE, VringState(EVENT, 0))
    exchange(driver, listener, 1)
    call(ops.SET_VRING_ENABLE, VringState(index, 0))
    with pytest.raises(TimeoutError):
        driver.connect(port_of(listener), timeout=0.1)
    call(ops.SET_VRING_ENABLE, VringState(index, 1))
    listener.accept()[0].close()
    exchange(driver, listener, 1)


def test_context_id_is_taken(target: str, driver: VsockDriver) -> None:
    with pytest.raises(OSError, match="another device has context id") as refused:
        connect(target)
    assert refused.value.errno == errno.EBUSY


def test_served(target: str, listener: socket.socket) -> None:
    """To a driver in another process, that is this one; no byte passes the process that serves."""
    with (
        bridging(target) as bridge,
        bridge.device("vsock", "require") as device,
        VsockDriver(device) as driver,
        driver.connect(port_of(listener)) as stream,
        listener.accept()[0] as peer,
    ):
        peer.settimeout(5)
        before = bridge.rest()
        for _ in range(100):
            text = os.urandom(500)
            stream.send(text)
            assert peer.recv(500, socket.MSG_WAITALL) == text
        assert bridge.expenses() == before
