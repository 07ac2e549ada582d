# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""QEMU guests whose kernels drive the socket model: AF_VSOCK sockets there, UNIX sockets here, or another guest."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.guest import Guest
from tests.support.programs import program
from tests.support.seen import Seen
from vdpa_bridge import Target
from vdpa_bridge.vhost_user.server import Server

pytestmark = pytest.mark.peers

PATIENCE = 60.0
MIB = 1 << 20
MODULES = ["vmw_vsock_virtio_transport"]


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def device(path: Path) -> list[str]:
    return ["-chardev", f"socket,id=c0,path={path}", "-device", "vhost-user-vsock-pci,chardev=c0"]


def exchange(sock: socket.socket, data: bytes) -> bytes:
    """Send *data* and its end, while everything is read that comes."""
    sock.settimeout(PATIENCE)

    def send() -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    got = bytearray()
    while more := sock.recv(1 << 16):
        got += more
    sender.join(PATIENCE)
    assert not sender.is_alive()
    return bytes(got)


@contextmanager
def port(path: str, serve: Callable[[socket.socket], object]) -> Iterator[None]:
    """A port of the host's: each connection is served in a thread of its own."""
    threads: list[threading.Thread] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(256)  # more than come at a time: who finds no room is reset, as on any host

        def one(sock: socket.socket) -> None:
            with sock:
                sock.settimeout(PATIENCE)
                serve(sock)

        def run() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                threads.append(threading.Thread(target=one, args=(sock,)))
                threads[-1].start()

        threads.append(threading.Thread(target=run))
        threads[0].start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)


def echo(sock: socket.socket) -> None:
    while data := sock.recv(1 << 16):
        sock.sendall(data)


def test_streams(short_dir: Path, vsock_program: bytes, seen: Seen) -> None:
    """16 MiB each way at once, 200 connections at a time, a port at which nobody listens, and connections from the host."""
    script = """
        head -c 16777216 /dev/urandom > /data; echo out $(md5sum < /data)
        /vsock 2 7 < /data > /back && echo in $(md5sum < /back)
        /vsock hold 2 8 200
        /vsock 2 9 < /dev/null 2>&1 || echo REFUSED
        /vsock listen 99 20 && echo SERVED
    """
    data, came = random.Random(1).randbytes(16 * MIB), []
    path, uds = short_dir / "s", short_dir / "v"
    target = Target.parse(f"model:vsock?cid=42&uds={uds}")
    with (
        port(f"{uds}_7", lambda sock: came.append(exchange(sock, data))),
        port(f"{uds}_8", echo),
        Server(target.open, str(path)),
        Guest(script, modules=MODULES, files={"vsock": vsock_program}, qemu_args=device(path)) as guest,
    ):
        guest.wait_output("LISTENING", timeout=90)
        for turn in range(20):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(uds))
                client.sendall(b"CONNECT 99\n")
                assert client.recv(3) == b"OK "
                while client.recv(1) != b"\n":
                    pass
                part = data[turn * 1000 : turn * 1000 + (4 * MIB if turn == 10 else 5000)]
                assert exchange(client, part) == part
        result = guest.wait(timeout=60)
    target.close()
    assert result.status == 0, result.output + result.errors + result.log
    assert f"out {md5(came[0])}" in result.output
    assert f"in {md5(data)}" in result.output
    assert "200 connections at a time" in result.output
    assert "connect: Connection reset by peer\nREFUSED" in result.output
    assert result.output.endswith("SERVED\n")
    seen("clients", "QEMU", "vsock", "model", "split")


def test_reboot(short_dir: Path, vsock_program: bytes, seen: Seen) -> None:
    """The guest resets itself in the middle of a connection: its end reaches the host, and the guest connects anew."""
    script = """
        if [ "$(/vsock 2 7 < /dev/null)" = first ]; then
            (echo open; sleep 30) | /vsock 2 8 &
            sleep 1; echo 1 > /proc/sys/kernel/sysrq; echo b > /proc/sysrq-trigger; sleep 30
        fi
        echo SECOND
    """
    turns, ended = iter((b"first", b"second")), []
    path, uds = short_dir / "s", short_dir / "v"
    target = Target.parse(f"model:vsock?uds={uds}")
    with (
        port(f"{uds}_7", lambda sock: sock.sendall(next(turns))),
        port(f"{uds}_8", lambda sock: ended.append((sock.recv(64), sock.recv(64)))),
        Server(target.open, str(path)) as server,
        Guest(script, modules=MODULES, files={"vsock": vsock_program}, qemu_args=[*device(path), "-action", "reboot=reset"]) as guest,
    ):
        result = guest.wait(timeout=90)
    assert server.served == 1, "one connection lasts over the reboot"
    target.close()
    assert result.status == 0, result.output + result.errors + result.log
    assert result.output == "SECOND\n"
    assert ended == [(b"open\n", b"")]
    seen("clients", "QEMU", "vsock", "model", "reboot")


def test_two_guests(short_dir: Path, vsock_program: bytes) -> None:
    """A program by the back-end conventions for each; one guest connects to the other by its context id."""
    send = """
        head -c 4194304 /dev/urandom > /data
        /vsock 4 50 < /data > /back && cmp /data /back && echo SAME
    """
    with (
        program("vsock", "--socket-path", f"{short_dir}/4", "--guest-cid", "4", "--uds-path", f"{short_dir}/v4", "-v") as other,
        program("vsock", "--socket-path", f"{short_dir}/3", "--uds-path", f"{short_dir}/v3", "--peers", f"4:{short_dir}/v4", "-v") as one,
    ):
        other.logs("ready")
        one.logs("ready")
        with Guest("/vsock listen 50 1", modules=MODULES, files={"vsock": vsock_program}, qemu_args=device(short_dir / "4")) as server:
            server.wait_output("LISTENING", timeout=90)
            with Guest(send, modules=MODULES, files={"vsock": vsock_program}, qemu_args=device(short_dir / "3")) as client:
                result = client.wait(timeout=90)
            assert result.status == 0, result.output + result.errors + result.log
            assert server.wait(timeout=30).status == 0
        one.end()
        other.end()
    assert result.output == "SAME\n"
