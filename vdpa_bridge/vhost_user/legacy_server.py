# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Legacy vhost-user, back-end side: what clients like QEMU say, made into vDPA operations on any back-end.

Rule of this file: the life cycle is derived, because many clients never send DRIVER_OK (vhost-user spec, "Ring states").
The device is brought up, with all that was said so far, when the first ring has size, addresses and kick and is
enabled; it is reset when the last one is stopped. Memory stays known across that and is mapped again where needed.
The client's guest physical addresses become the IOVAs; ACCESS_PLATFORM is hidden from it and acknowledged for it.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from .. import ops
from ..backends.base import Backend
from ..device import UNDERSTOOD, first_error
from ..errors import RemoteProtocolError, reason
from ..eventfd import Metronome, kick, was_kicked
from ..flags import VHOST_ONLY_FEATURES, VHOST_USER_F_PROTOCOL_FEATURES, BackendFeature, Feature, Status, without
from ..flags import ProtocolFeature as P
from ..ops import Call
from ..virtio.ids import DeviceId
from ..wire import (
    EMPTY,
    U8,
    U64,
    ConfigData,
    ConfigRange,
    Empty,
    EventFile,
    IotlbBatchBegin,
    IotlbBatchEnd,
    Payload,
    VringAddr,
    VringFile,
    VringState,
)
from . import messages as m
from .backend_channel import BackendEnd
from .framing import REPLY_FLAGS, Frame, frame
from .legacy_memory import ClientMemory
from .legacy_state import ClientRing, whole_base
from .messages import message_name

_log = logging.getLogger(__name__)

OFFERED = P.MQ | P.REPLY_ACK | P.BACKEND_REQ | P.CONFIG | P.RESET_DEVICE | P.CONFIGURE_MEM_SLOTS | P.STATUS | P.GPA_ADDRESSES
"""Protocol features that this server implements."""
MAX_SLOTS = 509
"""Memory regions; what libvhost-user offers too, and QEMU expects never to shrink."""
_RUNNING = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK


class LegacyService:
    """One legacy client of one device. Does not own the back-end."""

    def __init__(self, backend: Backend, extra: int = 0) -> None:
        self._backend = backend
        self._offered = OFFERED | P(extra)
        self._protocol = P(0)
        self._features = 0
        self._backend_features = 0
        self._owned = False
        self._running = False
        self._mapped = False
        self._status = 0
        self._memory = ClientMemory()
        self._rings: dict[int, ClientRing] = {}
        self._queues: int | None = None
        self._channel: BackendEnd | None = None
        self._metronome = Metronome()

    @property
    def event(self) -> int:
        """An eventfd to wait for beside the client's messages, -1 for none; ``on_event`` when it is readable."""
        return -1 if self._channel is None else self._channel.event

    def on_event(self) -> None:
        """The device's configuration changed: tell the client."""
        if self._channel is not None:
            self._channel.announce()

    def handle(self, message: Frame) -> bytes:
        """Carry out one message; the reply, if there is one."""
        number = message.request
        method = _METHODS.get(number)
        if method is None:
            raise RemoteProtocolError(f"{message_name(number)} is not offered by this server")
        row = m.BY_NUMBER[number]
        acknowledge = row.reply is None and message.need_reply and bool(self._protocol & P.REPLY_ACK)
        try:
            if row.request is Empty and message.payload:
                raise ValueError(f"takes no payload, {len(message.payload)} bytes came")
            request = EMPTY if row.request is Empty else row.request.unpack(message.payload)
            reply = method(self, message, request)
        except ValueError as error:
            raise RemoteProtocolError(f"{message_name(number)}: {error}") from None
        except OSError as error:
            text = f"{self._backend.name}: {message_name(number)}: {reason(error)}"
            if number == m.GET_CONFIG.number:
                _log.info("%s", text)
                return frame(number, b"", REPLY_FLAGS)
            if not acknowledge:
                raise RemoteProtocolError(text) from None
            _log.warning("%s", text)
            return frame(number, U64(1).pack(), REPLY_FLAGS)
        if row.reply is not None:
            return frame(number, (reply or EMPTY).pack(), REPLY_FLAGS)
        if number == m.SET_PROTOCOL_FEATURES.number:
            acknowledge = message.need_reply and bool(self._protocol & P.REPLY_ACK)
        return frame(number, U64(0).pack(), REPLY_FLAGS) if acknowledge else b""

    def close(self) -> None:
        """Give the client's descriptors back."""
        self._metronome.close()
        for ring in self._rings.values():
            self._stop(ring)
            ring.replace("call", -1)
        self._rings.clear()
        self._memory.close()
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    # Operations on the device ----------------------------------------------------------------------------------------------

    def _all(self, calls: list[Call]) -> None:
        if error := first_error(self._backend.call_many(calls)):
            raise error

    def _own(self) -> None:
        """Once a connection: owner, and back-end features."""
        if not self._owned:
            offered = self._backend.call(ops.GET_BACKEND_FEATURES, EMPTY).value
            self._backend_features = offered & UNDERSTOOD
            self._all([(ops.SET_OWNER, EMPTY), (ops.SET_BACKEND_FEATURES, U64(self._backend_features))])
            self._owned = True

    def _batch(self, calls: list[Call]) -> list[Call]:
        if not calls or not self._backend_features & BackendFeature.IOTLB_BATCH:
            return calls
        return [(ops.IOTLB_BATCH_BEGIN, IotlbBatchBegin(0)), *calls, (ops.IOTLB_BATCH_END, IotlbBatchEnd(0))]

    def _ring_calls(self, index: int, ring: ClientRing) -> list[Call]:
        assert ring.addr is not None
        address = self._memory.ring(index, ring.addr)
        ring.set_up = True
        calls: list[Call] = [
            (ops.SET_VRING_NUM, VringState(index, ring.num)),
            (ops.SET_VRING_ADDR, address),
            (ops.SET_VRING_BASE, VringState(index, ring.base)),
            (ops.SET_VRING_KICK, VringFile(index, ring.kick)),
            (ops.SET_VRING_CALL, VringFile(index, ring.call)),
        ]
        if self._is_enabled(ring):  # virtio-pci has no way to say that a ring is not
            calls.append((ops.SET_VRING_ENABLE, VringState(index, 1)))
        return calls

    def _is_enabled(self, ring: ClientRing) -> bool:
        return ring.enabled or not self._features & VHOST_USER_F_PROTOCOL_FEATURES

    def _sync(self) -> None:
        """Bring the device up, or let a further ring in, when what is needed for it has been said."""
        ready = {i: r for i, r in self._rings.items() if r.ready}
        if not self._running:
            if self._may_start(list(ready.values())):
                self._bring_up(ready)
            return
        fresh = {i: r for i, r in ready.items() if not r.set_up}
        if fresh:
            with self._at_rest() as kept:
                if kept:
                    for index, ring in fresh.items():
                        self._all(self._ring_calls(index, ring))

    def _may_start(self, ready: list[ClientRing]) -> bool:
        """Whether a ring is enabled; where none can be enabled later, every ready one must be, or be said not to be."""
        if not any(self._is_enabled(ring) for ring in ready):
            return False
        self._own()
        return self._enables_late or bool(self._status & Status.DRIVER_OK) or all(ring.told or self._is_enabled(ring) for ring in ready)

    @property
    def _enables_late(self) -> bool:
        return bool(self._backend_features & BackendFeature.ENABLE_AFTER_DRIVER_OK)

    def _bring_up(self, ready: dict[int, ClientRing]) -> None:
        driver = Status.ACKNOWLEDGE | Status.DRIVER
        features = self._features & ~VHOST_ONLY_FEATURES | Feature.ACCESS_PLATFORM
        self._all(
            [
                (ops.SET_STATUS, U8(0)),
                (ops.SET_STATUS, U8(Status.ACKNOWLEDGE)),
                (ops.SET_STATUS, U8(driver)),
                (ops.SET_FEATURES, U64(features)),
                (ops.SET_STATUS, U8(driver | Status.FEATURES_OK)),
            ]
        )
        if not self._backend.call(ops.GET_STATUS, EMPTY).value & Status.FEATURES_OK:
            raise OSError(errno.EINVAL, f"the device refuses the features {features:#x}")
        if not self._mapped:
            try:
                self._all(self._batch([region.there for region in self._memory.regions]))
            except OSError:  # some are mapped, and a reset may keep them: the client gets to send a better table
                self._backend.call_many(self._batch([region.gone for region in self._memory.regions]))
                raise
            self._mapped = True
        calls: list[Call] = []
        for index, ring in ready.items():
            calls += self._ring_calls(index, ring)
        try:
            self._all([*calls, (ops.SET_STATUS, U8(_RUNNING))])
        except OSError:
            self._reset()
            raise
        self._running = True
        for ring in ready.values():
            if was_kicked(ring.kick):
                kick(ring.kick)  # a kick before DRIVER_OK is lost (vdpa_sim_net.c, vdpa_sim_blk.c), and so is one before a restart

    @contextmanager
    def _at_rest(self) -> Iterator[bool]:
        """The device suspended meanwhile; without SUSPEND it is reset, which yields False, and brought up again where it stood."""
        if not self._running:
            yield False
        elif self._backend_features & BackendFeature.SUSPEND:
            self._backend.call(ops.SUSPEND, EMPTY)
            yield True
            self._backend.call(ops.RESUME, EMPTY)
        else:
            self._note_bases()
            self._reset()
            yield False
            self._sync()

    def _note_bases(self) -> None:
        """Where the working rings stand; the device at rest meanwhile, if it can."""
        if any(ring.set_up for ring in self._rings.values()) and self._backend_features & BackendFeature.SUSPEND:
            self._backend.call(ops.SUSPEND, EMPTY)
        for index, ring in self._rings.items():
            if ring.set_up:
                ring.base = self._base(index, ring)

    def _base(self, index: int, ring: ClientRing) -> int:
        """Next available index of a ring at rest. Devices that cannot tell have completed all that they took: used.idx says it."""
        try:
            return self._backend.call(ops.GET_VRING_BASE, VringState(index, 0)).num
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP or ring.addr is None or self._features & Feature.RING_PACKED:
                raise
        return self._memory.used_index(ring.addr)

    def _reset(self) -> None:
        self._running = False
        for ring in self._rings.values():
            ring.set_up = False
        if self._owned:
            self._backend.call(ops.SET_STATUS, U8(0))
            self._mapped = self._mapped and bool(self._backend_features & BackendFeature.IOTLB_PERSIST)

    # Negotiation -----------------------------------------------------------------------------------------------------------

    def _get_features(self, message: Frame, request: Empty) -> U64:
        device = self._backend.call(ops.GET_FEATURES, EMPTY).value
        return U64(without(device, Feature.ACCESS_PLATFORM | VHOST_ONLY_FEATURES) | VHOST_USER_F_PROTOCOL_FEATURES)

    def _set_features(self, message: Frame, request: U64) -> None:
        offered = self._get_features(message, EMPTY).value
        if extra := request.value & ~offered:
            raise ValueError(f"accepts {extra:#x}, which was not offered ({offered:#x})")
        changed = request.value != self._features
        self._features = request.value
        if changed and self._running:
            self._reset()
        self._sync()

    def _get_protocol_features(self, message: Frame, request: Empty) -> U64:
        return U64(self._offered)

    def _set_protocol_features(self, message: Frame, request: U64) -> None:
        if extra := without(request.value, self._offered):
            raise ValueError(f"accepts {extra:#x}, which was not offered ({int(self._offered):#x})")
        self._protocol = P(request.value)

    def _set_owner(self, message: Frame, request: Empty) -> None:
        """Repeated by some clients, sent before or after the features; the device is owned when it is needed."""

    def _reset_owner(self, message: Frame, request: Empty) -> None:
        """Deprecated by the specification; back-ends ignore it."""

    def _get_queue_num(self, message: Frame, request: Empty) -> U64:
        count = self._queue_count()
        if self._backend.call(ops.GET_DEVICE_ID, EMPTY).value == DeviceId.NET:
            count //= 2  # pairs; a control queue comes on top
        return U64(count)

    def _queue_count(self) -> int:
        if self._queues is None:
            self._queues = self._backend.call(ops.GET_VQS_COUNT, EMPTY).value
        return self._queues

    def _get_status(self, message: Frame, request: Empty) -> U64:
        device = self._backend.call(ops.GET_STATUS, EMPTY).value if self._running else 0
        return U64(self._status | device & (Status.NEEDS_RESET | Status.FAILED))

    def _set_status(self, message: Frame, request: U64) -> None:
        if request.value > 0xFF:
            raise ValueError(f"status {request.value:#x} is not a byte")
        if not request.value:
            with suppress(OSError):  # hardware does not tell where packed rings stand: a driver that starts anew need not know
                self._note_bases()  # QEMU 7.2 resets first and asks for the bases afterwards
            self._reset()
        self._status = request.value
        if request.value & Status.DRIVER_OK:
            self._sync()

    def _reset_device(self, message: Frame, request: Empty) -> None:
        self._reset()
        self._status = 0
        for ring in self._rings.values():
            ring.enabled = ring.told = False
            ring.base = 0
            self._stop(ring)

    # Configuration space ---------------------------------------------------------------------------------------------------

    def _get_config(self, message: Frame, request: m.ConfigSpace) -> m.ConfigSpace:
        size = self._backend.call(ops.GET_CONFIG_SIZE, EMPTY).value
        length = len(request.data)
        have = max(0, min(length, size - request.offset))
        data = self._backend.call(ops.GET_CONFIG, ConfigRange(request.offset, have)).data if have else b""
        return m.ConfigSpace(request.offset, request.flags, data.ljust(length, b"\0"))

    def _set_config(self, message: Frame, request: m.ConfigSpace) -> None:
        self._backend.call(ops.SET_CONFIG, ConfigData(request.offset, request.data))

    def _set_backend_req_fd(self, message: Frame, request: Empty) -> None:
        old, self._channel = self._channel, BackendEnd(message.take_fds()[0])
        if old is not None:
            old.close()
        self._backend.call(ops.SET_CONFIG_CALL, EventFile(self._channel.event))

    # Memory ----------------------------------------------------------------------------------------------------------------

    def _get_max_mem_slots(self, message: Frame, request: Empty) -> U64:
        return U64(MAX_SLOTS)

    @property
    def _gpa_addresses(self) -> bool:
        return bool(self._protocol & P.GPA_ADDRESSES)

    def _set_mem_table(self, message: Frame, request: m.MemTable) -> None:
        """What stays is not touched: a device goes on while memory is added, and rests while something is replaced under it."""
        gone, fresh = self._memory.renew(request.regions, message.take_fds(), self._gpa_addresses)
        rings = [ring.addr for ring in self._rings.values() if ring.set_up and ring.addr is not None]
        replaced = any(old.overlaps(new) for old in gone for new in fresh)
        moved = any(old.holds(address) for old in gone for addr in rings for address in (addr.desc, addr.avail, addr.used))
        try:
            with self._at_rest() if replaced or moved else nullcontext():
                if self._mapped:
                    self._all(self._batch([*(old.gone for old in gone), *(new.there for new in fresh)]))
        except OSError as error:  # the table before is gone, and there is nothing to go back to
            raise ValueError(reason(error)) from None
        finally:
            for region in gone:
                region.close()

    def _add_mem_reg(self, message: Frame, request: m.MemReg) -> None:
        if len(self._memory.regions) >= MAX_SLOTS:
            raise ValueError(f"more than {MAX_SLOTS} memory regions")
        region = self._memory.checked(request.region, message.fds[0], self._gpa_addresses)
        if self._mapped:
            self._backend.call(*region.there)
        message.take_fds()
        self._memory.regions.append(region)

    def _rem_mem_reg(self, message: Frame, request: m.MemReg) -> None:
        want = request.region
        for held in self._memory.regions:
            r = held.region
            if (r.guest_addr, r.size, r.user_addr) == (want.guest_addr, want.size, want.user_addr):
                if self._mapped:
                    self._all([held.gone])
                self._memory.regions.remove(held)
                held.close()
                return
        raise ValueError(f"there is no region of {want.size:#x} bytes at {want.guest_addr:#x}")

    # Rings -------------------------------------------------------------------------------------------------------------------

    def _ring(self, index: int) -> ClientRing:
        if index >= self._queue_count():
            raise ValueError(f"ring {index}: the device has {self._queue_count()}")
        return self._rings.setdefault(index, ClientRing())

    def _set_vring_num(self, message: Frame, request: VringState) -> None:
        largest = self._backend.call(ops.GET_VRING_NUM, EMPTY).value
        if not 0 < request.num <= largest or request.num & (request.num - 1):
            raise ValueError(f"ring size {request.num} is not a power of two up to {largest}")
        self._ring(request.index).num = request.num

    def _set_vring_base(self, message: Frame, request: VringState) -> None:
        packed = bool(self._features & Feature.RING_PACKED)
        if request.num > 0xFFFF and not packed:
            raise ValueError(f"base {request.num:#x} of a split ring has more than 16 bits")
        self._ring(request.index).base = whole_base(request.num, packed)

    def _set_vring_addr(self, message: Frame, request: VringAddr) -> None:
        if request.flags:
            raise ValueError(f"flags {request.flags:#x}: logging is not offered")
        if request.desc % 16 or request.avail % 2 or request.used % 4:
            raise ValueError(f"addresses {request.desc:#x}, {request.avail:#x}, {request.used:#x} are not aligned to 16, 2 and 4")
        self._ring(request.index).addr = request

    def _event(self, message: Frame, request: U64) -> tuple[int, ClientRing, int]:
        """Ring index, ring, and the descriptor, which is now the caller's."""
        index = request.value & 0xFF
        if request.value & ~(0xFF | m.NOFD):
            raise ValueError(f"ring word {request.value:#x} has unknown bits")
        ring = self._ring(index)
        return index, ring, message.take_fds()[0] if message.fds else -1

    def _set_vring_kick(self, message: Frame, request: U64) -> None:
        """Without a descriptor the ring is polled (vhost-user spec, SET_VRING_KICK): the device is kicked in our rhythm then."""
        index, ring, fd = self._event(message, request)
        self._stop(ring)
        ring.kick = fd if fd >= 0 else self._metronome.add()
        if ring.set_up:
            self._backend.call(ops.SET_VRING_KICK, VringFile(index, ring.kick))
        self._sync()

    def _set_vring_call(self, message: Frame, request: U64) -> None:
        index, ring, fd = self._event(message, request)
        ring.replace("call", fd)
        if ring.set_up:
            self._backend.call(ops.SET_VRING_CALL, VringFile(index, fd))

    def _set_vring_err(self, message: Frame, request: U64) -> None:
        """No vDPA device signals it; the descriptor is closed with the message."""
        if request.value & ~(0xFF | m.NOFD):
            raise ValueError(f"ring word {request.value:#x} has unknown bits")
        self._ring(request.value & 0xFF)

    def _set_vring_enable(self, message: Frame, request: VringState) -> None:
        if request.num > 1:
            raise ValueError(f"enable is {request.num}, not 0 or 1")
        ring = self._ring(request.index)
        changed, ring.enabled, ring.told = ring.enabled != bool(request.num), bool(request.num), True
        if ring.set_up and changed and ring.enabled and not self._enables_late:
            self._note_bases()
            self._reset()  # and up again, below
        elif ring.set_up and changed:
            self._backend.call(ops.SET_VRING_ENABLE, request)
            if ring.enabled:
                kick(ring.kick)  # what was kicked while the ring was disabled is lost otherwise
        self._sync()

    def _stop(self, ring: ClientRing) -> None:
        """Back to stopped; the kick descriptor goes, as the specification has it."""
        self._metronome.remove(ring.kick)
        ring.replace("kick", -1)

    def _get_vring_base(self, message: Frame, request: VringState) -> VringState:
        """Stop one ring and say where it stands; the others go on."""
        ring = self._ring(request.index)
        if ring.set_up:
            with_suspend = bool(self._backend_features & BackendFeature.SUSPEND)
            if with_suspend:
                self._backend.call(ops.SUSPEND, EMPTY)
            self._backend.call(ops.SET_VRING_ENABLE, VringState(request.index, 0))
            ring.base = self._base(request.index, ring)
            ring.set_up = False
            if not any(other.set_up for other in self._rings.values()):
                self._reset()
            elif with_suspend:
                self._backend.call(ops.RESUME, EMPTY)
        self._stop(ring)
        return VringState(request.index, ring.base)


_METHODS: dict[int, Callable[[LegacyService, Frame, Any], Payload | None]] = {
    row.number: getattr(LegacyService, f"_{row.name.lower()}")
    for row in m.BY_NUMBER.values()
    if (row.needs is None or row.needs & OFFERED) and hasattr(LegacyService, f"_{row.name.lower()}")
}
"""The method of each message that this server takes."""
