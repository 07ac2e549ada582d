# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""vhost-user in vDPA mode without I/O: operations to messages and back (docs/vhost-user-vdpa.md).

Rule of this file: nothing per operation. The request number is the ioctl's number, the payload is the ioctl's argument
struct, and every request has one reply: u32 errno, u32 zero, then the struct that the ioctl would have returned.
"""

from __future__ import annotations

import struct
from typing import Any

from .. import _ioctl, ops
from ..errors import RemoteProtocolError
from ..ops import Absent, Op, Rep
from ..wire import EMPTY, Empty, Payload, Struct, u32, u64
from .framing import HEADER, REPLY_FLAGS, VERSION, Frame
from .messages import legacy_fds, message_name

MAGIC = int.from_bytes(b"vhostVDP", "little")
REVISION = 1
MAX_PAYLOAD = 4096 + 64
"""Largest payload either side accepts: a configuration space of 4 KiB and its header."""
MAX_REQUESTS = 256
"""Requests that a front-end may have under way before it reads the first reply."""

BUNDLE_BYTES = 16384
"""Bytes of messages that may go out by one sendmsg with descriptors (docs/vhost-user-vdpa.md, "Descriptors")."""

_ERRNO = struct.Struct("=II")
_BEHIND = HEADER.size + _ERRNO.size


class Hello(Struct):
    """First message of vDPA mode, both ways: who speaks, and what it can take."""

    magic: u64
    revision: u32
    max_payload: u32
    max_requests: u32
    flags: u32


RELAYED = 1
"""A bit of ``flags``, from the back-end: requests pass through its process."""
HELLO_OP: Op[Hello, Hello] = Op("Open vDPA mode", _ioctl.iowr(0xF0, Hello.layout), Hello, Hello, Absent("vDPA mode only"), name="HELLO")
"""Not in the table of operations: it is the protocol's, not the device's."""
OUR_HELLO = Hello(MAGIC, REVISION, MAX_PAYLOAD, MAX_REQUESTS, 0)
LEAST_HELLO = Hello(MAGIC, REVISION, 512, 16, 0)
"""What every peer takes at least; requests within it may follow HELLO before its answer is read."""


def check_hello(hello: Hello) -> None:
    """Raise what is wrong with the peer's HELLO."""
    if hello.magic != MAGIC:
        raise RemoteProtocolError(f"HELLO: magic {hello.magic:#x} is not {MAGIC:#x}: the peer uses protocol feature bit 56 for something else")
    if hello.revision != REVISION:
        raise RemoteProtocolError(f"HELLO: revision {hello.revision}, this side speaks {REVISION}")
    if hello.max_payload < LEAST_HELLO.max_payload or hello.max_requests < LEAST_HELLO.max_requests:
        raise RemoteProtocolError(f"HELLO: limits of {hello.max_payload} bytes and {hello.max_requests} requests are too small to work with")


def fds_wanted(number: int, payload: bytes) -> tuple[int, int]:
    """Least and most descriptors of any message, of either mode."""
    if number < 0x100:
        return legacy_fds(number, payload)
    op = ops.by_message(number, payload)
    if op is None or op.request is Empty:
        return 0, 0
    count = op.request.fds_wanted(payload)
    return count, count


_BARE = {op: HEADER.pack(op.number, VERSION, 0) for op in ops.TABLE}
"""The whole request of an operation without argument."""


def request_bytes(op: Op[Any, Any], request: Payload) -> tuple[bytes, tuple[int, ...]]:
    """The message that asks for *op*, and the descriptors to send with its first byte."""
    if request is EMPTY:
        return _BARE[op], ()
    payload, fds = request.to_message()
    return HEADER.pack(op.number, VERSION, len(payload)) + payload, fds


def parse_request(frame: Frame) -> tuple[Op[Any, Any], Payload]:
    """The operation of a message; LookupError when there is none, ValueError when its payload is wrong."""
    op = ops.by_message(frame.request, frame.payload)
    if op is None:
        raise LookupError(f"{message_name(frame.request)} is no operation")
    if op.request is Empty:
        if frame.payload:
            raise ValueError(f"{op.name} takes no payload, {len(frame.payload)} bytes came")
        return op, EMPTY
    return op, op.request.from_message(frame.payload, frame.fds)


def answer_bytes(op: Op[Any, Rep], reply: Rep) -> bytes:
    """The reply to a request that was carried out."""
    begin = _SUCCESS.get(op)
    if begin is None:
        return reply_bytes(op.number, 0, reply)
    return begin if reply is EMPTY else begin + reply.pack()


def reply_bytes(number: int, error: int, reply: Payload = EMPTY) -> bytes:
    """The reply to a request: an errno, or 0 and the struct."""
    payload = b"" if error or reply is EMPTY else reply.pack()
    return HEADER.pack(number, REPLY_FLAGS, 8 + len(payload)) + _ERRNO.pack(error, 0) + payload


def _success(op: Op[Any, Any]) -> bytes:
    """How the reply to a successful request begins, for operations whose reply has one size."""
    size = op.reply.layout.size if issubclass(op.reply, Struct) else 0
    return HEADER.pack(op.number, REPLY_FLAGS, _ERRNO.size + size) + _ERRNO.pack(0, 0)


_SUCCESS = {op: _success(op) for op in ops.TABLE if issubclass(op.reply, Struct)}


def parse_reply(op: Op[Any, Rep], message: bytes) -> tuple[int, Rep | None]:
    """(errno, None) or (0, the reply) of a whole message; RemoteProtocolError when it is no answer to *op*."""
    expected = _SUCCESS.get(op)
    if expected is not None and message.startswith(expected):
        return 0, EMPTY if op.reply is Empty else op.reply.unpack(message[_BEHIND:])  # type: ignore[return-value]
    number, flags, _ = HEADER.unpack_from(message)
    payload = message[HEADER.size :]
    if number != op.number or flags != REPLY_FLAGS:
        raise RemoteProtocolError(
            f"{op.name}: answered by {message_name(number)} with flags {flags:#x}, expected {op.number:#x} with {REPLY_FLAGS:#x}"
        )
    if len(payload) < _ERRNO.size:
        raise RemoteProtocolError(f"{op.name}: reply of {len(payload)} bytes, errno and zero are {_ERRNO.size}")
    error, zero = _ERRNO.unpack_from(payload)
    if zero:
        raise RemoteProtocolError(f"{op.name}: the word behind errno is {zero:#x}, not 0")
    if error:
        if error > 4095 or len(payload) != _ERRNO.size:
            raise RemoteProtocolError(f"{op.name}: error reply with errno {error} and {len(payload)} bytes")
        return error, None
    try:
        return 0, op.reply.unpack(payload[_ERRNO.size :])
    except ValueError as wrong:
        raise RemoteProtocolError(f"{op.name}: {wrong}") from None
