# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Every way in which a socket or a model does not work, made for real; and what is said to be typed."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vdpa_bridge.backends.vhost_vdpa import ENOTSUPP
from vdpa_bridge.explain import CAUSES, Examination, Wishes
from vdpa_bridge.explain.node import NodeExamination
from vdpa_bridge.flags import VHOST_USER_F_PROTOCOL_FEATURES, Feature, ProtocolFeature
from vdpa_bridge.models import KINDS
from vdpa_bridge.system import modules
from vdpa_bridge.vhost_user import messages as m
from vdpa_bridge.vhost_user.framing import HEADER, REPLY, VERSION, frame
from vdpa_bridge.wire import U64

from ..support.kernel import as_nobody, bridge, explain
from ..support.service import serving

TESTS = Path(__file__).parents[1]


@pytest.fixture
def path() -> Iterator[Path]:
    """Where a socket can be."""
    with tempfile.TemporaryDirectory(prefix="vb") as directory:
        yield Path(directory, "s")


@contextmanager
def listening(path: Path, kind: int = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.bind(str(path))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        sock.settimeout(20)
        yield sock


@contextmanager
def answering(path: Path, answers: dict[int, int], rest: bytes | None = None) -> Iterator[None]:
    """A peer that has a u64 for each message of *answers*, then *rest*, and hangs up."""

    def serve(sock: socket.socket) -> None:
        client, _ = sock.accept()
        with client:
            client.settimeout(20)
            while head := client.recv(HEADER.size):
                number, _, size = HEADER.unpack(head)
                if size:
                    client.recv(size)
                if number in answers:
                    client.sendall(frame(number, U64(answers[number]).pack(), VERSION | REPLY))
                elif number != m.SET_PROTOCOL_FEATURES.number:
                    client.sendall(rest or b"")
                    return

    with listening(path) as sock:
        thread = threading.Thread(target=serve, args=(sock,))
        thread.start()
        try:
            yield
        finally:
            thread.join(20)


# The table ---------------------------------------------------------------------------------------------------------------


def test_every_cause_has_its_own_status_and_is_made_by_a_test() -> None:
    statuses = [cause.status for cause in CAUSES]
    assert statuses == sorted(set(statuses))
    assert all(10 <= status < 64 for status in statuses)
    tests = "".join(file.read_text() for file in TESTS.rglob("test_explain*.py"))
    assert [cause.name for cause in CAUSES if f'"{cause.name}"' not in tests] == []


def test_cures_show_what_is_to_be_filled_in() -> None:
    cure = next(cause for cause in CAUSES if cause.name == "wrong-driver")
    assert cure.shown() == "vdpa-bridge mgmt bind NAME vhost_vdpa"
    assert cure.typed(name="net0") == "vdpa-bridge mgmt bind net0 vhost_vdpa"
    assert not any("{" in cause.shown() for cause in CAUSES)


# The way to a socket -----------------------------------------------------------------------------------------------------


def test_the_path_is_too_long() -> None:
    cause, found = explain(f"vhost-user:/{'d' * 60}/{'s' * 60}")
    assert (cause, found["type"]) == ("path-too-long", f"ln -s /{'d' * 60} /tmp/s; then vhost-user:/tmp/s/{'s' * 60}")


def test_nothing_or_something_else_is_there(path: Path) -> None:
    assert explain(f"vhost-user:{path}")[0] == "no-socket"
    assert explain(str(path))[0] == "no-socket"
    path.write_text("")
    assert explain(f"vhost-user:{path}")[0] == "not-a-socket"
    path.unlink()
    with listening(path, socket.SOCK_DGRAM):
        cause, found = explain(f"vhost-user:{path}")
        assert cause == "not-a-socket"
        assert "another type" in found["checks"][-1]["says"]


def test_nobody_listens_any_more(path: Path) -> None:
    with listening(path):
        pass
    cause, found = explain(f"vhost-user:{path}")
    assert cause == "socket-dead"
    assert f"rm {path}" in found["type"]
    result = bridge("show", f"vhost-user:{path}")
    assert result.stderr.endswith(f"; vdpa-bridge explain vhost-user:{path} says more\n")


def test_this_user_may_not_connect(path: Path) -> None:
    def refused(where: str) -> bool:
        cause, found = explain(f"vhost-user:{path}")
        return cause == "permission" and where in found["type"]

    with listening(path):
        path.parent.chmod(0o755)
        path.chmod(0o600)
        explain(f"vhost-user:{path}?timeout=0.2")  # imports what the child needs
        assert as_nobody(lambda: refused("--socket-mode 660")) == 0
        path.parent.chmod(0o700 if os.geteuid() == 0 else 0)
        try:
            assert as_nobody(lambda: refused("sudo chmod o+x")) == 0
        finally:
            path.parent.chmod(0o700)


# Who listens -------------------------------------------------------------------------------------------------------------


def test_somebody_listens_and_is_silent(path: Path) -> None:
    with listening(path):
        cause, found = explain(f"vhost-user:{path}?timeout=0.2")
    assert cause == "silent"
    assert f"(pid {os.getpid()})" in found["type"]


def test_somebody_else_is_served(path: Path) -> None:
    """Back-ends serve one client; the next one waits without a word."""
    client = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(flush=True); sys.stdin.read()"
    with serving("model:net", "--socket-path", str(path)) as server:
        server.ready()
        with subprocess.Popen([sys.executable, "-c", client, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            other.stdout.readline()
            cause, found = explain(f"vhost-user:{path}?timeout=0.3")
            other.kill()
        assert cause == "busy"
        assert f"(pid {other.pid})" in found["type"]
        assert explain(f"vhost-user:{path}")[0] is None


@pytest.mark.parametrize("rest", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_somebody_else_listens(path: Path, rest: bytes) -> None:
    with answering(path, {}, rest):
        assert explain(f"vhost-user:{path}")[0] == "not-a-backend"


def test_modes_that_do_not_meet(path: Path) -> None:
    with serving("model:net", "--socket-path", str(path), "--vdpa", "off") as server:
        server.ready()
        cause, found = explain(f"vhost-user:{path}?vdpa=require")
        assert cause == "no-vdpa-mode"
        assert "vdpa=prefer" in found["type"]
    with serving("model:net", "--socket-path", str(path), "--vdpa", "require") as server:
        server.ready()
        cause, found = explain(f"vhost-user:{path}?vdpa=off&type=net")
        assert cause == "not-a-backend"
        assert "drop vdpa=off" in found["type"]
        assert explain(f"vhost-user:{path}")[0] is None


def test_a_back_end_without_configuration_space_is_too_old_for_a_disk(path: Path) -> None:
    features = VHOST_USER_F_PROTOCOL_FEATURES | Feature.VERSION_1
    answers = {m.GET_FEATURES.number: int(features), m.GET_PROTOCOL_FEATURES.number: int(ProtocolFeature.MQ), m.GET_QUEUE_NUM.number: 1}
    with answering(path, answers):
        cause, found = explain(f"vhost-user:{path}?type=blk")
    assert cause == "too-old"
    assert "GET_CONFIG" in found["type"]


def test_a_back_end_that_dies_while_it_is_looked_at(path: Path) -> None:
    features = VHOST_USER_F_PROTOCOL_FEATURES | Feature.VERSION_1
    answers = {m.GET_FEATURES.number: int(features), m.GET_PROTOCOL_FEATURES.number: int(ProtocolFeature.MQ | ProtocolFeature.CONFIG)}
    with answering(path, answers):
        cause, found = explain(f"vhost-user:{path}?type=blk")
    assert cause == "broken"
    assert "--trace" in found["type"]


# The device --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["", "?vdpa=require", "?vdpa=off&type=blk"])
def test_a_good_back_end_is_good(path: Path, query: str) -> None:
    with serving("model:blk?size=1M", "--socket-path", str(path)) as server:
        server.ready()
        cause, found = explain(f"vhost-user:{path}{query}")
        assert (cause, {check["verdict"] for check in found["checks"]}) == (None, {"ok"})
        assert "a block device: 1 queue" in bridge("explain", f"vhost-user:{path}{query}").stdout
        entry = next(entry for entry in _list() if entry["name"] == str(path))
        assert (entry["kind"], entry["target"], entry["device"]) == ("socket", f"vhost-user:{path}", "")
        assert f"(pid {server.process.pid})" in entry["by"]
        probed = next(entry for entry in _list("--probe") if entry["name"] == str(path))
        assert (probed["device"], probed["state"]) == ("block", "0 clients; vhost-user, vDPA mode")
        _, found = explain(f"vhost-user:{path}?vdpa=off")
        assert found["status"] == 0
        assert next(check for check in found["checks"] if check["verdict"] == "unknown")["type"].startswith("add ?type=blk")


def test_names_of_others_cannot_command_shell_or_terminal(path: Path) -> None:
    odd = path.with_name("vhost\x1b[31m; true")
    with listening(odd):
        line = next(line for line in bridge("list").stdout.splitlines() if "; true" in line)
        assert "\x1b" not in line
        assert f"'vhost-user:{path.parent}/vhost?[31m; true'" in " ".join(line.split())
        assert any(entry["name"] == str(odd) for entry in _list())


def _list(*options: str) -> list[dict[str, str]]:
    import json

    result = bridge("list", "--json", *options)
    assert result.exit_code == 0, result.output
    found: list[dict[str, str]] = json.loads(result.stdout)
    return found


def test_features_and_addresses_that_it_has_not(path: Path) -> None:
    assert explain("model:net")[0] is None
    cause, found = explain("model:net", "--want", "CTRL_VQ", "--want", "RSS")
    assert cause == "feature-withheld"
    assert any(check["says"] == "RSS not offered" for check in found["checks"])
    assert bridge("explain", "model:net", "--want", "NONSENSE").exit_code == 2
    with serving("model:net", "--socket-path", str(path)) as server:
        server.ready()
        cause, found = explain(f"vhost-user:{path}?vdpa=off&type=net", "--memory", "8388608T")
        assert cause == "iova-range"
        assert "0x7fffffffffefffff" in found["type"]


def test_what_cannot_be_opened() -> None:
    cause, found = explain("model:blk?file=/nowhere/disk")
    assert cause == "cannot-open"
    assert "/nowhere/disk" in found["checks"][-1]["says"]
    assert "explain" not in bridge("show", "model:blk?file=/nowhere/disk").stderr


# The kernel, as far as this one can show it -------------------------------------------------------------------------------


class Refused(NodeExamination):
    """A node that is there, and whose opening fails."""

    def modules(self) -> str:
        return ""

    def exists(self) -> str:
        return ""

    def permission(self) -> str:
        return ""


@pytest.mark.parametrize(("number", "name"), [(ENOTSUPP, "no-iommu"), (errno.EIO, "not-answering"), (errno.EACCES, "permission"), (errno.EBUSY, "busy")])
def test_the_errors_of_opening_a_node(number: int, name: str) -> None:
    def refuse() -> Examination:
        raise OSError(number, "refused")

    with Refused(refuse, Wishes(), path="/dev/null") as examination:  # type: ignore[arg-type]
        first = examination.run().first
    assert first is not None
    assert first.cause is not None
    assert first.cause.name == name


def test_a_kernel_without_vdpa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This kernel's own answer depends on it; a directory of modules that lacks them is the same everywhere."""
    if modules.is_loaded("vduse"):
        pytest.skip("this kernel has vduse loaded")
    monkeypatch.setattr(modules, "MODULES", tmp_path)
    assert explain("/dev/vduse/x")[0] == "no-vduse"
    directory = tmp_path / os.uname().release
    directory.mkdir()
    (directory / "modules.builtin").write_text("kernel/drivers/vhost/vhost.ko\n")
    (directory / "modules.dep").write_text("kernel/drivers/net/tun.ko.xz: kernel/x.ko\n")
    cause, found = explain("/dev/vduse/x")
    assert cause == "module-unavailable"
    assert "CONFIG_VDPA_USER" in found["type"]
    (directory / "modules.dep").write_text("kernel/drivers/vdpa/vdpa_user/vduse.ko.xz: kernel/x.ko\n")
    assert explain("/dev/vduse/x")[0] == "no-vduse"
    (directory / "modules.builtin").write_text("kernel/drivers/vdpa/vdpa_user/vduse.ko\n")
    assert explain("/dev/vduse/x")[0] == "no-such-device"


def test_shells_complete_targets(path: Path) -> None:
    """What ``eval "$(_VDPA_BRIDGE_COMPLETE=bash_source vdpa-bridge)"`` installs asks in this way."""

    def completed(words: str, at: int) -> list[str]:
        environment = os.environ | {"_VDPA_BRIDGE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(at)}
        run = subprocess.run([sys.executable, "-m", "vdpa_bridge"], env=environment, capture_output=True, text=True, check=True, timeout=60)
        return [line.partition(",")[2] for line in run.stdout.splitlines()]

    assert completed("vdpa-bridge exp", 1) == ["explain"]
    assert completed("vdpa-bridge show mod", 2) == [f"model:{kind}" for kind in KINDS]
    with listening(path.with_name("vhost")):
        assert f"vhost-user:{path.with_name('vhost')}" in completed("vdpa-bridge show vhost-user", 2)
    source = subprocess.run(
        [sys.executable, "-m", "vdpa_bridge"], env=os.environ | {"_VDPA_BRIDGE_COMPLETE": "zsh_source"}, capture_output=True, text=True, check=True, timeout=60
    )
    assert re.match(r"#compdef vdpa-bridge", source.stdout)
