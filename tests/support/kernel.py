# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The lab's kernel from the outside: devices by name, iproute2's ``vdpa``, commands as a user types them."""

from __future__ import annotations

import json
import os
import pwd
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from vdpa_bridge.cli import main
from vdpa_bridge.system.vdpa_bus import bus_devices

PATIENCE = 60.0


def in_lab() -> None:
    """Skips where there is no kernel to manage."""
    if "VDPA_SIM_NET" not in os.environ:
        pytest.skip("no $VDPA_SIM_NET: run it in the lab, tools/lab pytest -m lab tests/lab")


def device_name(node: str) -> str:
    """What the device of a node is called on the bus."""
    return next(device.name for device in bus_devices() if device.node == os.environ[f"VDPA_{node}"])


def bridge(*words: str) -> Result:
    """``vdpa-bridge`` with *words*, in this process."""
    return CliRunner().invoke(main, words)


def done(*words: str) -> str:
    """What it prints; it must succeed."""
    result = bridge(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def told(*words: str) -> Any:
    """What it prints with --json."""
    return json.loads(done(*words, "--json"))


def fails(*words: str) -> str:
    """Its one line of error."""
    result = bridge(*words)
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    return line


def type_it(line: str) -> None:
    """Do what a user is told to type."""
    for part in line.split("; "):
        words = shlex.split(part)
        if words[0] == "vdpa-bridge":
            done(*words[1:])
        else:
            subprocess.run(words, check=True, timeout=PATIENCE)


def iproute(*words: str) -> Any:
    """What iproute2's ``vdpa -j`` prints; some of its keys end in a blank."""

    def trimmed(value: Any) -> Any:
        return {key.strip(): trimmed(entry) for key, entry in value.items()} if isinstance(value, dict) else value

    run = subprocess.run(["vdpa", "-j", *words], capture_output=True, text=True, check=True, timeout=PATIENCE)
    return trimmed(json.loads(run.stdout))


def explain(target: str, *options: str) -> tuple[str | None, dict[str, Any]]:
    """The cause that ``explain`` finds, and all it says; the exit status must be the cause's."""
    result = bridge("explain", target, *options, "--json")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    found = json.loads(result.stdout)
    assert found["status"] == result.exit_code
    return found["cause"], found


def as_nobody(function: Callable[[], object]) -> int:
    """The exit status of a child without privileges: 0 when *function* returns true. What it imports must be imported already."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            if os.geteuid() == 0:
                nobody = pwd.getpwnam("nobody")
                os.setgroups([])
                os.setgid(nobody.pw_gid)
                os.setuid(nobody.pw_uid)
            status = 0 if function() else 1
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def holding(path: str) -> Iterator[int]:
    """Another process has *path* open: its pid."""
    code = "import os, sys; fd = os.open(sys.argv[1], os.O_RDWR); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        try:
            yield process.pid
        finally:
            process.kill()
            process.wait(PATIENCE)


@contextmanager
def added(name: str, mgmtdev: str, *options: str) -> Iterator[str]:
    """A device for a while: its target."""
    done("mgmt", "dev", "add", "name", name, "mgmtdev", mgmtdev, *options)
    try:
        yield f"vdpa:{name}"
    finally:
        if Path("/sys/bus/vdpa/devices", name).exists():
            done("mgmt", "dev", "del", name)
