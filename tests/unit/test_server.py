# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The server against clients that do what they should not: the client loses its connection, and nobody loses anything else.

After every test the server must serve a good client from first to last message, and nothing may be left behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.bare import MODES, STEP, Bare
from tests.support.homes import Opener, connector, socket_path
from tests.support.raw import ENTER, HELLO, Raw
from vdpa_bridge import ops
from vdpa_bridge.backends.base import Backend
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.device import Device
from vdpa_bridge.drivers import BlkDriver
from vdpa_bridge.errors import PeerClosed
from vdpa_bridge.flags import VHOST_USER_F_PROTOCOL_FEATURES, ProtocolFeature, Status
from vdpa_bridge.models import make_model
from vdpa_bridge.models.base import Queue
from vdpa_bridge.vhost_user import messages as m
from vdpa_bridge.vhost_user.framing import HEADER, MAX_FDS, frame
from vdpa_bridge.vhost_user.server import Server
from vdpa_bridge.vhost_user.vdpa_mode import HELLO_OP, MAGIC, MAX_PAYLOAD, MAX_REQUESTS, OUR_HELLO, REVISION, Hello
from vdpa_bridge.wire import EMPTY, U8, U64, IotlbUpdate, Iova, VringFile, VringState

STATUS = frame(ops.GET_STATUS.number)
PATIENCE = 0.3


@pytest.fixture
def model() -> Iterator[ModelDevice]:
    device = ModelDevice(make_model("blk", {"size": "1M"}), "model:blk")
    yield device
    device.close()


@pytest.fixture
def path() -> Iterator[str]:
    with socket_path() as path:
        yield path


@pytest.fixture
def server(model: ModelDevice, path: str) -> Iterator[Server]:
    """An impatient server; it must be as good as new afterwards."""
    with Server(model.open, path, timeout=PATIENCE) as server:
        yield server
        works(connector(path, "blk", "require"))


@pytest.fixture
def raw(server: Server, path: str) -> Iterator[Raw]:
    with Raw(path) as raw:
        yield raw


def works(opener: Opener) -> None:
    """A good client finds a device at rest, and data comes back."""
    with Device(opener()) as device:
        assert device.get_status() == 0
        with BlkDriver(device, queue_size=8, pool_size=65536) as disk:
            disk.write(512, b"x" * 512)
            assert disk.read(512, 512) == b"x" * 512


# Framing --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 11, 12, 15])
def test_message_that_ends_too_early(raw: Raw, cut: int) -> None:
    raw.enter().send(frame(ops.SET_VRING_NUM.number, VringState(0, 16).pack())[:cut])
    raw.sock.shutdown(socket.SHUT_WR)
    assert raw.hung_up()


@pytest.mark.parametrize("cut", [1, 12, 15])
def test_message_that_never_ends(raw: Raw, cut: int) -> None:
    """Silence within a message costs the connection; silence between messages does not."""
    raw.enter()
    time.sleep(2 * PATIENCE)
    raw.send(STATUS)
    assert raw.errno() == 0
    raw.send(frame(ops.SET_VRING_NUM.number, VringState(0, 16).pack())[:cut])
    started = time.monotonic()
    assert raw.hung_up()
    assert PATIENCE * 0.8 < time.monotonic() - started < PATIENCE + 3


def test_client_that_drips(raw: Raw) -> None:
    """Slow, but whole: every byte on its own."""
    raw.enter()
    for byte in frame(ops.SET_STATUS.number, U8(1).pack()) + STATUS:
        raw.send(bytes([byte]))
        time.sleep(0.001)
    assert raw.errno() == 0
    assert raw.reply() == (ops.GET_STATUS.number, 5, bytes(8) + b"\1")


@pytest.mark.parametrize("size", [MAX_PAYLOAD + 1, 1 << 20, 0xFFFFFFFF])
def test_payload_too_large(raw: Raw, size: int) -> None:
    raw.enter().send(HEADER.pack(ops.SET_CONFIG.number, 1, size))
    assert raw.errno() == errno.EPROTO
    assert raw.hung_up()


@pytest.mark.parametrize("flags", [0, 2, 3, 0xFFFFFFFF])
def test_wrong_version(raw: Raw, flags: int) -> None:
    raw.enter().send(frame(ops.GET_STATUS.number, b"", flags))
    assert raw.errno() == errno.EPROTO
    assert raw.hung_up()


