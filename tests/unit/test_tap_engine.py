# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Network devices on taps of this system: the engine in C and the model in Python do the same, whatever happens to the tap."""

from __future__ import annotations

import contextlib
import logging
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.cable import OTHER, OWN, frame
from tests.support.driven import opened
from tests.support.tapped import Wire, attribute, exists, ip, tap_name
from vdpa_bridge import Device, ops
from vdpa_bridge._virtqueue import header_agreed
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.drivers import Driver, NetDriver
from vdpa_bridge.drivers.base import RING_FEATURES
from vdpa_bridge.engines import NetFilter, TapEngine
from vdpa_bridge.flags import Feature
from vdpa_bridge.models import NetModel, make_model
from vdpa_bridge.models.net import Exchange, offload
from vdpa_bridge.models.net.control import Control
from vdpa_bridge.netdev import HEADER, PLAIN
from vdpa_bridge.virtio.features import NetFeature as F
from vdpa_bridge.wire import VringState

RX, TX, CTRL = 0, 1, 2
KIND = b"\x88\xb5"
HOST = F.CSUM | F.HOST_TSO4 | F.HOST_TSO6 | F.HOST_ECN | F.HOST_UFO | F.HOST_USO
GUEST = F.GUEST_CSUM | F.GUEST_TSO4 | F.GUEST_TSO6 | F.GUEST_ECN | F.GUEST_UFO | F.GUEST_USO4 | F.GUEST_USO6
PATIENCE = 20.0


# The same decisions ----------------------------------------------------------------------------------------------------------


@settings(max_examples=1000, deadline=None)
@given(
    fields=st.tuples(
        st.integers(0, 255), st.sampled_from([0, 1, 2, 3, 4, 5, 6, 8, 0x80, 0x81, 0x83, 0x84, 0x85]), *[st.one_of(st.integers(0, 80), st.integers(0, 65535))] * 4
    ),
    length=st.integers(0, 200),
    accepted=st.sets(st.sampled_from([f for f in F if f & (HOST | GUEST)])),
    out=st.booleans(),
)
def test_headers_are_judged_alike(fields: tuple[int, ...], length: int, accepted: set[int], out: bool) -> None:
    packet = struct.pack("<BBHHHHH", *fields, 7) + bytes(length)
    features = sum(accepted)
    judged = (offload.sent if out else offload.received)(packet, features) if length >= 14 else None
    assert header_agreed(packet, offload.terms(features, out)) == (None if judged is None else judged[:HEADER])


MACS = st.sampled_from([OWN, OTHER, b"\xff" * 6, bytes.fromhex("01005e000001"), bytes.fromhex("333300000001"), bytes(6)])


@settings(max_examples=1000, deadline=None)
@given(
    features=st.sampled_from([int(F.CTRL_RX), int(F.CTRL_RX | F.CTRL_VLAN)]),
    modes=st.lists(st.booleans(), min_size=6, max_size=6),
    tables=st.tuples(*[st.one_of(st.none(), st.sets(MACS))] * 2),
    vlans=st.sets(st.sampled_from([0, 1, 63, 64, 4095])),
    to=MACS,
    rest=st.sampled_from([b"", bytes(2), KIND, *(b"\x81\0" + struct.pack(">H", tag) for tag in (0, 1, 63, 64, 4095, 0xF040))]),
)
def test_frames_are_filtered_alike(features: int, modes: list[bool], tables: Any, vlans: set[int], to: bytes, rest: bytes) -> None:
    control = Control(OWN, 1)
    control.start(features)
    control.modes = dict(zip(control.modes, modes, strict=True))
    control.tables, control.vlans = list(tables), vlans
    data = (to + OTHER + rest).ljust(60, b"\0")
    assert control.filter().accepts(data) == control.accepts(PLAIN + data)


def test_wrong_arguments() -> None:
    for mac, options in ((b"short", {}), (OWN, {"tables": ([b"x"], [])}), (OWN, {"tables": ([OWN] * 65, [])}), (OWN, {"vlans": [4096]})):
        with pytest.raises(ValueError):
            NetFilter(mac, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="11 bytes"):
        TapEngine(0, 11)
    with pytest.raises(ValueError, match="no header"):
        header_agreed(bytes(11), (False, False, False, 0))
    with pytest.raises(ValueError, match="threads= for these and taps"):
        make_model("net", {"user": "on", "threads": "1"})


