# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a driver says over the control queue of a device with a wire, which frames it gets by that, and what it is told of the link."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cable import OTHER, OWN, Cable, device, frame, native
from tests.support.driven import opened, quiet
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.device import Device
from vdpa_bridge.drivers import Driver
from vdpa_bridge.models import NetModel, make_model
from vdpa_bridge.models.net.control import Control
from vdpa_bridge.netdev import PLAIN
from vdpa_bridge.virtio.features import NetFeature as F

__all__ = ["native", "quiet"]  # autouse fixtures

CTRL = 2
ALL = int(sum(F)) & ~F.MQ
GROUP = bytes.fromhex("01005e000001")
OTHER_GROUP = bytes.fromhex("333300000001")
BROADCAST = b"\xff" * 6


@pytest.fixture
def cable() -> Cable:
    return Cable(F.GUEST_CSUM | F.GUEST_TSO4 | F.CTRL_GUEST_OFFLOADS)


@pytest.fixture
def nic(cable: Cable) -> Iterator[Driver]:
    with opened(device(cable)) as there, Driver(there, wanted=ALL) as driver:
        yield driver


def say(nic: Driver, group: int, number: int, value: bytes) -> bool:
    written, (ack,) = nic.transact(CTRL, [bytes((group, number)), value] if value else [bytes((group, number))], [1])
    assert (written, ack) in ((1, b"\0"), (1, b"\1"))
    return ack == b"\0"


def macs(*tables: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(table)) + b"".join(table) for table in tables)


def comes(nic: Driver, cable: Cable, data: bytes, sure_to: bytes = BROADCAST) -> bool:
    """Whether the driver gets a frame; one that it gets for sure comes behind it."""
    sure = frame(99, 70, sure_to)
    posted = [nic.post(0, [], [2048]) for _ in range(2)]
    cable.far.send(PLAIN + data)
    cable.far.send(PLAIN + sure)
    nic.wait(lambda: posted[0].written >= 0, "a frame")
    if posted[0].written == 12 + len(sure):
        cable.far.send(PLAIN + sure)  # the second buffer is not left over
    nic.wait(lambda: posted[1].written >= 0, "the second frame")
    return posted[0].written == 12 + len(data)


def tagged(vlan: int) -> bytes:
    return OWN + OTHER + b"\x81\0" + struct.pack(">H", 0x6000 | vlan) + bytes(50)


def test_all_frames_come_until_the_driver_says_otherwise(nic: Driver, cable: Cable) -> None:
    for to in (OWN, OTHER, GROUP, BROADCAST):
        assert comes(nic, cable, frame(1, to=to))
    assert comes(nic, cable, tagged(5))
    assert say(nic, 0, 0, b"\0")
    for to, expected in ((OWN, True), (OTHER, False), (GROUP, False), (BROADCAST, True)):
        assert comes(nic, cable, frame(2, to=to)) is expected
    nic.restart()
    assert comes(nic, cable, frame(3, to=OTHER)), "a new driver has said nothing yet"


@pytest.mark.parametrize(
    ("mode", "let_through"),
    [(1, {OWN, BROADCAST, GROUP}), (2, {OWN, BROADCAST, OTHER}), (3, {OWN, BROADCAST}), (4, {BROADCAST}), (5, {OWN})],
)
def test_modes(nic: Driver, cable: Cable, mode: int, let_through: set[bytes]) -> None:
    assert say(nic, 0, 0, b"\0")
    assert say(nic, 0, mode, b"\1")
    sure_to = BROADCAST if mode == 4 else OWN
    assert {to for to in (OWN, OTHER, GROUP, BROADCAST) if comes(nic, cable, frame(1, to=to), sure_to)} == let_through


def test_tables_of_addresses(nic: Driver, cable: Cable) -> None:
    assert say(nic, 0, 0, b"\0")
    assert say(nic, 1, 0, macs([OTHER], [GROUP]))
    assert [comes(nic, cable, frame(1, to=to)) for to in (OWN, OTHER, GROUP, OTHER_GROUP)] == [True, True, True, False]
    assert say(nic, 1, 0, macs([], [bytes((1, 0, 0, 0, 0, n)) for n in range(65)])), "too many to keep: all come"
    assert [comes(nic, cable, frame(1, to=to)) for to in (OTHER, GROUP, OTHER_GROUP)] == [False, True, True]
    assert say(nic, 1, 1, OTHER), "the address of the device"
    assert comes(nic, cable, frame(1, to=OTHER))
    say(nic, 1, 1, OWN)


def test_vlans(nic: Driver, cable: Cable) -> None:
    assert say(nic, 0, 0, b"\0")
    assert not comes(nic, cable, tagged(5))
    assert say(nic, 2, 0, b"\5\0")
    assert [comes(nic, cable, tagged(vlan)) for vlan in (5, 6)] == [True, False]
    assert say(nic, 2, 1, b"\5\0")
    assert not comes(nic, cable, tagged(5))
    assert comes(nic, cable, frame(1)), "frames without a tag always do"


def test_offloads_that_the_driver_puts_off(nic: Driver, cable: Cable) -> None:
    large = struct.pack("<BBHHHHH", 1, 1, 54, 500, 34, 16, 0) + frame(7, 1500)
    assert comes(nic, cable, frame(1))
    posted = nic.post(0, [], [4096])
    cable.far.send(large)
    nic.wait(lambda: posted.written >= 0, "the large frame")
    assert say(nic, 5, 0, bytes(8))
    posted = nic.post(0, [], [4096])
    cable.far.send(large)
    cable.far.send(PLAIN + frame(8))
    nic.wait(lambda: posted.written >= 0, "the complete frame")
    assert posted.written == 72


