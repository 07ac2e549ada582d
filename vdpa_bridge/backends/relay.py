# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A back-end in front of a back-end: its rings end here, and go on in rings of our own on the device behind.

Rules of this file: to its client it is a device that reaches every address, starts a ring anywhere, can be suspended and
says where its rings stand, whatever the one behind can. Data is not copied: each buffer is passed on under the address at
which the device has it. What concerns no ring (configuration space, status, device id) is the device's own.

A ring is stopped by a reset of the device, and goes on by a new bring-up with empty rings of ours: that works on all.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import Any

from .. import ops
from ..device import Device, RingSetup, first_error
from ..errors import reason
from ..eventfd import EventFd
from ..flags import BackendFeature as B
from ..flags import Feature, Status
from ..memory import U64_MAX
from ..ops import Op
from ..virtqueue import PACKED_BEGIN, DeviceQueue, DriverQueue, RingLayout
from ..wire import (
    EMPTY,
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
    VringState,
)
from .base import ABSENT, NATIVE, Backend, Capability
from .relay_memory import RelayMemory
from .relay_rings import Behind, RelayedRing, RelayRunner
from .rules import Ring, RuledBackend, refuse

_log = logging.getLogger(__name__)

_TRANSPORT = (1 << 50) - (1 << 24)
"""Feature bits that are no device type's (virtio 1.2, 2.2)."""
_CARRIED = (
    Feature.ANY_LAYOUT
    | Feature.RING_INDIRECT_DESC
    | Feature.RING_EVENT_IDX
    | Feature.VERSION_1
    | Feature.ACCESS_PLATFORM
    | Feature.RING_PACKED
    | Feature.IN_ORDER
    | Feature.ORDER_PLATFORM
)
"""Those that hold on both sides of a relay. Others promise something of rings, interrupts or doorbells that ours do not keep."""
_TABLE = 32
"""Buffers of the longest chain that goes on in an indirect table; longer ones take as many descriptors."""
_NEGOTIATED = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
_BEHIND = (ops.GET_CONFIG, ops.SET_CONFIG, ops.GET_CONFIG_SIZE, ops.SET_CONFIG_CALL)


def carried(features: int) -> int:
    """Those of *features* that a relay can offer."""
    return features & ~(_TRANSPORT & ~_CARRIED)


def relayed(behind: Backend, why: str = "asked for") -> RelayBackend:
    """A relay in front of *behind*, which is closed when there can be none."""
    try:
        return RelayBackend(behind, why)
    except BaseException:
        behind.close()
        raise


