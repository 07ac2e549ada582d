# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A device behind a stock vhost-user back-end: vDPA operations made of legacy messages.

Rule of this file: never pretend. What messages cannot say is answered from what we know, or refused with the reason;
the operations table says which is which. Addresses need no translation: every mapping becomes a memory region whose
guest address and user address are both its IOVA, as the specification leaves those numbers to the front-end.

The ring part of a bring-up is kept here until DRIVER_OK, because legacy messages act at once: SET_VRING_KICK starts a
ring, GET_VRING_BASE stops it, and back-ends drop kick, call and sometimes the addresses when they stop one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from dataclasses import dataclass
from typing import Any, TypeVar

from .. import ops
from ..errors import RemoteProtocolError
from ..eventfd import EventFd
from ..flags import VHOST_ONLY_FEATURES, VHOST_USER_F_PROTOCOL_FEATURES, Feature, Status
from ..flags import BackendFeature as B
from ..flags import ProtocolFeature as P
from ..memory import IotlbTable, check_room
from ..ops import Op
from ..quirks import CONTROL_QUEUE, CONTROLLED, STALE_RINGS, Offer, quirks_of
from ..vhost_user import messages as m
from ..vhost_user.backend_channel import FrontEnd
from ..vhost_user.connection import Connection
from ..vhost_user.framing import NEED_REPLY, VERSION, frame
from ..vhost_user.legacy_state import whole_base
from ..virtio.config import config_size, min_queues
from ..virtio.features import NetFeature
from ..virtio.ids import DeviceId, device_name
from ..wire import (
    U8,
    U32,
    U64,
    Empty,
    EventFile,
    IotlbBatchBegin,
    IotlbBatchEnd,
    IotlbInvalidate,
    IotlbUpdate,
    Iova,
    IovaRange,
    Payload,
    VringAddr,
    VringState,
)
from .base import ABSENT, EMULATED, NATIVE, Capability
from .rules import Ring, RuledBackend, refuse

SPOKEN = P.MQ | P.REPLY_ACK | P.BACKEND_REQ | P.CONFIG | P.RESET_DEVICE | P.CONFIGURE_MEM_SLOTS | P.STATUS
"""Protocol features that this front-end uses when offered."""
PARKING_SIZE = 1 << 20
"""Room for the largest split ring."""
PARKING = (1 << 63) - PARKING_SIZE
"""Where stopped rings are kept; above it, peers that count in signed 64 bits overflow."""
LAST_IOVA = PARKING - 1


_SAY_TYPE = "say it in the target: ?type=blk, ?type=net, ..."
P_ = TypeVar("P_", bound=Payload)


@dataclass(eq=False)
class _Region:
    """A memory region at the peer; owns its descriptor, which SET_MEM_TABLE has to send again and again."""

    region: m.MemoryRegion
    fd: int
    sent: bool = False

    def close(self) -> None:
        os.close(self.fd)