@pytest.mark.parametrize("flags", [0x5, 0x9, 0x11, 0x80000001])
def test_flags_that_a_request_does_not_have(raw: Raw, flags: int) -> None:
    raw.enter().send(frame(ops.GET_STATUS.number, b"", flags))
    assert raw.errno() == errno.EPROTO
    assert raw.hung_up()


@pytest.mark.parametrize("count", [1, 2, MAX_FDS, MAX_FDS + 1, 200])
def test_descriptors_that_nobody_announced(raw: Raw, count: int) -> None:
    """Closed, all of them, however many the kernel delivers."""
    fd = os.eventfd(0)
    raw.enter().send(STATUS, [fd] * count)
    os.close(fd)
    answer = raw.reply()
    assert answer is None or int.from_bytes(answer[2][:4], "little") == errno.EPROTO
    assert answer is None or raw.hung_up()


@pytest.mark.parametrize("op", [ops.SET_VRING_KICK, ops.SET_VRING_CALL, ops.SET_VRING_ERR], ids=lambda op: op.name)
def test_announced_descriptor_is_missing(raw: Raw, op: ops.Op[VringFile, object]) -> None:
    raw.enter().send(frame(op.number, VringFile(0, 0).pack()))
    assert raw.errno() == errno.EPROTO
    assert raw.hung_up()


def test_mapping_without_memory(raw: Raw) -> None:
    raw.enter().send(frame(ops.IOTLB, IotlbUpdate(Iova(0), 4096, -1).message()))
    assert raw.errno() == errno.EPROTO
    assert raw.hung_up()


@pytest.mark.parametrize("mark", [1, -2, 7])
def test_descriptor_field_that_is_neither(raw: Raw, mark: int) -> None:
    """0 is "beside me", -1 is "none"; the number of a descriptor in another process is nothing."""
    raw.enter().send(frame(ops.SET_VRING_KICK.number, VringFile(0, mark).pack()))
    assert raw.errno() == errno.EBADMSG
    raw.send(STATUS)
    assert raw.errno() == 0


@pytest.mark.parametrize(
    "message",
    [
        frame(ops.SET_VRING_NUM.number, bytes(7)),
        frame(ops.SET_VRING_NUM.number, bytes(9)),
        frame(ops.SET_VRING_NUM.number),
        frame(ops.GET_STATUS.number, b"\0"),
        frame(ops.GET_CONFIG.number, bytes(4)),
        frame(ops.SET_CONFIG.number, struct.pack("=II", 0, 8) + bytes(7)),
        frame(ops.SET_CONFIG.number, struct.pack("=II", 0, 0xFFFFFFFF)),
        frame(ops.SET_VRING_KICK.number, bytes(4)),
    ],
)
def test_payload_of_the_wrong_size(raw: Raw, message: bytes) -> None:
    """Well framed: an error for this request, and the session goes on."""
    raw.enter().send(message + STATUS)
    assert raw.errno() == errno.EBADMSG
    assert raw.errno() == 0


@pytest.mark.parametrize("payload", [bytes(71), bytes(72), bytes(73), struct.pack("=IIQQQBB38x", 2, 0, 0, 4096, 0, 3, 1), struct.pack("=IIQQQBB38x", 1, 0, 0, 4096, 0, 3, 3)])
def test_iotlb_message_that_is_none(raw: Raw, payload: bytes) -> None:
    """Other sizes, a miss, version 1."""
    raw.enter().send(frame(ops.IOTLB, payload) + STATUS)
    assert raw.errno() in (errno.ENOTTY, errno.EBADMSG)
    assert raw.errno() == 0


@pytest.mark.parametrize("number", [0xAF02, 0x4008AF03, 0x8008AF83, 0xC0FFAFFF, 0xFFFFAF00 + 0x55])
def test_unknown_operation(raw: Raw, number: int) -> None:
    """Of the family, so newer than we are: ENOTTY, as the kernel says."""
    raw.enter().send(frame(number, bytes(8)) + STATUS)
    assert raw.errno() == errno.ENOTTY
    assert raw.errno() == 0


