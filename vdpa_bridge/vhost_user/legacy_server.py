# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Legacy vhost-user, back-end side: what clients like QEMU say, made into vDPA operations on any back-end.

Rule of this file: one method per message, which checks it and notes what it says. What becomes of the device is the
matter of ``legacy_life``. ACCESS_PLATFORM is hidden from the client and acknowledged for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from .. import ops
from ..backends.base import Backend
from ..errors import RemoteProtocolError, reason
from ..eventfd import Metronome, kick
from ..flags import VHOST_ONLY_FEATURES, VHOST_USER_F_PROTOCOL_FEATURES, BackendFeature, Feature, Status
from ..flags import ProtocolFeature as P
from ..wire import (
    EMPTY,
    U64,
    ConfigData,
    ConfigRange,
    Empty,
    Payload,
    VringAddr,
    VringFile,
    VringState,
)
from . import messages as m
from .backend_channel import BackendEnd
from .framing import NEED_REPLY, REPLY_FLAGS, Frame, frame
from .legacy_life import LifeCycle
from .legacy_state import ClientRing, whole_base
from .messages import message_name

_log = logging.getLogger(__name__)

OFFERED = P.MQ | P.REPLY_ACK | P.BACKEND_REQ | P.CONFIG | P.RESET_DEVICE | P.CONFIGURE_MEM_SLOTS | P.STATUS | P.GPA_ADDRESSES
"""Protocol features that this server implements."""
_FOR_IOTLB = P.REPLY_ACK | P.BACKEND_REQ
"""What a client has to accept before it is offered ACCESS_PLATFORM: a miss and its answer need both."""
_DONE, _FAILED = U64(0).pack(), U64(1).pack()
"""The two acknowledgements."""
MAX_SLOTS = 509
"""Memory regions; what libvhost-user offers too, and QEMU expects never to shrink."""


