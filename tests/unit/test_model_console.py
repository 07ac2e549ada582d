# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The console model over real rings, with real sockets and terminals: what arrives, who waits for whom, and what a driver may say."""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.driven import WAYS, in_way, opened, quiet
from tests.support.ends import PATIENCE, client, read, take, terminal
from tests.support.homes import socket_path
from tests.support.seen import Seen
from vdpa_bridge.drivers import ConsoleDriver
from vdpa_bridge.drivers.base import RING_FEATURES
from vdpa_bridge.flags import Feature
from vdpa_bridge.models import ConsoleModel, Sources, make_model
from vdpa_bridge.models.console_port import KEPT, KEPT_FOR_SLOW
from vdpa_bridge.virtio.features import ConsoleFeature as F

__all__ = ["quiet"]  # an autouse fixture

LONG = 1_000_000
"""More than rings and sockets hold."""


@pytest.fixture
def path() -> Iterator[str]:
    with socket_path() as path:
        yield path


@contextmanager
def in_background(work: object) -> Iterator[None]:
    thread = threading.Thread(target=work)  # type: ignore[arg-type]
    thread.start()
    try:
        yield
    finally:
        thread.join(PATIENCE)
    assert not thread.is_alive()


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


# Sockets -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rings", ["split", "packed"])
def test_both_directions_at_once(path: str, way: str, rings: str, seen: Seen) -> None:
    """Client after client, and driver after driver."""
    features = RING_FEATURES | (Feature.RING_PACKED if rings == "packed" else 0)
    there, here = random.Random(1).randbytes(LONG), random.Random(2).randbytes(LONG)
    with in_way(way, make_model("console", {"ports": f"listen:path={path}"})) as device, ConsoleDriver(device, ring_features=features) as driver:
        assert driver.features & features == features
        for turn in range(2):
            with client(path) as sock, in_background(lambda sock=sock: sock.sendall(here)):
                got = bytearray()
                for at in range(0, LONG, 50_000):
                    driver.write(there[at : at + 50_000])
                    assert take(sock, min(50_000, LONG - at)) == there[at : at + 50_000]
                    while len(got) < at + 50_000:
                        got += driver.read(PATIENCE)
                assert got == here
            if not turn:
                driver.restart()
    seen("devices", "console", "console", "model", rings, "restart", *{way} & set(WAYS[1:]))


def test_a_console_without_a_listener_keeps_its_last_words(path: str, passes: list[float]) -> None:
    with opened(make_model("console", {"ports": f"listen:path={path}"})) as device, ConsoleDriver(device) as driver:
        said = random.Random(3).randbytes(3 * KEPT)
        driver.write(said)
        rests(passes)
        with client(path) as sock:
            assert take(sock, KEPT) == said[-KEPT:]
            driver.write(b"and then?")
            assert take(sock, 9) == b"and then?"


def test_a_console_with_a_slow_listener_is_heard(path: str, passes: list[float]) -> None:
    """It is not held up; what it said last is kept."""
    with opened(make_model("console", {"ports": f"listen:path={path}"})) as device, ConsoleDriver(device) as driver, client(path) as sock:
        said = random.Random(4).randbytes(3 * KEPT_FOR_SLOW)
        driver.write(said)
        rests(passes)
        driver.write(b"the end")
        got = b""
        while not got.endswith(b"the end"):
            got += sock.recv(1 << 20)
        assert KEPT_FOR_SLOW <= len(got) < len(said)
        assert got[-KEPT_FOR_SLOW:] == (said + b"the end")[-KEPT_FOR_SLOW:]


def test_a_port_that_is_no_console_waits_for_its_listener(path: str, passes: list[float]) -> None:
    """Nothing is lost: before somebody comes, while he does not read, and when another one comes in his place."""
    said = random.Random(5).randbytes(LONG)
    with opened(make_model("console", {"ports": f"listen:path={path};console=off"})) as device, ConsoleDriver(device) as driver:
        with pytest.raises(TimeoutError):
            driver.write(b"nobody listens", timeout=0.05)
        rests(passes)
        with client(path) as sock:
            assert take(sock, 14) == b"nobody listens"
            got: list[bytes] = []
            with in_background(lambda: _drain_later(sock, got)):
                with pytest.raises(TimeoutError):
                    driver.write(said, timeout=0.2)
                rests(passes)
                assert got == []
                driver.wait(lambda: driver.ring(1).queue.free == driver.ring(1).queue.num, "an empty queue", PATIENCE)
            whole = b"".join(got)
            assert whole == said[: len(whole)]
            assert len(whole) < LONG, "the driver gave up on the rest"
        with client(path) as sock:
            driver.write(b"to the next one")
            assert take(sock, 15) == b"to the next one"


def _drain_later(sock: socket.socket, got: list[bytes]) -> None:
    time.sleep(0.8)
    sock.settimeout(0.3)
    while True:
        try:
            got.append(sock.recv(1 << 16))
        except TimeoutError:
            return


def test_a_driver_that_does_not_read_holds_its_client_up(path: str, passes: list[float]) -> None:
    data = random.Random(6).randbytes(LONG)
    with (
        opened(make_model("console", {"ports": f"listen:path={path}"})) as device,
        ConsoleDriver(device) as driver,
        client(path) as sock,
        in_background(lambda: sock.sendall(data)),
    ):
        time.sleep(0.1)
        rests(passes)
        assert read(driver, LONG) == data