# Real taps -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["0", "1"], ids=["model", "engine"])
def threads(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def on_tap(threads: str, pairs: int = 1, **options: str) -> Iterator[tuple[NetModel, str]]:
    """A device on a tap on which this system says nothing by itself."""
    name = tap_name()
    ip("tuntap", "add", "dev", name, "mode", "tap", *["multi_queue"] * (pairs > 1))
    try:
        Path("/proc/sys/net/ipv6/conf", name, "disable_ipv6").write_text("1")
        ip("link", "set", "dev", name, "mtu", options.get("mtu", "1500"), "up")
        model = make_model("net", {"tap": name, "threads": threads, "pairs": str(pairs), "mac": OWN.hex(":"), **options})
        assert isinstance(model, NetModel)
        until(lambda: attribute(name, "operstate") == "up")
        ip("link", "set", "dev", name, "up")  # whoever has done that knows that the kernel has done with the carrier, too
        yield model, name
    finally:
        if exists(name):
            ip("link", "delete", "dev", name)


def came(wire: Wire, count: int) -> list[bytes]:
    end = time.monotonic() + PATIENCE
    while len(wire.came(KIND)) < count and time.monotonic() < end:
        wire.look(0.1)
    return wire.came(KIND)


@pytest.mark.parametrize("packed", [0, Feature.RING_PACKED], ids=["split", "packed"])
@pytest.mark.parametrize("merge", [False, True], ids=["whole", "merged"])
def test_frames_of_all_sizes_pass_both_ways(threads: str, merge: bool, packed: int) -> None:
    with on_tap(threads, mtu="9000") as (model, name), opened(model) as there, Wire(name) as wire:
        wanted = F.MRG_RXBUF if merge else 0
        with Driver(there, wanted=wanted, ring_features=RING_FEATURES | packed, pool_size=8 << 20) as driver:
            sizes = [60, 61, 9014, 1514, 1500, 2036, 2037, *range(100, 9000, 331)]
            room = 1000 if merge else 9100
            for at in range(0, len(sizes), 10):
                frames = [frame(at + number, size) for number, size in enumerate(sizes[at : at + 10])]
                posted = [driver.post(RX, [], [room - 20, 20]) for _ in range(sum(-(-(HEADER + len(data)) // room) for data in frames))]
                for data in frames:
                    wire.send(data)
                driver.wait(lambda posted=posted: posted[-1].written >= 0, "frames", PATIENCE)  # type: ignore[misc]
                got = b"".join(b"".join(buffer.data)[: buffer.written] for buffer in posted)
                expected = b"".join(bytes(10) + struct.pack("<H", -(-(HEADER + len(data)) // room)) + data for data in frames)
                assert got == expected
            for at, size in enumerate(sizes):
                cut = 1 + at % 40
                data = PLAIN + frame(at, size)
                driver.transact(TX, [data[:cut], data[cut:]] if at % 2 else [data])
            assert came(wire, len(sizes)) == [frame(at, size) for at, size in enumerate(sizes)]
        assert isinstance(model.path, Exchange)
        assert (model.path.sent.frames, model.path.sent.dropped, model.path.received.dropped) == (len(sizes), 0, 0)


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def segment(length: int) -> bytes:
    """A TCP segment of IPv4, whose checksum is still to be made: the pseudo header's is there."""
    pseudo = bytes((10, 9, 0, 2, 10, 9, 0, 1)) + struct.pack(">HH", 6, 20 + length)
    tcp = struct.pack(">HHIIBBHHH", 5000, 5001, 7, 9, 0x50, 0x10, 4096, ~checksum(pseudo) & 0xFFFF, 0)
    head = struct.pack(">BBHHHBBH", 0x45, 0, 40 + length, 1, 0, 64, 6, 0) + pseudo[:8]
    head = head[:10] + struct.pack(">H", checksum(head)) + head[12:]
    return b"\xff" * 6 + OWN + b"\x08\0" + head + tcp + bytes(at % 251 for at in range(length))


def test_checksums_and_segments_are_left_as_agreed(threads: str) -> None:
    """The kernel makes checksums, and cuts for a wire that takes no more; what was not agreed on is dropped."""
    with on_tap(threads) as (model, name), opened(model) as there, Wire(name) as wire:
        large, small = segment(20000), segment(1000)
        with Driver(there, wanted=F.MRG_RXBUF | HOST | GUEST, pool_size=4 << 20) as driver:
            driver.transact(TX, [struct.pack("<BBHHHHH", 1, 1, 54, 1448, 34, 16, 0), large])
            driver.transact(TX, [struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 16, 0), small])
            driver.transact(TX, [struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 5000, 0), small])
            end = time.monotonic() + PATIENCE
            while sum(len(data) for _, sent, data in wire.seen if not sent) < len(large) + len(small) and time.monotonic() < end:
                wire.look(0.1)
            assert [data for _, sent, data in wire.seen if not sent and data[12:14] == b"\x08\0"] == [large, small]
        with Driver(there, wanted=F.MRG_RXBUF) as driver:
            driver.transact(TX, [struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 16, 0), small])
            driver.transact(TX, [PLAIN, frame(5)])
            assert came(wire, 1) == [frame(5)]
        assert isinstance(model.path, Exchange)
        assert (model.path.sent.frames, model.path.sent.large, model.path.sent.dropped) == (3, 1, 2)


def test_pairs_join_and_leave(threads: str) -> None:
    """Each pair's frames go out; what comes in goes to the pairs in use, all of it."""
    with on_tap(threads, pairs=2) as (model, name), opened(model) as there, Wire(name) as wire, NetDriver(there, pairs=2) as nic:
        for used in (2, 1, 2):
            assert nic.transact(4, [b"\4\0" + struct.pack("<H", used)], [1]) == (1, [b"\0"])
            before = len(wire.came(KIND))
            for pair in range(2):
                nic.send_many([frame(10 * pair + at) for at in range(10)], pair=pair)
            assert sorted(came(wire, before + 10 * used)[before:]) == sorted(frame(at) for at in range(10 * used))
            for number in range(40):
                wire.send(b"\xff" * 6 + frame(number, 60 + number)[6:])
            got: list[bytes] = []
            end = time.monotonic() + PATIENCE
            while len(got) < 40 and time.monotonic() < end:
                for pair in range(2):
                    with contextlib.suppress(TimeoutError):
                        got.append(nic.receive(pair=pair, timeout=0.01))
            assert sorted(map(len, got)) == [60 + number for number in range(40)]


def flow(port: int) -> bytes:
    """A datagram of one of many flows, which a tap spreads over its queues."""
    udp = struct.pack(">HHHH", port, 9, 28, 0) + bytes(20)
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0, bytes((10, 9, 0, 1)), bytes((10, 9, 0, 2)))
    return OWN + OTHER + b"\x08\0" + head[:10] + struct.pack(">H", checksum(head)) + head[12:] + udp


def test_ring_that_is_put_off_takes_no_frames(threads: str) -> None:
    """Its queue leaves the tap with the first frame that comes for it; all later ones come by the other pair, until it is back."""
    flows = {flow(5000 + number) for number in range(64)}
    with on_tap(threads, pairs=2) as (model, name), opened(model) as there, Wire(name) as wire, NetDriver(there, pairs=2) as nic:

        def come(pairs: int) -> bool:
            """Whether all flows arrive, by so many pairs."""
            for data in flows:
                wire.send(data)
            got: dict[int, set[bytes]] = {pair: set() for pair in range(2)}
            end = time.monotonic() + 1
            while len(got[0] | got[1]) < len(flows) and time.monotonic() < end:
                for pair in range(2):
                    with contextlib.suppress(TimeoutError):
                        got[pair].add(nic.receive(pair=pair, timeout=0.005))
            return got[0] | got[1] == flows and sum(map(bool, got.values())) == pairs

        until(lambda: come(2))
        assert isinstance(model.path, Exchange)
        there.backend.call(ops.SET_VRING_ENABLE, VringState(2, 0))
        until(lambda: come(1))
        there.backend.call(ops.SET_VRING_ENABLE, VringState(2, 1))
        until(lambda: come(2))


def test_newer_code_goes_on_with_the_tap(threads: str) -> None:
    """``serve --reload``: the successor has the tap, and what the driver said."""
    with on_tap(threads) as (model, name):
        home = ModelDevice(model, "model:test")
        try:
            with Device(home.open()) as there, Wire(name) as wire, NetDriver(there) as nic:
                for number in range(3):
                    nic.send(frame(2 * number))
                    assert came(wire, number + 1)[number] == frame(2 * number)
                    wire.send(frame(2 * number + 1))
                    assert nic.receive(timeout=PATIENCE) == frame(2 * number + 1)
                    home.replace(lambda old: NetModel.succeed(old, {"tap": name, "threads": threads, "mac": OWN.hex(":")}))
        finally:
            home.close()


@pytest.mark.parametrize("action", ["suspend", "restart", "plug"])
def test_traffic_meanwhile(threads: str, action: str) -> None:
    """Frames come all the time; those that the driver gets are whole and in order, and it gets some after each interruption."""
    stop = threading.Event()
    with on_tap(threads) as (model, name), opened(model) as there, Wire(name) as wire, NetDriver(there) as nic:

        def flood() -> None:
            number = 0
            while not stop.is_set():
                with contextlib.suppress(OSError):  # its queue is full, or the cable is out
                    wire.send(frame(number, 60 + number % 1400))
                number += 1
                if number % 64 == 0:
                    time.sleep(0.0005)

        thread = threading.Thread(target=flood)
        thread.start()
        last = -1
        try:
            for _ in range(15):
                for data in nic.receive_many(200, timeout=PATIENCE):
                    if data[12:14] != KIND:
                        continue
                    number = int.from_bytes(data[14:18], "big")
                    assert number > last
                    assert data == frame(number, 60 + number % 1400)
                    last = number
                nic.send_many([frame(at) for at in range(20)])
                if action == "suspend":
                    nic.suspend()
                    nic.resume()
                elif action == "restart":
                    nic.restart()
                else:
                    model.plug(False)
                    model.plug(True)
        finally:
            stop.set()
            thread.join()


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("by", ["receiving", "sending"])
def test_tap_that_is_removed(threads: str, by: str, caplog: pytest.LogCaptureFixture) -> None:
    """The link goes down, the log says why, once; frames are lost, and nothing spins."""
    with on_tap(threads, pairs=2) as (model, name), opened(model) as there, NetDriver(there, pairs=2) as nic, caplog.at_level(logging.WARNING):
        nic.send_many([frame(1), frame(2)])
        assert nic.link_up
        ip("link", "delete", "dev", name)
        assert not exists(name)
        if by == "sending":
            nic.send_many([frame(3)] * 10)
        until(lambda: not nic.link_up)
        nic.send_many([frame(4)] * 100)
        before = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - before < 0.1
        nic.restart()
        nic.send_many([frame(5)] * 10)
        assert not nic.link_up
    assert caplog.text.count("is the interface gone?") == 1


def test_interface_that_is_down_for_a_while(threads: str) -> None:
    with on_tap(threads) as (model, name), opened(model) as there, Wire(name) as wire, NetDriver(there) as nic:
        nic.send(frame(1))
        assert came(wire, 1) == [frame(1)]
        ip("link", "set", "dev", name, "down")
        nic.send_many([frame(2)] * 5)
        assert nic.link_up
        ip("link", "set", "dev", name, "up")
        nic.send(frame(3))
        with Wire(name) as again:
            nic.send(frame(4))
            assert came(again, 1)[-1] == frame(4)
            again.send(frame(5))
            assert nic.receive(timeout=PATIENCE) == frame(5)


def test_without_buffers_nothing_is_read_and_nobody_spins(threads: str) -> None:
    """More than a tap's queue holds comes; once there are buffers, what it held comes first."""
    merge = {"wanted": F.MRG_RXBUF, "queue_size": 256}
    with on_tap(threads) as (model, name), opened(model) as there, Wire(name) as wire, Driver(there, **merge) as driver:
        for number in range(2000):
            with contextlib.suppress(OSError):
                wire.send(frame(number))
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - before < 0.1
        posted = [driver.post(RX, [], [200]) for _ in range(200)]
        driver.wait(lambda: posted[-1].written >= 0, "frames", PATIENCE)
        got = [buffer.data[0][HEADER : buffer.written] for buffer in posted]
        assert got == [frame(number) for number in range(200)]


def test_who_has_an_engine() -> None:
    """Taps that nothing captures, of models that are not another class's."""
    with on_tap("1") as (model, _):
        assert model.threads == 1
        model.start(int(F.MRG_RXBUF))
        assert isinstance(model.engine(0), TapEngine)
        assert model.engine(0) is model.engine(1)
        assert model.engine(CTRL) is None
        model.close()
    name = tap_name()
    captured = make_model("net", {"tap": name, "pcap-out": "/dev/null"})
    assert captured.threads == 0
    captured.close()
