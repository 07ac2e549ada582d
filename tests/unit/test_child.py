# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A model in a sandboxed child: how it comes and goes, and what is heard of it when it does wrong. Its operations are in tests/contract."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.homes import socket_path
from tests.support.sandbox import LACKING, MODEL, REPO, command
from tests.support.service import disk, serving, works
from vdpa_bridge.backends.child import ChildDevice
from vdpa_bridge.device import Device
from vdpa_bridge.drivers import BlkDriver, GenericDriver
from vdpa_bridge.errors import PeerClosed, PeerTimeout
from vdpa_bridge.targets import Target


@contextmanager
def child(target: str, timeout: float = 5.0, sandbox: str = "on") -> Iterator[ChildDevice]:
    device = ChildDevice(target, "child:test", sandbox, timeout)
    try:
        yield device
    finally:
        device.close()


@pytest.fixture
def wrong(tmp_path: Path) -> str:
    """A target whose model misbehaves when it is asked to."""
    (tmp_path / "secret").write_text("secret")
    return f"model:{MODEL}?secret={tmp_path}/secret"


def ask(driver: GenericDriver, what: str) -> object:
    written, (data,) = driver.transact(0, [json.dumps({"attempt": what}).encode()], [4096])
    return json.loads(data[:written])["errno"]


def family(pid: int) -> list[int]:
    """A process and what it has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for one in children for each in family(int(one)))]


def test_it_is_closed_in_and_ends_with_its_target() -> None:
    target = Target.parse("child:blk?size=1M")
    with target.open() as session:
        pid = session.facts()["process"]
        assert isinstance(pid, int)
        _, inside = family(pid)
        assert re.search(r"^Seccomp:\t2$", Path(f"/proc/{inside}/status").read_text(), re.MULTILINE)
    target.close()
    for each in (pid, inside):
        assert not Path(f"/proc/{each}").exists()


def test_what_a_session_wrote_the_next_one_reads() -> None:
    with child("model:blk?size=1M") as device:
        for turn in range(3):
            with Device(device.open()) as opened, BlkDriver(opened) as disk:
                assert disk.read(0, 512) == bytes([turn]) * 512
                disk.write(0, bytes([turn + 1]) * 512)


@pytest.mark.parametrize(
    ("target", "error", "says"),
    [
        ("child:blk?siz=1M", ValueError, "^child:blk.siz=1M: model blk has no option siz"),
        ("child:nosuch", ValueError, "^child:nosuch: unknown model 'nosuch'"),
        ("child:blk?sandbox=maybe", ValueError, "sandbox=maybe; it is on, degrade or off"),
        ("child:blk?file=/no/such/file", OSError, r"process \d+ ended with status 1; it last said: /no/such/file: No such file or directory"),
    ],
)
def test_what_cannot_start_says_why(target: str, error: type[Exception], says: str, capfd: pytest.CaptureFixture[str]) -> None:
    parsed = Target.parse(target)
    with pytest.raises(error, match=says):
        parsed.open()
    parsed.close()
    assert capfd.readouterr() == ("", ""), "it is said once"


def test_a_kernel_that_lacks_something(tmp_path: Path) -> None:
    """It is refused like any other error, or taken as it is."""
    words = [*command(["Landlock"])[:-1], "show"]
    assert LACKING["Landlock"]
    done = [
        subprocess.run([*words, f"child:rng{more}"], cwd=REPO, capture_output=True, text=True, timeout=60, check=False, env=os.environ | {"PYTHONPATH": str(REPO)})
        for more in ("", "?sandbox=degrade", "?sandbox=off")
    ]
    assert [each.returncode for each in done] == [1, 0, 0]
    assert re.search(r"^error: child:rng: its process \d+ ended with status 1; it last said: the sandbox cannot be closed: no Landlock", done[0].stderr)
    assert "rng (id 4)" in done[1].stdout


def test_a_crash_is_an_error_that_says_so(wrong: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of the session, and of every one that is tried afterwards; other devices live."""
    with child(wrong) as device, child("model:blk?size=1M") as other:
        died = pytest.raises(PeerClosed, match=r"^child:test: .*: its process \d+ died of SIGSEGV; it last said: died: ")
        with died, Device(device.open()) as opened, GenericDriver(opened) as driver:
            ask(driver, "crash")
        with pytest.raises(OSError, match=r"^\[Errno 10\] child:test: its process \d+ died of SIGSEGV"):
            device.open()
        assert "child:test: Fatal Python error: Segmentation fault" in caplog.messages
        with Device(other.open()) as opened, BlkDriver(opened) as disk:
            disk.write(0, b"x" * 512)


def test_an_end_is_told_whatever_its_status(wrong: str) -> None:
    """And whatever it wrote before."""
    with child(wrong) as device, pytest.raises(PeerClosed, match=r"its process \d+ died of signal 72"), Device(device.open()) as opened, GenericDriver(opened) as driver:
        ask(driver, "leave")