def test_the_words_of_a_client_that_went(path: str) -> None:
    """They come all the same; the next one is let in when they have."""
    with opened(make_model("console", {"ports": f"listen:path={path}"})) as device, ConsoleDriver(device) as driver:
        for turn in range(20):
            with client(path) as sock:
                sock.sendall(b"%6d" % turn * 1000)
            assert read(driver, 6000) == b"%6d" % turn * 1000
        with client(path) as sock:
            sock.sendall(b"question")
            sock.shutdown(socket.SHUT_WR)
            assert read(driver, 8) == b"question"
            driver.write(b"an answer after its end")
            assert take(sock, 23) == b"an answer after its end"


def test_words_before_there_is_a_driver_and_after(path: str) -> None:
    with opened(make_model("console", {"ports": f"listen:path={path}"})) as device, client(path) as sock:
        sock.sendall(b"early")
        with ConsoleDriver(device) as driver:
            assert read(driver, 5) == b"early"
            driver.write(b"last words")
        assert take(sock, 10) == b"last words"


def test_a_socket_that_somebody_else_listens_on(path: str) -> None:
    """It is connected to when it is there, and again when it was not."""
    with opened(make_model("console", {"ports": f"connect:path={path}"})) as device, ConsoleDriver(device) as driver:
        for turn in range(2):
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path)
                listener.listen()
                listener.settimeout(PATIENCE)
                sock, _ = listener.accept()
                with sock:
                    sock.settimeout(PATIENCE)
                    sock.sendall(b"%d" % turn)
                    assert read(driver, 1) == b"%d" % turn
                    driver.write(b"hello")
                    assert take(sock, 5) == b"hello"
            os.unlink(path)


# Terminals and files ---------------------------------------------------------------------------------------------------------


def typed(fd: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        assert select.select([fd], [], [], PATIENCE)[0]
        data += os.read(fd, 1 << 16)
    return data


def test_a_pseudoterminal(path: str, passes: list[float]) -> None:
    """Found by its link, opened and closed again and again, and its size followed; all 256 bytes go as they are."""
    with opened(make_model("console", {"ports": f"pty:link={path}"})) as device, ConsoleDriver(device) as driver:
        assert (driver.info["cols"], driver.info["rows"]) == (80, 24)
        driver.write(b"while nobody looks")
        rests(passes)
        for turn in range(2):
            with terminal(path) as fd:
                if not turn:
                    assert typed(fd, 18) == b"while nobody looks"
                driver.write(bytes(range(256)))
                assert typed(fd, 256) == bytes(range(256))
                os.write(fd, bytes(range(256)))
                assert read(driver, 256) == bytes(range(256))
                termios.tcsetwinsize(fd, (40 + turn, 132))
                driver.wait(lambda turn=turn: driver.info["rows"] == 40 + turn, "another size")
                assert driver.info["cols"] == 132
            rests(passes)
    assert not os.path.lexists(path)


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_bytes(b"before\n")
    with opened(make_model("console", {"ports": f"file:path={file}"})) as device, ConsoleDriver(device) as driver:
        driver.write(b"x" * 100_000)
        assert not driver.features & F.SIZE
    assert file.read_bytes() == b"before\n" + b"x" * 100_000


def test_a_fifo(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with opened(make_model("console", {"ports": f"file:path={fifo}"})) as device, ConsoleDriver(device) as driver:
        fifo.write_bytes(b"from a writer who leaves")
        assert read(driver, 24) == b"from a writer who leaves"


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_standard_input_and_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Put in place of this process's own; they are as they were afterwards."""
    (tmp_path / "in").write_bytes(b"typed before" * 1000)
    if kind == "pipe":
        source, feed = os.pipe()
        drain, sink = os.pipe()
        os.write(feed, b"typed before" * 1000)
        os.close(feed)
    else:
        source, sink = os.open(tmp_path / "in", os.O_RDONLY), os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
        drain = os.open(tmp_path / "out", os.O_RDONLY)
    replaced = {0: source, 1: sink}
    dup = os.dup
    monkeypatch.setattr(os, "dup", lambda fd: dup(replaced.get(fd, fd)))
    monkeypatch.setattr(os, "isatty", lambda fd: False)
    try:
        with opened(make_model("console", {"ports": "stdio"})) as device, ConsoleDriver(device) as driver:
            assert read(driver, 12_000) == b"typed before" * 1000
            driver.write(b"printed")
            assert os.read(drain, 100) == b"printed"
        assert os.get_blocking(source)
        assert os.get_blocking(sink)
    finally:
        for fd in (source, sink, drain):
            os.close(fd)


# Options -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ports", "text"),
    [
        ("tcp:path=x", "leads to pty, listen, connect, stdio, file, not to 'tcp'"),
        ("listen", "needs path="),
        ("listen:/run/x", "a port is written KIND:OPTION=VALUE;OPTION=VALUE"),
        ("pty:path=/x", "has no option path; there is: link"),
        ("pty,", "not to ''"),
        ("pty:console=maybe", "it is on or off"),
        ("pty:name=" + "x" * 129, "longer than 128 bytes"),
        (",".join(["pty"] * 32), "32 ports; there are 31 at most"),
    ],
)
def test_wrong_options_are_named(ports: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_model("console", {"ports": ports})


def test_needs(path: str) -> None:
    model = make_model("console", {"ports": f"pty,connect:path={path},listen:path={path}2"})
    assert isinstance(model, ConsoleModel)
    assert (model.needs.connect, model.needs.controls) == ((path,), (0x5413,))
    assert (model.queue_count, model.config()) == (8, struct.pack("<HHII", 80, 24, 3, 0))
    model.close()