class RelayBackend(RuledBackend):
    """One opening of the device that *behind* is an opening of, which it takes over. *why* is told to those who ask."""

    offered_backend_features = (
        B.IOTLB_MSG_V2 | B.IOTLB_BATCH | B.IOTLB_ASID | B.SUSPEND | B.RESUME | B.ENABLE_AFTER_DRIVER_OK | B.IOTLB_PERSIST
    )

    def __init__(self, behind: Backend, why: str) -> None:
        super().__init__(behind.name)
        self._why = why
        self._behind = behind
        self._device = Device(behind)
        self._identity = self._device.identify()
        self.queue_size = 1 << self._identity.queue_size.bit_length() - 1
        self._memory = RelayMemory(self._device)
        self._rings_behind: dict[int, Behind] = {}
        self._agreed = self._refused = False
        self._runner = RelayRunner(behind.name, self._ring_broke)
        self._lock = self._runner.lock

    def capability(self, op: Op[Any, Any]) -> Capability:
        """The device's own where it is asked, else native for whatever has a method."""
        if op in _BEHIND:
            return self._behind.capability(op)
        return Capability(NATIVE) if op in self.methods else Capability(ABSENT, "a relay has no such thing")

    @property
    def relayed(self) -> str:
        """What ``why`` was."""
        return self._why

    def facts(self) -> dict[str, object]:
        """The device's, and that its rings are relayed."""
        return {**self._behind.facts(), "relay": self._why}

    def close(self) -> None:
        """Reset, unmap, give the device back. The client's eventfds go before the thread, which one of them may hold up."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._runner.clear()
        try:
            self._behind.close()
        finally:
            self._forget_behind()
            self._forget()
            if self._config_call is not None:
                self._config_call.close()
            self._memory.close()
            self._runner.close()

    # Life cycle --------------------------------------------------------------------------------------------------------

    def _set_owner(self, request: Empty) -> None:
        """The device may have an owner already: its opening was handed over."""
        super()._set_owner(request)
        features = self._identity.backend_features & (B.IOTLB_MSG_V2 | B.IOTLB_BATCH | B.IOTLB_PERSIST)
        owned, accepted = self._behind.call_many([(ops.SET_OWNER, EMPTY), (ops.SET_BACKEND_FEATURES, U64(features))])
        for answer, harmless in ((owned, errno.EBUSY), (accepted, 0)):
            if isinstance(answer, OSError) and answer.errno != harmless:
                self._owned = False
                raise answer
        self._device.backend_features = features

    def _get_features(self, request: Empty) -> U64:
        return U64(carried(self._device.get_features()))

    def _on_features(self, features: int) -> None:
        """Bits that were not offered are dropped in silence, as vdpa_sim does."""

    def _get_status(self, request: Empty) -> U8:
        """Ours; the device may have something to say beside it."""
        status = self._status | self._device.get_status() & (Status.NEEDS_RESET | Status.FAILED)
        return U8(status & ~Status.FEATURES_OK if self._refused else status)

    def _on_status(self, new: int, starts: bool) -> None:
        if (starts or new & Status.FEATURES_OK) and not self._agreed:
            self._agree()
        if starts:
            if self._refused:
                raise refuse(errno.EINVAL, f"the device refuses the features {self._features:#x}")
            self._start()

    def _on_reset(self, keep_mappings: bool) -> None:
        self._runner.clear()
        self._stop_behind()
        self._agreed = self._refused = False
        if not keep_mappings:
            self._memory.clear()

    def _get_device_id(self, request: Empty) -> U32:
        return U32(self._identity.device_id)

    def _ring_broke(self, index: int, why: str) -> None:
        _log.warning("%s: queue %d: %s; the device needs a reset", self.name, index, why)
        self._status |= Status.NEEDS_RESET
        if self._config_call is not None:
            self._runner.signal(self._config_call)

    # The device behind ---------------------------------------------------------------------------------------------------

    def _agree(self) -> None:
        """Bring the device from reset to FEATURES_OK with what the client accepted; ``_refused`` if it does not take that."""
        features = self._features & carried(self._identity.features)
        answers = self._behind.call_many(
            [
                (ops.SET_STATUS, U8(0)),
                (ops.SET_STATUS, U8(Status.ACKNOWLEDGE)),
                (ops.SET_STATUS, U8(Status.ACKNOWLEDGE | Status.DRIVER)),
                (ops.SET_FEATURES, U64(features)),
                (ops.SET_STATUS, U8(_NEGOTIATED)),
                (ops.GET_STATUS, EMPTY),
            ]
        )
        self._memory.was_reset()
        if error := first_error(answers):
            raise error
        self._agreed, self._refused = True, not answers[-1].value & Status.FEATURES_OK

    def _start(self) -> None:
        """From FEATURES_OK on: a ring of ours behind each that the client has, memory, DRIVER_OK; then the client's rings."""
        accepted = self._features & carried(self._identity.features)
        packed = bool(accepted & Feature.RING_PACKED)
        table = _TABLE if accepted & Feature.RING_INDIRECT_DESC else 0
        layout = RingLayout.contiguous(self.queue_size, table, packed)
        indices = [index for index, ring in enumerate(self._rings) if ring.addr is not None]
        each = -(-layout.size // 4096) * 4096
        setups = []
        try:
            region = self._memory.rings(each * len(indices)) if indices else None
            for at, index in enumerate(indices):
                assert region is not None
                queue: DriverQueue[None] = DriverQueue(
                    region.mapping.address + at * each,
                    each,
                    region.iova + at * each,
                    self.queue_size,
                    table_entries=table,
                    event_idx=bool(accepted & Feature.RING_EVENT_IDX),
                    owner=region,
                    packed=packed,
                    in_order=bool(accepted & Feature.IN_ORDER),
                    overstated=True,  # the client may have expected it of the device, and gets no more than fits
                )
                behind = self._rings_behind[index] = Behind(queue, _eventfd(), _eventfd())
                base = PACKED_BEGIN if packed else 0
                setups.append(RingSetup(index, queue.num, queue.desc, queue.avail, queue.used, behind.kick.fd, behind.call.fd, base))
            self._device.start(setups, self._memory.missing())
        except (OSError, ValueError):
            self._memory.was_reset()
            self._forget_behind()
            raise
        self._memory.is_there()
        for index, ring in enumerate(self._rings):
            if ring.enabled:
                self._serve(index, ring)

    def _stop_behind(self) -> None:
        """Reset the device; its mappings may go with it, but not those of the client here."""
        if self._owned or self._status:
            self._device.reset()
            self._memory.was_reset()
        self._forget_behind()

    def _forget_behind(self) -> None:
        rings, self._rings_behind = self._rings_behind, {}
        for behind in rings.values():
            behind.close()

    # Configuration space -----------------------------------------------------------------------------------------------

    def _config_bytes(self) -> int:
        return self._identity.config_size

    def _read_config(self, offset: int, length: int) -> bytes:
        return self._device.get_config(offset, length)

    def _write_config(self, offset: int, data: bytes) -> None:
        self._device.set_config(offset, data)

    def _set_config_call(self, request: EventFile) -> None:
        """For the device, and for us: a ring that breaks here is news as well."""
        event = EventFd.borrow(request.fd)
        try:
            self._behind.call(ops.SET_CONFIG_CALL, request)
        except BaseException:
            if event is not None:
                event.close()
            raise
        old, self._config_call = self._config_call, event
        if old is not None:
            old.close()

    # Queues ------------------------------------------------------------------------------------------------------------

    def _queues(self) -> int:
        return self._identity.queues

    def _get_vring_base(self, request: VringState) -> VringState:
        ring = self._ring(request.index)
        relayed = self._runner.rings.get(request.index)
        return VringState(request.index, relayed.base if relayed is not None else self._base(ring))

    def _on_event(self, index: int, ring: Ring) -> None:
        if relayed := self._runner.rings.get(index):
            relayed.call = ring.call
            if relayed.kick is not ring.kick:
                self._runner.rekick(index, ring.kick)

    def _on_enable(self, index: int, ring: Ring) -> None:
        relayed = self._runner.rings.get(index)
        if relayed is not None:
            relayed.enabled = ring.enabled
            if ring.enabled:
                self._runner.look(index)
            else:
                self._runner.settle([relayed])
        elif ring.enabled and (index in self._rings_behind or ring.addr is None):
            self._serve(index, ring)
        elif ring.enabled:  # the device has to be told of it before it starts
            self._on_suspend()
            self._on_resume()

    def _serve(self, index: int, ring: Ring) -> None:
        """Let a ring of the client work from its base on."""
        accepted = self._features
        try:
            if ring.addr is None:
                raise ValueError("enabled without an address")
            front = DeviceQueue(
                self._memory.here,
                ring.num,
                ring.addr.desc,
                ring.addr.avail,
                ring.addr.used,
                base=ring.base,
                event_idx=bool(accepted & Feature.RING_EVENT_IDX),
                indirect=bool(accepted & Feature.RING_INDIRECT_DESC),
                packed=bool(accepted & Feature.RING_PACKED),
                in_order=bool(accepted & Feature.IN_ORDER),
            )
        except (OSError, ValueError) as error:
            self._ring_broke(index, reason(error))
            return
        self._runner.add(index, RelayedRing(front, self._rings_behind[index], self._memory.places, ring.kick, ring.call))

    def _on_suspend(self) -> None:
        self._runner.settle(list(self._runner.rings.values()))
        self._device.reset()
        self._runner.finish()
        for index, relayed in self._runner.rings.items():
            self._rings[index].base = relayed.base
        self._runner.clear()
        self._memory.was_reset()
        self._forget_behind()

    def _on_resume(self) -> None:
        self._agree()
        if self._refused:
            raise refuse(errno.EIO, "the device took these features before, and does not any more")
        self._start()

    # Address spaces and mappings ---------------------------------------------------------------------------------------

    def _get_iova_range(self, request: Empty) -> IovaRange:
        return IovaRange(Iova(0), Iova(U64_MAX))

    def _iotlb_update(self, request: IotlbUpdate) -> None:
        self._memory.add(self._for_memory(request))

    def _iotlb_invalidate(self, request: IotlbInvalidate) -> None:
        self._memory.remove(self._for_memory(request))

    def _iotlb_batch_begin(self, request: IotlbBatchBegin) -> None:
        self._memory.table.begin(self._for_memory(request))

    def _iotlb_batch_end(self, request: IotlbBatchEnd) -> None:
        self._memory.table.end(self._for_memory(request))


def _eventfd() -> EventFd:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        return EventFd(fd)
    finally:
        os.close(fd)
