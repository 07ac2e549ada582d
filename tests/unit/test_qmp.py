# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The monitor: QEMU's own client library and qmp-shell on services of ours, every command and every event."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError

from tests.support.homes import connector, socket_path
from tests.support.programs import program
from tests.support.qmp import PATIENCE, Qmp, service
from tests.support.service import Serve, disk, refused, serving, works
from vdpa_bridge import Device, ops
from vdpa_bridge.drivers import BlkDriver
from vdpa_bridge.drivers.base import Posted
from vdpa_bridge.service.qmp_commands import COMMANDS, EVENTS
from vdpa_bridge.service.spec import DeviceSpec, read_config
from vdpa_bridge.wire import U8, VringState

MIB = 1 << 20


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory whose path leaves room for names of sockets."""
    with socket_path() as path:
        yield Path(path).parent


def at(folder: Path) -> Qmp:
    return Qmp(folder / "qmp")


# Every command and event ---------------------------------------------------------------------------------------------------


Check = Callable[[Any], object]
ANSWERS: dict[str, tuple[dict[str, object], Check]] = {
    "query-version": ({}, lambda it: it["qemu"].keys() == {"major", "minor", "micro"} and it["package"].startswith("vdpa-bridge ")),
    "query-commands": ({}, lambda it: {each["name"] for each in it} == set(COMMANDS)),
    "query-qmp-schema": ({}, lambda it: {each["name"] for each in it if each["meta-type"] in ("command", "event")} == {*COMMANDS, *EVENTS}),
    "query-status": ({}, lambda it: it == {"running": True, "status": "running"}),
    "query-vdpa-devices": ({}, lambda it: [(each["name"], each["type"], each["client"]) for each in it] == [("disk", "block", True), ("net", "net", False)]),
    "query-vdpa-queues": ({"device": "net"}, lambda it: [each["index"] for each in it] == [0, 1, 2]),
    "query-vdpa-clients": ({}, lambda it: [(each["device"], each["pid"], each["mode"]) for each in it] == [("disk", os.getpid(), "vDPA")]),
    "block_resize": ({"device": "disk", "size": 2 * MIB}, lambda it: it == {}),
    "set_link": ({"name": "net", "up": False}, lambda it: it == {}),
    "stop": ({}, lambda it: it == {}),
    "cont": ({}, lambda it: it == {}),
    "reload": ({}, lambda it: it == {}),
    "quit": ({}, lambda it: it == {}),
}


def test_every_command_is_answered(folder: Path) -> None:
    """What the table says of each is what the schema says of it, and what it takes."""
    assert set(ANSWERS) | {"qmp_capabilities"} == set(COMMANDS)
    with service(folder) as server, at(folder) as monitor:
        schema = {each["name"]: each for each in monitor.ask("query-qmp-schema")}
        with disk(folder / "disk") as device:
            device.get_features()
            for name, (arguments, check) in ANSWERS.items():
                members = schema[schema[name]["arg-type"]]["members"]
                assert {member["name"] for member in members if "default" not in member} <= set(arguments) <= {member["name"] for member in members}
                assert check(monitor.ask(name, **arguments)), name
        assert server.wait() == 0
        assert sorted(os.listdir(folder)) == ["image"], "no socket is left"


def test_every_event_comes(folder: Path) -> None:
    came: dict[str, dict[str, Any]] = {}
    with service(folder) as server, at(folder) as monitor:

        def next_is(name: str) -> dict[str, Any]:
            event = monitor.event()
            assert event["event"] == name
            assert abs(event["timestamp"]["seconds"] - time.time()) < 60
            assert event.get("data", {}).keys() == set(EVENTS[name].data)
            came[name] = event
            return event.get("data", {})

        with disk(folder / "disk") as device:
            device.negotiate(0, 0)
            assert next_is("VDPA_CLIENT_CONNECTED") == {"device": "disk", "pid": os.getpid(), "uid": os.getuid()}
            device.backend.call(ops.SET_VRING_ENABLE, VringState(0, 1))
            device.backend.call(ops.SET_STATUS, U8(15))
            assert next_is("VDPA_DEVICE_BROKEN") == {"device": "disk", "queue": 0, "reason": "enabled without an address"}
            assert monitor.ask("query-vdpa-devices")[0]["needs-reset"] is True
        assert next_is("VDPA_CLIENT_DISCONNECTED")["pid"] == os.getpid()
        monitor.ask("stop")
        monitor.ask("stop")
        next_is("STOP")
        monitor.ask("cont")
        monitor.ask("cont")
        next_is("RESUME")
        monitor.ask("block_resize", device="disk", size=4 * MIB)
        assert next_is("VDPA_DEVICE_RESIZED") == {"device": "disk", "change": "2048 sectors before, 8192 now"}
        os.truncate(folder / "image", MIB)
        monitor.ask("reload")
        assert next_is("VDPA_DEVICE_RESIZED") == {"device": "disk", "change": "8192 sectors before, 2048 now"}
        os.truncate(folder / "image", 2 * MIB)
        server.process.send_signal(signal.SIGHUP)
        assert next_is("VDPA_DEVICE_RESIZED")["change"] == "2048 sectors before, 4096 now"
        monitor.ask("quit")
        assert next_is("SHUTDOWN") == {"guest": False, "reason": "host-qmp-quit"}
        assert server.wait() == 0
    assert set(came) == set(EVENTS)


def test_a_signal_is_told(folder: Path) -> None:
    with service(folder) as server, at(folder) as monitor:
        server.process.terminate()
        assert monitor.event()["data"] == {"guest": False, "reason": "host-signal"}
        assert server.wait() == 0


# What commands do --------------------------------------------------------------------------------------------------------------


WAYS = ["service", "program in a sandbox"]


@contextmanager
def one_disk(folder: Path, way: str) -> Iterator[Serve]:
    (folder / "image").write_bytes(bytes(MIB))
    if way != WAYS[1]:
        engine = "python" if way == "model in Python" else "native"
        with serving(f"{folder}/blk=model:blk?file={folder}/image&engine={engine}", "--qmp", f"{folder}/qmp") as server:
            server.ready()
            yield server
    else:
        with program("blk", "--socket-path", f"{folder}/blk", "--blk-file", f"{folder}/image", "--qmp", f"{folder}/qmp", "-v") as server:
            server.logs("ready")
            yield server


@pytest.mark.parametrize("way", [*WAYS, "model in Python"])
def test_requests_wait_while_stopped(folder: Path, way: str) -> None:
    """In flight or made meanwhile, of this client or of the next: all are served, in the end."""
    with one_disk(folder, way) as server, at(folder) as monitor:
        with disk(folder / "blk") as device, BlkDriver(device) as driver:

            def write(sector: int, fill: bytes) -> Posted:
                return driver.post(0, [b"\1" + bytes(7) + sector.to_bytes(8, "little"), fill * 512], [1])

            early = [write(sector, b"a") for sector in range(64)]
            monitor.ask("stop")
            assert monitor.ask("query-status") == {"running": False, "status": "paused"}
            late = [write(sector, b"b") for sector in range(64, 128)]
            driver.poll()
            taken = monitor.ask("query-vdpa-queues", device="blk")[0]["base"]
            time.sleep(0.1)
            driver.poll()
            assert monitor.ask("query-vdpa-queues", device="blk")[0]["base"] == taken <= 64
            assert all(each.written < 0 for each in late)
            assert device.get_status() == 15, "operations are carried out"
            monitor.ask("cont")
            driver.wait(lambda: all(each.written == 1 for each in [*early, *late]), "all of them")
            queue = monitor.ask("query-vdpa-queues", device="blk")[0]
            assert (queue["base"], queue["used"], queue["in-flight"], queue["enabled"]) == (128, 128, 0, True)
            monitor.ask("stop")
        with disk(folder / "blk") as device, BlkDriver(device) as driver:
            posted = write(200, b"c")
            time.sleep(0.05)
            driver.poll()
            assert posted.written < 0
            monitor.ask("cont")
            driver.wait(lambda: posted.written == 1, "the next client's")
        server.end()
    image = (folder / "image").read_bytes()
    assert image[: 128 * 512] == b"a" * 64 * 512 + b"b" * 64 * 512
    assert image[200 * 512 :][:512] == b"c" * 512


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("vdpa", ["require", "off"])
def test_the_driver_is_told_of_another_size(folder: Path, way: str, vdpa: str) -> None:
    event = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        with one_disk(folder, way) as server, at(folder) as monitor:
            with disk(folder / "blk", vdpa) as device, BlkDriver(device) as driver:
                device.set_config_call(event)
                for size in (2 * MIB, MIB // 2):
                    monitor.ask("block_resize", device="blk", size=size)
                    assert select.select([event], [], [], PATIENCE)[0], "the driver was not told"
                    os.eventfd_read(event)
                    assert driver.refresh().capacity * 512 == size == (folder / "image").stat().st_size
                    driver.write(size - 512, b"e" * 512)
                device.set_config_call(-1)
            server.end()
    finally:
        os.close(event)


def test_memory_has_another_size_too(folder: Path) -> None:
    with serving(f"{folder}/a=model:blk?size=1M", "--qmp", f"{folder}/qmp") as server:
        server.ready()
        with at(folder) as monitor, disk(folder / "a") as device, BlkDriver(device) as driver:
            driver.write(0, b"k" * MIB)
            monitor.ask("block_resize", device="a", size=3 * MIB)
            assert driver.refresh().capacity == 3 * MIB // 512
            assert driver.read(0, 3 * MIB) == b"k" * MIB + bytes(2 * MIB)
            driver.write(0, b"m" * 3 * MIB)
            monitor.ask("block_resize", device="a", size=MIB // 2 + 512)
            assert driver.refresh().capacity == MIB // 1024 + 1
            driver.write(MIB // 2, b"n" * 512)
            with pytest.raises(OSError, match="I/O error"):
                driver.read(MIB, 512, unchecked=True)
            monitor.ask("block_resize", device="a", size=2 * MIB)
            driver.refresh()
            assert driver.read(0, 2 * MIB) == b"m" * (MIB // 2) + b"n" * 512 + bytes(2 * MIB - MIB // 2 - 512)
            driver.write(MIB, b"o" * MIB)
            assert driver.read(MIB, MIB) == b"o" * MIB
        server.end()


def test_a_cable_is_pulled(folder: Path) -> None:
    event = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        with service(folder) as server, at(folder) as monitor:
            with Device(connector(str(folder / "net"), "net", "require")()) as device:
                device.set_config_call(event)
                for up in (False, True):
                    monitor.ask("set_link", name="net", up=up)
                    assert select.select([event], [], [], PATIENCE)[0], "the driver was not told"
                    os.eventfd_read(event)
                    assert device.get_config(6, 2)[0] & 1 == up
                device.set_config_call(-1)
            server.end()
    finally:
        os.close(event)


@pytest.mark.parametrize(
    ("command", "arguments", "kind", "text"),
    [
        ("block_resize", {"device": "disc", "size": 512}, "DeviceNotFound", "Device 'disc' not found; there is: disk, net"),
        ("block_resize", {"device": "disk", "size": 513}, "GenericError", "a multiple of 512"),
        ("block_resize", {"device": "disk", "size": -512}, "GenericError", "a disk has 512 bytes to"),
        ("block_resize", {"device": "disk", "size": 1 << 80}, "GenericError", "a disk has 512 bytes to"),
        ("block_resize", {"device": "net", "size": 512}, "GenericError", "it has no size"),
        ("block_resize", {"device": "disk", "size": True}, "GenericError", "Invalid parameter type for 'size', expected: integer"),
        ("block_resize", {"device": "disk"}, "GenericError", "Parameter 'size' is missing"),
        ("block_resize", {"device": "disk", "size": 512, "sise": 1}, "GenericError", "Parameter 'sise' is unexpected"),
        ("set_link", {"name": "disk", "up": True}, "GenericError", "it has no link"),
        ("query-vdpa-queues", {"device": ""}, "DeviceNotFound", "Device '' not found"),
        ("query-vdpa-queue", {}, "CommandNotFound", "The command query-vdpa-queue has not been found"),
        ("qmp_capabilities", {}, "CommandNotFound", "already complete"),
    ],
)
def test_what_cannot_be_is_said(folder: Path, command: str, arguments: dict[str, object], kind: str, text: str) -> None:
    with service(folder), at(folder) as monitor:
        with pytest.raises(ExecuteError) as failed:
            monitor.ask(command, **arguments)
        assert (failed.value.error.error.class_, text in str(failed.value)) == (kind, True), str(failed.value)
        assert monitor.ask("query-status")["running"]


def test_devices_that_are_no_models(folder: Path) -> None:
    with serving(f"{folder}/inner=model:blk?size=1M") as inner:
        inner.ready()
        with serving(f"{folder}/outer=vhost-user:{folder}/inner", "--qmp", f"{folder}/qmp") as server:
            server.ready()
            with at(folder) as monitor:
                assert "type" not in monitor.ask("query-vdpa-devices")[0]
                for command, arguments in (("stop", {}), ("query-vdpa-queues", {"device": "outer"}), ("block_resize", {"device": "outer", "size": 512})):
                    with pytest.raises(ExecuteError, match="no model in this process"):
                        monitor.ask(command, **arguments)
                works(folder / "outer")
            server.end()
        inner.end()


def test_a_read_only_disk_keeps_its_size(folder: Path) -> None:
    (folder / "image").write_bytes(bytes(MIB))
    with serving(f"{folder}/a=model:blk?file={folder}/image&readonly=on", "--qmp", f"{folder}/qmp") as server:
        server.ready()
        with at(folder) as monitor, pytest.raises(ExecuteError, match="read-only"):
            monitor.ask("block_resize", device="a", size=512)
        server.end()
    assert (folder / "image").stat().st_size == MIB


# Where it is ---------------------------------------------------------------------------------------------------------------------


def test_the_configuration_names_the_socket(folder: Path) -> None:
    file = folder / "config.toml"
    file.write_text(f'qmp = "{folder}/qmp"\n[[device]]\ntarget = "model:blk?size=1M"\nsocket-path = "{folder}/s"\n')
    assert read_config(str(file), DeviceSpec("")).qmp == f"{folder}/qmp"
    with serving("--config", str(file)) as server:
        server.ready()
        with at(folder) as monitor:
            assert [each["name"] for each in monitor.ask("query-vdpa-devices")] == ["s"]
        assert (folder / "qmp").stat().st_mode & 0o777 == 0o600
        server.end()
    assert os.listdir(folder) == ["config.toml"]
    file.write_text("qmp = 1\n[[device]]\ntarget='model:net'\n")
    with pytest.raises(ValueError, match="qmp = 1 is not a text in quotes"):
        read_config(str(file), DeviceSpec(""))


@pytest.mark.parametrize("sandbox", ["off", "on"])
def test_a_socket_that_cannot_be_had_ends_the_service(folder: Path, sandbox: str) -> None:
    assert "No such file" in refused(f"{folder}/s=model:net", "--qmp", f"{folder}/missing/qmp", "--sandbox", sandbox)
    assert os.listdir(folder) == []


# qmp-shell --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_qmp_shell(folder: Path, way: str) -> None:
    """The program of QEMU's package: commands typed, their answers, events, and the end of the service."""
    typed = "query-status\nblock_resize device=blk size=2097152\nblock_resize device=none size=512\nnonsense\nstop\n\nquit\nquery-status\n"
    command = [sys.executable, "-c", "from qemu.qmp.qmp_shell import main; main()", str(folder / "qmp")]
    with one_disk(folder, way) as server:
        done = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=60, env=os.environ | {"HOME": str(folder)}, check=False)
        assert server.wait() == 0
    lines = done.stdout.replace("(QEMU) ", "").splitlines()
    assert lines[:2] == ["Welcome to the QMP low-level shell!", "Connected to QEMU 0.1.0"]
    answers = [json.loads(line) for line in lines if line.startswith('{"')]
    assert [each.get("return", each.get("error", {}).get("class")) for each in answers[:5]] == [
        {"status": "running", "running": True},
        {},
        "DeviceNotFound",
        "CommandNotFound",
        {},
    ]
    assert "VDPA_DEVICE_RESIZED" in done.stdout
    assert "'STOP'" in done.stdout
    assert (folder / "image").stat().st_size == 2 * MIB