@pytest.mark.parametrize("number", [m.SET_MEM_TABLE.number, m.GET_CONFIG.number, m.GET_FEATURES.number, 0, 0xFF, 0x1234, 0x40085301, 0xFFFFFFFF])
def test_message_of_another_protocol(raw: Raw, number: int) -> None:
    """Legacy messages too: vDPA mode makes them needless, and refuses them."""
    raw.enter().send(frame(number))
    assert raw.errno() == errno.EPROTO
    assert raw.hung_up()


# Negotiation --------------------------------------------------------------------------------------------------------------------


def test_offer(raw: Raw) -> None:
    raw.send(frame(m.GET_FEATURES.number) + frame(m.GET_PROTOCOL_FEATURES.number))
    _, _, features = raw.reply() or (0, 0, b"")
    assert U64.unpack(features).value & VHOST_USER_F_PROTOCOL_FEATURES
    _, flags, offered = raw.reply() or (0, 0, b"")
    assert flags == 0x5
    assert U64.unpack(offered).value & ProtocolFeature.VDPA


@pytest.mark.parametrize(
    "hello",
    [
        Hello(MAGIC + 1, REVISION, MAX_PAYLOAD, MAX_REQUESTS, 0),
        Hello(MAGIC, REVISION + 1, MAX_PAYLOAD, MAX_REQUESTS, 0),
        Hello(MAGIC, 0, MAX_PAYLOAD, MAX_REQUESTS, 0),
        Hello(MAGIC, REVISION, 16, MAX_REQUESTS, 0),
        Hello(MAGIC, REVISION, MAX_PAYLOAD, 0, 0),
    ],
)
def test_wrong_hello(raw: Raw, hello: Hello) -> None:
    raw.send(ENTER + frame(HELLO_OP.number, hello.pack()))
    assert raw.errno() == errno.EPROTO
    assert raw.hung_up()


@pytest.mark.parametrize("message", [STATUS, frame(HELLO_OP.number, bytes(8)), frame(HELLO_OP.number, OUR_HELLO.pack(), 9), frame(m.GET_FEATURES.number)])
def test_no_hello_no_session(raw: Raw, message: bytes) -> None:
    raw.send(ENTER + message)
    assert raw.errno() == errno.EPROTO
    assert raw.hung_up()


def test_hello_twice(raw: Raw) -> None:
    raw.enter().send(HELLO + STATUS)
    assert raw.errno() == errno.ENOTTY
    assert raw.errno() == 0


def test_vdpa_mode_goes_with_no_other_bit(raw: Raw) -> None:
    raw.send(frame(m.SET_PROTOCOL_FEATURES.number, U64(ProtocolFeature.VDPA | ProtocolFeature.MQ).pack()))
    assert raw.hung_up()


def test_operation_without_the_bit(raw: Raw) -> None:
    raw.send(STATUS)
    assert raw.hung_up()


def test_server_that_requires(model: ModelDevice, path: str) -> None:
    """Legacy clients are dropped; questions before the decision are answered."""
    with Server(model.open, path, vdpa="require"):
        for refused in (frame(m.SET_FEATURES.number, bytes(8)), frame(m.SET_PROTOCOL_FEATURES.number, U64(ProtocolFeature.MQ).pack())):
            with Raw(path) as raw:
                raw.send(frame(m.GET_FEATURES.number))
                assert raw.reply()
                raw.send(refused)
                assert raw.hung_up()
        works(connector(path, "blk", "prefer"))


def test_server_that_does_not_offer(model: ModelDevice, path: str) -> None:
    with Server(model.open, path, vdpa="off"):
        with Raw(path) as raw:
            raw.send(ENTER)
            assert raw.hung_up()
        works(connector(path, "blk", "prefer"))
        with pytest.raises(Exception, match="VHOST_USER_PROTOCOL_F_VDPA"):
            connector(path, "blk", "require")()


# Pace --------------------------------------------------------------------------------------------------------------------------


def test_pipelining(raw: Raw) -> None:
    """More requests at once than HELLO allows are served all the same, in order."""
    raw.enter()
    count = 2 * MAX_REQUESTS
    raw.send(b"".join(frame(ops.SET_VRING_NUM.number, VringState(0, 1 << n % 9).pack()) + STATUS for n in range(count)))
    assert [raw.errno() for _ in range(2 * count)] == [errno.EPERM, 0] * count


