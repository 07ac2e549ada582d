# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The socket model over real rings and real UNIX sockets: what arrives where, how connections end, and who waits for whom."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.support.driven import WAYS, in_way, opened, quiet
from tests.support.homes import socket_path
from tests.support.seen import Seen
from vdpa_bridge.drivers import VsockDriver
from vdpa_bridge.drivers.base import RING_FEATURES
from vdpa_bridge.drivers.vsock import VsockStream
from vdpa_bridge.flags import Feature
from vdpa_bridge.models import Sources, VsockModel, make_model
from vdpa_bridge.models.vsock_connection import WINDOW

__all__ = ["quiet"]  # an autouse fixture

PATIENCE = 10.0
LONG = 2_000_000
"""More than both ends and a UNIX socket hold."""


@pytest.fixture
def uds() -> Iterator[str]:
    with socket_path() as path:
        yield path


@contextmanager
def listening(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(200)
        listener.settimeout(PATIENCE)
        yield listener


@contextmanager
def accepted(listener: socket.socket) -> Iterator[socket.socket]:
    sock, _ = listener.accept()
    with sock:
        sock.settimeout(PATIENCE)
        yield sock


@contextmanager
def calling(uds: str, words: bytes) -> Iterator[socket.socket]:
    """A client of the host that has said *words*."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(uds)
        client.sendall(words)
        yield client


def everything(sock: socket.socket) -> bytes:
    """What comes up to the end; what comes before a reset is kept."""
    data = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while more := sock.recv(1 << 16):
            data += more
    return bytes(data)


def received(stream: VsockStream) -> bytes:
    return b"".join(iter(stream.receive, b""))


@contextmanager
def background(work: Callable[[], object]) -> Iterator[None]:
    """*work* in a thread, which has ended afterwards, well."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(PATIENCE)
    assert not thread.is_alive()
    assert errors == []


@contextmanager
def pair(uds: str, port: int = 7) -> Iterator[tuple[VsockDriver, VsockStream, socket.socket]]:
    """A guest's connection to a port of the host, and the host's end of it."""
    model = VsockModel(3, uds)
    with (
        listening(f"{uds}_{port}") as listener,
        opened(model) as device,
        VsockDriver(device) as driver,
        driver.connect(port) as stream,
        accepted(listener) as sock,
    ):
        yield driver, stream, sock


# Data ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rings", ["split", "packed"])
def test_both_directions_at_once(uds: str, way: str, rings: str, seen: Seen) -> None:
    """The host gives back what comes, then the guest ends its side, then the host does."""
    features = RING_FEATURES | (Feature.RING_PACKED if rings == "packed" else 0)

    def echo() -> None:
        for _ in range(2):  # the connections before and after the restart
            with accepted(listener) as sock:
                while data := sock.recv(1 << 16):
                    sock.sendall(data)

    data = random.Random(1).randbytes(LONG)
    with listening(f"{uds}_7") as listener, in_way(way, VsockModel(42, uds)) as device, VsockDriver(device, ring_features=features) as driver:
        assert driver.features & features == features
        assert driver.cid == 42
        with background(echo):
            for turn in range(2):
                with driver.connect(7) as stream:
                    back = bytearray()
                    for at in range(0, LONG, 100_000):
                        stream.send(data[at : at + 100_000])
                        while len(back) < at + 100_000:
                            back += stream.receive()
                    stream.shutdown()
                    assert stream.receive() == b""
                    assert back == data
                if not turn:
                    driver.restart()
    seen("devices", "vsock", "vsock", "model", rings, "restart", *{way} & set(WAYS[1:]))


@pytest.mark.parametrize("way", WAYS)
def test_a_client_of_the_host(uds: str, way: str) -> None:
    with in_way(way, VsockModel(3, uds)) as device, VsockDriver(device) as driver:
        driver.listen(99)
        with calling(uds, b"CONNECT 99\nand at once ") as client, driver.accept(99) as stream:
            ok, port, rest = client.recv(64).partition(b" ")[0], stream.ends.peer_port, b""
            assert (ok, stream.ends.peer) == (b"OK", 2)
            assert port >= 1 << 30
            client.sendall(b"more")
            client.shutdown(socket.SHUT_WR)
            assert received(stream) == b"and at once more"
            stream.send(b"an answer after the end of the question")
            stream.shutdown()
            rest = everything(client)
        assert rest == b"an answer after the end of the question"


def test_words_of_a_client_that_come_one_by_one(uds: str) -> None:
    with opened(VsockModel(3, uds)) as device, VsockDriver(device) as driver:
        driver.listen(99)
        with calling(uds, b"") as client:
            for at in range(11):
                client.send(b"CONNECT 99\n"[at : at + 1])
                time.sleep(0.002)
            with driver.accept(99) as stream:
                assert client.recv(64) == b"OK %d\n" % stream.ends.peer_port


@pytest.mark.parametrize("words", [b"\n", b"CONNECT\n", b"CONNECT x\n", b"CONNECT 4294967296\n", b"CONNECT -1\n", b"C" * 33, b"GET / HTTP/1.0\r\n", b"CONNECT 98\n"])
def test_clients_that_are_not_served(uds: str, words: bytes) -> None:
    """Wrong words, or a port at which nobody listens."""
    with opened(VsockModel(3, uds)) as device, VsockDriver(device) as driver:
        driver.listen(99)
        with calling(uds, words) as client, background(lambda: everything(client)), contextlib.suppress(TimeoutError):
            driver.accept(99, timeout=0.2)
        with calling(uds, b"CONNECT 99\n") as client, driver.accept(99):
            assert client.recv(64).startswith(b"OK ")


def test_a_port_at_which_nobody_listens(uds: str) -> None:
    with opened(VsockModel(3, uds)) as device, VsockDriver(device) as driver:
        for port, cid in ((7, 2), (7, 4), (7, 1)):
            with pytest.raises(ConnectionRefusedError):
                driver.connect(port, cid)
        with listening(f"{uds}_7") as listener, driver.connect(7) as stream, accepted(listener) as sock:
            stream.send(b"x")
            assert sock.recv(2) == b"x"
    with opened(make_model("vsock", {"cid": "9"})) as device, VsockDriver(device) as driver:
        assert driver.cid == 9
        with pytest.raises(ConnectionRefusedError):
            driver.connect(7)


def test_two_guests(uds: str) -> None:
    """One connects to the other by its context id; each has its own device, as in two processes."""
    one, other = VsockModel(3, f"{uds}1", {4: f"{uds}2"}), VsockModel(4, f"{uds}2", {3: f"{uds}1"})
    data = random.Random(2).randbytes(LONG)

    def serve() -> None:
        with driver.accept(50, timeout=PATIENCE) as stream:
            stream.send(received(stream)[::-1])
            stream.shutdown()

    with opened(one) as here, opened(other) as there, VsockDriver(here) as client, VsockDriver(there) as driver:
        driver.listen(50)
        with background(serve), client.connect(50, 4, timeout=PATIENCE) as stream:
            stream.send(data)
            stream.shutdown()
            assert received(stream) == data[::-1]
    with opened(VsockModel(3, None, {4: f"{uds}3"})) as here, VsockDriver(here) as client, listening(f"{uds}3") as listener:

        def lie() -> None:
            with accepted(listener) as sock:
                assert sock.recv(64) == b"CONNECT 50\n"
                sock.sendall(b"NO\n")

        with background(lie), pytest.raises(ConnectionRefusedError):
            client.connect(50, 4)


# How connections end ---------------------------------------------------------------------------------------------------------


def test_the_guest_hangs_up_before_the_host_has_read(uds: str) -> None:
    """All that was sent arrives, although it fills the host's socket and waits in the device."""
    data = random.Random(3).randbytes(400_000)
    with pair(uds) as (driver, stream, sock):
        stream.send(data)
        stream.close()
        with pytest.raises(ConnectionRefusedError):
            driver.connect(8)
        assert everything(sock) == data


def test_the_guest_gives_up_waiting_for_the_end(uds: str) -> None:
    """As kernels do 8 seconds after close: what they sent before arrives all the same."""
    data = random.Random(3).randbytes(400_000)
    with pair(uds) as (driver, stream, sock):
        stream.send(data)
        stream.close()
        driver.answer(stream.ends, 3)
        with pytest.raises(ConnectionRefusedError):
            driver.connect(8)
        assert everything(sock) == data


def test_the_host_hangs_up_before_the_guest_has_read(uds: str) -> None:
    data = random.Random(4).randbytes(300_000)
    with pair(uds) as (driver, stream, sock):

        def send() -> None:
            sock.sendall(data)
            sock.close()

        with background(send):
            driver.wait(lambda: len(stream._data) > 100_000, "bytes")
            time.sleep(0.05)
            assert received(stream) == data
        with pytest.raises(BrokenPipeError):
            stream.send(b"x")


def test_the_host_hangs_up_on_a_guest_that_writes(uds: str) -> None:
    with pair(uds) as (_, stream, sock):
        stream.send(b"unread")
        sock.close()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            stream.send(bytes(4 * WINDOW))


def test_the_host_hangs_up_on_a_guest_that_has_no_room(uds: str) -> None:
    """It is told once it has room, after all that came before."""
    with pair(uds) as (driver, stream, sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        sock.sendall(bytes(WINDOW + 5000))
        driver.wait(lambda: len(stream._data) == WINDOW, "a full buffer")
        sock.close()
        assert len(received(stream)) == WINDOW + 5000


def test_the_guest_takes_no_more(uds: str) -> None:
    with pair(uds) as (driver, stream, sock):
        driver.tell(stream.ends, 4, 0, 1)  # SHUTDOWN, NO_RECEIVE
        with pytest.raises(BrokenPipeError):
            sock.sendall(bytes(4 * WINDOW))
        stream.send(b"but it sends")
        assert sock.recv(64) == b"but it sends"
        sock.close()
        driver.wait(lambda: stream._ended, "the end")


def test_a_client_that_goes_before_the_guest_has_answered(uds: str) -> None:
    with opened(VsockModel(3, uds)) as device, VsockDriver(device) as driver:
        driver.listen(99)
        with calling(uds, b"CONNECT 99\n"):
            driver.wait(lambda: bool(driver._waiting[99]), "the request")
        (stream,) = driver._waiting[99]
        driver.wait(lambda: stream.ends not in driver._streams, "its end")


def test_reset_ends_connections_but_not_clients_that_wait(uds: str) -> None:
    model = VsockModel(3, uds)
    with calling(uds, b"CONNE") as early, listening(f"{uds}_7") as listener, opened(model) as device, VsockDriver(device) as driver:
        driver.connect(7)
        with accepted(listener) as sock:
            driver.restart()
            assert everything(sock) == b""
        driver.listen(99)
        early.sendall(b"CT 99\n")
        with driver.accept(99):
            assert early.recv(64).startswith(b"OK ")
    assert not os.path.exists(uds)


# Flow control ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When models served their sources."""
    times: list[float] = []
    serve = Sources.serve

    def counting(sources: Sources, queues: object) -> None:
        times.append(time.monotonic())
        serve(sources, queues)  # type: ignore[arg-type]

    monkeypatch.setattr(Sources, "serve", counting)
    return times


def rests(passes: list[float]) -> None:
    """Nothing goes round in circles while nothing can be done."""
    time.sleep(0.05)
    before = len(passes)
    time.sleep(0.2)
    assert len(passes) - before <= 2


def test_a_host_that_does_not_read(uds: str, passes: list[float]) -> None:
    """The guest may send what the device and the socket hold and no more; another connection goes on meanwhile."""
    data = random.Random(5).randbytes(LONG)
    with pair(uds) as (driver, stream, sock), listening(f"{uds}_8") as listener:
        with pytest.raises(TimeoutError, match="room at the other end"):
            stream.send(data, timeout=0.2)
        sent = stream._sent
        assert WINDOW <= sent <= 2 * WINDOW + int(sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))
        rests(passes)
        with driver.connect(8) as other, accepted(listener) as there:
            other.send(b"past it")
            assert there.recv(64) == b"past it"
        got = bytearray()

        def read() -> None:
            while len(got) < LONG:
                got.extend(sock.recv(1 << 16))

        with background(read):
            stream.send(data[sent:])
        assert got == data


def test_a_guest_that_does_not_read(uds: str, passes: list[float]) -> None:
    """The host may send what the guest has room for and the socket holds; another connection goes on meanwhile."""
    data = random.Random(6).randbytes(LONG)
    with pair(uds) as (driver, stream, sock), listening(f"{uds}_8") as listener:
        with background(lambda: sock.sendall(data)):
            driver.wait(lambda: len(stream._data) == WINDOW, "a full buffer")
            rests(passes)
            with driver.connect(8) as other, accepted(listener) as there:
                there.sendall(b"past it")
                assert other.receive() == b"past it"
            got = bytearray()
            while len(got) < LONG:
                got += stream.receive()
        assert got == data


def test_many_connections_at_once(uds: str) -> None:
    """Each carries its own data, in both directions, and to its end."""
    count, model = 100, VsockModel(3, uds)
    with listening(f"{uds}_7") as listener, opened(model) as device, VsockDriver(device) as driver:
        streams = [driver.connect(7) for _ in range(count)]
        socks = [listener.accept()[0] for _ in range(count)]
        for turn in range(5):
            for number, (stream, sock) in enumerate(zip(streams, socks, strict=True)):
                stream.send(struct.pack("<II", turn, number) * 100)
                sock.sendall(struct.pack("<II", number, turn) * 100)
        for number, (stream, sock) in enumerate(zip(streams, socks, strict=True)):
            stream.shutdown()
            sock.shutdown(socket.SHUT_WR)
            assert everything(sock) == b"".join(struct.pack("<II", turn, number) * 100 for turn in range(5))
            assert received(stream) == b"".join(struct.pack("<II", number, turn) * 100 for turn in range(5))
            sock.close()
        driver.wait(lambda: not driver._streams, "the end of all")