class LegacyService(LifeCycle):
    """One legacy client of one device. Does not own the back-end."""

    def __init__(self, backend: Backend, extra: int = 0, relay: bool = True) -> None:
        super().__init__(backend, relay)
        self._offered = OFFERED | extra
        self._protocol = 0
        self._queues: int | None = None
        self._largest: int | None = None
        self._config_size: int | None = None
        self._metronome = Metronome()

    @property
    def event(self) -> int:
        """An eventfd to wait for beside the client's messages, -1 for none; ``on_event`` when it is readable."""
        return -1 if self._channel is None else self._channel.event

    def on_event(self) -> None:
        """The device's configuration changed, or its rings miss mappings, or the client answers."""
        if self._channel is not None:
            self._channel.announce()
            if self._iotlb is not None:
                self._iotlb.converse(self._channel)

    def handle(self, message: Frame) -> bytes:
        """Carry out one message; the reply, if there is one."""
        number, payload = message.request, message.payload
        if (known := _HANDLERS.get(number)) is None:
            raise RemoteProtocolError(f"{message_name(number)} is not offered by this server")
        method, kind, done = known
        try:
            if kind is not Empty:
                request = kind.unpack(payload)
            elif payload:
                raise ValueError(f"takes no payload, {len(payload)} bytes came")
            else:
                request = EMPTY
            reply = method(self, message, request)
        except ValueError as error:
            raise RemoteProtocolError(f"{message_name(number)}: {error}") from None
        except OSError as error:
            text = f"{self._backend.name}: {message_name(number)}: {reason(error)}"
            if number == m.GET_CONFIG.number:
                _log.info("%s", text)
                return frame(number, b"", REPLY_FLAGS)
            if not done or not self._to_acknowledge(message):
                raise RemoteProtocolError(text) from None
            _log.warning("%s", text)
            return frame(number, _FAILED, REPLY_FLAGS)
        if reply is not None:
            return frame(number, reply.pack(), REPLY_FLAGS)
        return done if self._to_acknowledge(message) else b""

    def _to_acknowledge(self, message: Frame) -> bool:
        return bool(message.flags & NEED_REPLY and self._protocol & P.REPLY_ACK)

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
        self.close_relay()

    # Negotiation -----------------------------------------------------------------------------------------------------------

    def _get_features(self, message: Frame, request: Empty) -> U64:
        """ACCESS_PLATFORM only where each side can do its part; clients ask once more when they have accepted protocol features."""
        return U64(self._feature_offer())

    def _feature_offer(self) -> int:
        device = self._device.call(ops.GET_FEATURES, EMPTY).value  # with a relay as without: the client has accepted some of them
        hidden = VHOST_ONLY_FEATURES
        if self._iotlb is None or _FOR_IOTLB & ~self._protocol:
            hidden |= Feature.ACCESS_PLATFORM
        return device & ~hidden | VHOST_USER_F_PROTOCOL_FEATURES

    def _set_features(self, message: Frame, request: U64) -> None:
        offered = self._feature_offer()
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
        if extra := request.value & ~self._offered:
            raise ValueError(f"accepts {extra:#x}, which was not offered ({self._offered:#x})")
        self._protocol = request.value

    def _set_owner(self, message: Frame, request: Empty) -> None:
        """Repeated by some clients, sent before or after the features; the device is owned when it is needed."""

    def _reset_owner(self, message: Frame, request: Empty) -> None:
        """Deprecated by the specification; back-ends ignore it."""

    def _get_queue_num(self, message: Frame, request: Empty) -> U64:
        """All of them, a NIC's control queue among them. Clients take it for a limit of different things: queue pairs (QEMU), rings
        (cloud-hypervisor v53), all rings there are (crosvm). Who asks for more pairs is refused at a ring that is not there."""
        return U64(self._queue_count())

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
            try:
                self._stop_all()  # QEMU 7.2 resets first and asks for the bases afterwards
            except OSError:  # hardware does not tell where packed rings stand: a driver that starts anew need not know
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
        if self._config_size is None:
            self._config_size = self._backend.call(ops.GET_CONFIG_SIZE, EMPTY).value
        length = len(request.data)
        have = max(0, min(length, self._config_size - request.offset))
        data = self._backend.call(ops.GET_CONFIG, ConfigRange(request.offset, have)).data if have else b""
        return m.ConfigSpace(request.offset, request.flags, data.ljust(length, b"\0"))

    def _set_config(self, message: Frame, request: m.ConfigSpace) -> None:
        self._backend.call(ops.SET_CONFIG, ConfigData(request.offset, request.data))

    def _set_backend_req_fd(self, message: Frame, request: Empty) -> None:
        old, self._channel = self._channel, BackendEnd(message.take_fds()[0])
        if old is not None:
            old.close()
        self._watch_config()
        if self._iotlb is not None:
            self._iotlb.new_channel(self._channel if self._translates else None)

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
            with self._at_rest() if self._mapped and (replaced or moved) else nullcontext():
                if self._iotlb is not None and gone:
                    self._iotlb.flush()
                calls = self._batch([*(old.gone for old in gone), *(new.there for new in fresh)])
                if self._mapped and not self._remap(calls):
                    self._sync()
        except OSError as error:  # the table before is gone, and there is nothing to go back to
            raise ValueError(reason(error)) from None
        finally:
            for region in gone:
                region.close()

    def _add_mem_reg(self, message: Frame, request: m.MemReg) -> None:
        wanted, fd = request.region, message.fds[0]
        if self._memory.again(wanted, fd):
            return
        if len(self._memory.regions) >= MAX_SLOTS:
            raise ValueError(f"more than {MAX_SLOTS} memory regions")
        region = self._memory.checked(wanted, fd, self._gpa_addresses)
        kept = not self._mapped or self._remap([region.there])
        message.take_fds()
        self._memory.regions.append(region)
        if not kept:
            self._sync()

    def _rem_mem_reg(self, message: Frame, request: m.MemReg) -> None:
        held = self._memory.same(request.region)
        held.times -= 1
        if held.times:
            return
        if self._iotlb is not None:
            self._iotlb.flush()
        if self._mapped:
            self._all([held.gone])
        self._memory.regions.remove(held)
        held.close()

    def _iotlb_msg(self, message: Frame, request: m.IotlbMessage) -> None:
        if self._iotlb is None or not self._translates:
            raise ValueError("ACCESS_PLATFORM was not accepted")
        self._iotlb.message(request, self._running)

    # Rings -------------------------------------------------------------------------------------------------------------------

    def _ring(self, index: int) -> ClientRing:
        if (ring := self._rings.get(index)) is None:
            if index >= self._queue_count():
                raise ValueError(f"ring {index}: the device has {self._queue_count()}")
            ring = self._rings[index] = ClientRing()
        return ring

    def _set_vring_num(self, message: Frame, request: VringState) -> None:
        if self._largest is None:
            self._largest = self._backend.call(ops.GET_VRING_NUM, EMPTY).value
        if not 0 < request.num <= self._largest or request.num & (request.num - 1):
            raise ValueError(f"ring size {request.num} is not a power of two up to {self._largest}")
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
        if fd < 0:
            fd = self._metronome.add()
            _log.info("%s: ring %d has no kick descriptor: the device is kicked every %g us", self._device.name, index, self._metronome.period * 1e6)
        ring.kick = fd
        if ring.set_up:
            self._backend.call(ops.SET_VRING_KICK, VringFile(index, ring.kick))
        self._sync()

    def _set_vring_call(self, message: Frame, request: U64) -> None:
        index, ring, fd = self._event(message, request)
        ring.replace("call", fd)
        if ring.set_up:
            self._backend.call(ops.SET_VRING_CALL, VringFile(index, fd))
            if fd >= 0:  # a call may have gone to the old one that the client did not look at any more (QEMU 7.2's SCSI devices)
                kick(fd)

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
            self._stop_all()  # and up again, below
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
        if ring.set_up and not any(other.set_up for other in self._rings.values() if other is not ring):
            self._stop_all()
        elif ring.set_up:
            with_suspend = bool(self._backend_features & BackendFeature.SUSPEND)
            if with_suspend:
                self._backend.call(ops.SUSPEND, EMPTY)
            self._backend.call(ops.SET_VRING_ENABLE, VringState(request.index, 0))
            told = self._told_base(request.index)
            ring.base = self._read_base(ring) if told is None else told
            ring.set_up = False
            if with_suspend:
                self._backend.call(ops.RESUME, EMPTY)
        self._stop(ring)
        return VringState(request.index, ring.base)


_Handler = tuple[Callable[[LegacyService, Frame, Any], Payload | None], type[Payload], bytes]
_HANDLERS: dict[int, _Handler] = {
    row.number: (method, row.request, b"" if row.reply else frame(row.number, _DONE, REPLY_FLAGS))
    for row in m.BY_NUMBER.values()
    if (row.needs is None or row.needs & OFFERED) and (method := getattr(LegacyService, f"_{row.name.lower()}", None))
}
"""Of each message that this server takes: the method, the payload, and the acknowledgement, where there is no reply."""
