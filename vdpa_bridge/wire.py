# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Wire structs: one frozen class per C struct, its fields in C order.

Rule of this file: nothing here knows an operation or a transport. A payload can be written as the kernel wants it
(``pack``: file descriptors are numbers in the struct) and as a socket wants it (``to_message``: the struct says 0 for
"a descriptor comes beside me" or -1 for "none", and the descriptors travel as ancillary data).
Byte order is the machine's own, as in the kernel's ABI and in vhost-user.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Annotated, Any, ClassVar, NewType, Self, TypeVar, dataclass_transform, get_args, get_type_hints

u8 = Annotated[int, "B"]
u16 = Annotated[int, "H"]
u32 = Annotated[int, "I"]
u64 = Annotated[int, "Q"]
s32 = Annotated[int, "i"]
fd32 = Annotated[int, "i", "fd"]

Iova = NewType("Iova", int)
"""An address as the device sees it: what goes into descriptors and SET_VRING_ADDR."""
ProcessAddress = NewType("ProcessAddress", int)
"""An address in this process. Never sent to a device as is; only an IOTLB update relates the two."""
iova64 = Annotated[Iova, "Q"]

RO, WO, RW = 1, 2, 3
"""Access the *device* gets to a mapping (VHOST_ACCESS_RO, _WO, _RW of linux/vhost_types.h)."""


class Payload:
    """What an operation carries in one direction. Subclasses are immutable values."""

    @property
    def room(self) -> int:
        """Bytes that the reply needs behind the struct (only GET_CONFIG has any)."""
        return 0

    def pack(self) -> bytes:
        """The C struct, verbatim."""
        raise TypeError(f"{type(self).__name__} has no C struct of its own")

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Self:
        """The inverse of ``pack``; ValueError when the length is wrong."""
        raise TypeError(f"{cls.__name__} has no C struct of its own")

    def to_message(self) -> tuple[bytes, tuple[int, ...]]:
        """The struct as it goes through a socket, and the descriptors that go beside it."""
        return self.pack(), ()

    @classmethod
    def fds_wanted(cls, data: bytes | memoryview) -> int:
        """How many descriptors a socket message with this payload must bring."""
        return 0

    @classmethod
    def from_message(cls, data: bytes | memoryview, fds: list[int]) -> Self:
        """The inverse of ``to_message``. Takes no ownership: the request lends the descriptors."""
        return cls.unpack(data)


T = TypeVar("T", bound=Payload)


@dataclass_transform(frozen_default=True)
def immutable(cls: type[T]) -> type[T]:
    """A payload with the annotated fields.

    Type checkers see to it that it stays as it was made: looking at run time, as ``frozen`` does, would make each take three times as long.
    """
    return dataclass(unsafe_hash=True)(cls)


@dataclass_transform(frozen_default=True)
class Struct(Payload):
    """A payload of fixed layout: declaring annotated fields is declaring the struct."""

    layout: ClassVar[struct.Struct]
    fd_field: ClassVar[str | None] = None
    names: ClassVar[tuple[str, ...]] = ()
    _values: ClassVar[Callable[[Any], Any] | None]

    def __init_subclass__(cls, pad: int = 0) -> None:
        immutable(cls)
        hints = get_type_hints(cls, include_extras=True)
        codes = ""
        cls.names = tuple(f.name for f in fields(cls))  # type: ignore[arg-type]
        for name in cls.names:
            _, *notes = get_args(hints[name])
            codes += notes[0]
            if "fd" in notes:
                cls.fd_field = name
        cls.layout = struct.Struct("=" + codes + f"{pad}x" * bool(pad))
        cls._values = attrgetter(*cls.names) if cls.names else None

    def pack(self) -> bytes:
        kind = type(self)
        if len(kind.names) == 1:
            return kind.layout.pack(kind._values(self))  # type: ignore[misc]
        return kind.layout.pack(*kind._values(self)) if kind.names else b""  # type: ignore[misc]

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Self:
        if len(data) != cls.layout.size:
            raise ValueError(f"{cls.__name__} is {cls.layout.size} bytes long, not {len(data)}")
        return cls(*cls.layout.unpack(data))

    def to_message(self) -> tuple[bytes, tuple[int, ...]]:
        if self.fd_field is None:
            return self.pack(), ()
        fd = getattr(self, self.fd_field)
        if fd < 0:
            return replace(self, **{self.fd_field: -1}).pack(), ()  # type: ignore[type-var]
        return replace(self, **{self.fd_field: 0}).pack(), (fd,)  # type: ignore[type-var]

    @classmethod
    def fds_wanted(cls, data: bytes | memoryview) -> int:
        if cls.fd_field is None or len(data) != cls.layout.size:
            return 0
        return int(getattr(cls.unpack(data), cls.fd_field) == 0)

    @classmethod
    def from_message(cls, data: bytes | memoryview, fds: list[int]) -> Self:
        value = cls.unpack(data)
        if cls.fd_field is None:
            return value
        mark = getattr(value, cls.fd_field)
        if mark not in (0, -1):
            raise ValueError(f"{cls.__name__}.{cls.fd_field} is {mark}; on a socket it is 0 (a descriptor is attached) or -1 (none)")
        return replace(value, **{cls.fd_field: fds[0]}) if mark == 0 else value  # type: ignore[type-var]


