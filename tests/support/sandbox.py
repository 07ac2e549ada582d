# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A sandboxed process whose model tries to get out, and what it tries to get at; kernels that lack a means of closing it.

Rule of this file: a kernel that lacks something is this kernel under a filter that gives the answer that such a one gives.
"""

from __future__ import annotations

import json
import os
import pkgutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import vdpa_bridge
from tests.support.homes import connector
from tests.support.service import Serve
from vdpa_bridge.device import Device
from vdpa_bridge.drivers import GenericDriver

REPO = Path(__file__).resolve().parents[2]
MODEL = REPO / "tests" / "support" / "escapes.py"
NOBODY = 65534
LACKING = {"Landlock": ("landlock_create_ruleset",), "namespaces": ("unshare",), "seccomp": ("seccomp",)}
"""Layers, and the system calls that a kernel without them does not have."""

_START = """
import ctypes, importlib, os, sys
modules, lacking, user, words = sys.argv[1].split(","), sys.argv[2], int(sys.argv[3]), sys.argv[4:]
for name in filter(None, modules):
    importlib.import_module(name)  # where they are, another user may not read
if user:
    from vdpa_bridge.sandbox.preload import preload
    preload()
from vdpa_bridge.sandbox import seccomp
lib = seccomp.library()
if lacking:
    context = lib.seccomp_init(0x7FFF0000)
    for name in lacking.split(","):
        number = lib.seccomp_syscall_resolve_name(name.encode())
        error = 1 if name == "unshare" else 38
        assert lib.seccomp_rule_add_array(context, 0x50000 | error, number, 0, None) == 0
        if name == "seccomp":
            compare = (seccomp._Compare * 1)(seccomp._Compare(0, 4, 22, 0))  # PR_SET_SECCOMP
            assert lib.seccomp_rule_add_array(context, 0x50000 | 22, lib.seccomp_syscall_resolve_name(b"prctl"), 1, compare) == 0
    assert lib.seccomp_load(context) == 0
if user:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as after execve by that user
sys.argv[0] = "vdpa-bridge"
from vdpa_bridge.cli import main
main(words)
"""


def none_for_others() -> str:
    """Why another user could not make namespaces here; empty if it can."""
    if os.getuid():
        return "needs root, to become somebody else"
    tried = subprocess.run(["unshare", "--user", "true"], user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, text=True, timeout=20, check=False)
    return tried.stderr.strip() and f"{tried.stderr.strip()} (for another user: a chroot?)"


def command(lacking: Sequence[str] = (), user: int = 0) -> list[str]:
    """How to start ``vdpa-bridge`` as *user* on a kernel without some layers."""
    modules = [info.name for info in pkgutil.walk_packages(vdpa_bridge.__path__, "vdpa_bridge.") if info.name != "vdpa_bridge.__main__"]
    modules = [*modules, "tests.support.escapes", "difflib"] if user else []
    missing = ",".join(name for layer in lacking for name in LACKING[layer])
    return [sys.executable, "-c", _START, ",".join(modules), missing, str(user), "serve"]


class Prisoner:
    """A served EscapeModel, and a driver that has it try."""

    def __init__(self, server: Serve, path: Path, facts: dict[str, Any]) -> None:
        self.server, self.path, self.facts = server, path, facts

    @contextmanager
    def driver(self, timeout: float = 20.0) -> Iterator[GenericDriver]:
        with Device(connector(str(self.path), "rng", "require", timeout)()) as device, GenericDriver(device) as driver:
            yield driver

    def attempt(self, driver: GenericDriver, name: str, timeout: float = 20.0) -> tuple[int, str]:
        """errno, 0 for success, and its text."""
        request = json.dumps(self.facts | {"attempt": name}).encode()
        written, (data,) = driver.transact(0, [request], [4096], timeout)
        answer = json.loads(data[:written])
        return answer["errno"], answer.get("text", "")

    @property
    def inside(self) -> int:
        """The process in the sandbox, or the only one."""
        pid = self.server.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else pid


@contextmanager
def prisoner(
    sandbox: str, *more: str, lacking: Sequence[str] = (), user: int = 0, fds: Sequence[int] = (), deaf: bool = False, **needs: str
) -> Iterator[Prisoner]:
    """One, with all that it may try to reach: files, listeners, a process of the same user. *needs*: options of the model, and environment in capitals."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vb")))
        secret, model = folder / "secret", folder / "escapes.py"
        secret.write_text("secret")
        model.write_text(MODEL.read_text())
        if user:
            for path in (folder, secret, model):
                os.chown(path, user, user)
        facts: dict[str, Any] = {"secret": str(secret), "folder": str(folder), "abstract": f"vdpa-bridge-{folder.name}", "socket": f"{folder}/unix"}
        for name, family, kind, address in (
            ("tcp", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            ("udp", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            ("", socket.AF_UNIX, socket.SOCK_STREAM, "\0" + facts["abstract"]),
            ("", socket.AF_UNIX, socket.SOCK_STREAM, facts["socket"]),
        ):
            sock = stack.enter_context(socket.socket(family, kind))
            sock.bind(address)
            if kind == socket.SOCK_STREAM:
                sock.listen(128)
            if name:
                facts[name] = sock.getsockname()[1]
        os.chmod(facts["socket"], 0o777)
        victim = subprocess.Popen(["sleep", "3600"], **({"user": user, "group": user, "extra_groups": []} if user else {}))
        stack.callback(victim.wait)
        stack.callback(victim.kill)
        facts |= {"victim": victim.pid, "address": _readable_address(victim.pid), "parent": os.getpid()}
        environment = {name: needs.pop(name) for name in list(needs) if name.isupper()}
        options = urlencode({"secret": str(secret)} | needs)
        path = folder / "s"
        words = [f"model:{model}?{options}", "--socket-path", str(path), f"--sandbox={sandbox}", *more]
        server = Serve(*words, command=command(lacking, user), fds=fds, deaf=deaf, PYTHONPATH=str(REPO), **environment)
        stack.callback(server.close)
        yield Prisoner(server, path, facts)


def _readable_address(pid: int) -> int:
    """The beginning of the kernel's page in it (vdso(7)); Popen returns before execve has made that."""
    end = time.monotonic() + 10
    while not (found := [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if line.endswith("[vdso]")]):
        assert time.monotonic() < end
    return int(found[0].split("-")[0], 16)