def test_pipelining_with_descriptors(raw: Raw) -> None:
    """Each message gets its own: the last kick is the one that counts."""
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(20)]
    raw.enter().send(frame(ops.SET_OWNER.number))
    assert raw.errno() == 0
    for fd in fds:
        raw.send(frame(ops.SET_VRING_KICK.number, VringFile(0, 0).pack()) + STATUS + frame(ops.SET_VRING_CALL.number, VringFile(0, -1).pack()), [fd])
    assert [raw.errno() for _ in range(3 * len(fds))] == [0] * 3 * len(fds)
    for fd in fds:
        os.close(fd)


def test_replies_that_nobody_reads(raw: Raw) -> None:
    """The server stops when the socket is full, and hangs up after its timeout."""
    raw.enter()
    with pytest.raises((BrokenPipeError, ConnectionResetError, TimeoutError)):
        raw.send(STATUS * 1_000_000)


def test_client_that_vanishes(server: Server, path: str) -> None:
    """With a running device, a batch open, and a mapping; without a word."""
    for _ in range(5):
        memory = os.memfd_create("gone", os.MFD_CLOEXEC)
        os.ftruncate(memory, 4096)
        with Raw(path) as raw:
            raw.enter()
            assert raw.ask(ops.SET_OWNER, EMPTY) == 0  # type: ignore[arg-type]
            assert raw.ask(ops.SET_STATUS, U8(1)) == 0  # type: ignore[arg-type]
            assert raw.ask(ops.IOTLB_UPDATE, IotlbUpdate(Iova(0), 4096, memory)) == 0  # type: ignore[arg-type]
            raw.send(frame(ops.GET_STATUS.number)[:5])
        os.close(memory)


def test_client_that_vanishes_unheard(server: Server, path: str) -> None:
    """Before it said anything, and before it read its replies."""
    for data in (b"", ENTER, ENTER + HELLO, ENTER + HELLO + STATUS * 100):
        with Raw(path) as raw:
            raw.send(data)


def test_memory_that_shrinks(raw: Raw) -> None:
    """The server must not die of SIGBUS; the ring is the client's loss."""
    memory = os.memfd_create("shrinks", os.MFD_CLOEXEC)
    os.ftruncate(memory, 8192)
    kick = os.eventfd(0)
    raw.enter()
    from vdpa_bridge.device import RingSetup

    for op, request in [
        (ops.SET_OWNER, EMPTY),
        (ops.SET_STATUS, U8(3)),
        (ops.SET_FEATURES, U64(3 << 32)),
        (ops.SET_STATUS, U8(11)),
        (ops.IOTLB_UPDATE, IotlbUpdate(Iova(0), 8192, memory)),
        *RingSetup(0, 16, 0, 1024, 2048, kick).calls(),
        (ops.SET_STATUS, U8(15)),
    ]:
        assert raw.ask(op, request) == 0  # type: ignore[arg-type]
    os.ftruncate(memory, 0)
    os.eventfd_write(kick, 1)
    deadline = time.monotonic() + 5
    while not _status(raw) & Status.NEEDS_RESET:
        os.eventfd_write(kick, 1)
        assert time.monotonic() < deadline, "the device did not notice"
        time.sleep(0.01)
    assert raw.ask(ops.SET_STATUS, U8(0)) == 0  # type: ignore[arg-type]
    os.close(memory)
    os.close(kick)


def _status(raw: Raw) -> int:
    raw.send(STATUS)
    answer = raw.reply()
    assert answer is not None
    return answer[2][8]


# The socket --------------------------------------------------------------------------------------------------------------------


def test_stale_socket_is_replaced(model: ModelDevice, path: str) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    with Server(model.open, path):
        works(connector(path, "blk", "require"))
    assert not Path(path).exists()


def test_live_socket_is_not_replaced(server: Server, model: ModelDevice, path: str) -> None:
    with pytest.raises(OSError) as refused:
        Server(model.open, path)
    assert refused.value.errno == errno.EADDRINUSE
    assert path in str(refused.value)