class VhostUserLegacy(RuledBackend):
    """One session with a stock back-end. Takes over the connection, which has asked for both feature words only."""

    traits = ("vhost-user", "legacy")

    offered_backend_features = B.IOTLB_MSG_V2 | B.IOTLB_BATCH | B.SUSPEND | B.RESUME | B.ENABLE_AFTER_DRIVER_OK | B.IOTLB_PERSIST

    def __init__(self, connection: Connection, features: int, protocol_offered: int, device_id: int | None, queue_size: int, config_bytes: int | None) -> None:
        super().__init__(connection.name)
        self._connection = connection
        self._protocol_offered = protocol_offered
        self._quirks = quirks_of(Offer(device_id, features, protocol_offered))
        self._hidden = CONTROLLED if CONTROL_QUEUE in self._quirks else 0
        self._offered = features & ~self._hidden
        self._protocol = protocol_offered & SPOKEN
        self._device_id = device_id
        self.queue_size = queue_size
        self._config_size = config_bytes
        self._table: IotlbTable[_Region] = IotlbTable(1, 0, LAST_IOVA)
        self._removed: list[_Region] = []
        self._started: set[int] = set()
        self._known: dict[int, VringAddr] = {}
        self._parking: _Region | None = None
        self._channel: FrontEnd | None = None
        self._slots = m.MAX_REGIONS
        self._queue_count: int | None = None
        if features & VHOST_USER_F_PROTOCOL_FEATURES:
            self._tell(m.SET_PROTOCOL_FEATURES, U64(self._protocol).pack(), acknowledged=False)
            if self._protocol & P.CONFIGURE_MEM_SLOTS:
                self._slots = self._ask_u64(m.GET_MAX_MEM_SLOTS)

    # Messages --------------------------------------------------------------------------------------------------------

    def _tell(self, row: m.Legacy, payload: bytes = b"", fds: tuple[int, ...] = (), acknowledged: bool = True) -> None:
        """Send a message without a reply of its own; with REPLY_ACK wait for the acknowledgement."""
        if acknowledged and self._protocol & P.REPLY_ACK:
            result = self._parse(U64, self._connection.ask(row.number, payload, fds, flags=NEED_REPLY)).value
            if result:
                raise refuse(errno.EIO, f"the peer refused {row.name} (acknowledged {result})")
        else:
            self._connection.send(frame(row.number, payload, VERSION), fds, row.name)

    def _ask_u64(self, row: m.Legacy) -> int:
        return self._parse(U64, self._connection.ask(row.number)).value

    def _parse(self, kind: type[P_], payload: bytes) -> P_:
        try:
            return kind.unpack(payload)
        except ValueError as error:
            raise RemoteProtocolError(f"{self.name}: {error}") from None

    def _barrier(self) -> None:
        """A question: when its answer is there, the peer lived through everything before."""
        self._ask_u64(m.GET_FEATURES)

    # Waist -----------------------------------------------------------------------------------------------------------

    def capability(self, op: Op[Any, Any]) -> Capability:
        """From the table's legacy column and the peer's protocol features."""
        legacy = op.legacy
        if isinstance(legacy, ops.Absent):
            return Capability(ABSENT, legacy.why)
        if isinstance(legacy, ops.Emulated):
            return Capability(EMULATED, legacy.how)
        if legacy.needs and not self._protocol & legacy.needs:
            if op in (ops.GET_CONFIG, ops.SET_CONFIG):
                return Capability(ABSENT, f"the peer does not offer {legacy.needs.name}")
            return Capability(EMULATED, legacy.note)
        return Capability(NATIVE, legacy.note)

    def facts(self) -> dict[str, object]:
        """What the peer offers and what is used of it."""
        return {
            "transport": "vhost-user, legacy mode",
            "protocol features offered": f"{self._protocol_offered:#x}",
            "protocol features used": f"{self._protocol:#x}",
            "memory slots": self._slots,
            **({"quirks": ", ".join(sorted(quirk.name for quirk in self._quirks))} if self._quirks else {}),
        }

    def close(self) -> None:
        """Stop what runs, hang up."""
        if self._closed:
            return
        self._closed = True
        try:
            self._stop_rings()
        except (OSError, RemoteProtocolError, ValueError):
            pass  # it is gone, and so is what it did
        finally:
            self._connection.close()
            if self._channel is not None:
                self._channel.close()
            for ring in self._rings:
                ring.close()
            for entry in self._table.clear():
                entry.value.close()
            for region in [*self._removed, *([self._parking] if self._parking else [])]:
                region.close()

    # Features and status -------------------------------------------------------------------------------------------------

    def _set_owner(self, request: Empty) -> None:
        super()._set_owner(request)
        self._tell(m.SET_OWNER)

    def _get_features(self, request: Empty) -> U64:
        return U64(self._ask_u64(m.GET_FEATURES) & ~(VHOST_ONLY_FEATURES | self._hidden) | Feature.ACCESS_PLATFORM)

    def _on_features(self, features: int) -> None:
        accepted = features & self._offered & ~(Feature.ACCESS_PLATFORM | VHOST_ONLY_FEATURES)
        self._tell(m.SET_FEATURES, U64(accepted | self._offered & VHOST_USER_F_PROTOCOL_FEATURES).pack())

    def _get_device_id(self, request: Empty) -> U32:
        if self._device_id is None:
            raise refuse(errno.EOPNOTSUPP, f"legacy vhost-user has no message for the device id; {_SAY_TYPE}")
        return U32(self._device_id)

    def _get_status(self, request: Empty) -> U8:
        if self._protocol & P.STATUS:
            return U8(self._status | self._ask_u64(m.GET_STATUS) & (Status.NEEDS_RESET | Status.FAILED))
        return U8(self._status)

    def _on_status(self, new: int, starts: bool) -> None:
        if starts:
            self._start_enabled()
        if self._protocol & P.STATUS:
            self._tell(m.SET_STATUS, U64(new).pack())
        if starts:
            self._barrier()

    def _on_reset(self, keep_mappings: bool) -> None:
        self._stop_rings()
        if self._status:
            if self._protocol & P.RESET_DEVICE:
                self._tell(m.RESET_DEVICE)
            elif self._protocol & P.STATUS:
                self._tell(m.SET_STATUS, U64(0).pack())
        if not keep_mappings:
            self._removed += [entry.value for entry in self._table.clear()]
            self._send_memory()

    # Configuration space -------------------------------------------------------------------------------------------------

    def _config_bytes(self) -> int:
        if not self._protocol & P.CONFIG:
            return 0
        if self._config_size is not None:
            return self._config_size
        if self._device_id is None:
            raise refuse(errno.EOPNOTSUPP, f"the size follows from the device type; {_SAY_TYPE}")
        size = config_size(self._device_id)
        if size is None:
            raise refuse(errno.EOPNOTSUPP, f"no configuration layout is known for {device_name(self._device_id)}; say ?config-size=BYTES")
        return size

    def _need_config(self) -> None:
        if not self._protocol & P.CONFIG:
            raise refuse(errno.EOPNOTSUPP, "the peer does not offer CONFIG")

    def _read_config(self, offset: int, length: int) -> bytes:
        """From 0 and cut, as peers ignore the offset."""
        self._need_config()
        end = offset + length
        if end > m.MAX_CONFIG:
            raise refuse(errno.EOPNOTSUPP, f"one message carries {m.MAX_CONFIG} bytes of configuration space at most")
        payload = self._connection.ask(m.GET_CONFIG.number, m.ConfigSpace(0, 0, bytes(end)).pack())
        answer = self._parse(m.ConfigSpace, payload).data if payload else b""
        if len(answer) < end:
            raise refuse(errno.EIO, f"the peer returned {len(answer)} of {end} bytes")
        return answer[offset:end]

    def _write_config(self, offset: int, data: bytes) -> None:
        self._need_config()
        self._tell(m.SET_CONFIG, m.ConfigSpace(offset, 0, data).pack())
        self._barrier()

    def _set_config_call(self, request: EventFile) -> None:
        """Changes come through a second socket; without BACKEND_REQ at the peer they never come."""
        event = EventFd.borrow(request.fd)
        old, self._channel = self._channel, None
        if old is not None:
            old.close()
        if event is None:
            return
        if not self._protocol & P.BACKEND_REQ:
            event.close()
            return
        ours, theirs = socket.socketpair()
        with theirs:
            self._channel = FrontEnd(ours, event, self.name)
            self._tell(m.SET_BACKEND_REQ_FD, b"", (theirs.fileno(),))

    # Queues --------------------------------------------------------------------------------------------------------------

    def _queues(self) -> int:
        if self._queue_count is None:
            count = min_queues(self._device_id) if self._device_id is not None else 1
            if self._protocol & P.MQ:
                count = self._pairs() * 2 + bool(self._offered & NetFeature.CTRL_VQ) if self._device_id == DeviceId.NET else self._ask_u64(m.GET_QUEUE_NUM)
            if not 0 < count <= 0x201:  # 256 pairs and a control queue
                raise RemoteProtocolError(f"{self.name}: GET_QUEUE_NUM says {count} queues")
            self._queue_count = count
        return self._queue_count

    def _pairs(self) -> int:
        """Queue pairs of a NIC. GET_QUEUE_NUM counts them (DPDK 22.11), or rings (crosvm, ours): the configuration space says it best."""
        if not self._offered & NetFeature.MQ:
            return 1
        if self._protocol & P.CONFIG:
            return int.from_bytes(self._read_config(8, 2), "little")
        return self._ask_u64(m.GET_QUEUE_NUM)

    def _get_vring_base(self, request: VringState) -> VringState:
        ring = self._ring(request.index)
        if request.index in self._started:
            raise refuse(errno.EBUSY)
        return VringState(request.index, self._base(ring))

    def _on_event(self, index: int, ring: Ring) -> None:
        if index in self._started:
            self._tell_event(m.SET_VRING_CALL, index, ring.call)
            self._tell_event(m.SET_VRING_KICK, index, ring.kick)

    def _tell_event(self, row: m.Legacy, index: int, event: EventFd | None) -> None:
        """Hand an eventfd over; for none, one that nobody kicks or reads.

        "No descriptor" would ask the peer to poll for kicks, and a libvhost-user without a call descriptor hangs up at its first
        interrupt (QEMU 7.2).
        """
        fd = event.fd if event is not None else os.eventfd(0, os.EFD_CLOEXEC)
        try:
            self._tell(row, U64(index).pack(), (fd,))
        finally:
            if event is None:
                os.close(fd)

    def _on_enable(self, index: int, ring: Ring) -> None:
        if ring.enabled and index not in self._started:
            self._start_ring(index, ring)
            self._let_work(index, ring)
        else:
            self._tell_enable(index, ring.enabled)
            if ring.enabled and ring.kick is not None:
                ring.kick.nudge()

    def _tell_enable(self, index: int, enable: bool) -> None:
        if self._offered & VHOST_USER_F_PROTOCOL_FEATURES:
            self._tell(m.SET_VRING_ENABLE, VringState(index, int(enable)).pack())
        elif not enable:
            raise refuse(errno.EOPNOTSUPP, "the peer lacks protocol features, its rings cannot be disabled")

    def _start_enabled(self) -> None:
        """All rings are started before the first is enabled, as QEMU does: hardware may have to know them all by then."""
        enabled = [(index, ring) for index, ring in enumerate(self._rings) if ring.enabled]
        for index, ring in enabled:
            self._start_ring(index, ring)
        for index, ring in enabled:
            self._let_work(index, ring)

    def _start_ring(self, index: int, ring: Ring) -> None:
        """Everything about a ring but its enabling, SET_VRING_KICK last because it starts it."""
        if ring.addr is None:
            raise refuse(errno.EINVAL, f"queue {index} is enabled but has no address")
        if index > 0xFF:
            raise refuse(errno.EINVAL, f"queue {index}: legacy messages number rings with 8 bits")
        self._tell(m.SET_VRING_NUM, VringState(index, ring.num).pack())
        self._tell(m.SET_VRING_BASE, VringState(index, self._base(ring)).pack())
        self._tell(m.SET_VRING_ADDR, ring.addr.pack())
        self._known[index] = ring.addr
        self._tell_event(m.SET_VRING_CALL, index, ring.call)
        if ring.err is not None:
            self._tell_event(m.SET_VRING_ERR, index, ring.err)
        self._tell_event(m.SET_VRING_KICK, index, ring.kick)
        self._started.add(index)

    def _let_work(self, index: int, ring: Ring) -> None:
        self._tell_enable(index, True)
        if ring.kick is not None:  # libvhost-user looks at a ring only after a kick (QEMU 10.0)
            ring.kick.nudge()

    def _stop_rings(self) -> None:
        """GET_VRING_BASE on every working ring: the only message that stops one."""
        for index in sorted(self._started):
            if self._offered & VHOST_USER_F_PROTOCOL_FEATURES and self._rings[index].enabled:
                self._tell_enable(index, False)
            payload = self._connection.ask(m.GET_VRING_BASE.number, VringState(index, 0).pack())
            self._rings[index].base = whole_base(self._parse(VringState, payload).num, self._packed)
            self._started.discard(index)

    def _on_suspend(self) -> None:
        self._stop_rings()

    def _on_resume(self) -> None:
        self._start_enabled()

    # Address spaces and mappings ---------------------------------------------------------------------------------------------

    def _get_iova_range(self, request: Empty) -> IovaRange:
        return IovaRange(Iova(0), Iova(LAST_IOVA))

    def _iotlb_update(self, request: IotlbUpdate) -> None:
        request = self._for_memory(request)
        self._table.check(request)
        check_room(request.fd, request.offset + request.size)
        if fcntl.fcntl(request.fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
            raise refuse(errno.EACCES, "peers map every region for reading and writing, this descriptor does not allow both")
        if len(self._table) >= self._slots:
            raise refuse(errno.ENOSPC, f"the peer takes {self._slots} memory regions; map fewer, larger pieces")
        region = _Region(m.MemoryRegion(request.iova, request.size, request.iova, request.offset), os.dup(request.fd))
        try:
            self._table.add(request, region)
            self._memory_changed()
        except BaseException:
            self._table.remove(IotlbInvalidate(request.iova, request.size, request.asid))
            region.close()
            raise

    def _iotlb_invalidate(self, request: IotlbInvalidate) -> None:
        request = self._for_memory(request)
        self._removed += [entry.value for entry in self._table.remove(request)]
        self._memory_changed()

    def _iotlb_batch_begin(self, request: IotlbBatchBegin) -> None:
        request = self._for_memory(request)
        self._table.begin(request)

    def _iotlb_batch_end(self, request: IotlbBatchEnd) -> None:
        request = self._for_memory(request)
        self._table.end(request)
        self._send_memory()

    def _memory_changed(self) -> None:
        if self._table.batch is None:
            self._send_memory()

    def _send_memory(self) -> None:
        """Tell the peer what changed, region by region or as a whole table."""
        removed, self._removed = self._removed, []
        try:
            self._park(removed)
            if self._protocol & P.CONFIGURE_MEM_SLOTS:
                for gone in removed:
                    if gone.sent:
                        self._tell(m.REM_MEM_REG, m.MemReg.of(gone.region).pack())
                for entry in self._table:
                    if not entry.value.sent:
                        self._add_region(entry.value)
            elif removed or any(not entry.value.sent for entry in self._table):
                self._send_table([entry.value for entry in self._table])
        finally:
            for gone in removed:
                gone.close()

    def _add_region(self, region: _Region) -> None:
        self._tell(m.ADD_MEM_REG, m.MemReg.of(region.region).pack(), (region.fd,))
        region.sent = True

    def _send_table(self, regions: list[_Region]) -> None:
        if self._parking:
            regions = [self._parking, *regions]
        if not regions:
            return  # peers refuse an empty table; the old one stays until the next mapping or the end of the session
        table = m.MemTable(tuple(r.region for r in regions))
        self._tell(m.SET_MEM_TABLE, table.pack(), tuple(r.fd for r in regions))
        for region in regions:
            region.sent = True

    def _park(self, removed: list[_Region]) -> None:
        """Move stopped rings to memory that stays, before theirs goes: libvhost-user (QEMU 7.2 to 10.0) hangs up otherwise,
        as it looks all rings up again with every change of memory, those that are stopped too."""
        if STALE_RINGS not in self._quirks:
            return  # no libvhost-user of that age; and the hardware behind such a server may not reach as far as the parking
        gone = [r.region for r in removed if r.sent]
        left = [
            index
            for index, addr in self._known.items()
            if index not in self._started and any(r.guest_addr <= a < r.guest_addr + r.size for r in gone for a in (addr.desc, addr.avail, addr.used))
        ]
        if not left:
            return
        if self._parking is None:
            fd = os.memfd_create("parked rings", os.MFD_CLOEXEC)
            os.ftruncate(fd, PARKING_SIZE)
            self._parking = _Region(m.MemoryRegion(PARKING, PARKING_SIZE, PARKING, 0), fd)
            if self._protocol & P.CONFIGURE_MEM_SLOTS:
                self._add_region(self._parking)
            else:
                self._send_table([r for r in [*removed, *(entry.value for entry in self._table)] if r.sent])
        for index in left:
            used, avail = PARKING + (10 << 16), PARKING + (8 << 16)
            self._known[index] = parked = VringAddr(index, 0, Iova(PARKING), Iova(used), Iova(avail), 0)
            self._tell(m.SET_VRING_ADDR, parked.pack())
