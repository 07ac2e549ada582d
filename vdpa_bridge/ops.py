# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The table: every vDPA operation, once.

Rule of this file: one operation is one row, and no other file mentions an operation's number. From the rows follow the
ioctls, the messages of vhost-user's vDPA mode (same numbers), server dispatch, the command line, traces, the matrix in
the docs, and what the tests must cover. The numbers are those of linux/vhost.h; tests/test_uapi.py proves it.

A row says what the operation does, its number, its request and reply, how a *legacy* vhost-user peer can be brought to
do it (a Message, or Emulated in the front-end, or Absent and why), the kernel that brought it, and the back-end
feature it needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from . import _ioctl
from .flags import BackendFeature as B
from .flags import ProtocolFeature as P
from .wire import (
    _CONFIG,
    EMPTY,
    U8,
    U16,
    U32,
    U64,
    ConfigData,
    ConfigRange,
    Empty,
    EventFile,
    IotlbBatchBegin,
    IotlbBatchEnd,
    IotlbInvalidate,
    IotlbMsg,
    IotlbPayload,
    IotlbUpdate,
    IovaRange,
    Payload,
    VringAddr,
    VringFile,
    VringState,
)

Req = TypeVar("Req", bound=Payload)
Rep = TypeVar("Rep", bound=Payload)


@dataclass(frozen=True)
class Message:
    """A legacy vhost-user message does it; *needs* is the protocol feature that the peer must offer for it."""

    number: int
    needs: P | None = None
    note: str = ""


@dataclass(frozen=True)
class Emulated:
    """No message; the front-end answers from what it knows. *how* says what that is worth."""

    how: str


@dataclass(frozen=True)
class Absent:
    """A legacy peer cannot be brought to do it: EOPNOTSUPP with *why*."""

    why: str


Legacy = Message | Emulated | Absent


@dataclass(frozen=True, eq=False)
class Op(Generic[Req, Rep]):
    """One operation. Compared and hashed by identity: there is one object for each."""

    doc: str
    number: int
    request: type[Req]
    reply: type[Rep]
    legacy: Legacy
    since: str = "5.7"
    gate: B | None = None
    name: str = ""

    @cached_property
    def msgtype(self) -> int | None:
        """The ``vhost_iotlb_msg.type`` of an IOTLB operation, None for an ioctl."""
        return self.request.msgtype if issubclass(self.request, IotlbPayload) else None

    @property
    def harmless(self) -> bool:
        """True for questions that change nothing and need no owner, so that anybody may ask at any time."""
        return self.name.startswith("GET_") and self.request is Empty

    def __repr__(self) -> str:
        return f"<{self.name} 0x{self.number:08x}>"


IOTLB = _ioctl.iow(0xF1, IotlbMsg.layout)
"""The request number that carries ``vhost_msg_v2`` on a socket; the kernel takes the same bytes by write()."""

_RING = "kept in the front-end until DRIVER_OK"

