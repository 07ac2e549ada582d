# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The places a device can live in, each as a thing that tests can open.

Rule of this file: a home is started once for all tests that use it, so that whatever a test leaves behind meets the
next one. What a home needs and does not find is said with the way to get it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from vdpa_bridge.backends.base import Backend
from vdpa_bridge.backends.child import ChildDevice
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.backends.relay import relayed
from vdpa_bridge.backends.vhost_net import VhostNet
from vdpa_bridge.backends.vhost_user import open_vhost_user
from vdpa_bridge.backends.vhost_vdpa import VhostVdpa
from vdpa_bridge.backends.vhost_vsock import VhostVsock
from vdpa_bridge.models import make_model
from vdpa_bridge.vhost_user.server import Server
from vdpa_bridge.virtio.config import parse_mac
from vdpa_bridge.virtio.ids import DeviceId, parse_device_id

from . import taps
from .vduse import VduseDisk
from .vduse import missing as vduse_missing

TIMEOUT = 5.0
"""Seconds that a front-end waits for an answer."""
DISK_SIZE = 8 << 20
SERIAL = "contract"
MAC = "02:aa:bb:cc:dd:09"
PAIRS = 3
OPTIONS = {"blk": {"size": str(DISK_SIZE), "serial": SERIAL}, "net": {"mac": MAC, "pairs": str(PAIRS)}}

_numbers = itertools.count()

Opener = Callable[[], Backend]
"""Opens the device once more."""


@dataclass(frozen=True)
class Home:
    """*traits* are what rows of ``vdpa_bridge.differences`` speak of; *mark* selects and deselects (peers, lab)."""

    name: str
    kind: str
    start: Callable[[str], AbstractContextManager[Opener]]
    traits: tuple[str, ...] = ()
    mark: str = ""
    needs: Callable[[str], str] = lambda kind: ""
    """What is missing and how to get it; empty when nothing is."""

    def __str__(self) -> str:
        return f"{self.name}-{self.kind}"

    @property
    def lives(self) -> tuple[str, tuple[str, ...]]:
        """Where the device lives and how it is reached, in the words of docs/devices.md."""
        make = self.name.partition("-")[0]
        makes = {"qsd": "qemu-storage-daemon", "sim": "vdpa_sim", "vp": "vp_vdpa", "vduse": "VDUSE", "kernel": f"vhost-{self.kind}", "child": "model in a sandbox"}
        where = makes.get(make, make) if (self.mark and make != "exported") or make == "child" else "model"
        return where, ("VDUSE",) if make == "exported" else ("legacy",) if "legacy" in self.traits else ("vDPA mode",) if "vhost-user" in self.traits else ()

    @property
    def missing(self) -> str:
        """Why this home cannot be had here, empty if it can."""
        return self.needs(self.kind)


@contextmanager
def socket_path() -> Iterator[str]:
    """A path for a socket, short enough for sun_path."""
    with tempfile.TemporaryDirectory(prefix="vb") as directory:
        yield f"{directory}/s"


@contextmanager
def _in_process(kind: str) -> Iterator[Opener]:
    device = ModelDevice(make_model(kind, OPTIONS[kind]), f"model:{kind}")
    try:
        yield device.open
    finally:
        device.close()


def connector(path: str, kind: str, vdpa: str, timeout: float = TIMEOUT) -> Opener:
    """Opens a socket as ``vhost-user:PATH?type=KIND`` does."""
    return lambda: open_vhost_user(path, device_id=parse_device_id(kind), vdpa=vdpa, timeout=timeout)


@contextmanager
def served(open_device: Opener, kind: str, vdpa: str) -> Iterator[Opener]:
    """*open_device* behind our own server and a socket; the front-end uses mode *vdpa*."""
    with socket_path() as path, Server(open_device, path, timeout=TIMEOUT):
        yield connector(path, kind, vdpa)


@contextmanager
def _vdpa(kind: str) -> Iterator[Opener]:
    with _in_process(kind) as opener, served(opener, kind, "require") as outside:
        yield outside


@contextmanager
def _legacy(kind: str) -> Iterator[Opener]:
    with _in_process(kind) as opener, served(opener, kind, "off") as outside:
        yield outside


@contextmanager
def _relayed(kind: str) -> Iterator[Opener]:
    with _in_process(kind) as opener:
        yield lambda: relayed(opener())


@contextmanager
def _child(kind: str) -> Iterator[Opener]:
    """In a sandbox, in a process of its own."""
    child = ChildDevice(f"model:{kind}?{urlencode(OPTIONS[kind])}", f"child:{kind}", timeout=TIMEOUT)
    try:
        yield child.open
    finally:
        child.close()


