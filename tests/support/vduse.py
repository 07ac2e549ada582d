# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A disk that another process serves to the kernel: qemu-storage-daemon behind VDUSE, and a name for it on the vdpa bus.

Rule of this file: whatever it makes in the kernel goes again, also when the daemon died first.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

BUS = Path("/sys/bus/vdpa/devices")
_numbers = itertools.count()


def missing() -> str:
    """Why there is none here, and how to get it; empty where there is."""
    if os.geteuid() or not Path("/dev/vduse/control").exists() or not shutil.which("vdpa"):
        return "no /dev/vduse/control, or no right to it: run it in the lab, tools/lab pytest -m lab"
    return "" if shutil.which("qemu-storage-daemon") else "no qemu-storage-daemon: tools/setup peers installs it"


def _until(condition: Callable[[], bool], what: str, timeout: float = 20.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"no {what} within {timeout:g} s"
        time.sleep(0.02)


class VduseDisk:
    """*size* bytes in a file, exported as a VDUSE device, which is on the vdpa bus and bound to vhost_vdpa."""

    def __init__(self, size: int, serial: str = "vduse") -> None:
        self.name = f"vb{os.getpid() % 100000}d{next(_numbers)}"
        self._directory = tempfile.TemporaryDirectory(prefix="vb")
        self._serial = serial
        self.image = Path(self._directory.name, "disk")
        with self.image.open("wb") as file:
            file.truncate(size)
        self._log = Path(self._directory.name, "log").open("w+")  # noqa: SIM115 - closed with the disk
        self.process: subprocess.Popen[bytes] | None = None
        try:
            self.serve()
            self._vdpa("add", "name", self.name, "mgmtdev", "vduse")
            _until(lambda: self.node is not None, f"node of {self.name}")
        except BaseException:
            self.close()
            raise

    def serve(self) -> None:
        """Start the daemon."""
        export = f"type=vduse-blk,id=e,name={self.name},node-name=d,writable=on,num-queues=1,queue-size=256,serial={self._serial}"
        command = ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=d,filename={self.image},discard=unmap", "--export", export]
        environment = {**os.environ, "TMPDIR": self._directory.name}  # the daemon maps a file there
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, env=environment)
        process = self.process
        device = Path("/dev/vduse", self.name)
        _until(lambda: device.exists() or process.poll() is not None, f"{device}")
        assert process.poll() is None, f"qemu-storage-daemon ended: {self.said()}"

    def said(self) -> str:
        """What the daemon printed."""
        return Path(self._log.name).read_text()

    def _vdpa(self, *words: str) -> None:
        done = subprocess.run(["vdpa", "dev", *words], capture_output=True, text=True, timeout=60, check=False)
        assert not done.returncode, f"vdpa dev {' '.join(words)}: {done.stderr} {self.said()}"

    @property
    def target(self) -> str:
        """For the command line."""
        return f"vdpa:{self.name}"

    @property
    def node(self) -> str | None:
        """The character device, once it is there."""
        names = [entry.name for entry in BUS.joinpath(self.name).glob("vhost-vdpa-*")]
        return f"/dev/{names[0]}" if names and Path("/dev", names[0]).exists() else None

    def patience(self, seconds: int) -> None:
        """How long the kernel waits for the daemon (30 s unless said otherwise)."""
        Path("/sys/class/vduse", self.name, "msg_timeout").write_text(str(seconds))

    def kill(self) -> None:
        """The daemon dies as it stands."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Daemon, device and file go."""
        if BUS.joinpath(self.name).exists():
            self._vdpa("del", self.name)
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
