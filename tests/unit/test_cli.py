# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The command line on real devices: models here, and a real server process for what needs one."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import vdpa_bridge
from vdpa_bridge import ops
from vdpa_bridge.cli import COMMANDS, main

REPO = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-m", "vdpa_bridge"]


def run(*arguments: str, stdin: bytes | None = None) -> Result:
    """The command in this process."""
    return CliRunner().invoke(main, arguments, input=stdin)


def good(*arguments: str, stdin: bytes | None = None) -> str:
    """Its output; it must succeed."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(status: int, *arguments: str, stdin: bytes | None = None) -> str:
    """Its error line; it must fail with *status* and without a traceback."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == status, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


# Help and usage ----------------------------------------------------------------------------------------------------------


def test_help_lists_all_commands_and_the_targets() -> None:
    text = good("--help")
    assert all(re.search(rf"^  {name} ", text, re.MULTILINE) for name in COMMANDS)
    assert "vhost-user:PATH" in text
    assert re.fullmatch(r"vdpa-bridge (\d+\.\d+|from a source tree).*\n", good("--version"))


def _all_commands() -> list[tuple[str, ...]]:
    managing = ("mgmtdev show", "dev show", "dev add", "dev del", "dev set", "dev config show", "dev vstats show", "bind")
    commands = [(name,) for name in COMMANDS] + [(name, "TARGET", verb) for name in COMMANDS if name not in ("mgmt", "bench") for verb in _verbs(name)]
    commands += [("bench", "blk"), ("bench", "net")]
    return commands + [("mgmt", *words.split()) for words in managing]


def _verbs(name: str) -> list[str]:
    found = import_module(f"vdpa_bridge.cli.{name}").command
    return list(found.commands) if isinstance(found, click.Group) else []


@pytest.mark.parametrize("command", _all_commands(), ids=" ".join)
def test_every_command_has_help_json_and_trace(command: tuple[str, ...]) -> None:
    text = good(*command, "--help")
    if len(command) == 1 and _verbs(command[0]):
        assert "Commands:" in text
    else:
        assert "--json" in text
        assert "--trace" in text
    if len(command) == 1:
        assert f"\n  vdpa-bridge {command[0]}" in text.partition("Examples:")[2]


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, atexit; atexit.register(lambda: print(*sys.modules)); from vdpa_bridge.cli import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    modules = set(done.stdout.splitlines()[-1].split())
    assert not {"rich", "pyroute2", "vdpa_bridge.compare", "vdpa_bridge.drivers", "vdpa_bridge.vhost_user.server"} & modules


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("dance",), "dance"),
        (("show",), "TARGET"),
        (("show", "model:blk", "--loud"), "--loud"),
        (("show", "floppy:0"), "a target is"),
        (("show", "model:floppy"), "there is: blk, "),
        (("show", "model:blk?sise=1M"), "sise"),
        (("ops", "nothing"), "nothing"),
        (("blk", "model:blk", "read", "--length", "many"), "64K"),
        (("net", "model:net", "send", "xyz"), "hex"),
        (("net", "model:net", "send"), "--file"),
        (("serve", "model:blk"), "--socket-path"),
        (("mgmt", "dev", "add", "name", "x"), "mgmtdev is missing"),
        (("mgmt", "dev", "add", "name", "x", "mgmtdev"), "every word needs its value"),
        (("mgmt", "dev", "vstats", "show", "x", "qidx", "one"), "queue's number"),
        (("serve", "model:blk", "--socket-path", "s", "--socket-mode", "999"), "octal"),
    ],
)
def test_wrong_usage_is_status_2_and_one_line(arguments: tuple[str, ...], says: str) -> None:
    assert says in fails(2, *arguments)


