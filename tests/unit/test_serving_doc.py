# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What docs/serving.md tells its readers to type and to write into files is typed and written here.

Paths of a system become paths of a temporary directory, a device that only some machines have becomes a model; nothing
else is changed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.homes import socket_path
from tests.support.programs import command
from tests.support.service import Serve, serial, serving, works
from vdpa_bridge.cli.programs import PROGRAMS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text()
TESTED = {"sh", "program", "capabilities", "client", "toml", "ini", "activate", "qemu", "xml", "yaml"}


def blocks(kind: str) -> list[str]:
    """The fenced blocks of one kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


class Machine:
    """A directory that stands for a machine: the command is in its path, and files are where the page has them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("run/vdpa-bridge", "var/lib/vdpa-bridge", "usr/bin", "etc"):
            (root / name).mkdir(parents=True)
        commands = {"vdpa-bridge": [sys.executable, "-m", "vdpa_bridge"]} | {row.name: command(kind) for kind, row in PROGRAMS.items()}
        for name, words in commands.items():
            program = root / "usr/bin" / name
            program.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
            program.chmod(0o755)
        (root / "var/lib/vdpa-bridge/disk.img").write_bytes(bytes(1 << 20))
        (config,) = blocks("toml")
        (root / "etc/vdpa-bridge.toml").write_text(self.here(config))
        self.environment = {"PATH": f"{root}/usr/bin:{os.environ['PATH']}", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}

    def here(self, text: str) -> str:
        """*text* with this machine's paths."""
        text = re.sub(r"/(run/vdpa-bridge|var/lib/vdpa-bridge|etc/vdpa-bridge|usr/bin/vdpa-bridge)", rf"{self.root}/\1", text)
        return text.replace("/dev/vhost-vdpa-0", "model:net")

    def start(self, script: str) -> Serve:
        """The server that a script ends with."""
        *before, last = self.here(script).replace("\\\n", " ").strip().splitlines()
        text = "\n".join(["set -eu", f"cd {self.root}", *before, f"exec {last}"])
        return Serve(command=["bash", "-c", text], **self.environment)

    def run(self, script: str) -> str:
        """What a script prints."""
        done = subprocess.run(
            ["bash", "-euc", self.here(script)], cwd=self.root, env=os.environ | self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def machine() -> Iterator[Machine]:
    with socket_path() as path:
        yield Machine(Path(path).parent)


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert set(re.findall(r"^```(\w+)$", PAGE, re.MULTILINE)) == TESTED
    assert PAGE.count("```") == 2 * sum(len(blocks(kind)) for kind in TESTED)


@pytest.mark.parametrize("number", range(len(blocks("sh"))))
def test_commands_serve_and_end(machine: Machine, number: int) -> None:
    script = blocks("sh")[number]
    several = "--config" in script or "=model:net" in script
    server = machine.start(script)
    try:
        lines = server.ready(2 if several else 1)
        for line in lines:
            found = machine.root / line.split(" on ")[1].split(" (vdpa=")[0]
            assert found.is_socket()
        if "--config" not in script:
            (client,) = blocks("client")
            assert "64.0 MiB" in machine.run(client)
        server.end()
    finally:
        server.close()


def test_programs_by_the_conventions(machine: Machine) -> None:
    (script,) = blocks("program")
    server = machine.start(script)
    try:
        server.logs("ready")
        works(machine.root / "disk.sock")
        server.end()
        assert "stopped" in server.log
    finally:
        server.close()
    (shown,) = blocks("capabilities")
    asked, _, answer = shown.partition("\n")
    assert machine.run(asked.removeprefix("$ ")) == answer


def test_units_are_right(machine: Machine) -> None:
    """They verify, and the sockets of one are the devices of the other's configuration."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze: apt-get install systemd")
    units = []
    for text in blocks("ini"):
        path = Path(re.match(r"# (\S+)\n", text)[1]).name  # type: ignore[index]
        (machine.root / path).write_text(machine.here(text))
        units.append(machine.root / path)
    assert [path.suffix for path in units] == [".socket", ".service"]
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, timeout=60, check=False)
    ours = [line for line in done.stderr.splitlines() if "vdpa-bridge" in line]
    assert (done.returncode, ours) == (0, []), done.stderr
    listened = re.findall(r"^ListenStream=(.*)$", units[0].read_text(), re.MULTILINE)
    devices = tomllib.loads((machine.root / "etc/vdpa-bridge.toml").read_text())["device"]
    assert listened == [device["socket-path"] for device in devices]
    (command,) = re.findall(r"^ExecStart=(.*)$", blocks("ini")[1], re.MULTILINE)
    server = machine.start(command)
    try:
        server.ready(2)
        server.end()
    finally:
        server.close()


def test_activation_without_systemd(machine: Machine) -> None:
    if not shutil.which("systemd-socket-activate"):
        pytest.skip("needs systemd-socket-activate: apt-get install systemd")
    (script,) = blocks("activate")
    path = machine.root / "disk.sock"
    # It passes on PATH and TERM, but no PYTHONPATH unless told.
    server = machine.start(script.replace(" -l ", " -E PYTHONPATH -l "))
    try:
        server.logs("Listening on")
        assert serial(path) == "vdpa_bridge"
        works(path)
        server.end()
    finally:
        server.close()


@pytest.mark.peers
@pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="needs qemu-system-x86_64: run tools/setup peers")
def test_qemu_finds_both_devices(machine: Machine) -> None:
    (script,) = blocks("qemu")
    command = shlex.split(machine.here(script).replace("\\\n", " "))
    with serving("--config", str(machine.root / "etc/vdpa-bridge.toml"), "--log-format", "json", "-v") as server:
        server.ready(2)
        with subprocess.Popen([*command, "-nodefaults", "-display", "none", "-monitor", "stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as vm:
            try:
                server.logs('"device": "disk", "event": "connect"')
                server.logs('"device": "net", "event": "connect"')
                time.sleep(1)  # the firmware looks at both
                out, _ = vm.communicate("info qtree\nquit\n", timeout=60)
            finally:
                vm.kill()
        assert vm.returncode == 0, out
        assert "vhost-user-blk-pci" in out
        server.logs('"device": "disk", "event": "disconnect".*"mode": "legacy"')
        server.end()
    assert '"drop"' not in server.log


def test_the_domain_names_the_sockets_that_are_served(machine: Machine) -> None:
    (text,) = blocks("xml")
    domain = ElementTree.fromstring(machine.here(text))
    paths = [source.get("path") for source in domain.iter("source") if source.get("type") == "unix"]
    devices = tomllib.loads((machine.root / "etc/vdpa-bridge.toml").read_text())["device"]
    assert paths == [device["socket-path"] for device in devices]
    assert domain.find("memoryBacking/access[@mode='shared']") is not None


def test_the_side_car_starts(machine: Machine) -> None:
    (text,) = blocks("yaml")
    (line,) = re.findall(r"^ +command: (\[.*\])$", text, re.MULTILINE)
    server = machine.start(shlex.join(json.loads(line)))
    try:
        server.ready(2)
        server.end()
    finally:
        server.close()
