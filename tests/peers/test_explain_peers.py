# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Real programs at the other ends: a VMM that keeps its memory, a daemon that speaks another protocol, a back-end of a disk."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vdpa_bridge.system.processes import open_files
from vdpa_bridge.system.unix_sockets import clients_of

from ..support.kernel import explain, told
from ..support.service import serving
from ..support.sockets import listens

pytestmark = pytest.mark.peers
PATIENCE = 20.0


def needs(program: str) -> str:
    if not shutil.which(program):
        pytest.skip(f"needs {program}: run tools/setup peers dpdk")
    return program


@contextmanager
def running(*command: object) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()
            process.wait(PATIENCE)


def until(what: str, condition: object, process: subprocess.Popen[bytes]) -> None:
    """Waits for a condition on a process that must live."""
    end = time.monotonic() + PATIENCE
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < end, what
        time.sleep(0.02)


SHARED = ("-object", "memory-backend-memfd,id=mem,size=64M,share=on", "-numa", "node,memdev=mem")


@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_a_guest_keeps_its_memory_to_itself(short_dir: Path, shared: bool) -> None:
    qemu, path = needs("qemu-system-x86_64"), short_dir / "s"
    command = [qemu, "-M", "q35", "-accel", "tcg", "-m", "64", "-display", "none", "-nodefaults", "-S", *(SHARED if shared else ())]
    command += ["-chardev", f"socket,id=c,path={path}", "-device", "vhost-user-blk-pci,chardev=c"]
    with serving("model:blk?size=1M", "--socket-path", str(path)) as server:
        server.ready()
        with running(*command) as guest:
            until("the guest connects", lambda: clients_of(str(path), open_files()), guest)
            cause, found = explain(f"vhost-user:{path}?timeout=0.3")
            others = next(check for check in found["checks"] if check["check"] == "other clients")
            assert f"(pid {guest.pid})" in others["says"]
            if shared:
                assert cause == "busy"
            else:
                assert cause == "memory-not-shared"
                assert "64 MiB" in others["says"]
                assert found["type"].startswith(" ".join(SHARED).replace("64M", "SIZE"))
                assert found["checks"][-1]["cause"] == "busy"


def test_another_protocol(short_dir: Path) -> None:
    """The monitor of a storage daemon listens beside its disk, and greets whoever comes."""
    daemon, disk, monitor = needs("qemu-storage-daemon"), short_dir / "disk", short_dir / "monitor"
    command = [daemon, "--blockdev", "driver=null-co,node-name=n0,size=1048576", "--chardev", f"socket,id=m,path={monitor},server=on,wait=off", "--monitor", "chardev=m"]
    command += ["--export", f"type=vhost-user-blk,id=e0,node-name=n0,addr.type=unix,addr.path={disk}"]
    with running(*command) as process:
        until("both sockets", lambda: listens(disk) and listens(monitor), process)
        assert explain(f"vhost-user:{monitor}")[0] == "not-a-backend"
        assert explain(f"vhost-user:{disk}?type=blk")[0] is None
        assert explain(f"vhost-user:{disk}?vdpa=require")[0] == "no-vdpa-mode"
        (entry,) = [entry for entry in told("list", "--probe") if entry["name"] == str(disk)]
        assert (entry["target"], entry["device"]) == (f"vhost-user:{disk}?type=blk", "block")
        assert entry["by"] == f"qemu-storage-daemon (pid {process.pid})"
        assert entry["state"] == "0 clients; vhost-user, legacy mode"


def test_a_back_end_without_configuration_space(short_dir: Path) -> None:
    """DPDK's network back-end has none, and needs none; taken for a disk it is too old."""
    testpmd, path = needs("dpdk-testpmd"), short_dir / "s"
    command = [testpmd, "--no-huge", "-m", "256", "--no-pci", "--no-telemetry", "--no-shconf", "--vdev", f"net_vhost0,iface={path}"]
    command += ["--", "--nb-cores=1", "--auto-start", "--stats-period=1", "--total-num-mbufs=2048"]
    with running(*command) as process:
        until("the socket", path.exists, process)
        assert explain(f"vhost-user:{path}?type=net")[0] is None
        cause, found = explain(f"vhost-user:{path}?type=blk")
        assert cause == "too-old"
        assert "does not offer CONFIG" in found["checks"][-1]["says"]
        (entry,) = [entry for entry in told("list") if entry["name"] == str(path)]
        assert (entry["device"], entry["target"]) == ("net", f"vhost-user:{path}?type=net")
