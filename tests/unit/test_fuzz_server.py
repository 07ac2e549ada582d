# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Streams of messages from hostile clients: whatever comes, a session ends in one way, and the device serves the next client.

The streams follow from seeds, so that each run is the same. ``VDPA_BRIDGE_FUZZ=COUNT`` sets how many messages are carried out (both
modes together); ``VDPA_BRIDGE_FUZZ_SEED=SEED`` replays the one session that a failure names.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.conftest import belongings
from tests.support.homes import connector, served, socket_path
from tests.support.hostile import FULL, Hostile, Stock
from tests.support.limited import LimitedDevice
from tests.support.raw import Raw
from vdpa_bridge import ops
from vdpa_bridge.backends.base import Backend
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.backends.relay import relayed
from vdpa_bridge.device import Device
from vdpa_bridge.drivers import BlkDriver, NetDriver
from vdpa_bridge.errors import RemoteProtocolError
from vdpa_bridge.flags import Status
from vdpa_bridge.models import make_model
from vdpa_bridge.vhost_user.framing import HEADER, REPLY_FLAGS, Frame, Receiver
from vdpa_bridge.vhost_user.messages import message_name
from vdpa_bridge.vhost_user.server import Server
from vdpa_bridge.vhost_user.session import Session
from vdpa_bridge.vhost_user.vdpa_mode import MAX_PAYLOAD, fds_wanted
from vdpa_bridge.wire import EMPTY