def test_a_defect_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(pattern: str) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("vdpa_bridge.cli.ops.rows", defect)
    result = run("ops")
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_what_the_documentation_says_of_operations_is_fresh() -> None:
    done = subprocess.run(
        [sys.executable, str(REPO / "tools" / "render"), "--check"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


# ops, show, call ---------------------------------------------------------------------------------------------------------


def test_ops_lists_every_operation() -> None:
    text, data = good("ops"), json.loads(good("ops", "--json"))
    assert [row["name"] for row in data] == [op.name for op in ops.TABLE]
    assert all(op.name in text for op in ops.TABLE)
    status = next(row for row in data if row["name"] == "GET_STATUS")
    assert (status["number"], status["legacy"]) == ("0x8001af71", "GET_STATUS (40)")
    assert {row["legacy"] for row in json.loads(good("ops", "desc_group", "--json"))} == {"absent"}


def test_show_tells_identity_features_config_and_operations() -> None:
    facts = json.loads(good("show", "model:blk?size=3M&serial=abc", "--json"))
    assert facts["device"] == {"id": 2, "name": "block"}
    assert facts["config"]["fields"]["capacity"] == 6144
    assert {"FLUSH", "VERSION_1", "ACCESS_PLATFORM"} <= set(facts["features"]["names"])
    assert "SUSPEND" in facts["backend_features"]["names"]
    assert facts["queues"] == [{"index": 0, "size": 256, "group": 0, "descriptor_group": None, "base": 0}]
    assert set(facts["operations"]) == {op.name for op in ops.TABLE}
    assert facts["operations"]["GET_VRING_DESC_GROUP"]["level"] == "absent"
    text = good("show", "model:net")
    assert "groups 0:0 1:0 2:1" in text
    assert "mac = 02:00:00:00:00:01" in text


def test_call_carries_out_operations_in_one_session() -> None:
    text = good("call", "model:net", "SET_OWNER", "set_vring_num", "index=0", "num=0x40", "GET_VRING_GROUP", "index=2", "GET_STATUS")
    assert text.splitlines() == ["SET_OWNER: ok", "SET_VRING_NUM: ok", "GET_VRING_GROUP: index=2 num=1", "GET_STATUS: value=0"]
    words = ("SET_OWNER", "IOTLB_UPDATE", "iova=1M", "memory=64K", "perm=ro", "SET_VRING_KICK", "index=0", "fd=new")
    good("call", "model:blk", *words, "SET_VRING_KICK", "index=0", "fd=none", "SET_CONFIG_CALL", "fd=-1")
    (reply,) = json.loads(good("call", "model:net", "GET_CONFIG", "offset=0", "length=6", "--json"))
    assert reply == {"op": "GET_CONFIG", "reply": {"offset": 0, "data": "020000000001"}}


def test_call_tells_the_errno_of_the_device() -> None:
    line = fails(1, "call", "model:blk", "SET_VRING_NUM", "index=0", "num=3")
    assert "SET_OWNER first" in line
    result = run("call", "model:blk", "SET_OWNER", "SET_OWNER", "GET_STATUS", "--keep-going", "--json")
    assert result.exit_code == 1
    assert [entry.get("errno") for entry in json.loads(result.stdout)] == [None, "EBUSY", None]
    stopped = run("call", "model:blk", "SET_OWNER", "SET_OWNER", "GET_STATUS")
    assert stopped.stdout == "SET_OWNER: ok\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("DANCE", "no such operation"),
        ("STATUS", "SET_STATUS"),
        ("value=1", "OP KEY=VALUE"),
        ("SET_STATUS", "value= is missing"),
        ("SET_STATUS value=1 colour=2", "no field colour"),
        ("SET_STATUS value=x", "not a number"),
        ("SET_STATUS value=0x100", "does not fit"),
        ("SET_CONFIG offset=0 data=xy", "hex"),
        ("SET_VRING_KICK index=0 fd=old", "none or new"),
        ("GET_STATUS value=1", "takes none"),
        ("IOTLB_UPDATE iova=0 size=4096", "fd= is missing"),
    ],
)
def test_call_refuses_what_cannot_be_a_request(words: str, says: str) -> None:
    assert says in fails(2, "call", "model:blk", *words.split())


def test_trace_goes_to_stderr_or_a_file_and_takes_no_word_with_it(tmp_path: Path) -> None:
    result = run("call", "--trace", "model:blk", "GET_STATUS")
    assert result.exit_code == 0
    assert re.search(r"^GET_STATUS\(\) = value=0 <\d+ us>$", result.stderr, re.MULTILINE)
    good("blk", "model:blk", "id", f"--trace={tmp_path}/t")
    lines = (tmp_path / "t").read_text().splitlines()
    assert lines[-1].startswith("close()")
    assert any(line.startswith("+ SET_STATUS(value=15 ") for line in lines)
    assert "No such file" in fails(1, "show", "model:blk", "--trace=/nowhere/t")


def test_json_can_go_to_a_file_beside_the_text(tmp_path: Path) -> None:
    assert good("blk", "model:blk?serial=x1", "id", f"--json={tmp_path}/j") == "x1\n"
    assert json.loads((tmp_path / "j").read_text()) == {"id": "x1"}


# blk, net ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A file of 4 MiB."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(4 << 20))
    return path


