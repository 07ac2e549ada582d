# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A service without a descriptor for the clients that come: none of its sockets keeps it busy, and all are served once there is one."""

from __future__ import annotations

import json
import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.homes import connector
from tests.support.service import serving
from vdpa_bridge.device import Device
from vdpa_bridge.drivers import ConsoleDriver, NetDriver, VsockDriver

FRAME = bytes(range(14)).ljust(60, b".")
WATCHED = 1.0
"""Seconds that the service is watched for."""


@contextmanager
def exhausted(process: int) -> Iterator[None]:
    """That process can open nothing: from the first number that is free on, none may be used."""
    before = resource.prlimit(process, resource.RLIMIT_NOFILE)
    taken = {int(name) for name in os.listdir(f"/proc/{process}/fd")}
    resource.prlimit(process, resource.RLIMIT_NOFILE, (min(set(range(len(taken) + 1)) - taken), before[1]))
    try:
        yield
    finally:
        resource.prlimit(process, resource.RLIMIT_NOFILE, before)


def cpu(process: int) -> float:
    """Seconds that it has computed."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def test_no_socket_of_a_service_spins_without_descriptors(short_dir: Path) -> None:
    """A client's socket, a monitor, a model's commands, a console, a socket device and a network, all at once."""

    def at(name: str) -> Path:
        return short_dir / name

    models = {
        "gpio": f"model:gpio?control={at('lines')}",
        "console": f"model:console?ports=listen:path={at('port')}",
        "vsock": f"model:vsock?uds={at('streams')}",
        "net": f"model:net?stream={at('wire')}&server=on",
    }
    with serving(*[f"{at(kind)}={target}" for kind, target in models.items()], "--qmp", str(at("qmp"))) as server, ExitStack() as stack:
        server.ready(len(models))

        def device(kind: str) -> Device:
            return stack.enter_context(Device(connector(str(at(kind)), kind, "require")()))

        console = stack.enter_context(ConsoleDriver(device("console")))
        streams = stack.enter_context(VsockDriver(device("vsock")))
        nic = stack.enter_context(NetDriver(device("net")))
        clients = {name: stack.enter_context(socket.socket(socket.AF_UNIX)) for name in ("lines", "port", "streams", "wire", "qmp", "gpio")}
        with exhausted(server.process.pid):
            for name, client in clients.items():
                client.settimeout(5)
                client.connect(str(at(name)))
            time.sleep(0.1)
            before = cpu(server.process.pid)
            time.sleep(WATCHED)
            assert cpu(server.process.pid) - before < 0.1 * WATCHED
            logged = server.log
        assert 1 <= logged.count("a client has to wait") <= len(clients), logged

        clients["lines"].sendall(b"get 0\n")
        assert clients["lines"].recv(64) == b"ok 0\n"
        console.write(b"hello")
        assert clients["port"].recv(64) == b"hello"
        streams.listen(5)
        clients["streams"].sendall(b"CONNECT 5\n")
        with streams.accept(5):
            assert clients["streams"].recv(64).startswith(b"OK ")
        clients["wire"].sendall(len(FRAME).to_bytes(4, "big") + FRAME)
        assert nic.receive(5) == FRAME
        assert "QMP" in json.loads(clients["qmp"].recv(4096))
        clients["gpio"].close()
        assert server.process.poll() is None
        server.end()