MESSAGES = int(os.environ.get("VDPA_BRIDGE_FUZZ", "200000"))
REPLAY = os.environ.get("VDPA_BRIDGE_FUZZ_SEED")
OPTIONS = {"blk": {"size": "1M"}, "net": {}}
BOUND = 3.0
"""Seconds that one message may take on a busy machine; those that matter take microseconds."""
NAMED = re.compile(r"(?:\S+: )?(?:[A-Z][A-Z0-9_]+(?: message)? \((?:0x[0-9a-f]+|\d+)\)|request 0x[0-9a-f]+|HELLO|SET_PROTOCOL_FEATURES|\d+ descriptors for one message)")
"""What the text of a dropped connection begins with: the message, behind the device where that refused it, or what is counted."""


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Only complaints are kept: thousands of clients are noted on purpose."""
    caplog.set_level(logging.ERROR, "vdpa_bridge")


@pytest.fixture
def stock() -> Iterator[Stock]:
    with Stock() as stock:
        yield stock


def works(device: Device, kind: str) -> None:
    """A good client finds the device at rest and gets its data back."""
    with device:
        assert device.get_status() == 0
        if kind == "blk":
            with BlkDriver(device, queue_size=8, pool_size=65536) as disk:
                disk.write(512, b"x" * 512)
                assert disk.read(512, 512) == b"x" * 512
        else:
            with NetDriver(device, queue_size=8) as nic:
                nic.send(b"\xff" * 6 + bytes(6) + b"\x08\x00" + bytes(50))
                assert nic.receive(5)


def assert_nothing_left(before: Counter[str]) -> None:
    """A thread that has ended may be listed for a moment more."""
    deadline = time.monotonic() + 2
    while (more := belongings() - before) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not more


def check_replies(data: bytes, vdpa: bool) -> int:
    """Whole replies, each as the mode has them; how many."""
    count = 0
    while data:
        _, flags, size = HEADER.unpack_from(data)
        assert flags == REPLY_FLAGS
        assert len(data) >= HEADER.size + size
        if vdpa:
            error, zero = data[HEADER.size : HEADER.size + 4], data[HEADER.size + 4 : HEADER.size + 8]
            assert zero == bytes(4)
            assert int.from_bytes(error, "little") < 4096
            assert size == 8 or not any(error)
        data = data[HEADER.size + size :]
        count += 1
    return count


class Attack:
    """Sessions against one device without a socket, and what came of them."""

    def __init__(self, stock: Stock) -> None:
        self.stock = stock
        self.messages = 0
        self.sessions = 0
        self.ran = 0
        """Sessions whose device was running at their end."""
        self.asked = 0
        """Translations."""
        self.dropped: Counter[str] = Counter()
        self.slowest = 0.0

    def __str__(self) -> str:
        ends = f"{sum(self.dropped.values())} dropped by {len(self.dropped)} rules"
        return f"{self.messages} messages, {self.sessions} sessions, {self.ran} with a running device, {self.asked} translations asked for, {ends}, slowest {self.slowest * 1000:.0f} ms"

    def run(self, backend: Backend, client: Hostile) -> None:
        """One client from its first to its last byte, as the server would serve it."""
        session = Session(backend, client.random.choice(("prefer", "require", "prefer")) if client.mode == "vdpa" else "prefer")
        receiver = Receiver(fds_wanted, MAX_PAYLOAD, message_name)
        self.sessions += 1
        self.stock.refresh()
        self.stock.scribble(client.ring())
        try:
            for chunk in client.session():
                receiver.feed(chunk.data, [os.dup(self.stock[name]) for name in chunk.fds])
                while (message := receiver.next()) is not None:
                    self._carry_out(session, message)
                    self._converse(session, client)
                if client.random.random() < 0.05:
                    os.eventfd_write(self.stock["kick"], 1)
                if client.random.random() < 0.01:
                    self.stock.scribble(client.ring())
                if client.random.random() < 0.003:
                    os.ftruncate(self.stock["memory"], 4096)
        except RemoteProtocolError as error:
            text = str(error)
            assert NAMED.match(text), f"an end that does not name its message: {text}"
            assert not re.search(r"None|Errno|object at|Traceback", text), text
            check_replies(session.last_words(error), True)
            self.dropped[re.sub(r"0x[0-9a-f]+|\d+", "N", text)] += 1
        finally:
            receiver.close()
            with contextlib.suppress(OSError, RemoteProtocolError):  # a bridge's own device can be gone
                self.ran += bool(backend.call(ops.GET_STATUS, EMPTY).value & Status.DRIVER_OK)
            started = time.monotonic()
            session.close()
            self._timed(started, "close")

    def _converse(self, session: Session, client: Hostile) -> None:
        """The back-end channel: an answer for each thing that is asked, or too few, or too many."""
        if session.event < 0 or not select.select([session.event], [], [], 0)[0]:
            return
        session.on_event()
        with socket.socket(fileno=os.dup(self.stock["other end"])) as sock, contextlib.suppress(BlockingIOError, BrokenPipeError):
            if asked := len(sock.recv(1 << 16, socket.MSG_DONTWAIT)) // (HEADER.size + 32):
                self.asked += asked
                for _ in range(asked + (client.random.choice((-1, 1)) if client.wrong() else 0)):
                    sock.send(client.answer(), socket.MSG_DONTWAIT)

    def _carry_out(self, session: Session, message: Frame) -> None:
        self.messages += 1
        vdpa = session.mode == "vDPA"
        started = time.monotonic()
        count = check_replies(session.handle(message), vdpa)
        self._timed(started, message_name(message.request))
        assert not message.fds, "nobody took the descriptors, and nobody closed them"
        assert count == 1 if vdpa else count <= 1

    def _timed(self, started: float, what: str) -> None:
        took = time.monotonic() - started
        self.slowest = max(self.slowest, took)
        assert took < BOUND, f"{what} took {took:.1f} s"


def seeds(name: str) -> Iterator[str]:
    """Without an end, or the one that is to be replayed."""
    if REPLAY is not None:
        yield REPLAY
        return
    number = 0
    while True:
        yield f"{name}:{number}"
        number += 1


def chosen(name: str) -> bool:
    """Whether the seed to replay, if any, is of this test."""
    return REPLAY is None or REPLAY.startswith(name + ":")


@pytest.mark.timeout(max(120, MESSAGES // 1000))
@pytest.mark.parametrize("kind", ["blk", "net"])
def test_sessions(kind: str, stock: Stock) -> None:
    """The bulk, on sessions that are fed by hand; a good client after every hundredth, and nothing left behind."""
    device = ModelDevice(make_model(kind, OPTIONS[kind]), f"model:{kind}")
    attack = Attack(stock)
    works(Device(device.open()), kind)
    before = belongings()
    started = time.monotonic()
    try:
        for seed in seeds(kind) if chosen(kind) else ():
            try:
                attack.run(device.open(), Hostile(seed))
                if attack.sessions % 100 == 0:
                    assert_nothing_left(before)
                    works(Device(device.open()), kind)
            except BaseException as error:
                error.add_note(f"replay it with VDPA_BRIDGE_FUZZ_SEED={seed}")
                raise
            if attack.messages >= MESSAGES * 45 // 100:
                break
        works(Device(device.open()), kind)
    finally:
        device.close()
    took = time.monotonic() - started
    print(f"{kind}: {took:.0f} s, {attack}")
    if REPLAY is None and MESSAGES >= 20000:
        assert attack.ran > attack.sessions // 10, "too few sessions get as far as a running device"
        assert kind == "net" or attack.asked > attack.sessions // 10, "too few sessions have a device IOTLB at work"
        assert len(attack.dropped) > 20, "a hostile client should get to see more rules than these"


@pytest.mark.timeout(max(120, MESSAGES // 1000))
def test_sessions_through_a_bridge(stock: Stock) -> None:
    """The device is behind a socket of its own: what the bridge sends on must be good, whatever came in."""
    device = ModelDevice(make_model("blk", OPTIONS["blk"]), "model:blk")
    attack = Attack(stock)
    try:
        for vdpa in ("require", "off"):
            with served(device.open, "blk", vdpa) as opener:
                for seed in seeds(f"bridge-{vdpa}") if chosen(f"bridge-{vdpa}") else ():
                    try:
                        attack.run(opener(), Hostile(seed))
                    except BaseException as error:
                        error.add_note(f"replay it with VDPA_BRIDGE_FUZZ_SEED={seed}")
                        raise
                    if attack.messages >= MESSAGES * (3 if vdpa == "require" else 5) // 100:
                        break
                works(Device(opener()), "blk")
    finally:
        device.close()
    print(f"bridge: {attack}")


@pytest.mark.timeout(max(120, MESSAGES // 1000))
@pytest.mark.parametrize("hardware", [False, True], ids=["asked for", "hardware"])
def test_sessions_through_a_relay(hardware: bool, stock: Stock) -> None:
    """Always in between, or brought in by what a device with hardware's limits refuses: what goes on to the device must be good."""
    place = "hardware" if hardware else "relay"
    device = (LimitedDevice if hardware else ModelDevice)(make_model("net", OPTIONS["net"]), f"model:{place}")
    attack = Attack(stock)
    works(Device(device.open()), "net")
    before = belongings()
    try:
        for seed in seeds(place) if chosen(place) else ():
            try:
                attack.run(device.open() if hardware else relayed(device.open()), Hostile(seed))
                if attack.sessions % 50 == 0:
                    assert_nothing_left(before)
            except BaseException as error:
                error.add_note(f"replay it with VDPA_BRIDGE_FUZZ_SEED={seed}")
                raise
            if attack.messages >= MESSAGES * 5 // 100:
                break
        works(Device(device.open()), "net")
    finally:
        device.close()
    print(f"{place}: {attack}")