_CHILD = """
import sys
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.backends.relay import relayed
from vdpa_bridge.models import make_model
from vdpa_bridge.vhost_user.server import Server
device = ModelDevice(make_model(sys.argv[2], dict(a.split("=", 1) for a in sys.argv[3:])), "child")
with Server(device.open, sys.argv[1]):
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextmanager
def _process(kind: str) -> Iterator[Opener]:
    """The server in another process: other descriptors, another address space."""
    options = [f"{key}={value}" for key, value in OPTIONS[kind].items()]
    with socket_path() as path:
        command = [sys.executable, "-c", _CHILD, path, kind, *options]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            try:
                assert child.stdout is not None
                if child.stdout.readline() != "ready\n":
                    raise RuntimeError("the server process did not start (its stderr is above)")
                yield connector(path, kind, "require")
            finally:
                child.terminate()
                child.wait(10)


@contextmanager
def storage_daemon(size: int = DISK_SIZE) -> Iterator[str]:
    """The socket of qemu-storage-daemon with an empty disk of *size* bytes."""
    with tempfile.TemporaryDirectory(prefix="vb") as directory:
        image = Path(directory, "disk")
        with image.open("wb") as file:
            file.truncate(size)
        path = f"{directory}/s"
        pid_file = Path(directory, "pid")
        command = [
            "qemu-storage-daemon",
            *("--blockdev", f"driver=file,node-name=disk,filename={image},discard=unmap"),
            *("--export", f"type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=1,addr.type=unix,addr.path={path}"),
            *("--pidfile", str(pid_file), "--daemonize"),
        ]
        subprocess.run(command, check=True, timeout=20)
        try:
            yield path
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid_file.read_text()), 15)


@contextmanager
def _storage_daemon(kind: str) -> Iterator[Opener]:
    """QEMU's vhost-user-blk: the legacy front-end against somebody else's back-end."""
    with storage_daemon() as path:
        yield connector(path, kind, "off")


def _node_variable(name: str) -> Callable[[str], str]:
    return lambda kind: f"VDPA_{name}_{kind.upper()}"


def _kernel(name: str) -> Callable[[str], AbstractContextManager[Opener]]:
    @contextmanager
    def start(kind: str) -> Iterator[Opener]:
        path = os.environ[_node_variable(name)(kind)]
        yield lambda: VhostVdpa(path)

    return start


@contextmanager
def _vduse(kind: str) -> Iterator[Opener]:
    """A daemon's disk by way of the kernel."""
    with VduseDisk(DISK_SIZE, SERIAL) as disk:
        node = disk.node
        assert node is not None
        yield lambda: VhostVdpa(node)


@contextmanager
def _exported(kind: str) -> Iterator[Opener]:
    """The model by way of the kernel: our own exporter, in a process of its own."""
    name = f"vb{os.getpid() % 100000}{kind}{next(_numbers)}"
    target = f"model:{kind}?{urlencode(OPTIONS[kind])}"
    subprocess.run(["modprobe", "-a", "vduse", "vhost_vdpa"], check=True, timeout=60)
    command = [sys.executable, "-m", "vdpa_bridge", "vduse", name, target, "--driver", "vhost_vdpa", "--json"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            ready = json.loads(child.stdout.readline() or "{}")
            if "used_as" not in ready:
                raise RuntimeError("the exporter did not start (its stderr is above)")
            (node,) = ready["used_as"]
            yield lambda: VhostVdpa(node)
        finally:
            child.terminate()
            child.wait(20)


@contextmanager
def _kernel_net(kind: str) -> Iterator[Opener]:
    """The kernel's own vhost on a tap that gives every frame back."""
    with taps.tap(echo=True) as name:
        yield lambda: VhostNet(f"vhost-net:{name}", name, parse_mac(MAC))


@contextmanager
def _kernel_vsock(kind: str) -> Iterator[Opener]:
    taps.load()
    cid = taps.new_cid()
    yield lambda: VhostVsock(f"vhost-vsock:{cid}", cid)


def _bridged(name: str, vdpa: str) -> Callable[[str], AbstractContextManager[Opener]]:
    """A kernel device behind our own server."""

    @contextmanager
    def start(kind: str) -> Iterator[Opener]:
        with _kernel(name)(kind) as opener, served(opener, kind, vdpa) as outside:
            yield outside

    return start


def _needs_node(name: str) -> Callable[[str], str]:
    def needs(kind: str) -> str:
        variable = _node_variable(name)(kind)
        return "" if variable in os.environ else f"no ${variable}: run it in the lab, tools/lab pytest -m lab tests/contract"

    return needs


def _needs_storage_daemon(kind: str) -> str:
    return "" if shutil.which("qemu-storage-daemon") else "no qemu-storage-daemon: tools/setup peers installs it"


def _both(name: str, start: Callable[[str], AbstractContextManager[Opener]], traits: tuple[str, ...] = (), mark: str = "", **more: Callable[[str], str]) -> list[Home]:
    return [Home(name, kind, start, traits, mark, **more) for kind in ("blk", "net")]


HOMES: list[Home] = [
    *_both("model", _in_process),
    *_both("vdpa", _vdpa, ("vhost-user",)),
    *_both("legacy", _legacy, ("vhost-user", "legacy")),
    *_both("relay", _relayed),
    *_both("child", _child),
    Home("process", "blk", _process, ("vhost-user",)),
    Home("qsd", "blk", _storage_daemon, ("vhost-user", "legacy", "qemu-storage-daemon"), "peers", _needs_storage_daemon),
    *_both("sim", _kernel("SIM"), (), "lab", needs=_needs_node("SIM")),
    *_both("vp", _kernel("VP"), ("vp_vdpa",), "lab", needs=_needs_node("VP")),
    Home("vduse", "blk", _vduse, ("VDUSE", "libvduse"), "lab", lambda kind: vduse_missing()),
    *_both("exported", _exported, ("VDUSE",), "lab", needs=lambda kind: vduse_missing()),
    Home("kernel", "net", _kernel_net, VhostNet.traits, "lab", lambda kind: taps.missing()),
    Home("kernel", "vsock", _kernel_vsock, VhostVsock.traits, "lab", lambda kind: taps.missing()),
    Home("sim-bridged", "blk", _bridged("SIM", "require"), ("vhost-user",), "lab", _needs_node("SIM")),
    Home("sim-legacy", "net", _bridged("SIM", "off"), ("vhost-user", "legacy"), "lab", _needs_node("SIM")),
]

DEVICE_IDS = {"blk": DeviceId.BLOCK, "net": DeviceId.NET, "vsock": DeviceId.VSOCK}
