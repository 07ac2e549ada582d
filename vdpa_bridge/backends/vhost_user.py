# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A device behind a vhost-user socket that speaks vDPA mode: operations go through verbatim (docs/vhost-user-vdpa.md).

``call_many`` sends everything before it reads the first reply, so that a bring-up is a few round trips.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from .. import ops
from ..errors import LocalProtocolError, NotOffered, RemoteProtocolError, device_error
from ..flags import VHOST_USER_F_PROTOCOL_FEATURES, ProtocolFeature
from ..ops import Call, Op, Rep, Req
from ..vhost_user import messages
from ..vhost_user.connection import Connection
from ..vhost_user.framing import HEADER, MAX_FDS, frame
from ..vhost_user.vdpa_mode import BUNDLE_BYTES, HELLO_OP, LEAST_HELLO, OUR_HELLO, RELAYED, Hello, check_hello, parse_reply, request_bytes
from ..wire import EMPTY, U64, Payload
from .base import ABSENT, NATIVE, Backend, Capability
from .hints import hint, lacking
from .vhost_user_legacy import VhostUserLegacy

_REPLY_BUDGET = 65536
"""Bytes of replies that may be under way: less than a socket buffer, so that neither side blocks the other."""
_BESIDE_HELLO = replace(LEAST_HELLO, max_requests=LEAST_HELLO.max_requests - 1)
"""Limits until the peer's HELLO is read: one request is under way, HELLO."""


def open_vhost_user(
    path: str,
    name: str = "",
    device_id: int | None = None,
    vdpa: str = "prefer",
    timeout: float = 5.0,
    queue_size: int = 256,
    config_size: int | None = None,
) -> Backend:
    """Connect and settle the mode: vDPA where the peer offers it, else legacy unless *vdpa* is ``require``.

    *device_id*, *queue_size* and *config_size* (None: the usual one of the type) are what a legacy peer cannot tell; *timeout* in seconds holds for each answer.
    """
    name = name or f"vhost-user:{path}"
    connection = Connection.open(path, name, timeout)
    try:
        features = U64.unpack(connection.ask(messages.GET_FEATURES.number)).value
        offered = 0
        if features & VHOST_USER_F_PROTOCOL_FEATURES:
            offered = U64.unpack(connection.ask(messages.GET_PROTOCOL_FEATURES.number)).value
        if vdpa != "off" and offered & ProtocolFeature.VDPA:
            return VhostUserVdpa(connection)
        if vdpa == "require":
            raise NotOffered(f"{name}: the peer does not offer VHOST_USER_PROTOCOL_F_VDPA (protocol features {offered:#x})")
        return VhostUserLegacy(connection, features, offered, device_id, queue_size, config_size)
    except ValueError as error:
        connection.close()
        raise RemoteProtocolError(f"{name}: {error}") from None
    except BaseException:
        connection.close()
        raise