@pytest.mark.timeout(max(120, MESSAGES // 1000))
def test_sockets(stock: Stock, caplog: pytest.LogCaptureFixture) -> None:
    """The same streams through a socket. No client finds a defect, and each that is dropped is named in the log."""
    caplog.set_level(logging.WARNING, "vdpa_bridge.vhost_user.server")
    device = ModelDevice(make_model("blk", OPTIONS["blk"]), "model:blk")
    sent = sessions = 0
    try:
        with socket_path() as path, Server(device.open, path, timeout=0.2):
            for seed in seeds("socket") if chosen("socket") else ():
                client = Hostile(seed)
                stock.refresh()
                stock.scribble(client.ring())
                sessions += 1
                with Raw(path, timeout=20) as raw:
                    sent += _send_all(raw, client, stock)
                    if client.random.random() < 0.5:  # the rest vanishes without a word
                        _drain(raw)
                check_log(caplog, seed)
                if sessions % 100 == 0:
                    works(Device(connector(path, "blk", "require")()), "blk")
                if sent >= MESSAGES // 10:
                    break
            works(Device(connector(path, "blk", "require")()), "blk")
            works(Device(connector(path, "blk", "off")()), "blk")
    finally:
        device.close()
    print(f"sockets: {sent} chunks, {sessions} sessions")


def check_log(caplog: pytest.LogCaptureFixture, seed: str) -> None:
    """No defects; whoever was dropped is told apart by message and value."""
    for record in caplog.records:
        text = record.getMessage()
        assert record.exc_info is None, f"a defect, replay it with VDPA_BRIDGE_FUZZ_SEED={seed}: {text}\n{record.exc_text}"
        _, dropped, why = text.partition(": drop: ")
        if dropped:
            assert re.search(r"\d|hung up in the middle|does not read", why), f"{seed}: {text}"
    caplog.clear()


def _send_all(raw: Raw, client: Hostile, stock: Stock) -> int:
    """A reader beside keeps the replies from filling the socket."""
    reader = threading.Thread(target=_drain, args=(raw,))
    reader.start()
    count = 0
    try:
        for chunk in client.session():
            try:
                raw.send(chunk.data, [stock[name] for name in chunk.fds])
            except (BrokenPipeError, ConnectionResetError):
                break
            count += 1
        raw.sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the server hung up first, as it may
    reader.join(20)
    assert not reader.is_alive(), f"the server neither answers nor hangs up: VDPA_BRIDGE_FUZZ_SEED={client.seed}"
    return count


def _drain(raw: Raw) -> None:
    try:
        while raw.sock.recv(65536):
            pass
    except ConnectionResetError:
        pass  # a server that hung up with something unread


def test_seeds_replay(stock: Stock) -> None:
    """The same seed makes the same session, in every process and in any order."""
    assert FULL.bit_length() == 64
    for seed in ("a:1", "a:2"):
        first, second = ([(c.data, c.fds) for c in Hostile(seed).session()] for _ in range(2))
        assert first == second
        assert first