@pytest.mark.parametrize(
    ("group", "number", "value"),
    [
        (0, 0, b""),
        (0, 0, b"\1\0"),
        (0, 6, b"\1"),
        (1, 0, b""),
        (1, 0, macs([OWN])),
        (1, 0, macs([OWN], [])[:-1]),
        (1, 0, macs([OWN], []) + b"\0"),
        (1, 0, b"\xff\xff\xff\xff" + OWN),
        (1, 1, OWN[:5]),
        (1, 2, OWN),
        (2, 0, b"\0\x10"),
        (2, 0, b"\1"),
        (2, 2, b"\1\0"),
        (3, 0, b""),
        (3, 1, b""),
        (4, 0, b"\1\0"),
        (5, 0, bytes(7)),
        (5, 0, struct.pack("<Q", F.GUEST_UFO)),
        (5, 0, b"\xff" * 8),
        (6, 0, b""),
        (255, 255, b"\xff" * 100),
    ],
)
def test_wrong_commands_change_nothing(nic: Driver, cable: Cable, group: int, number: int, value: bytes) -> None:
    assert not say(nic, group, number, value)
    assert comes(nic, cable, frame(1, to=OTHER))


@given(commands=st.lists(st.binary(max_size=40), max_size=8), features=st.integers(0, (1 << 64) - 1))
def test_any_command_leaves_a_state_that_can_be_handed_on(commands: list[bytes], features: int) -> None:
    control = Control(OWN, 4)
    control.start(features)
    for command in commands:
        control.carry_out(command)
    state = control.snapshot()
    other = Control(OTHER, 4)
    other.start(features)
    other.restore(state)
    assert other.snapshot() == state
    assert all(other.accepts(PLAIN + frame(0, to=to)) == control.accepts(PLAIN + frame(0, to=to)) for to in (OWN, OTHER, GROUP, BROADCAST))


@pytest.mark.parametrize("spoilt", [{}, {"mac": "zz"}, {"mac": "00"}, {"used": 9}, {"tables": [[]]}, {"tables": 3}, {"vlans": ["x"]}])
def test_states_that_are_none(spoilt: dict[str, object]) -> None:
    control = Control(OWN, 4)
    before = control.snapshot()
    with pytest.raises(ValueError, match="not the state of a network device"):
        control.restore({**before, **spoilt} if spoilt else {})
    assert control.snapshot() == before


def test_link_and_speed() -> None:
    """``link=down``, ``plug``, and what the driver is told."""
    home = ModelDevice(make_model("net", {"link": "down", "speed": "25000"}), "model:net")
    try:
        model = home.model
        assert isinstance(model, NetModel)
        with Device(home.open()) as there, Driver(there, wanted=ALL) as driver:
            assert driver.features & F.SPEED_DUPLEX
            assert there.get_config(6, 2) == b"\0\0"
            assert there.get_config(12, 5) == struct.pack("<IB", 25000, 1)
            home.change(lambda: model.plug(True))
            assert there.get_config(6, 2) == b"\1\0"
    finally:
        home.close()


def test_unplugged_device_moves_no_frames(nic: Driver, cable: Cable) -> None:
    home = ModelDevice(device(other := Cable()), "model:net")
    try:
        model = home.model
        assert isinstance(model, NetModel)
        with Device(home.open()) as there, Driver(there, wanted=ALL) as driver:
            home.change(lambda: model.plug(False))
            driver.transact(1, [PLAIN, frame(1)])
            other.far.send(PLAIN + frame(2))
            assert not other.said
            home.change(lambda: model.plug(True))
            assert int.from_bytes(there.get_config(6, 2), "little") == 3, "up, and the driver is to announce itself"
            assert say(driver, 3, 0, b"")
            assert int.from_bytes(there.get_config(6, 2), "little") == 1
            assert not say(driver, 3, 0, b""), "once"
            assert comes(driver, other, frame(3))
    finally:
        home.close()


def test_successor_takes_the_wire_over(tmp_path: Path) -> None:
    """A model of one's own that is loaded anew keeps the socket that cannot be bound twice, and what the driver said."""
    options = {"dgram": str(tmp_path / "here"), "mac": OWN.hex(":")}
    home = ModelDevice(NetModel.from_options(options), "model:net")
    try:
        with Device(home.open()) as there, Driver(there, wanted=ALL) as driver:
            assert say(driver, 0, 0, b"\0")
            first = home.model
            home.replace(lambda old: NetModel.succeed(old, options))
            for wrong, words in (({"nonsense": ""}, "no option nonsense"), ({"pairs": "2"}, "would be")):
                with pytest.raises(ValueError, match=words):
                    home.replace(lambda old, wrong=wrong: NetModel.succeed(old, {**options, **wrong}))  # type: ignore[misc]
            assert home.model is not first
            assert isinstance(home.model, NetModel)
            assert not home.model.control.modes["promisc"]
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
                peer.bind(str(tmp_path / "there"))
                peer.sendto(frame(1), options["dgram"])
                posted = driver.post(0, [], [2048])
                driver.wait(lambda: posted.written >= 0, "a frame")
                driver.transact(1, [PLAIN, frame(2)])
                assert peer.recv(100) == frame(2)
    finally:
        home.close()
    assert not (tmp_path / "here").exists()