def test_file_in_the_way_is_not_replaced(model: ModelDevice, path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(OSError) as refused:
        Server(model.open, path)
    assert refused.value.errno == errno.EADDRINUSE
    assert Path(path).read_text() == "precious"


def test_stop_ends_the_session_at_hand(model: ModelDevice, path: str) -> None:
    server = Server(model.open, path).start()
    with connector(path, "blk", "require")() as backend:
        server.stop()
        server.stop()
        with pytest.raises(PeerClosed):
            backend.call(ops.GET_STATUS, EMPTY)
    with model.open() as direct:
        assert direct.call(ops.GET_STATUS, EMPTY).value == 0


def test_device_that_cannot_be_opened(model: ModelDevice, path: str) -> None:
    """The client is told by the end of the connection; the next one may have more luck."""
    with Server(model.open, path) as server:
        with model.open(), pytest.raises(PeerClosed):
            connector(path, "blk", "require")()
        works(connector(path, "blk", "require"))
        assert server.served >= 1


def test_device_whose_opening_fails_in_an_unexpected_way(model: ModelDevice, path: str, caplog: pytest.LogCaptureFixture) -> None:
    """A defect costs the client at hand its connection, and is told; the server goes on."""
    defects = [KeyError("of a model")]

    def open_device() -> Backend:
        if defects:
            raise defects.pop()
        return model.open()

    with Server(open_device, path):
        with pytest.raises(PeerClosed):
            connector(path, "blk", "require")()
        works(connector(path, "blk", "require"))
    assert any(record.exc_info and isinstance(record.exc_info[1], KeyError) for record in caplog.records)


@pytest.mark.parametrize("mode", MODES)
def test_ring_thread_wakes_for_work_alone(mode: str, server: Server, model: ModelDevice, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring that is empty when it starts is looked at after a kick; chains that are there before are served without one."""
    process, looked = model.model.process, list[int]()
    monkeypatch.setattr(model.model, "engine", lambda index: None)  # rings of engines are looked at in C

    def process_and_note(queues: Mapping[int, Queue], index: int) -> None:
        looked.append(index)
        process(queues, index)

    monkeypatch.setattr(model.model, "process", process_and_note)
    with Bare(path, mode) as client:
        client.bring_up()
        client.fill()
        client.offer(STEP)
        client.wait_done(STEP)
    assert looked == [0]
    with Bare(path, mode) as client:
        client.fill()
        client.offer(STEP)
        os.eventfd_read(client.kick)
        client.bring_up()
        client.wait_done(STEP)


def test_timeout_that_is_almost_none(model: ModelDevice, path: str) -> None:
    """It is not taken for no limit, as the socket option takes 0."""
    with Server(model.open, path, timeout=1e-9), Raw(path) as raw:
        raw.enter()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            raw.send(STATUS * 1_000_000)


# Anything ----------------------------------------------------------------------------------------------------------------------


_numbers = st.sampled_from([op.number for op in ops.TABLE] + sorted(m.BY_NUMBER) + [HELLO_OP.number, 0xFFFF, 0xAF99])
_messages = st.builds(
    lambda number, flags, payload, lie: HEADER.pack(number, flags, max(0, len(payload) + lie)) + payload,
    _numbers,
    st.sampled_from([1, 1, 1, 1, 9, 5, 0]),
    st.one_of(st.binary(max_size=80), st.sampled_from([b"", bytes(8), U64(ProtocolFeature.VDPA).pack(), OUR_HELLO.pack()])),
    st.sampled_from([0, 0, 0, 0, 1, -1, 5000]),
)


@pytest.mark.parametrize("prefix", [b"", ENTER + HELLO], ids=["from the start", "in vDPA mode"])
def test_random_bytes(prefix: bytes, model: ModelDevice) -> None:
    """Whatever comes, in whatever pieces: the server answers or hangs up, and serves the next one."""
    with socket_path() as path, Server(model.open, path, timeout=0.05):

        @settings(max_examples=300, deadline=None, derandomize=True, database=None)
        @given(st.lists(st.one_of(_messages, st.binary(max_size=40)), max_size=8), st.integers(0, 3))
        def attack(messages: list[bytes], fds: int) -> None:
            fd = os.memfd_create("attack", os.MFD_CLOEXEC)
            try:
                with Raw(path) as raw, contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may hang up at any time
                    raw.send(prefix)
                    for at, message in enumerate(messages):
                        raw.send(message or b"\0", [fd] * fds if at == 0 else ())
            finally:
                os.close(fd)

        attack()
        works(connector(path, "blk", "require"))
