# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Programs by the back-end conventions: started as management software starts them, by path and by descriptor."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.support.homes import connector, socket_path
from tests.support.programs import TYPES, capabilities, command, descriptor, program
from tests.support.service import PATIENCE, disk, listening, serial, serving, works
from vdpa_bridge.cli.programs import PROGRAMS
from vdpa_bridge.device import Device
from vdpa_bridge.drivers import BlkDriver
from vdpa_bridge.models import KINDS, make_model
from vdpa_bridge.service.listening import PeerCredentials
from vdpa_bridge.system.inventory import inventory
from vdpa_bridge.virtio.features import BlockFeature
from vdpa_bridge.virtio.ids import DeviceId

IDS = {"block": DeviceId.BLOCK, "console": DeviceId.CONSOLE, "gpio": DeviceId.GPIO, "i2c": DeviceId.I2C, "input": DeviceId.INPUT, "net": DeviceId.NET, "rng": DeviceId.RNG, "scsi": DeviceId.SCSI, "vsock": DeviceId.VSOCK}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory whose path leaves room for names of sockets."""
    with socket_path() as path:
        yield Path(path).parent


def said(kind: str, *arguments: str, status: int = 0) -> tuple[str, str]:
    """stdout and stderr of a program that ends by itself."""
    done = subprocess.run([*command(kind), *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


# What they say -----------------------------------------------------------------------------------------------------------


def test_every_model_has_a_program() -> None:
    assert set(PROGRAMS) == set(KINDS)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_capabilities_are_all_that_is_said(kind: str) -> None:
    out, err = said(kind, "--fd", "nonsense", "--nonsense", "--print-capabilities", "nonsense", "--help")
    assert capabilities(out)["type"] == PROGRAMS[kind].type
    assert err == ""


@pytest.mark.parametrize("kind", PROGRAMS)
def test_the_type_is_that_of_the_device(kind: str, folder: Path) -> None:
    with program(kind, "--socket-path", f"{folder}/s", "-v") as server:
        server.logs("ready")
        with Device(connector(f"{folder}/s", "blk", "require")()) as device:
            assert device.identify().device_id == IDS[capabilities(said(kind, "--print-capabilities")[0])["type"]]
        server.end()


@pytest.mark.parametrize("kind", PROGRAMS)
def test_every_option_reaches_the_model(kind: str) -> None:
    options = (*PROGRAMS[kind].conventional, *PROGRAMS[kind].own)
    with pytest.raises(ValueError, match="has no option no-such; there is") as caught:
        make_model(kind, {"no-such": "1"})
    assert {str(option.name).replace("_", "-") for option in options} <= set(re.split("[ ,]+", str(caught.value)))


@pytest.mark.parametrize("read_only", [False, True])
def test_the_features_of_the_disk_are_there(folder: Path, read_only: bool) -> None:
    """Exactly that file, and with the other feature no way to write to it."""
    assert set(capabilities(said("blk", "--print-capabilities")[0])["features"]) == {"blk-file", "read-only"}
    image = folder / "a disk & more+.img"
    image.write_bytes(b"precious".ljust(1 << 20, b"."))
    more = ["--read-only"] if read_only else []
    with program("blk", "--socket-path", f"{folder}/s", "--blk-file", str(image), *more, "-v") as server:
        server.logs("ready")
        with disk(folder / "s") as device, BlkDriver(device) as driver:
            assert (driver.info.capacity, driver.read(0, 512)[:8]) == (2048, b"precious")
            assert bool(driver.features & BlockFeature.RO) == read_only
            with pytest.raises(OSError) if read_only else nullcontext():
                driver.write(0, b"w" * 512)
        server.end()
    assert image.read_bytes()[:8] == (b"precious" if read_only else b"wwwwwwww")


def test_descriptors_conform_and_name_the_programs(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vdpa_bridge", "descriptors", "--install", folder / "a/b", "--bin", "/opt/x"], capture_output=True, text=True, timeout=60, check=True
    )
    files = sorted((folder / "a/b").iterdir())
    assert done.stdout.split() == [str(path) for path in files]
    for path in files:
        kind = re.fullmatch(r"50-vdpa-bridge-(\w+)\.json", path.name)
        assert kind is not None
        found = descriptor(path.read_text())
        assert (found["type"], found["binary"]) == (PROGRAMS[kind[1]].type, f"/opt/x/vhost-user-vdpa-{kind[1]}")
    assert len(files) == len([program for program in PROGRAMS.values() if program.type in TYPES])


def test_no_descriptor_names_what_is_not_there(folder: Path) -> None:
    """Started as a module, the command does not know where the programs are."""
    done = subprocess.run([sys.executable, "-m", "vdpa_bridge", "descriptors", "--install", folder / "d"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "give --bin DIR" in done.stderr) == (1, True)
    assert not (folder / "d").exists()


# How they are started ----------------------------------------------------------------------------------------------------


def test_by_path(folder: Path) -> None:
    """In the foreground: the process that was started serves, client after client; on SIGTERM it goes, and its socket."""
    path = folder / "s"
    with program("blk", "--socket-path", str(path), "-v") as server:
        server.logs("ready")
        works(path)
        works(path, b"x", vdpa="off")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            assert PeerCredentials.of(client).pid == server.process.pid
            assert server.end() < 5
        assert not path.exists()
        assert server.out.read() == ""


def test_by_a_listening_descriptor(folder: Path) -> None:
    path = folder / "s"
    with listening(path) as (sock,), program("blk", "--fd", str(sock.fileno()), "--serial", "passed", fds=[sock.fileno()]) as server:
        assert serial(path) == "passed"
        works(path)
        server.end(signal.SIGINT)
        assert path.exists(), "whose socket it is removes it"
        assert server.out.read() == ""


def test_by_a_connected_descriptor(folder: Path) -> None:
    """The only client: the program ends with it."""
    path = folder / "s"

    def reads() -> bytes:
        with Device(connector(str(path), "blk", "require", PATIENCE)()) as device, BlkDriver(device) as driver:  # it comes before its server
            return driver.read(0, 512)

    with listening(path) as (sock,), ThreadPoolExecutor(1) as pool:
        client = pool.submit(reads)
        sock.settimeout(PATIENCE)
        connected, _ = sock.accept()
        with connected, program("blk", "--fd", str(connected.fileno()), "-v", fds=[connected.fileno()]) as server:
            connected.close()
            assert client.result(2 * PATIENCE) == bytes(512)
            assert server.wait() == 0
            assert "ended with the only client after 1 connections" in server.log


def test_a_list_of_sockets_says_what_the_program_serves(folder: Path) -> None:
    script = folder / PROGRAMS["blk"].name
    script.write_text(command("blk")[-1])
    started = [sys.executable, str(script), "--socket-path", f"{folder}/s", "-v"]
    with serving(command=started, PYTHONPATH=str(Path(__file__).parents[2])) as server:
        server.logs("ready")
        (found,) = (found for found in inventory() if found.name == f"{folder}/s")
        assert (found.device, found.target) == ("block", f"vhost-user:{folder}/s?type=blk")
        server.end()


def test_a_connected_descriptor_and_sigterm() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, program("rng", "--fd", str(theirs.fileno()), "-v", fds=[theirs.fileno()]) as server:
        theirs.close()
        server.logs("rng: connect")
        server.end()
        ours.settimeout(PATIENCE)
        assert ours.recv(1) == b""


def test_a_connected_descriptor_whose_client_is_gone() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs, program("rng", "--fd", str(theirs.fileno()), fds=[theirs.fileno()]) as server:
        assert server.wait() == 0


def test_options_of_several_words(folder: Path) -> None:
    _, errors = said("net", "--socket-path", str(folder / "s"), "--tcp-ports", "2222:22", status=2)
    assert "tcp-ports= goes with user=" in errors


def test_what_cannot_be_had_ends_the_start(folder: Path) -> None:
    """Early, with a status that is not 0 and a message: no client comes in vain."""
    path = f"{folder}/s"
    for arguments, status, says in (
        ([], 2, "either --socket-path or --fd"),
        (["--socket-path", path, "--fd", "3"], 2, "either --socket-path or --fd"),
        (["--fd", "0"], 2, "must be a Unix socket"),
        (["--fd", "77"], 2, "Bad file descriptor"),
        (["--socket-path", path, "--blk-file", f"{folder}/none"], 1, "No such file"),
        (["--socket-path", path, "--blk-file", "/dev/null"], 2, "neither a file nor a block device"),
        (["--socket-path", path, "--queues", "0"], 2, "queues=0; it is a number"),
        (["--socket-path", path, "--mac", "52:54:00:00:00:01"], 2, "--mac"),
    ):
        out, err = said("blk", *arguments, status=status)
        assert (out, err.count("\n"), says in err) == ("", 1, True), err
    assert not os.path.exists(path)
    with socket.socket(socket.AF_UNIX) as idle, program("blk", "--fd", str(idle.fileno()), fds=[idle.fileno()]) as server:
        assert server.wait() == 2
        assert "no Unix stream socket that listens or is connected" in server.log


def test_what_is_asked_for_capabilities_imports_no_device() -> None:
    """Management software asks every program that it finds."""
    code = """
import sys
from vdpa_bridge.cli.programs import rng
try:
    rng(["--print-capabilities"])
finally:
    print(sorted({"vdpa_bridge.models", "vdpa_bridge.targets", "vdpa_bridge.wire", "evdev"} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (json.loads(done.stdout), done.stderr) == ({"type": "rng"}, "[]\n")


def test_what_serves_loads_only_modules_that_its_model_needs() -> None:
    code = """
import sys
from vdpa_bridge.models import make_model
from vdpa_bridge.sandbox.preload import preload
preload(make_model("rng", {}).needs.modules)
assert "evdev" not in sys.modules
model = make_model("input", {"control": sys.argv[1]})
preload(model.needs.modules)
assert "evdev" in sys.modules
model.close()
"""
    with socket_path() as path:
        subprocess.run([sys.executable, "-c", code, path], timeout=60, check=True)
