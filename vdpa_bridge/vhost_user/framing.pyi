# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""vhost-user framing: what `framing.pyx` is to Python."""

import struct
from collections.abc import Callable
from typing import final

HEADER: struct.Struct
"""u32 request, u32 flags, u32 size (vhost-user spec, "Message specification")."""

VERSION: int
VERSION_MASK: int
REPLY: int
NEED_REPLY: int
REPLY_FLAGS: int
"""What a reply carries, exactly: QEMU compares the whole word."""

MAX_FDS: int
"""Descriptors that one message can bring; the largest real number is 8 (SET_MEM_TABLE)."""

def close_all(fds: list[int]) -> None:
    """Close every descriptor."""

def frame(request: int, payload: bytes = b"", flags: int = ...) -> bytes:
    """The bytes of one message; *flags* are VERSION by default. OverflowError when a number has more than 32 bits."""

@final
class Frame:
    """One message. Owns its descriptors until ``take_fds``."""

    @property
    def request(self) -> int: ...
    @property
    def flags(self) -> int: ...
    @property
    def payload(self) -> bytes: ...
    @property
    def fds(self) -> list[int]: ...
    def __init__(self, request: int, flags: int, payload: bytes, fds: list[int] | None = None) -> None: ...
    @property
    def need_reply(self) -> bool:
        """The sender wants an acknowledgement (REPLY_ACK)."""

    def take_fds(self) -> list[int]:
        """Hand the descriptors over to the caller."""

    def close(self) -> None:
        """Close descriptors that nobody took."""

@final
class Receiver:
    """Collects bytes and descriptors and gives out frames.

    *fds_wanted* tells, from request and payload, the least and the most descriptors that a message brings; *describe* names a
    request in errors.
    """

    def __init__(self, fds_wanted: Callable[[int, bytes], tuple[int, int]], max_payload: int, describe: Callable[[int], str]) -> None: ...
    @property
    def partial(self) -> bool:
        """True in the middle of a message."""

    def feed(self, data: bytes | memoryview, fds: list[int], *, cut: bool = False) -> None:
        """Take what one recvmsg delivered; the descriptors are ours now. *cut*: it filled its buffer, more is there.

        RemoteProtocolError when more than MAX_FDS are under way.
        """

    def next(self) -> Frame | None:
        """The next whole message, or None. RemoteProtocolError that names the rule it breaks."""

    def close(self) -> None:
        """Close descriptors of messages that never became whole."""
