# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The sockets of a service: made exactly where and how they were asked for, or passed by a service manager."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.homes import socket_path
from tests.support.service import PATIENCE, Serve, disk, launched, listening, refused, serial, serving, works
from vdpa_bridge.service.listening import Listener


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory whose path leaves room for names of sockets."""
    with socket_path() as path:
        yield Path(path).parent


# Sockets -----------------------------------------------------------------------------------------------------------------


def test_a_live_socket_is_refused_and_its_holder_named(folder: Path) -> None:
    path = folder / "s"
    with serving("model:blk", "--socket-path", str(path)) as server:
        server.ready()
        before = path.stat().st_ino
        log = refused("model:blk", "--socket-path", str(path))
        assert re.search(rf"cannot listen on {path}: Address already in use: process {server.process.pid} \(.+\) listens there", log)
        assert path.stat().st_ino == before
        works(path)
        server.process.kill()
        server.process.wait(PATIENCE)
        assert path.exists()
        with serving("model:blk", "--socket-path", str(path)) as second:  # what is stale by now is replaced
            second.ready()
            works(path)
            second.end()


def test_a_holder_whose_queue_is_full_is_found_too(folder: Path) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waits:
        busy.bind(str(path))
        busy.listen(0)
        waits.connect(str(path))
        assert f"process {os.getpid()} " in refused("model:blk", "--socket-path", str(path))


def test_what_is_no_socket_stays(folder: Path) -> None:
    path = folder / "s"
    path.write_text("precious")
    assert "no socket" in refused("model:blk", "--socket-path", str(path))
    assert path.read_text() == "precious"


def test_a_socket_file_of_somebody_else_is_not_removed(folder: Path) -> None:
    path = folder / "s"
    with serving("model:blk", "--socket-path", str(path)) as server:
        server.ready()
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            server.end()
            assert path.exists()


def test_of_servers_that_start_at_once_on_a_stale_socket_one_wins(folder: Path) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    servers = [Serve("model:blk", "--socket-path", str(path)) for _ in range(4)]
    try:
        lines = [server.out.readline() for server in servers]
        assert sorted(map(bool, lines)) == [False, False, False, True]
        works(path)
        winner = servers[[bool(line) for line in lines].index(True)]
        losers = [server for server in servers if server is not winner]
        assert [server.wait() for server in losers] == [1] * 3
        assert all("Address already in use" in server.log for server in losers)
        winner.end()
    finally:
        for server in servers:
            server.close()


def test_others_of_our_kind_wait_while_one_looks_at_a_socket(folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with serving("model:blk", "--socket-path", f"{folder}/s") as server:
            time.sleep(1)
            assert not (folder / "s").exists()
            fcntl.flock(lock, fcntl.LOCK_UN)
            server.ready()
            server.end()
    finally:
        os.close(lock)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a socket to a group of others: run as root")
def test_mode_and_group_are_as_asked_for(folder: Path) -> None:
    path = folder / "s"
    with serving("model:blk", "--socket-path", str(path), "--socket-mode", "662", "--socket-group", "12345") as server:
        server.ready()
        assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_gid) == (0o662, 12345)
        server.end()


def test_nobody_can_connect_before_the_mode_is_right(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, chmod, seen = str(folder / "s"), os.chmod, []

    def looks_first(where: str, mode: int) -> None:
        seen.append(stat.S_IMODE(os.stat(path).st_mode))
        with socket.socket(socket.AF_UNIX) as early, pytest.raises((ConnectionRefusedError, PermissionError)):
            early.connect(path)
        chmod(where, mode)

    monkeypatch.setattr(os, "chmod", looks_first)
    mask = os.umask(0)
    try:
        listener = Listener.bind(path, 0o640, os.getgid())
        assert os.umask(0) == 0
    finally:
        os.umask(mask)
    assert seen == [0]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o640
    listener.close()
    assert not os.path.exists(path)


# The service manager -----------------------------------------------------------------------------------------------------

def test_passed_sockets_find_their_devices_by_name_and_by_path(folder: Path) -> None:
    config = folder / "c.toml"
    tables = [f'[[device]]\ntarget = "model:blk?serial={n}"\n' for n in "abc"]
    config.write_text(f'{tables[0]}name = "a"\n{tables[1]}name = "b"\nsocket-path = "{folder}/B"\n{tables[2]}socket-path = "{folder}/own"\n')
    paths = folder / "B", folder / "A"
    with listening(*paths) as sockets, launched(sockets, "vdpa.socket:a", "--config", str(config)) as server:
        lines = server.ready(3)
        assert [serial(path) for path in (folder / "A", folder / "B", folder / "own")] == ["a", "b", "c"]
        assert "on fd 4" in lines[0]
        server.end()
        assert sorted(path.name for path in folder.iterdir()) == ["A", "B", "c.toml"], "what was passed is the manager's to remove"


def test_a_single_passed_socket_needs_no_name(folder: Path) -> None:
    with listening(folder / "s") as sockets, launched(sockets, "any.socket", "model:blk?serial=x") as server:
        server.ready()
        assert serial(folder / "s") == "x"
        server.end()


def test_passed_sockets_must_make_sense(folder: Path) -> None:
    words = f"{folder}/x.sock=model:blk", f"{folder}/y.sock=model:blk"
    for names, says in (("z", "is of no device; there is: x, y"), ("x:y", "LISTEN_FDNAMES=x:y has 2 names")):
        with listening(folder / "s") as sockets, launched(sockets, names, *words) as server:
            assert server.wait() == 2
            assert says in server.log
        (folder / "s").unlink()
    with listening(folder / "s", folder / "t") as sockets, launched(sockets, "x:x", *words) as server:
        assert server.wait() == 2
        assert "two passed sockets" in server.log
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wrong, launched([wrong], "x", *words) as server:
        assert server.wait() == 2
        assert "no Unix stream socket that listens or is connected" in server.log
    with listening(folder / "v") as (sock,):  # meant for another process
        assert "has no socket" in refused("model:blk", status=2, fds=[sock.fileno()], LISTEN_PID="1", LISTEN_FDS="1")


@pytest.mark.parametrize("abstract", [False, True])
def test_the_manager_hears_what_happens(folder: Path, abstract: bool) -> None:
    name = f"@vdpa-bridge-test-{os.getpid()}" if abstract else f"{folder}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        manager.settimeout(PATIENCE)

        def hears(wanted: str) -> str:
            while wanted not in (heard := manager.recv(4096).decode()):
                pass
            return heard

        with serving(f"{folder}/a=model:blk", f"{folder}/b=model:blk", NOTIFY_SOCKET=name) as server:
            assert hears("READY=1") == "READY=1\nSTATUS=2 devices, 0 clients"
            with disk(folder / "a"):
                assert hears("1 client") == "STATUS=2 devices, 1 client"
            hears("0 clients")
            server.process.send_signal(signal.SIGHUP)
            assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", hears("RELOADING"))
            hears("READY=1")
            server.process.terminate()
            hears("STOPPING=1")
            assert server.wait() == 0