def test_a_loop_costs_itself_alone(wrong: str) -> None:
    """The device does not answer and says that its process runs; closing it ends that."""
    with child(wrong, timeout=1.0) as device:
        pids = family(device.pid)
        assert len(pids) == 2
        with contextlib.suppress(PeerTimeout, TimeoutError), Device(device.open()) as opened, GenericDriver(opened) as driver:
            driver.transact(0, [json.dumps({"attempt": "loop_with_lock"}).encode()], [4096], 0.5)
        with pytest.raises(PeerTimeout, match=r"no answer to HELLO within 1 s: its process \d+ runs"):
            device.open()
        start = time.monotonic()
    assert time.monotonic() < start + 15
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


def test_a_flood_of_log_is_cut(wrong: str, caplog: pytest.LogCaptureFixture) -> None:
    """What is said at the end is heard, and how much was left out."""
    with child(wrong) as device, Device(device.open()) as opened, GenericDriver(opened) as driver:
        assert ask(driver, "fill_log") == 0
        time.sleep(1.1)
        assert ask(driver, "fill_log") == 0
    said = [message for message in caplog.messages if message.startswith("child:test: ")]
    assert 0 < len(said) < 1000
    assert any(re.search(r"\d+ lines of its log were left out", message) for message in said)


def test_a_log_has_no_control_characters_and_its_levels(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = tmp_path / "loud.py"
    model.write_text(
        "import logging, os\nfrom vdpa_bridge.models import Model\n"
        "class Loud(Model):\n    device_id = 4\n    queue_count = 1\n    def process(self, queues, index):\n        pass\n"
        "    def start(self, features):\n        logging.getLogger('vdpa_bridge').error('red: \\x1b[31m')\n        os.write(2, b'bare \\x07 ' + b'x' * 9000 + b'\\n')\n"
    )
    with child(f"model:{model}") as device, Device(device.open()) as opened, GenericDriver(opened):
        end = time.monotonic() + 5
        while not any("bare" in message for message in caplog.messages):
            assert time.monotonic() < end
            time.sleep(0.01)
    assert ("vdpa_bridge.backends.child", logging.ERROR, "child:test: log: red: ?[31m") in caplog.record_tuples
    (bare,) = (message for message in caplog.messages if "bare" in message)
    assert bare.startswith("child:test: bare ? xx")
    assert len(bare) < 2100


_PARENT = """
import os, sys
from vdpa_bridge.targets import Target
backend = Target.parse("child:rng").open()
print(backend.facts()["process"], flush=True)
sys.stdin.read()
"""


def test_the_end_of_the_parent_is_its_end() -> None:
    """However that ends, and a thread of it is no parent."""
    with subprocess.Popen([sys.executable, "-c", _PARENT], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        watched = [os.pidfd_open(pid) for pid in family(int(parent.stdout.readline()))]
        try:
            assert len(watched) == 2
            parent.kill()
            for fd in watched:
                assert select.select([fd], [], [], 10)[0]
        finally:
            for fd in watched:
                os.close(fd)


def test_a_disk_that_grows_is_seen_by_its_driver(tmp_path: Path) -> None:
    """As with a model of the service's own: SIGHUP."""
    file = tmp_path / "disk"
    file.write_bytes(bytes(1 << 20))
    with socket_path() as path, serving(f"{path}=child:blk?file={file}") as server:
        server.ready()
        with disk(Path(path)) as device, BlkDriver(device) as driver:
            assert driver.info.capacity == 2048
            os.truncate(file, 2 << 20)
            server.process.send_signal(signal.SIGHUP)
            end = time.monotonic() + 5
            while int.from_bytes(device.get_config(0, 8), "little") != 4096:
                assert time.monotonic() < end
                time.sleep(0.01)
        server.end()


def test_the_package_is_the_one_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies in the current directory."""
    (tmp_path / "vdpa_bridge").mkdir()
    (tmp_path / "vdpa_bridge" / "__init__.py").write_text("raise SystemExit('taken over')")
    monkeypatch.chdir(tmp_path)
    with child("model:rng") as device, Device(device.open()) as opened:
        assert opened.identify().queues == 1


def test_signals_from_a_terminal_do_not_reach_the_sandbox() -> None:
    """The child is in our process group, what is in the sandbox is not."""
    with child("model:rng") as device:
        outside, inside = family(device.pid)
        assert (os.getpgid(outside), os.getsid(outside)) == (os.getpgid(0), os.getsid(0))
        assert os.getsid(inside) == inside
        os.kill(inside, signal.SIGHUP)
        with Device(device.open()) as opened:
            assert opened.identify().queues == 1


def test_a_service_serves_children_beside_others() -> None:
    """To clients of both kinds; one that dies is told of and made anew for the next client."""
    with socket_path() as path:
        first, second = Path(path + "1"), Path(path + "2")
        with serving(f"{first}=child:blk?size=1M", f"{second}=child:blk?size=1M", "-v") as server:
            server.ready(2)
            works(first)
            works(second, vdpa="off")
            victim, *_ = sorted(pid for pid in family(server.process.pid)[1:] if Path(f"/proc/{pid}/stat").read_text().split()[3] == str(server.process.pid))
            served = Path(f"/proc/{victim}/cmdline").read_bytes()
            assert b"model:blk" in served
            os.kill(victim, signal.SIGKILL)
            server.logs(rf"ERROR s[12]: its process {victim} was ended by SIGKILL")
            works(first)
            works(second)
            server.end()