class VhostUserVdpa(Backend):
    """One session in vDPA mode. Takes over the connection, which has asked for features and protocol features only."""

    traits: tuple[str, ...] = ("vhost-user",)

    def __init__(self, connection: Connection) -> None:
        self.name = connection.name
        self._connection = connection
        ack = frame(messages.SET_PROTOCOL_FEATURES.number, U64(ProtocolFeature.VDPA).pack())
        connection.send(ack + frame(HELLO_OP.number, OUR_HELLO.pack()), what="HELLO")
        self._peer: Hello | None = None
        self._limits = _BESIDE_HELLO
        self._missing: set[Op[Any, Any]] = set()

    def _greeted(self) -> Hello:
        """The peer's HELLO: read when it is needed, so that the first questions go out beside ours."""
        if self._peer is None:
            error, hello = parse_reply(HELLO_OP, self._connection.message("HELLO"))
            if hello is None:
                raise RemoteProtocolError(f"{self.name}: the peer refuses HELLO with errno {error}")
            check_hello(hello)
            self._peer = self._limits = hello
        return self._peer

    def _answer(self, op: Op[Req, Rep]) -> tuple[int, Rep | None]:
        if self._peer is None:
            self._greeted()
        return parse_reply(op, self._connection.message(op.name))

    def call(self, op: Op[Req, Rep], request: Req) -> Rep:
        """One round trip."""
        connection = self._connection
        data, fds = self._request(op, request) if request is not EMPTY else request_bytes(op, request)
        if not connection.send(data, fds, op.name):
            raise self._refused(op, errno.EBADF)
        if self._peer is None:
            self._greeted()
        error, reply = parse_reply(op, connection.message(op.name))
        if reply is None:
            raise self._refused(op, error)
        return reply

    def _request(self, op: Op[Any, Any], request: Payload) -> tuple[bytes, tuple[int, ...]]:
        """The message, within the peer's limit."""
        data, fds = request_bytes(op, request)
        size = len(data) - HEADER.size
        if size > self._limits.max_payload and size > self._greeted().max_payload:
            raise LocalProtocolError(f"{op.name} on {self.name}: {size} bytes, the peer takes {self._limits.max_payload}")
        return data, fds

    def _refused(self, op: Op[Any, Any], number: int) -> OSError:
        if lacking(op, number):
            self._missing.add(op)
        return device_error(number, op.name, self.name, hint(op, number))

    def call_many(self, calls: Sequence[Call]) -> list[Any]:
        """All requests first, then all replies, as far as the peer's limits allow."""
        results: list[Any] = []
        for part in self._portions(calls):
            unsent: set[int] = set()
            what = f"{part[0][0].name} and {len(part) - 1} more requests"
            messages = [self._request(op, request) for op, request in part]  # a wrong one must not leave half a burst
            for bundle in _bundles(messages):
                data = b"".join([messages[at][0] for at in bundle])
                fds = [fd for at in bundle for fd in messages[at][1]]
                if not self._connection.send(data, fds, what):  # one of the descriptors is not open: find out which
                    unsent |= {at for at in bundle if not self._connection.send(*messages[at], what)}
            for at, (op, _) in enumerate(part):
                error, reply = (errno.EBADF, None) if at in unsent else self._answer(op)
                results.append(self._refused(op, error) if reply is None else reply)
        return results

    def _portions(self, calls: Sequence[Call]) -> Iterator[Sequence[Call]]:
        """Cut *calls* so that neither the peer's request limit nor our receive buffer is exceeded."""
        start = budget = 0
        for at, (_, request) in enumerate(calls):
            need = 64 + request.room
            if at > start and (at - start >= self._limits.max_requests or budget + need > _REPLY_BUDGET):
                yield calls[start:at]
                start, budget = at, 0
            budget += need
        if start < len(calls):
            yield calls[start:]

    def capability(self, op: Op[Any, Any]) -> Capability:
        """Native, unless the device said no, or does not offer the back-end feature: every operation has its message."""
        if op in self._missing:
            return Capability(ABSENT, "the device behind the socket does not have it")
        if op.gate is not None and not self.call(ops.GET_BACKEND_FEATURES, EMPTY).value & op.gate:
            return Capability(ABSENT, f"back-end feature {op.gate.name} not offered")
        return Capability(NATIVE)

    @property
    def relayed(self) -> str:
        """What the peer says of itself."""
        return "by the server: requests pass through its process" if self._greeted().flags & RELAYED else ""

    def facts(self) -> dict[str, object]:
        """Mode and limits."""
        hello = self._greeted()
        facts: dict[str, object] = {"transport": "vhost-user, vDPA mode", "revision": hello.revision, "max payload": hello.max_payload}
        return {**facts, "relay": self.relayed} if self.relayed else facts

    def close(self) -> None:
        """Hang up; the peer resets the device then."""
        self._connection.close()


def _bundles(messages: Sequence[tuple[bytes, Sequence[int]]]) -> Iterator[range]:
    """Which messages go out by one system call: as many as its bytes and descriptors allow."""
    start = size = count = 0
    for at, (data, fds) in enumerate(messages):
        if at > start and (size + len(data) > BUNDLE_BYTES or count + len(fds) > MAX_FDS):
            yield range(start, at)
            start, size, count = at, 0, 0
        size += len(data)
        count += len(fds)
    if start < len(messages):
        yield range(start, len(messages))