def test_what_is_written_is_read_and_is_in_the_file(disk: Path, tmp_path: Path) -> None:
    target, data = f"model:blk?file={disk}", os.urandom(1_500_000 // 512 * 512)
    (tmp_path / "in").write_bytes(data)
    assert f"{len(data)} bytes written" in good("blk", target, "write", "--offset", "64K", "--input", f"{tmp_path}/in", "--flush")
    good("blk", target, "read", "--offset", "0x10000", "--length", str(len(data)), "--output", f"{tmp_path}/out")
    assert (tmp_path / "out").read_bytes() == data
    assert disk.read_bytes()[65536:][: len(data)] == data
    result = run("blk", target, "read", "--offset", "64K", "--length", "1M")
    assert result.stdout_bytes == data[: 1 << 20]
    good("blk", target, "zero", "--offset", "64K", "--length", "4K")
    assert disk.read_bytes()[65536 : 65536 + 8192] == bytes(4096) + data[4096:8192]
    good("blk", target, "discard", "--offset", "68K", "--length", "4K")
    good("blk", target, "flush")


def test_data_from_a_pipe_may_be_padded(disk: Path) -> None:
    target = f"model:blk?file={disk}"
    assert "--pad" in fails(2, "blk", target, "write", stdin=b"hello")
    assert "512 bytes written" in good("blk", target, "write", "--pad", stdin=b"hello")
    assert disk.read_bytes()[:8] == b"hello\0\0\0"
    read = json.loads(good("blk", target, "read", "--length", "512", "--json"))
    assert bytes.fromhex(read["data"]) == b"hello".ljust(512, b"\0")


def test_blk_info_and_refusals(disk: Path) -> None:
    facts = json.loads(good("blk", f"model:blk?file={disk}&readonly=on&serial=S7", "info", "--json"))
    assert (facts["size"], facts["readonly"], facts["serial"]) == (4 << 20, True, "S7")
    assert "leave the disk" in fails(2, "blk", f"model:blk?file={disk}", "read", "--length", "1G")
    assert "multiples of 512" in fails(2, "blk", f"model:blk?file={disk}", "read", "--offset", "5", "--length", "512")
    assert "I/O error" in fails(1, "blk", f"model:blk?file={disk}&readonly=on", "write", stdin=bytes(512))
    assert "net device, not block" in fails(1, "blk", "model:net", "info")
    assert "No such file" in fails(1, "blk", "model:blk?file=/nowhere/disk", "info")


def test_net_loops_sends_and_waits() -> None:
    facts = json.loads(good("net", "model:net", "loop", "--count", "100", "--json"))
    assert (facts["frames"], facts["missing"], facts["wrong"]) == (100, 0, 0)
    facts = json.loads(good("net", "model:net?mtu=900&pairs=3", "info", "--json"))
    assert (facts["mtu"], facts["pairs"]) == (900, 3)
    assert json.loads(good("net", "model:net?pairs=3", "loop", "--pairs", "3", "--json"))["missing"] == 0
    assert "has 1 queue pair, 2 are wanted" in fails(2, "net", "model:net", "loop", "--pairs", "2")
    assert "1 frame of 60 bytes sent" in good("net", "model:net", "send", "ff" * 60)
    assert "3 frames" in good("net", "model:net", "send", "--file", "-", "--count", "3", stdin=bytes(60))
    assert "takes 14 to" in fails(2, "net", "model:net", "send", "ffff")
    assert "0 of 2 frames" in fails(1, "net", "model:net", "recv", "--count", "2", "--timeout", "0.05")


# serve -------------------------------------------------------------------------------------------------------------------


@dataclass
class Served:
    """A server process."""

    process: subprocess.Popen[str]
    path: Path

    def end(self, number: int = signal.SIGTERM) -> tuple[int, float]:
        """Its exit status, and the seconds it took to end."""
        start = time.monotonic()
        self.process.send_signal(number)
        status = self.process.wait(20)
        return status, time.monotonic() - start


@contextmanager
def serving(tmp_path: Path, target: str, *options: str) -> Iterator[Served]:
    """``vdpa-bridge serve`` that said it is ready."""
    path = tmp_path / "s"
    command = [*PROGRAM, "serve", target, "--socket-path", str(path), "--json", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.stderr.read() if process.stderr else ""
            assert json.loads(line)["event"] == "ready"
            yield Served(process, path)
        finally:
            if process.poll() is None:
                process.kill()


def test_a_server_serves_both_modes_and_ends_well(tmp_path: Path) -> None:
    with serving(tmp_path, "model:blk?size=4M&serial=served", "--socket-mode", "640") as server:
        assert server.path.stat().st_mode & 0o777 == 0o640
        for query in ("vdpa=require", "vdpa=off&type=blk"):
            assert good("blk", f"vhost-user:{server.path}?{query}", "id") == "served\n"
        good("blk", f"vhost-user:{server.path}", "write", stdin=b"x" * 512)
        read = json.loads(good("blk", f"vhost-user:{server.path}?vdpa=off&type=blk", "read", "--length", "512", "--json"))
        assert bytes.fromhex(read["data"]) == b"x" * 512
        facts = json.loads(good("show", f"vhost-user:{server.path}?vdpa=off", "--json"))
        assert facts["operations"]["GET_DEVICE_ID"]["level"] == "absent"
        assert facts["device"]["id"] is None
        status, seconds = server.end()
        assert status == 0
        assert seconds < 1
        assert not server.path.exists()
        assert server.process.stdout is not None
        assert json.loads(server.process.stdout.read()) == {"event": "stopped", "connections": 5}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_ends_at_once_though_a_client_runs_a_device(tmp_path: Path, number: int) -> None:
    with serving(tmp_path, "model:net") as server, vdpa_bridge.connect(f"vhost-user:{server.path}") as device:
        device.negotiate(0)
        status, seconds = server.end(number)
        assert (status, server.path.exists()) == (0, False)
        assert seconds < 1


def test_a_server_can_insist_and_can_trace(tmp_path: Path) -> None:
    with serving(tmp_path, "model:blk", "--vdpa", "require", "--trace") as server:
        assert "closed the connection" in fails(1, "blk", f"vhost-user:{server.path}?vdpa=off&type=blk", "id")
        good("show", f"vhost-user:{server.path}")
        server.end()
        assert server.process.stderr is not None
        assert "GET_DEVICE_ID() = value=2" in server.process.stderr.read()
    with serving(tmp_path, "model:blk", "--vdpa", "off") as server:
        assert "does not offer" in fails(1, "show", f"vhost-user:{server.path}?vdpa=require")


def test_a_server_takes_a_listening_socket_over(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "l"))
        listener.listen()
        command = [*PROGRAM, "serve", "model:blk?serial=by-fd", "--fd", str(listener.fileno())]
        with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[listener.fileno()], text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline().startswith("serving model:blk?serial=by-fd on fd ")
                assert good("blk", f"vhost-user:{tmp_path}/l", "id") == "by-fd\n"
                process.terminate()
                assert process.wait(20) == 0
            finally:
                process.kill()
    assert "Unix socket that listens" in _program("serve", "model:blk", "--fd", "0").stderr


def _program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL)


