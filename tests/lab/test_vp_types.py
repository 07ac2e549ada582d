# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Drivers on PCI functions of every type, as vp_vdpa gives them: QEMU's entropy source, disk, console and keyboard.

The console's ports lead to QEMU's monitors, so what is written there is understood or not, and can press keys.
"""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.bridge import node
from tests.support.seen import Seen
from vdpa_bridge import connect
from vdpa_bridge.drivers import ConsoleDriver, GenericDriver, InputDriver, RngDriver, ScsiDriver
from vdpa_bridge.drivers.base import RING_FEATURES
from vdpa_bridge.drivers.scsi import ScsiError
from vdpa_bridge.flags import Feature
from vdpa_bridge.virtio.ids import DeviceId
from vdpa_bridge.virtio.input import EV_KEY, EV_SYN, Event

pytestmark = pytest.mark.lab

BOTH = pytest.mark.parametrize("rings", ["split", "packed"])
KEY_A, KEY_Q, LED_CAPSL = 30, 16, 1
EV_LED = 0x11


def of(rings: str) -> int:
    """The features that ask for *rings*."""
    return RING_FEATURES | (Feature.RING_PACKED if rings == "packed" else 0)


class Monitor:
    """QEMU's monitor at the other end of a console port."""

    def __init__(self, console: ConsoleDriver) -> None:
        self.console = console
        self._count = random.randrange(1 << 32)
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        """What the monitor returns; answers to somebody before us are passed over."""
        self._count += 1
        request = {"execute": command, "arguments": arguments, "id": self._count}
        self.console.write(json.dumps(request).encode() + b"\n")
        while True:
            answer = json.loads(self.console.read_until(b"\n"))
            if answer.get("id") == self._count:
                return answer.get("return")


def test_generic_driver_finds_its_way(seen: Seen) -> None:
    """Type, queues and configuration are the device's own words; the entropy source answers on its queue."""
    found = {}
    for name in ("RNG", "SCSI", "CONSOLE", "INPUT"):
        with connect(node(f"VP_{name}")) as device, GenericDriver(device) as driver:
            found[name] = driver.info
            if name == "RNG":
                answers = {driver.ask(0, (), 16) for _ in range(20)}
    assert {name: info["id"] for name, info in found.items()} == {name: DeviceId[name] for name in found}
    assert {name: info["queues"] for name, info in found.items()} == {"RNG": 1, "SCSI": 3, "CONSOLE": 6, "INPUT": 2}
    assert found["SCSI"]["config"]["cdb_size"] == 32  # type: ignore[index]
    assert len(answers) == 20
    assert {len(answer) for answer in answers} == {16}
    seen("devices", "any type", "rng", "vp_vdpa", "split")


@BOTH
def test_rng(rings: str, seen: Seen) -> None:
    with connect(node("VP_RNG")) as device, RngDriver(device, ring_features=of(rings)) as rng:
        first = rng.read(40_000)
        rng.restart()
        second = rng.read(40_000)
    assert len(first) == len(second) == 40_000
    assert first != second
    assert set(first) == set(second) == set(range(256))
    seen("devices", "rng", "rng", "vp_vdpa", rings, "restart")


@BOTH
def test_scsi(rings: str, seen: Seen) -> None:
    """Bytes come back as they were written, by one driver after the other; what is not there is said not to be."""
    rng = random.Random(1)
    with connect(node("VP_SCSI")) as device:
        with ScsiDriver(device, ring_features=of(rings)) as host:
            ((target, lun, unit),) = host.units()
            assert (target, lun, unit.type, unit.vendor, host.serial()) == (0, 0, 0, "QEMU", "VPLUN")
            assert host.capacity() == (65536, 512)
            pieces = {offset * 512: rng.randbytes(512 * count) for offset, count in ((0, 1), (7, 700), (65535, 1), (30_000, 256))}
            for offset, data in pieces.items():
                host.write(offset, data)
            host.flush()
        with ScsiDriver(device) as host:
            for offset, data in pieces.items():
                assert host.read(offset, len(data)) == data
            for target, lun in ((3, 0), (0, 5)):
                with pytest.raises(OSError, match=rf"no such target|no unit {lun}") as refused:
                    host.inquiry(target, lun)
                assert refused.value.errno == errno.ENODEV
            with pytest.raises(ScsiError, match=r"command 0xf7 to target 0, unit 0: ILLEGAL REQUEST"):
                host.command(b"\xf7" + bytes(9))
            with pytest.raises(ScsiError, match="ILLEGAL REQUEST"):
                host.command(b"\x28\0\0\x01\0\0\0\0\1\0", room=512)
            with pytest.raises(ValueError, match="leaves the disk"):
                host.read(65536 * 512, 512)
            assert host.read(7 * 512, 512) == pieces[7 * 512][:512]
    seen("devices", "scsi", "scsi", "vp_vdpa", rings, "restart")


@pytest.mark.parametrize(("port", "rings"), [(None, "split"), (0, "split"), ("lab.monitor", "split"), ("lab.monitor", "packed")])
def test_console(port: int | str | None, rings: str, seen: Seen) -> None:
    """A monitor understands what the driver writes, without MULTIPORT and on ports by number and name, and after a restart."""
    with connect(node("VP_CONSOLE")) as device, ConsoleDriver(device, port=port, ring_features=of(rings)) as console:
        for _ in range(2):
            monitor = Monitor(console)
            assert monitor.ask("query-status")["status"] == "running"
            words = monitor.ask("query-commands")
            assert {"name": "send-key"} in words
            assert len(json.dumps(words)) > 4096, "more than one buffer holds"
            console.restart()
        if port is not None:
            assert console.ports == {0: "", 1: "lab.monitor"} or port == 0
    seen("devices", "console", "console", "vp_vdpa", rings, "restart")


def test_console_without_such_a_port() -> None:
    with connect(node("VP_CONSOLE")) as device, pytest.raises(LookupError, match=r"no port 'lab'; there is: 0 '', 1 'lab.monitor'"):
        ConsoleDriver(device, port="lab", timeout=0.5)


@pytest.fixture
def monitor() -> Iterator[Monitor]:
    with connect(node("VP_CONSOLE")) as device, ConsoleDriver(device) as console:
        yield Monitor(console)


@BOTH
def test_input(rings: str, monitor: Monitor, seen: Seen) -> None:
    """The keyboard says what it is, and keys that the monitor presses come as events, in order."""
    with connect(node("VP_INPUT")) as device, InputDriver(device, ring_features=of(rings)) as keyboard:
        info = keyboard.info
        assert keyboard.features & of(rings) == of(rings)
        assert info.name == "QEMU Virtio Keyboard"
        assert not info.axes
        assert {KEY_A, KEY_Q} <= set(info.events[EV_KEY])
        assert LED_CAPSL in info.events[EV_LED]
        for name in ("a", "q") * 40:
            monitor.ask("send-key", keys=[{"type": "qcode", "data": name}], **{"hold-time": 1})
            code = KEY_A if name == "a" else KEY_Q
            got = [keyboard.read() for _ in range(4)]
            assert got == [Event(EV_KEY, code, 1), Event(EV_SYN, 0, 0), Event(EV_KEY, code, 0), Event(EV_SYN, 0, 0)]
        keyboard.write(Event(EV_LED, LED_CAPSL, 1))
        with pytest.raises(TimeoutError, match="no end of an event"):
            keyboard.read(timeout=0.1)
    seen("devices", "input", "input", "vp_vdpa", rings)


def test_environment() -> None:
    assert all(f"VDPA_VP_{name}" in os.environ for name in ("RNG", "SCSI", "CONSOLE", "INPUT"))
