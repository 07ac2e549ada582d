# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Servers that last: thousands of rude clients, two hundred devices in a process, limits reached, eventfds abused.

Bounds are for a busy machine of two cores; what was measured is printed (``pytest -s``).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import random
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import belongings
from tests.support.bare import MODES, STEP, Bare
from tests.support.homes import connector, socket_path
from tests.support.hostile import FULL
from tests.support.many import Raising, resident
from tests.support.raw import ENTER, Raw
from vdpa_bridge import ops
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.device import Device
from vdpa_bridge.drivers import BlkDriver
from vdpa_bridge.flags import Status
from vdpa_bridge.models import make_model
from vdpa_bridge.vhost_user import messages as m
from vdpa_bridge.vhost_user.framing import frame
from vdpa_bridge.vhost_user.server import Server
from vdpa_bridge.wire import EventFile, VringFile, VringState

REPO = Path(__file__).parents[2]
CYCLES = 3000
DEVICES = 200
MIB = 1 << 20
QUICK = 2.0
"""Seconds that a control operation, or the end of a session, may take whatever the client did to its eventfds."""


@pytest.fixture
def model() -> Iterator[ModelDevice]:
    device = ModelDevice(make_model("blk", {"size": "1M"}), "model:blk")
    yield device
    device.close()


@pytest.fixture
def path(model: ModelDevice) -> Iterator[str]:
    """A server that works for a good client after the test."""
    with socket_path() as path, Server(model.open, path, timeout=1.0):
        yield path
        works(path)


@pytest.fixture
def client(request: pytest.FixtureRequest, path: str) -> Iterator[Bare]:
    with Bare(path, "vdpa") as client:
        yield client


def works(path: str, mode: str = "require") -> None:
    with Device(connector(path, "blk", mode)()) as device:
        assert device.get_status() == 0
        with BlkDriver(device, queue_size=8, pool_size=65536) as disk:
            disk.write(0, b"good" * 128)
            assert disk.read(0, 512) == b"good" * 128


@contextlib.contextmanager
def meanwhile(action: Callable[[int], object], fd: int) -> Iterator[None]:
    """*action* on eventfd *fd* again and again in a thread, which may wait in it."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(0.0002):
            with contextlib.suppress(BlockingIOError):
                action(fd)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        while thread.is_alive():
            with contextlib.suppress(BlockingIOError):
                os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT)
            thread.join(0.01)


def fill(fd: int) -> None:
    """To the brim."""
    os.eventfd_write(fd, FULL)


def took(action: Callable[[], object], bound: float = QUICK) -> float:
    """How long it took, which is not too long."""
    started = time.monotonic()
    action()
    seconds = time.monotonic() - started
    assert seconds < bound, f"it took {seconds:.2f} s"
    return seconds


# Thousands of clients ---------------------------------------------------------------------------------------------------------------


def rude(path: str, pick: random.Random) -> None:
    """A client that gets somewhere, and is gone."""
    with Bare(path, pick.choice(MODES)) as client:
        match pick.randrange(7):
            case 0:
                client.raw.send(ENTER[: pick.randrange(1, len(ENTER))])
            case 1:
                client.start()
                client.raw.send(frame(ops.SET_VRING_KICK.number, VringFile(0, 0).pack())[:-1], [client.kick])
            case 2:
                client.start()
                client.share()
            case 3:
                client.bring_up()
            case 4:
                client.bring_up().fill(kind=pick.choice((0, 1, 8)))
                client.offer(STEP)
            case 5:
                client.bring_up().fill()
                for index in range(STEP, 10 * STEP, STEP):
                    client.offer(index)
            case _:
                client.bring_up()
                client.raw.send(frame(ops.GET_STATUS.number) * 50 + b"\1")


@pytest.mark.timeout(300)
def test_thousands_of_rude_clients(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """Descriptors, mappings and threads are as before, and the memory within 2 MiB."""
    caplog.set_level(logging.CRITICAL + 1, "vdpa_bridge")
    pick = random.Random("rude")
    for _ in range(100):
        rude(path, pick)
    works(path)
    before, memory = belongings(), resident()
    started = time.monotonic()
    for cycle in range(CYCLES):
        rude(path, pick)
        if cycle % 100 == 0:
            works(path, pick.choice(("require", "off")))
    works(path)
    seconds = time.monotonic() - started
    growth = resident() - memory
    end = time.monotonic() + 3
    while (more := belongings() - before) and time.monotonic() < end:
        time.sleep(0.005)
    assert not more
    print(f"{CYCLES} cycles in {seconds:.1f} s, memory grew by {growth / 1024:.0f} KiB")
    assert growth < 2 * MIB


# Two hundred devices -----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def program(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A program of ``tests.support.many``, killed at the end if it is still there."""
    command = [sys.executable, "-m", "tests.support.many", *words]
    with subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> dict[str, float]:
    """The next line of JSON."""
    assert process.stdout is not None
    text = process.stdout.readline()
    assert text, f"the program ended: {process.wait(10)}"
    facts: dict[str, float] = json.loads(text)
    return facts


