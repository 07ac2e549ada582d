# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""vhost-user framing without I/O: bytes and descriptors in, whole messages out.

Rule of this file: it trusts nothing about the peer. A stream socket delivers descriptors with the data that carried
them, but may glue messages together before and cut them anywhere behind; so descriptors queue up and every message
claims as many as its own content announces. What nobody claims, or what is missing, breaks the protocol.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import RemoteProtocolError

HEADER = struct.Struct("=III")
"""u32 request, u32 flags, u32 size (vhost-user spec, "Message specification")."""

VERSION, VERSION_MASK = 0x1, 0x3
REPLY = 0x4
NEED_REPLY = 0x8
REPLY_FLAGS = VERSION | REPLY
"""What a reply carries, exactly: QEMU compares the whole word."""

MAX_FDS = 32
"""Descriptors that one message can bring; the largest real number is 8 (SET_MEM_TABLE)."""


@dataclass(slots=True)
class Frame:
    """One message. Owns its descriptors until ``take_fds``."""

    request: int
    flags: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    @property
    def need_reply(self) -> bool:
        """The sender wants an acknowledgement (REPLY_ACK)."""
        return bool(self.flags & NEED_REPLY)

    def take_fds(self) -> list[int]:
        """Hand the descriptors over to the caller."""
        fds, self.fds = self.fds, []
        return fds

    def close(self) -> None:
        """Close descriptors that nobody took."""
        close_all(self.take_fds())


def close_all(fds: list[int]) -> None:
    """Close every descriptor."""
    for fd in fds:
        os.close(fd)


def frame(request: int, payload: bytes = b"", flags: int = VERSION) -> bytes:
    """The bytes of one message."""
    return HEADER.pack(request, flags, len(payload)) + payload


class Receiver:
    """Collects bytes and descriptors and gives out frames.

    *fds_wanted* tells, from request and payload, the least and the most descriptors that a message brings.
    """

    def __init__(self, fds_wanted: Callable[[int, bytes], tuple[int, int]], max_payload: int, describe: Callable[[int], str]) -> None:
        self._wanted = fds_wanted
        self._max_payload = max_payload
        self._describe = describe
        self._buffer = b""
        self._at = 0
        self._cut = False
        self._fds: list[int] = []

    @property
    def partial(self) -> bool:
        """True in the middle of a message."""
        return len(self._buffer) > self._at

    def feed(self, data: bytes | memoryview, fds: list[int], *, cut: bool = False) -> None:
        """Take what one recvmsg delivered; the descriptors are ours now. *cut*: it filled its buffer, more is there."""
        self._buffer = bytes(data) if self._at == len(self._buffer) else self._buffer[self._at :] + data
        self._at = 0
        self._cut = cut
        if fds:
            self._fds.extend(fds)
            if len(self._fds) > MAX_FDS:
                raise RemoteProtocolError(f"{len(self._fds)} descriptors for one message, at most {MAX_FDS} are allowed")

    def next(self) -> Frame | None:
        """The next whole message, or None."""
        buffer, at = self._buffer, self._at
        have = len(buffer) - at
        if have < HEADER.size:
            return None
        request, flags, size = HEADER.unpack_from(buffer, at)
        if flags & VERSION_MASK != VERSION:
            raise RemoteProtocolError(f"{self._describe(request)}: flags {flags:#x} carry version {flags & VERSION_MASK}, not {VERSION}", request)
        if size > self._max_payload:
            raise RemoteProtocolError(
                f"{self._describe(request)}: payload of {size} bytes, at most {self._max_payload} are allowed", request
            )
        if have < HEADER.size + size:
            return None
        self._at = end = at + HEADER.size + size
        payload = buffer[end - size : end]
        result = Frame(request, flags, payload, [])
        least, most = self._wanted(request, payload)
        if most or self._fds:
            self._claim(result, least, most)
        return result

    def _claim(self, result: Frame, least: int, most: int) -> None:
        if len(self._fds) < least:
            raise RemoteProtocolError(f"{self._describe(result.request)}: {least} descriptors announced, {len(self._fds)} came", result.request)
        last = self._at == len(self._buffer)
        take = most if last else least  # an optional descriptor is this message's only when no other message follows
        result.fds = self._fds[:take]
        del self._fds[:take]
        if last and self._fds and not self._cut:
            count = len(self._fds)
            result.close()
            raise RemoteProtocolError(f"{self._describe(result.request)}: {count} more descriptors than the message announces", result.request)

    def close(self) -> None:
        """Close descriptors of messages that never became whole."""
        fds, self._fds = self._fds, []
        close_all(fds)
        self._buffer = b""
        self._at = 0
