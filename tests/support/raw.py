# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A vhost-user client made of bytes, to say what no front-end would."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Self

from vdpa_bridge import ops
from vdpa_bridge.flags import ProtocolFeature
from vdpa_bridge.vhost_user import messages as m
from vdpa_bridge.vhost_user.framing import HEADER, frame
from vdpa_bridge.vhost_user.vdpa_mode import HELLO_OP, OUR_HELLO, request_bytes
from vdpa_bridge.wire import U64, Payload

Reply = tuple[int, int, bytes]
"""Request, flags, payload."""
ENTER = frame(m.SET_PROTOCOL_FEATURES.number, U64(ProtocolFeature.VDPA).pack())
HELLO = frame(HELLO_OP.number, OUR_HELLO.pack())


class Raw:
    """A connection on which anything can be sent; every wait ends after *timeout* seconds."""

    def __init__(self, path: str, timeout: float = 5.0) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(path)  # blocking: with a timeout a full backlog is an error instead of a wait
        self.sock.settimeout(timeout)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """*data*, with *fds* beside its first byte."""
        if fds:
            sent = socket.send_fds(self.sock, [data], list(fds))
            data = data[sent:]
        if data:
            self.sock.sendall(data)

    def _exactly(self, size: int) -> bytes | None:
        data = b""
        while len(data) < size:
            try:
                more = self.sock.recv(size - len(data))
            except ConnectionResetError:
                more = b""
            if not more:
                return None
            data += more
        return data

    def reply(self) -> Reply | None:
        """The next message from the server; None when it hangs up instead."""
        head = self._exactly(HEADER.size)
        if head is None:
            return None
        request, flags, size = HEADER.unpack(head)
        payload = self._exactly(size)
        assert payload is not None, "the server hung up within a reply"
        return request, flags, payload

    def hung_up(self) -> bool:
        """Whether the server closes without another word."""
        return self.reply() is None

    def enter(self) -> Self:
        """Into vDPA mode."""
        self.send(ENTER + HELLO)
        answer = self.reply()
        assert answer is not None
        assert answer[0] == HELLO_OP.number
        return self

    def ask(self, op: ops.Op[Payload, Payload], request: Payload) -> int:
        """The errno that an operation is answered by."""
        data, fds = request_bytes(op, request)
        self.send(data, fds)
        return self.errno()

    def errno(self) -> int:
        """The errno of the next reply, in vDPA mode."""
        answer = self.reply()
        assert answer is not None, "the server hung up"
        assert answer[1] == 0x5
        assert answer[2][4:8] == bytes(4)
        return int.from_bytes(answer[2][:4], "little")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()