# fmt: off
GET_FEATURES          = Op("Feature bits the device offers",                          _ioctl.ior(0x00, U64.layout),         Empty,           U64,        Message(1, note="vhost's own bits 26 and 30 removed; ACCESS_PLATFORM offered by the front-end"))
SET_FEATURES          = Op("Feature bits the driver accepts; EBUSY once FEATURES_OK", _ioctl.iow(0x00, U64.layout),         U64,             Empty,      Message(2, note="ACCESS_PLATFORM kept back from peers that did not offer it"))
SET_OWNER             = Op("Begin a session; rings and mappings need it",             _ioctl.io(0x01),                      Empty,           Empty,      Message(3))
GET_BACKEND_FEATURES  = Op("What the back-end can do beyond virtio",                  _ioctl.ior(0x26, U64.layout),         Empty,           U64,        Emulated("the front-end's own abilities"), "5.9")
SET_BACKEND_FEATURES  = Op("Accept back-end features",                                _ioctl.iow(0x25, U64.layout),         U64,             Empty,      Emulated("kept in the front-end"), "5.9")
GET_DEVICE_ID         = Op("Virtio device id (1 net, 2 block, ...)",                  _ioctl.ior(0x70, U32.layout),         Empty,           U32,        Emulated("from the target's type=, as no message tells it"))
GET_STATUS            = Op("Device status byte",                                      _ioctl.ior(0x71, U8.layout),          Empty,           U8,         Message(40, P.STATUS, "emulated where the peer lacks STATUS"))
SET_STATUS            = Op("Write the status byte; 0 resets",                         _ioctl.iow(0x72, U8.layout),          U8,              Empty,      Message(39, P.STATUS, "emulated where the peer lacks STATUS; reset stops every ring"))
GET_CONFIG            = Op("Read configuration space",                                _ioctl.ior(0x73, _CONFIG),            ConfigRange,     ConfigData, Message(24, P.CONFIG, "read from 0 and cut, as peers ignore the offset"))
SET_CONFIG            = Op("Write configuration space",                               _ioctl.iow(0x74, _CONFIG),            ConfigData,      Empty,      Message(25, P.CONFIG))
GET_CONFIG_SIZE       = Op("Bytes of configuration space",                            _ioctl.ior(0x79, U32.layout),         Empty,           U32,        Emulated("the size that virtio gives the device type"), "5.18")
SET_CONFIG_CALL       = Op("Eventfd that tells of a configuration change",            _ioctl.iow(0x77, EventFile.layout),   EventFile,       Empty,      Message(21, P.BACKEND_REQ, "through CONFIG_CHANGE_MSG; never fires where the peer lacks BACKEND_REQ"), "5.8")
GET_VRING_NUM         = Op("Largest ring the device takes, over all queues",          _ioctl.ior(0x76, U16.layout),         Empty,           U16,        Emulated("256 unless the target says queue-size="))
GET_VRING_SIZE        = Op("Largest ring of one queue (its size once running)",       _ioctl.iowr(0x82, VringState.layout), VringState,      VringState, Emulated("as GET_VRING_NUM"), "6.9")
GET_VQS_COUNT         = Op("Number of queues",                                        _ioctl.ior(0x80, U32.layout),         Empty,           U32,        Message(17, P.MQ, "queue pairs are counted for net; the type's least where the peer lacks MQ"), "5.18")
SET_VRING_NUM         = Op("Entries of a ring",                                       _ioctl.iow(0x10, VringState.layout),  VringState,      Empty,      Message(8, note=_RING))
SET_VRING_ADDR        = Op("Where a ring lies, as IOVAs",                             _ioctl.iow(0x11, VringAddr.layout),   VringAddr,       Empty,      Message(9, note=_RING))
SET_VRING_BASE        = Op("Next available index the device takes",                   _ioctl.iow(0x12, VringState.layout),  VringState,      Empty,      Message(10, note=_RING))
GET_VRING_BASE        = Op("Where a ring stands; exact only while it is stopped",     _ioctl.iowr(0x12, VringState.layout), VringState,      VringState, Message(11, note="stops the ring, so EBUSY while it runs: suspend first"))
SET_VRING_KICK        = Op("Eventfd the driver kicks",                                _ioctl.iow(0x20, VringFile.layout),   VringFile,       Empty,      Message(12, note=_RING))
SET_VRING_CALL        = Op("Eventfd the device signals; -1 to poll",                  _ioctl.iow(0x21, VringFile.layout),   VringFile,       Empty,      Message(13))
SET_VRING_ERR         = Op("Eventfd for ring errors",                                 _ioctl.iow(0x22, VringFile.layout),   VringFile,       Empty,      Message(14))
SET_VRING_ENABLE      = Op("Let a ring work (1) or not (0)",                          _ioctl.iow(0x75, VringState.layout),  VringState,      Empty,      Message(18, note=_RING))
GET_IOVA_RANGE        = Op("IOVAs the device can reach; both ends count",             _ioctl.ior(0x78, IovaRange.layout),   Empty,           IovaRange,  Emulated("0 to 2^63 less 1 MiB"), "5.11")
GET_GROUP_NUM         = Op("Number of ring groups",                                   _ioctl.ior(0x81, U32.layout),         Empty,           U32,        Emulated("1"), "5.19")
GET_AS_NUM            = Op("Number of address spaces",                                _ioctl.ior(0x7A, U32.layout),         Empty,           U32,        Emulated("1"), "5.19")
GET_VRING_GROUP       = Op("The group of a ring",                                     _ioctl.iowr(0x7B, VringState.layout), VringState,      VringState, Emulated("0"), "5.19")
GET_VRING_DESC_GROUP  = Op("The group of a ring's descriptor area",                   _ioctl.iowr(0x7F, VringState.layout), VringState,      VringState, Absent("one memory table serves rings and buffers"), "6.7", B.DESC_ASID)
SET_GROUP_ASID        = Op("Put a group into an address space",                       _ioctl.iow(0x7C, VringState.layout),  VringState,      Empty,      Emulated("only group 0 in address space 0"), "5.19", B.IOTLB_ASID)
SUSPEND               = Op("Stop all rings and keep their state",                     _ioctl.io(0x7D),                      Empty,           Empty,      Emulated("GET_VRING_BASE on every ring"), "6.0", B.SUSPEND)
RESUME                = Op("Go on where SUSPEND stopped",                             _ioctl.io(0x7E),                      Empty,           Empty,      Emulated("every ring set up again at its base"), "6.3", B.RESUME)
IOTLB_UPDATE          = Op("Map memory for the device; EEXIST on overlap",            IOTLB,                                IotlbUpdate,     Empty,      Message(37, P.CONFIGURE_MEM_SLOTS, "SET_MEM_TABLE without the feature; perm is widened to RW"), "5.9", B.IOTLB_MSG_V2)
IOTLB_INVALIDATE      = Op("Take mappings away, each as a whole",                     IOTLB,                                IotlbInvalidate, Empty,      Message(38, P.CONFIGURE_MEM_SLOTS, "SET_MEM_TABLE without the feature"), "5.9", B.IOTLB_MSG_V2)
IOTLB_BATCH_BEGIN     = Op("Hold mapping changes back ...",                           IOTLB,                                IotlbBatchBegin, Empty,      Emulated("changes collected"), "5.9", B.IOTLB_BATCH)
IOTLB_BATCH_END       = Op("... and let the device see them at once",                 IOTLB,                                IotlbBatchEnd,   Empty,      Emulated("changes sent"), "5.9", B.IOTLB_BATCH)
# fmt: on

TABLE: tuple[Op[Any, Any], ...] = tuple(row for row in list(globals().values()) if isinstance(row, Op))
"""Every operation, in the order of the rows above."""

for _name, _row in list(globals().items()):
    if isinstance(_row, Op):
        object.__setattr__(_row, "name", _name)

BY_NAME: dict[str, Op[Any, Any]] = {op.name: op for op in TABLE}
_IOCTLS = {op.number: op for op in TABLE if op.msgtype is None}
_IOTLB = {op.msgtype: op for op in TABLE if op.msgtype is not None}
_MSGTYPE_AT = 33


def by_message(number: int, payload: bytes | memoryview) -> Op[Any, Any] | None:
    """The operation that a socket message asks for, or None: number, and for IOTLB messages the type inside."""
    if number != IOTLB:
        return _IOCTLS.get(number)
    return _IOTLB.get(payload[_MSGTYPE_AT]) if len(payload) == IotlbMsg.layout.size else None


Call = tuple[Op[Any, Any], Payload]
"""One entry of ``Backend.call_many``."""

__all__ = ["BY_NAME", "EMPTY", "IOTLB", "TABLE", "Absent", "Call", "Emulated", "Message", "Op", "by_message", *BY_NAME]