class Empty(Struct):
    """No argument."""


EMPTY = Empty()


class U8(Struct):
    """``u8``"""

    value: u8


class U16(Struct):
    """``u16``"""

    value: u16


class U32(Struct):
    """``u32``"""

    value: u32


class U64(Struct):
    """``u64``"""

    value: u64


class VringState(Struct):
    """``struct vhost_vring_state``"""

    index: u32
    num: u32


class VringFile(Struct):
    """``struct vhost_vring_file``: an eventfd for a ring; fd -1 takes the old one away."""

    index: u32
    fd: fd32


class VringAddr(Struct):
    """``struct vhost_vring_addr``; note that *used* stands before *avail*. Addresses are IOVAs for vDPA."""

    index: u32
    flags: u32
    desc: iova64
    used: iova64
    avail: iova64
    log: u64


class EventFile(Struct):
    """``int``: an eventfd, -1 to take the old one away."""

    fd: fd32


class IovaRange(Struct):
    """``struct vhost_vdpa_iova_range``; both ends inclusive."""

    first: iova64
    last: iova64


class IotlbMsg(Struct, pad=38):
    """``struct vhost_msg_v2`` with its ``struct vhost_iotlb_msg``: 72 bytes, the last 38 of them padding."""

    type: u32
    asid: u32
    iova: iova64
    size: u64
    uaddr: u64
    perm: u8
    msgtype: u8


_CONFIG = struct.Struct("=II")


@immutable
class ConfigRange(Payload):
    """``struct vhost_vdpa_config`` as a question: which bytes of the configuration space."""

    offset: int
    length: int

    @property
    def room(self) -> int:
        return self.length

    def pack(self) -> bytes:
        return _CONFIG.pack(self.offset, self.length)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Self:
        if len(data) != _CONFIG.size:
            raise ValueError(f"vhost_vdpa_config header is {_CONFIG.size} bytes long, not {len(data)}")
        return cls(*_CONFIG.unpack(data))


@immutable
class ConfigData(Payload):
    """``struct vhost_vdpa_config`` with its bytes: u32 off, u32 len, then len bytes."""

    offset: int
    data: bytes

    def pack(self) -> bytes:
        return _CONFIG.pack(self.offset, len(self.data)) + self.data

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Self:
        if len(data) < _CONFIG.size:
            raise ValueError(f"vhost_vdpa_config is at least {_CONFIG.size} bytes long, not {len(data)}")
        offset, length = _CONFIG.unpack_from(data)
        if len(data) != _CONFIG.size + length:
            raise ValueError(f"vhost_vdpa_config says {length} bytes but {len(data) - _CONFIG.size} follow")
        return cls(offset, bytes(data[_CONFIG.size :]))


