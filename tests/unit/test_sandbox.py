# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Nothing gets out of the sandbox: a model tries, in a real one, as root and as another user, and each layer alone holds what it can."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import select
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bare import MODES, STEP, Bare
from tests.support.escapes import ATTEMPTS, MAY_BE_ABSENT, OF_ROOT
from tests.support.homes import socket_path
from tests.support.programs import program
from tests.support.sandbox import NOBODY, Prisoner, none_for_others, prisoner
from tests.support.service import listening, refused, serving, works
from vdpa_bridge.drivers import GenericDriver
from vdpa_bridge.errors import DeviceBroken, ProtocolError
from vdpa_bridge.sandbox import landlock

ROOT = os.getuid() == 0
USERS = [pytest.param(0, id="root" if ROOT else "user"), *([] if none_for_others() else [pytest.param(NOBODY, id="nobody")])]
LAST = "become_program"
"""After it, there is nobody to ask."""
REFUSALS = {errno.EPERM, errno.EACCES, errno.ENOSYS}


@pytest.fixture(scope="module", params=USERS)
def user(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def closed(user: int) -> Iterator[tuple[Prisoner, GenericDriver]]:
    with prisoner("on", user=user) as inner:
        inner.server.ready()
        with inner.driver() as driver:
            yield inner, driver


@pytest.fixture(scope="module")
def free(user: int) -> Iterator[tuple[Prisoner, GenericDriver]]:
    with prisoner("off", user=user) as outer:
        outer.server.ready()
        with outer.driver() as driver:
            yield outer, driver


@pytest.mark.parametrize("name", [name for name in ATTEMPTS if name != LAST])
def test_no_way_out(name: str, user: int, closed: tuple[Prisoner, GenericDriver], free: tuple[Prisoner, GenericDriver]) -> None:
    """What succeeds without a sandbox is refused within, and the device goes on."""
    number, text = closed[0].attempt(closed[1], name)
    assert number in REFUSALS, text or "it got out"
    able = (user or os.getuid()) == 0 or name not in OF_ROOT
    if able:
        number, text = free[0].attempt(free[1], name)
        assert number == 0 or name in MAY_BE_ABSENT, text


def test_no_other_program(user: int) -> None:
    with prisoner("on", user=user) as inner, prisoner("off", user=user) as outer:
        inner.server.ready()
        outer.server.ready()
        with inner.driver() as driver:
            assert inner.attempt(driver, LAST)[0] == errno.EPERM
        with pytest.raises(ProtocolError), outer.driver() as driver:
            outer.attempt(driver, LAST)
        assert outer.server.wait() == 0, "it has become another program, which ended well"
        inner.server.end()


def test_what_the_kernel_says_of_it(user: int, closed: tuple[Prisoner, GenericDriver]) -> None:
    status = dict(line.split(":\t") for line in Path(f"/proc/{closed[0].inside}/status").read_text().splitlines() if ":\t" in line)
    assert (status["NoNewPrivs"], status["Seccomp"], status["NSpid"].split()[1:]) == ("1", "2", ["1"])
    assert [status[f"Cap{name}"].strip("0") for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")] == [""] * 5
    limits = Path(f"/proc/{closed[0].inside}/limits").read_text()
    assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
    if user:
        assert re.search(r"^Max processes +84 +84 ", limits, re.MULTILINE)


# One layer alone ---------------------------------------------------------------------------------------------------------


_FILES = {"read_file", "list_directory", "write_file", "make_file", "make_link", "remove_file", "reopen_for_writing", "memory_of_another", "environment_of_another", "run_program"}
_PROCESSES = {"trace", "read_memory"}
HELD = {
    "seccomp": set(ATTEMPTS) - {LAST},
    "Landlock": _FILES | _PROCESSES,
    "namespaces": (_FILES - {"reopen_for_writing"}) | _PROCESSES
    | {"tcp_connect", "udp_send", "abstract_socket", "unix_socket", "signal", "signal_parent", "pidfd", "limits_of_another", "signal_by_descriptor", "signal_by_ioctl"},
}
"""What each layer refuses without the others."""
BY_ABI = {4: {"tcp_connect", "tcp_listen"}, 6: {"abstract_socket", "signal", "signal_parent"}}
"""What newer versions of Landlock refuse, too."""


@pytest.mark.parametrize("layer", HELD)
def test_a_layer_holds_without_the_others(layer: str, user: int) -> None:
    """And the log names those that are not there."""
    others = [each for each in HELD if each != layer]
    refused = set(HELD[layer])
    if layer == "Landlock":
        refused = refused.union(*(names for since, names in BY_ABI.items() if landlock.abi() >= since))
    with prisoner("degrade", lacking=others, user=user) as inner:
        inner.server.ready()
        for each in others:
            inner.server.logs(f"WARNING degraded: no {each}: ")
        with inner.driver() as driver:
            out = [name for name in sorted(refused) if inner.attempt(driver, name)[0] == 0]
        assert out == []
        inner.server.end()
        assert f"no {layer}: " not in inner.server.log


@pytest.mark.parametrize("layer", HELD)
def test_a_kernel_without_a_layer_is_refused(layer: str, user: int) -> None:
    """With what is lacking, and what to type; nobody is left, nor a socket."""
    with prisoner("on", lacking=[layer], user=user) as inner:
        assert inner.server.wait() == 1
        assert re.fullmatch(rf"error: the sandbox cannot be closed: no {layer}: .*; or --sandbox=degrade, to go on without\n", inner.server.log), inner.server.log
        assert inner.server.out.read() == ""
        assert not inner.path.exists()


# What a model needs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lacking", [[], ["namespaces"], ["Landlock"]], ids=lambda names: "-".join(["without", *names]))
def test_needs_open_what_they_name_and_no_more(lacking: list[str], user: int, tmp_path: Path) -> None:
    with socket_path() as place:
        folder = Path(place).parent
        for name in ("read", "write", "other", "sockets"):
            (folder / name).mkdir()
            (folder / name / "file").write_text("x")
        if user:
            for path in [folder, *folder.rglob("*")]:
                os.chown(path, user, user)
        needs = {"read": f"{folder}/read", "write": f"{folder}/write", "connect": f"{folder}/sockets"}
        with prisoner("degrade" if lacking else "on", lacking=lacking, user=user, **needs) as inner, listening(folder / "sockets/s"):
            os.chmod(folder / "sockets/s", 0o777)
            inner.server.ready()
            with inner.driver() as driver:

                def attempt(name: str, **facts: str) -> int:
                    inner.facts |= facts
                    return inner.attempt(driver, name)[0]

                assert attempt("read_file", secret=f"{folder}/read/file", folder=f"{folder}/read", socket=f"{folder}/sockets/s") == 0
                assert attempt("list_directory") == attempt("unix_socket") == 0
                assert attempt("write_file") in {errno.EACCES, errno.EROFS}
                assert attempt("make_file") in {errno.EPERM, errno.EACCES, errno.EROFS}
                assert attempt("read_file", secret=f"{folder}/write/file", folder=f"{folder}/write") == 0
                assert [attempt(name) for name in ("write_file", "make_file", "make_link", "remove_file")] == [0] * 4
                assert attempt("read_file", secret=f"{folder}/other/file", folder=f"{folder}/other") in {errno.EACCES, errno.ENOENT}
                assert attempt("make_file") in {errno.EACCES, errno.ENOENT}
                assert [attempt(name) for name in ("tcp_connect", "netlink", "run_program", "io_uring", "fork", "signal")] == [errno.EPERM] * 6
            inner.server.end()


def test_a_need_that_is_not_there() -> None:
    """It is named, before there is a socket or a second process."""
    with prisoner("on", read="/no/such/place") as inner:
        assert inner.server.wait() == 1
        assert inner.server.log == "error: /no/such/place: No such file or directory\n"
        assert not inner.path.exists()


def test_needs_of_the_network_and_of_io_uring(user: int) -> None:
    with prisoner("on", user=user, network="on", io_uring="on") as inner:
        inner.server.ready()
        with inner.driver() as driver:
            assert [inner.attempt(driver, name)[0] for name in ("tcp_connect", "tcp_listen", "udp_send")] == [0] * 3
            assert inner.attempt(driver, "io_uring")[0] in {0, errno.ENOSYS}
            refused = ("abstract_socket", "unix_socket", "packet_socket", "read_file", "signal")
            assert [inner.attempt(driver, name)[0] for name in refused] == [errno.EPERM] * 5
        inner.server.end()


# Misbehaviour ------------------------------------------------------------------------------------------------------------


def test_a_crash_ends_the_process_and_is_told() -> None:
    with prisoner("on") as inner:
        inner.server.ready()
        with pytest.raises(ProtocolError), inner.driver() as driver:
            inner.attempt(driver, "crash")
        assert inner.server.wait() == 128 + signal.SIGSEGV
        assert "Fatal Python error: Segmentation fault" in inner.server.log
        assert "escapes.py" in inner.server.log, "and where it was"
        assert re.search("CRITICAL died: .* died of SIGSEGV", inner.server.log)
        assert not inner.path.exists()


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 alone has the calls of another architecture")
def test_a_call_of_another_architecture_ends_the_process() -> None:
    """Its number would be judged by another meaning."""
    with prisoner("off") as outer:
        outer.server.ready()
        with outer.driver() as driver:
            assert outer.attempt(driver, "foreign_call")[0] == 0, "needs CONFIG_IA32_EMULATION"
        outer.server.end()
    with prisoner("on") as inner:
        inner.server.ready()
        with pytest.raises(ProtocolError), inner.driver() as driver:
            inner.attempt(driver, "foreign_call")
        assert inner.server.wait() == 128 + signal.SIGSYS
        assert "died of SIGSYS" in inner.server.log


@pytest.mark.parametrize(("name", "status"), [("loop", 1), ("loop_with_lock", 128 + signal.SIGKILL)])
def test_a_loop_is_ended(name: str, status: int) -> None:
    with prisoner("on") as inner:
        inner.server.ready()
        with contextlib.suppress(TimeoutError, ProtocolError, OSError), inner.driver(0.5) as driver:
            inner.attempt(driver, name, 0.5)
        start = time.monotonic()
        inner.server.process.terminate()
        while inner.path.exists():
            assert time.monotonic() < start + 4, "the socket goes at once"
        assert inner.server.wait() == status, inner.server.log
        assert time.monotonic() < start + 15


@pytest.mark.parametrize(("name", "number"), [("eat_memory", -1), ("eat_threads", -1), ("eat_descriptors", errno.EMFILE)])
def test_who_eats_too_much_goes_hungry(name: str, number: int, user: int) -> None:
    """The model hears of it, and the device goes on."""
    with prisoner("on", user=user) as inner:
        inner.server.ready()
        with inner.driver() as driver:
            before = resident(inner.inside)
            assert inner.attempt(driver, name)[0] == number
            assert resident(inner.inside) < before + (300 << 20)
            assert inner.attempt(driver, "ids")[0] == errno.EPERM
            if name == "eat_memory":
                assert inner.attempt(driver, "read_file")[0] == errno.EPERM
        start = time.monotonic()
        inner.server.process.terminate()
        assert inner.server.wait() == (name == "eat_threads"), "nothing is given back in order without a thread"
        assert time.monotonic() < start + 5


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_log_that_nobody_reads_stalls_nobody() -> None:
    with prisoner("on", deaf=True) as inner:
        inner.server.ready()
        with inner.driver() as driver:
            assert inner.attempt(driver, "fill_log")[0] == 0
            assert inner.attempt(driver, "ids")[0] == errno.EPERM
        start = time.monotonic()
        inner.server.process.terminate()
        assert inner.server.process.wait(20) == 0
        assert time.monotonic() < start + 5
        inner.server.listen()


def test_an_error_of_the_model_breaks_the_device_alone() -> None:
    with prisoner("on") as inner:
        inner.server.ready()
        with pytest.raises(DeviceBroken), inner.driver() as driver:
            inner.attempt(driver, "fail")
        inner.server.logs("KeyError: 'the model is wrong'")
        with inner.driver() as driver:
            assert inner.attempt(driver, "ids")[0] == errno.EPERM
        inner.server.end()


# The two processes -------------------------------------------------------------------------------------------------------


def test_the_sandbox_dies_with_the_process_outside() -> None:
    with prisoner("on") as inner:
        inner.server.ready()
        inside = os.pidfd_open(inner.inside)
        try:
            inner.server.process.kill()
            assert select.select([inside], [], [], 5)[0]
        finally:
            os.close(inside)


def test_descriptors_that_a_launcher_left_open_stay_outside(tmp_path: Path) -> None:
    with (tmp_path / "precious").open("w") as file, prisoner("on", fds=[file.fileno()]) as inner:
        inner.server.ready()
        outside = Path(f"/proc/{inner.server.process.pid}/fd/{file.fileno()}")
        assert outside.readlink() == tmp_path / "precious"
        assert not Path(f"/proc/{inner.inside}/fd/{file.fileno()}").is_symlink()
        inner.server.end()


def test_the_service_manager_hears_of_it_and_clients_are_known(user: int) -> None:
    """By way of the process outside: numbers are those of the system."""
    with socket_path() as place, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(place)
        os.chmod(place, 0o777)
        os.chmod(Path(place).parent, 0o755)
        manager.settimeout(20)
        with prisoner("on", "-v", user=user, NOTIFY_SOCKET=place) as inner:
            inner.server.ready()
            assert manager.recv(4096) == b"READY=1\nSTATUS=1 device, 0 clients"
            with inner.driver() as driver:
                inner.attempt(driver, "ids")
                assert manager.recv(4096) == b"STATUS=1 device, 1 client"
                inner.server.logs(f"connect pid={os.getpid()} uid={os.getuid()}")
                inner.server.process.send_signal(signal.SIGUSR1)
                inner.server.logs(f"serves process {os.getpid()} of user {os.getuid()}")
            inner.server.end()
            heard = [manager.recv(4096) for _ in range(2)]
            assert b"STOPPING=1\nSTATUS=stopping" in heard


@pytest.mark.parametrize("mode", MODES)
def test_memory_that_goes_away_is_survived_there_too(mode: str) -> None:
    """SIGBUS is answered by a mapping in its place, which the allow-list has to leave."""
    with socket_path() as path, program("blk", "--socket-path", path, "--size", "1M", "-v") as server:
        server.logs("ready")
        with Bare(path, mode) as client:
            client.bring_up().fill(kind=8)
            client.offer(STEP)
            client.wait_done(STEP)
            os.ftruncate(client.memory, 0)
            client.offer(2 * STEP)
            assert client.needs_reset()
        works(Path(path))
        server.end()


def test_nothing_but_words_goes_out_by_the_link() -> None:
    """The service manager hears no more than it may, and descriptors that are sent do not pile up."""
    with socket_path() as place, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(place)
        manager.settimeout(20)
        with prisoner("on", NOTIFY_SOCKET=place) as inner:
            inner.server.ready()
            with inner.driver() as driver:
                assert [manager.recv(4096) for _ in range(2)][1] == b"STATUS=1 device, 1 client"
                descriptors = Path(f"/proc/{inner.server.process.pid}/fd")
                before = len(list(descriptors.iterdir()))
                assert inner.attempt(driver, "abuse_link") == (0, "")
                assert manager.recv(4096) == b"STATUS=still here"
                assert manager.recv(4096) == "STATUS=\ufffd".encode()
                assert len(list(descriptors.iterdir())) == before
            inner.server.end()


def test_what_it_would_leave_open_can_be_seen() -> None:
    with prisoner("show", network="on") as inner:
        shown = json.loads(inner.server.out.read())
        assert inner.server.wait() == 0
    assert (shown["needs"]["network"], shown["network"], shown["lacking_here"]) == (True, "that of the system", [])
    assert {"read", "socket"} <= set(shown["system_calls"])
    assert not {"execve", "ptrace", "open", "openat", "fork"} & set(shown["system_calls"])


def test_a_model_with_a_thread_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "early.py"
    model.write_text(
        "import threading, time\nfrom vdpa_bridge.models import Model\n"
        "class Early(Model):\n    device_id = 4\n    queue_count = 1\n    def process(self, queues, index):\n        pass\n"
        "    def __init__(self):\n        threading.Thread(target=time.sleep, args=(60,), name='too early', daemon=True).start()\n"
    )
    with socket_path() as path:
        log = refused(f"model:{model}", "--socket-path", path, "--sandbox=on", status=2)
        assert log.startswith("error: threads run before the sandbox is closed (too early): ")
        assert not Path(path).exists()


def test_only_models_can_be_closed_in() -> None:
    with socket_path() as path:
        for words, says in (
            (["vhost-user:/nowhere", "--sandbox=on"], "--sandbox is for models"),
            (["model:net", "--sandbox=on", "--keep-going"], "--keep-going opens files later"),
        ):
            assert says in refused(*words, "--socket-path", path, status=2)
            assert not Path(path).exists()


def test_sockets_of_models_go_with_the_others() -> None:
    with socket_path() as path, serving("model:gpio?control=" + path + "c", "--socket-path", path, "--sandbox=on") as server:
        server.ready()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path + "c")
            server.end()
        assert not Path(path).exists()
        assert not Path(path + "c").exists()


def test_a_disk_that_grows_is_looked_at_again(tmp_path: Path) -> None:
    """By the descriptor that was opened before."""
    file = tmp_path / "disk"
    file.write_bytes(bytes(1 << 20))
    with socket_path() as path, program("blk", "--socket-path", path, "--blk-file", str(file), "-v") as server:
        server.logs("ready")
        os.truncate(file, 2 << 20)
        server.process.send_signal(signal.SIGHUP)
        server.logs("resize: 2048 sectors before, 4096 now")
        works(Path(path))
        server.end()