@pytest.mark.timeout(300)
def test_two_hundred_devices_in_one_process() -> None:
    """Little memory each; none is stalled by another's clients or defects; all stop in seconds."""
    with tempfile.TemporaryDirectory(prefix="vb") as directory, program("serve", directory, str(DEVICES)) as server:
        ready = line(server)
        print(f"{ready['per_device'] / 1024:.0f} KiB per idle device, {ready['threads']} threads")
        assert ready["per_device"] < 2 * MIB
        idle = [asked(f"{directory}/{n}") for n in range(1, DEVICES, 4)]
        with contextlib.ExitStack() as storms:
            for n, how in enumerate(("kicks", "kicks", "messages", "stall")):  # device 0 raises
                assert line(storms.enter_context(program("storm", f"{directory}/{n}", how)))["storming"]
            busy = [asked(f"{directory}/{n}") for n in range(4, DEVICES)]
            works(f"{directory}/4")
            assert server.stdin is not None
            server.stdin.close()
            stopped = line(server)
        for name, times in (("idle", idle), ("others busy", busy)):
            print(f"{name}: connected and asked in {sorted(times)[len(times) // 2] * 1000:.1f} ms, {max(times) * 1000:.0f} ms at most")
        print(f"stopped in {stopped['stopped']:.1f} s")
        assert max(busy) < 2.0
        assert stopped["stopped"] < 15
        assert stopped["threads"] == 1
        assert stopped["sockets"] == 0
        assert server.wait(10) == 0


def asked(path: str) -> float:
    """Seconds until a new client has the answer to GET_STATUS."""
    started = time.monotonic()
    with Raw(path, 10) as raw:
        raw.enter().send(frame(ops.GET_STATUS.number))
        assert raw.errno() == 0
    return time.monotonic() - started


def test_model_that_raises() -> None:
    """Its device needs a reset; the next client gets as far, which it would not if the first still had the device."""
    device = ModelDevice(Raising.from_options({"size": "1M"}), "raising")
    logging.getLogger("vdpa_bridge").setLevel(logging.CRITICAL + 1)
    try:
        with socket_path() as path, Server(device.open, path):
            for mode in MODES * 3:
                with Bare(path, mode) as client:
                    client.bring_up().fill()
                    client.offer(STEP)
                    assert client.needs_reset()
    finally:
        logging.getLogger("vdpa_bridge").setLevel(logging.NOTSET)
        device.close()