IOTLB_MSG_V2 = 2
"""``VHOST_IOTLB_MSG_V2``, the ``type`` of every message we write."""


class IotlbPayload(Payload):
    """A request that travels as a ``vhost_msg_v2``; ``msgtype`` tells which."""

    msgtype: ClassVar[int]
    asid: int

    def message(self, uaddr: int = 0) -> bytes:
        """The 72 bytes to write; *uaddr* is the mapping's address (kernel) or its offset in the fd (socket)."""
        raise NotImplementedError

    def to_message(self) -> tuple[bytes, tuple[int, ...]]:
        return self.message(), ()

    @classmethod
    def _parse(cls, data: bytes | memoryview) -> IotlbMsg:
        msg = IotlbMsg.unpack(data)
        if msg.type != IOTLB_MSG_V2:
            raise ValueError(f"vhost_msg_v2.type is {msg.type}, not {IOTLB_MSG_V2}")
        return msg


@immutable
class IotlbUpdate(IotlbPayload):
    """Let the device reach *size* bytes of the memory *fd* from *offset* on, at address *iova* with *perm* (RO, WO, RW).

    The descriptor is lent for the call. iova, size and offset are multiples of 4096.
    """

    iova: Iova
    size: int
    fd: int
    offset: int = 0
    perm: int = RW
    asid: int = 0
    msgtype: ClassVar[int] = 2

    def message(self, uaddr: int = 0) -> bytes:
        return IotlbMsg(IOTLB_MSG_V2, self.asid, self.iova, self.size, uaddr, self.perm, self.msgtype).pack()

    def to_message(self) -> tuple[bytes, tuple[int, ...]]:
        return self.message(self.offset), (self.fd,)

    @classmethod
    def fds_wanted(cls, data: bytes | memoryview) -> int:
        return 1

    @classmethod
    def from_message(cls, data: bytes | memoryview, fds: list[int]) -> Self:
        msg = cls._parse(data)
        return cls(msg.iova, msg.size, fds[0], msg.uaddr, msg.perm, msg.asid)


@immutable
class IotlbInvalidate(IotlbPayload):
    """Take away the mappings that lie in [iova, iova + size). A mapping goes as a whole or not at all."""

    iova: Iova
    size: int
    asid: int = 0
    msgtype: ClassVar[int] = 3

    def message(self, uaddr: int = 0) -> bytes:
        return IotlbMsg(IOTLB_MSG_V2, self.asid, self.iova, self.size, 0, 0, self.msgtype).pack()

    @classmethod
    def from_message(cls, data: bytes | memoryview, fds: list[int]) -> Self:
        msg = cls._parse(data)
        return cls(msg.iova, msg.size, msg.asid)


@immutable
class IotlbBatch(IotlbPayload):
    """Brackets updates and invalidations of one address space so that the device sees them together."""

    asid: int = 0

    def message(self, uaddr: int = 0) -> bytes:
        return IotlbMsg(IOTLB_MSG_V2, self.asid, Iova(0), 0, 0, 0, self.msgtype).pack()

    @classmethod
    def from_message(cls, data: bytes | memoryview, fds: list[int]) -> Self:
        return cls(cls._parse(data).asid)


@immutable
class IotlbBatchBegin(IotlbBatch):
    """``VHOST_IOTLB_BATCH_BEGIN``"""

    msgtype: ClassVar[int] = 5


@immutable
class IotlbBatchEnd(IotlbBatch):
    """``VHOST_IOTLB_BATCH_END``"""

    msgtype: ClassVar[int] = 6


def describe(payload: Any) -> str:
    """``index=0 num=256``: the fields of a payload for people and traces."""
    parts = []
    for f in fields(payload):
        value = getattr(payload, f.name)
        if isinstance(value, bytes):
            text = value[:32].hex(" ") + (" ..." if len(value) > 32 else "")
        elif isinstance(value, int) and (f.name in ("iova", "size", "desc", "used", "avail", "first", "last", "offset") or value > 0xFFFF):
            text = hex(value)
        else:
            text = str(value)
        parts.append(f"{f.name}={text}")
    return " ".join(parts)
