# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Clients of the monitor: QEMU's own library, waited for, and a socket for what no library says.

Rule of this file: every wait ends; what did not come in time fails the test.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qemu.qmp import QMPClient

from tests.support.service import Serve, serving

PATIENCE = 20.0


class Qmp:
    """``qemu.qmp``'s client, one call at a time. A context manager."""

    def __init__(self, path: Path | str) -> None:
        self._loop = asyncio.new_event_loop()
        self.client = QMPClient("test")
        try:
            self._do(self.client.connect(str(path)))
        except BaseException:
            self._loop.close()
            raise

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(work, PATIENCE))

    def ask(self, command: str, **arguments: object) -> Any:
        """What it returns; ``qemu.qmp.ExecuteError`` when it fails."""
        return self._do(self.client.execute(command, arguments))

    def event(self, name: str = "") -> dict[str, Any]:
        """The next event, or the next that is called so."""
        while True:
            event = dict(self._do(self.client.events.get()))
            if not name or event["event"] == name:
                return event

    def close(self) -> None:
        async def end() -> None:
            try:
                await self.client.disconnect()
            except Exception:  # the service may be gone
                pass

        try:
            self._do(end())
        finally:
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Raw:
    """A socket to the monitor. A context manager."""

    def __init__(self, path: Path | str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path))
        self.sock.settimeout(PATIENCE)
        self._file = self.sock.makefile("rb")

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def hear(self) -> dict[str, Any] | None:
        """One message, None at the end."""
        line = self._file.readline()
        return json.loads(line) if line else None

    def ask(self, message: Mapping[str, object] | bytes) -> dict[str, Any] | None:
        """The next message after this one."""
        self.send(message if isinstance(message, bytes) else json.dumps(message).encode())
        return self.hear()

    def begin(self) -> None:
        """Greeting and negotiation."""
        greeting = self.hear()
        assert greeting is not None
        assert greeting["QMP"]["capabilities"] == []
        assert self.ask({"execute": "qmp_capabilities"}) == {"return": {}}

    def close(self) -> None:
        self._file.close()
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@contextmanager
def service(folder: Path, *more: str) -> Iterator[Serve]:
    """A disk in a file and a network interface, with a monitor."""
    (folder / "image").write_bytes(bytes(1 << 20))
    with serving(f"{folder}/disk=model:blk?file={folder}/image", f"{folder}/net=model:net", "--qmp", f"{folder}/qmp", "-v", *more) as server:
        server.ready(2)
        yield server
