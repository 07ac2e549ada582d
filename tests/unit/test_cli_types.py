# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The commands for devices other than disks and NICs, on small devices behind a server of ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.support.driven import quiet
from tests.support.homes import socket_path
from tests.support.liars import Files
from tests.support.peripherals import Bus, EchoConsole, Keyboard, Lines, ScsiDisk, SocketHost
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.cli import main
from vdpa_bridge.models import Model
from vdpa_bridge.vhost_user.server import Server

__all__ = ["quiet"]  # an autouse fixture

Serve = Callable[[Model], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Puts a model behind a server; returns the target."""
    with ExitStack() as stack:

        def started(model: Model) -> str:
            device = ModelDevice(model, "served")
            stack.callback(device.close)
            path = stack.enter_context(socket_path())
            stack.enter_context(Server(device.open, path))
            return f"vhost-user:{path}"

        yield started


def run(*arguments: str, stdin: bytes | None = None) -> Result:
    """The command in this process."""
    return CliRunner().invoke(main, arguments, input=stdin)


def good(*arguments: str, stdin: bytes | None = None) -> str:
    """Its output; it must succeed."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(status: int, *arguments: str) -> str:
    """Its one line of error."""
    result = run(*arguments)
    assert result.exit_code == status, result.output
    (line,) = result.stderr.splitlines()
    return line


def test_rng(tmp_path: Path) -> None:
    good("rng", "model:rng", "read", "100K", "--output", str(tmp_path / "noise"))
    assert len(set((tmp_path / "noise").read_bytes())) == 256
    assert (tmp_path / "noise").stat().st_size == 100 << 10
    answer = json.loads(good("rng", "model:rng", "read", "16", "--json"))
    assert (answer["length"], len(bytes.fromhex(answer["data"]))) == (16, 16)
    assert "is a block device, not rng" in fails(1, "rng", "model:blk", "read", "1")


def test_drive(serve: Serve) -> None:
    facts = json.loads(good("drive", "model:blk?size=1M", "info", "--json"))
    assert (facts["device"], facts["queues"], facts["config"]["capacity"]) == ("block", 1, 2048)
    read = good("drive", "model:blk?size=1M&serial=xyz", "send", "0", "08000000000000000000000000000000", "--expect", "20", "--expect", "1")
    assert bytes.fromhex(read) == b"xyz".ljust(20, b"\0") + b"\0"
    answer = json.loads(good("drive", "model:rng", "send", "0", "--expect", "4", "--expect", "2", "--json"))
    assert (answer["written"], [len(part) for part in answer["data"]]) == (6, [8, 4])
    assert "a buffer at least" in fails(2, "drive", "model:rng", "send", "0")
    assert "there is no queue 1" not in fails(2, "drive", "model:rng", "send", "1", "--expect", "1")
    assert "no end of a chain" in fails(1, "drive", serve(EchoConsole()), "send", "0", "--expect", "1", "--timeout", "0.1")
    assert "not hex digits" in fails(2, "drive", "model:rng", "send", "0", "xyz")


def test_console(serve: Serve) -> None:
    target = serve(EchoConsole())
    facts = json.loads(good("console", "--port", "echo", target, "info", "--json"))
    assert (facts["cols"], facts["rows"], facts["ports"]) == (80, 25, {"0": "", "1": "echo"})
    assert good("console", target, "write", stdin=b"hello" * 5000) == "25000 bytes written\n"
    assert json.loads(good("console", target, "read", "--timeout", "0.1", "--json")) == {"length": 0, "data": ""}
    assert "no port 'x'; there is: 0 '', 1 'echo'" in fails(2, "console", "--port", "x", target, "info")


def test_scsi(serve: Serve, tmp_path: Path) -> None:
    target, data = serve(ScsiDisk()), bytes(range(256)) * 20
    assert good("scsi", target, "info") == "1:2  VDPA TEST DISK 1.0  512.0 KiB, blocks of 512\n"
    assert good("scsi", "--unit", "1:2", target, "write", "--offset", "4K", stdin=data) == "5120 bytes written at offset 4096\n"
    good("scsi", "--unit", "1:2", target, "read", "--output", str(tmp_path / "disk"))
    assert (tmp_path / "disk").read_bytes() == bytes(4096) + data + bytes((512 << 10) - 4096 - 5120)
    assert json.loads(good("scsi", "--unit", "1:2", target, "read", "--offset", "4K", "--length", "512", "--json"))["data"] == data[:512].hex()
    answer = json.loads(good("scsi", "--unit", "1:2", target, "command", "12:01:80:00:ff:00", "--expect", "255", "--json"))
    assert bytes.fromhex(answer["data"])[4:] == b"SERIAL"
    assert "there is no such target" in fails(1, "scsi", target, "command", "000000000000")
    assert "TARGET:LUN" in fails(2, "scsi", "--unit", "1", target, "info")


def test_vsock(serve: Serve) -> None:
    target = serve(SocketHost())
    assert good("vsock", target, "info") == "context id 42\n"
    data = bytes(range(256)) * 50
    answer = json.loads(good("vsock", target, "connect", "7", "--json", stdin=data))
    assert answer == {"sent": len(data), "received": len(data), "data": data.hex()}
    assert "was refused" in fails(1, "vsock", target, "connect", "8")
    assert "connection to port 5" in fails(1, "vsock", target, "listen", "5", "--timeout", "0.1")


def test_input(serve: Serve) -> None:
    target = serve(Keyboard())
    facts = json.loads(good("input", target, "info", "--json"))
    assert (facts["name"], facts["ids"], facts["events"]) == ("test keyboard", [3, 0x1234, 0x5678, 1], {"1": [30, 32]})
    assert "test keyboard" in good("input", target, "info")
    assert "no end of an event" in fails(1, "input", target, "events", "--timeout", "0.1")


def test_gpio(serve: Serve) -> None:
    target = serve(Lines())
    assert good("gpio", target, "set", "0", "low") == "line 0 is low\n"
    assert good("gpio", target, "info") == "0     out   0  out\n1     none\n2     none     in\n"
    assert "there is no line 3" in fails(2, "gpio", target, "set", "3", "low")


def test_i2c(serve: Serve) -> None:
    target = serve(Bus())
    assert good("i2c", target, "scan") == "50\n"
    good("i2c", target, "transfer", "50", "10abcd")
    assert good("i2c", target, "transfer", "50", "10", "--expect", "2") == "abcd\n"
    assert "address 0x51 failed" in fails(1, "i2c", target, "transfer", "51", "00")


def test_fs(serve: Serve) -> None:
    target = serve(Files())
    assert good("fs", target, "ls") == "dir/\nlink@\n"
    facts = json.loads(good("fs", target, "stat", "link", "--json"))
    assert (facts["link"], facts["mode"], facts["size"]) == ("dir/file", "lrwxrwxrwx", 8)
    assert json.loads(good("fs", target, "cat", "dir/file", "--json"))["data"] == Files.CONTENT.hex()
    assert "No such file" in fails(1, "fs", target, "cat", "dir/no")
