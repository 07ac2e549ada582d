# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Stock vhost-user back-ends as processes: started, waited for, ended; what they said is in the error when they fail."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vdpa_bridge.backends.vhost_user_legacy import VhostUserLegacy
from vdpa_bridge.device import Device
from vdpa_bridge.vhost_user.framing import VERSION, frame

from .sockets import listens

VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
GPU = "/usr/lib/qemu/vhost-user-gpu"


@contextmanager
def backend(command: Sequence[str], path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """*command*, which makes the socket *path*; ended with the block."""
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=path.parent) as process:

        def said() -> str:
            log.seek(0)
            return log.read().decode(errors="replace")[-3000:]

        try:
            end = time.monotonic() + 20
            while not listens(path):
                assert process.poll() is None, f"{command[0]} ended:\n{said()}"
                assert time.monotonic() < end, f"{command[0]} makes no socket:\n{said()}"
                time.sleep(0.02)
            try:
                yield process
            except BaseException as error:
                error.add_note(said())
                raise
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def net_vhost(path: Path, queues: int = 1, mode: str = "io", options: str = "") -> list[str]:
    """DPDK's vhost library behind a forwarding loop: what comes in on a queue pair goes out on it."""
    return [
        *("dpdk-testpmd", "--lcores", f"0@0,1@{min(1, (os.cpu_count() or 1) - 1)}", "--no-huge", "-m", "256", "--no-pci", "--no-telemetry", "--no-shconf"),
        *("--vdev", f"net_vhost0,iface={path},queues={queues}{options}", "--", "--nb-cores=1", f"--forward-mode={mode}", "--no-flush-rx"),
        *("--auto-start", f"--rxq={queues}", f"--txq={queues}", "--total-num-mbufs=4096", "--stats-period=1"),
    ]


_HEADER = struct.Struct("<III")
_REPLY = 4
_FEATURES, _DISPLAY_INFO = 1, 3
_GPU_SET_SOCKET = 33


@contextmanager
def display(device: Device, width: int, height: int) -> Iterator[None]:
    """A display of that size for a vhost-user-gpu, given to it by GPU_SET_SOCKET: it asks it what GET_DISPLAY_INFO answers."""
    assert isinstance(device.backend, VhostUserLegacy)
    ours, theirs = socket.socketpair()

    def serve() -> None:
        while header := ours.recv(_HEADER.size, socket.MSG_WAITALL):
            request, _, size = _HEADER.unpack(header)
            ours.recv(size, socket.MSG_WAITALL)
            if request == _FEATURES:
                ours.sendall(_HEADER.pack(request, _REPLY, 8) + bytes(8))
            elif request == _DISPLAY_INFO:
                answer = struct.pack("<IIQII", 0x1101, 0, 0, 0, 0) + struct.pack("<6I", 0, 0, width, height, 1, 0) + bytes(15 * 24)
                ours.sendall(_HEADER.pack(request, _REPLY, len(answer)) + answer)

    thread = threading.Thread(target=serve, name="display")
    thread.start()
    try:
        with theirs:
            device.backend._connection.send(frame(_GPU_SET_SOCKET, b"", VERSION), (theirs.fileno(),), "GPU_SET_SOCKET")
        yield
    finally:
        ours.shutdown(socket.SHUT_RDWR)
        thread.join()
        ours.close()