# Limits of the process ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_descriptors(below: int) -> Iterator[None]:
    """None can be opened, though numbers from *below* on are free or become so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers = []
    while not fillers or fillers[-1] < below:
        fillers.append(os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (below, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in fillers:
            os.close(fd)


def test_no_descriptor_is_left_for_a_client(model: ModelDevice, caplog: pytest.LogCaptureFixture) -> None:
    """It waits until there is one; the server does not end."""
    with socket_path() as path, Server(model.open, path) as server, Raw(path) as first, socket.socket(socket.AF_UNIX) as second:
        first.enter()
        assert server._client is not None
        with no_descriptors(server._client.fileno()):  # accept takes a number before it waits: this one is to be none
            first.sock.shutdown(socket.SHUT_RDWR)
            second.connect(path)
            deadline = time.monotonic() + 5
            while "a client has to wait" not in caplog.text:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        second.close()
        works(path)


def test_descriptors_that_get_lost(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """The client is dropped, and the log says whose fault it was."""
    with Bare(path, "vdpa") as client:
        client.start()
        with no_descriptors(3):
            client.raw.send(frame(ops.SET_VRING_KICK.number, VringFile(0, 0).pack()), [client.kick])
            assert client.raw.hung_up()
        assert "RLIMIT_NOFILE" in caplog.text


@pytest.mark.parametrize("mode", MODES)
def test_descriptors_above_1023(mode: str, path: str) -> None:
    """A process with many devices has them; select() would not."""
    low = os.open("/dev/null", os.O_RDONLY)
    many = []
    try:
        while not many or many[-1] < 1100:
            many.append(os.dup(low))
        with Bare(path, mode) as client:
            client.bring_up().fill()
            client.offer(STEP)
            client.wait_done(STEP)
            client.raw.send(frame(m.GET_FEATURES.number if mode == "legacy" else ops.GET_STATUS.number)[:5])
            time.sleep(0.01)
            client.raw.send(frame(m.GET_FEATURES.number if mode == "legacy" else ops.GET_STATUS.number)[5:])
            assert client.raw.reply()
            if mode == "legacy":
                for enable in (0, 1):
                    assert client.tell(m.SET_VRING_ENABLE, VringState(0, enable)) == 0
        works(path, "off")
    finally:
        for fd in (low, *many):
            os.close(fd)


# Pace --------------------------------------------------------------------------------------------------------------------------------


def test_reply_does_not_wait_for_the_rest_of_the_next_message(path: str) -> None:
    whole = frame(ops.GET_STATUS.number)
    with Raw(path) as raw:
        raw.enter().send(whole + whole[:5])
        assert took(raw.errno, 0.8) < 0.8
        raw.send(whole[5:])
        assert raw.errno() == 0


def test_what_came_before_a_wrong_message_is_answered(path: str) -> None:
    with Raw(path) as raw:
        raw.enter().send(frame(ops.GET_STATUS.number) * 3 + frame(0x1234))
        assert [raw.errno() for _ in range(4)] == [0, 0, 0, errno.EPROTO]
        assert raw.hung_up()


# Eventfds ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["once", "again and again", "not to be waited for"])
def test_client_that_fills_its_call_eventfd(mode: str, how: str, path: str) -> None:
    """The thread of the rings is stuck in a write; nothing else is."""
    with Bare(path, mode) as client, contextlib.ExitStack() as stack:
        client.bring_up().fill()
        os.eventfd_write(client.call, FULL)
        if how == "again and again":
            stack.enter_context(meanwhile(fill, client.call))
        os.set_blocking(client.call, how != "not to be waited for")
        client.offer(STEP)
        client.wait_beyond(0)
        for _ in range(5):
            assert took(client.status) < QUICK
        fresh = os.eventfd(0)
        stack.callback(os.close, fresh)
        if mode == "vdpa":
            replaced = VringFile(0, fresh)
            took(lambda: client.raw.ask(ops.SET_VRING_CALL, replaced))  # type: ignore[arg-type]
        else:
            took(lambda: client.tell(m.SET_VRING_CALL, m.U64(0), fresh))
        client.offer(2 * STEP)
        client.wait_done(2 * STEP)
        end = time.monotonic() + QUICK
        os.set_blocking(fresh, False)
        while True:
            with contextlib.suppress(BlockingIOError):
                if os.eventfd_read(fresh):
                    break
            assert time.monotonic() < end, "the new eventfd is not signalled"
        os.eventfd_write(fresh, FULL)
        os.set_blocking(fresh, True)
        client.offer(3 * STEP)
        client.wait_beyond(2 * STEP)
        took(client.reset)
        client.raw.sock.close()
        took(lambda: works(path), 2 * QUICK)


def test_client_that_fills_its_config_eventfd(path: str, model: ModelDevice) -> None:
    with Bare(path, "vdpa") as client:
        client.bring_up().fill()
        os.eventfd_write(client.call, FULL)
        assert client.raw.ask(ops.SET_CONFIG_CALL, EventFile(client.call)) == 0  # type: ignore[arg-type]
        for _ in range(3):
            took(lambda: model.change(lambda: None))
        assert took(client.status) < QUICK
        client.raw.sock.close()
        took(lambda: works(path), 2 * QUICK)


@pytest.mark.parametrize("mode", MODES)
def test_client_that_reads_its_kick_eventfd(mode: str, path: str) -> None:
    """Kicks that it takes back are its own loss; the next one counts, and nobody waits for any."""
    with Bare(path, mode) as client:
        client.bring_up().fill()
        index = 0
        with meanwhile(os.eventfd_read, client.kick):
            for _ in range(50):
                if client.done == index:
                    index += STEP
                client.offer(index)
                took(client.status)
        client.ring_bell()
        client.wait_done(index)
        took(client.reset)


@pytest.mark.parametrize("mode", MODES)
def test_client_that_fills_its_kick_eventfd(mode: str, path: str) -> None:
    """Also where the server kicks for it: a ring that is enabled again."""
    with Bare(path, mode) as client:
        client.bring_up().fill()
        os.set_blocking(client.kick, True)
        with meanwhile(fill, client.kick):
            for enable in (0, 1) * 20:
                took(partial(set_enable, client, enable))
        took(client.reset)


def set_enable(client: Bare, enable: int) -> None:
    """In either mode."""
    request = VringState(0, enable)
    if client.mode == "vdpa":
        assert client.raw.ask(ops.SET_VRING_ENABLE, request) == 0  # type: ignore[arg-type]
    else:
        assert client.tell(m.SET_VRING_ENABLE, request) == 0


def test_kick_and_call_are_the_same_eventfd(path: str) -> None:
    """The device kicks itself, and control operations still come through."""
    with Bare(path, "vdpa") as client:
        os.close(client.call)
        client.call = os.dup(client.kick)
        client.bring_up().fill()
        for index in range(STEP, 50 * STEP, STEP):
            client.offer(index)
            client.wait_done(index)
            assert took(client.status) < QUICK
        assert client.status() & Status.DRIVER_OK