def test_what_cannot_be_served_is_said_before_anybody_can_connect(tmp_path: Path) -> None:
    for target, place, says in (
        ("model:blk?file=/nowhere/disk", tmp_path / "s", "No such file"),
        ("model:blk", tmp_path / "none" / "s", "cannot listen"),
        (f"vhost-user:{tmp_path}/nobody", tmp_path / "s", "nobody"),
    ):
        done = _program("serve", target, "--socket-path", str(place))
        assert done.returncode == 1, done
        assert says in done.stderr
        assert done.stdout == ""
        assert not place.exists()


def test_a_bridge_of_a_bridge(tmp_path: Path) -> None:
    """What serves can be served: legacy front-end in the middle, vDPA mode outside."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    with serving(tmp_path / "in", "model:blk?size=2M") as inner:
        target = f"vhost-user:{inner.path}?vdpa=off&type=blk"
        with serving(tmp_path / "out", target, "--vdpa", "require") as outer:
            data = os.urandom(4096)
            good("blk", f"vhost-user:{outer.path}", "write", stdin=data)
            read = json.loads(good("blk", f"vhost-user:{outer.path}", "read", "--length", "4096", "--json"))
            assert bytes.fromhex(read["data"]) == data


# Signals and pipes -------------------------------------------------------------------------------------------------------


def test_an_interrupt_ends_a_command_without_a_traceback(tmp_path: Path) -> None:
    trace = tmp_path / "t"
    # Who runs tests in a background of a shell has interrupts ignored.
    command = ["env", "--default-signal=INT", *PROGRAM, "net", "model:net", "recv", "--timeout", "60", f"--trace={trace}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 30
            while not (trace.exists() and "SET_STATUS(value=15" in trace.read_text()) and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130
    assert errors.split() == ["interrupted"]


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    with subprocess.Popen([*PROGRAM, "ops", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        process.wait(20)
