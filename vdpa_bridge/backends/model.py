# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A device in this process: any Model behind the operations."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import device_error, reason
from ..eventfd import EventFd
from ..flags import BackendFeature as B
from ..flags import Feature, Status
from ..memory import PAGE, IotlbTable, SharedMapping
from ..models.base import RING_FEATURES, Model
from ..ops import Op
from ..virtqueue import DeviceQueue, IovaMap
from ..wire import (
    U32,
    U64,
    Empty,
    IotlbBatchBegin,
    IotlbBatchEnd,
    IotlbInvalidate,
    IotlbUpdate,
    Iova,
    IovaRange,
    VringState,
)
from .base import ABSENT, NATIVE, Capability, DeviceIotlb, Miss
from .rules import Ring, RuledBackend, refuse
from .runner import Runner, ServedQueue

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QueueState:
    """How a queue stands: where the next chain is taken, and the next one is given back."""

    index: int
    size: int
    base: int
    used: int
    enabled: bool
    in_flight: int


@dataclass(frozen=True)
class DeviceState:
    """What a driver has made of a device: the status byte, the features that it accepted, and whether it has to reset it."""

    status: int = 0
    features: int = 0
    broken: bool = False


class ModelDevice:
    """A model that waits for a driver: one opening at a time, as with a character device."""

    on_broken: Callable[[int, str], None] = staticmethod(lambda index, why: None)
    """Called when a ring broke, with the lock held."""

    def __init__(self, model: Model, name: str, poll: int | None = None) -> None:
        """*poll* is how many nanoseconds rings are looked at before a thread sleeps, at most; see ``Runner``."""
        self.model = model
        self.name = name
        self.runner = Runner(model, name, poll)
        self._busy = threading.Lock()
        self._session: ModelBackend | None = None
        model.config_changed = self._config_changed

    def open(self) -> ModelBackend:
        """A fresh session; EBUSY while there is one."""
        if not self._busy.acquire(blocking=False):
            raise device_error(errno.EBUSY, "open", self.name, "somebody else has it open")
        self._session = ModelBackend(self, self._ended)
        return self._session

    def _ended(self) -> None:
        self._session = None
        self._busy.release()

    def change(self, action: Callable[[], None]) -> None:
        """Let *action* change the model between two batches, and tell the driver, if there is one, that its configuration changed."""
        with self.runner.lock:
            action()
            self._config_changed()

    def refresh(self) -> str:
        """Let the model look anew at what is outside; what it says has changed is told to the driver as well."""
        with self.runner.lock:
            if changed := self.model.refresh():
                self._config_changed()
            return changed

    def hold(self, held: bool) -> None:
        """Leave requests where they are until further notice, whoever the driver is; or go on. Operations are carried out meanwhile."""
        with self.runner.lock:
            self.runner.hold(held)

    def state(self) -> DeviceState:
        """As the driver that is there has made it."""
        with self.runner.lock:
            return self._session.state() if self._session is not None else DeviceState()

    def queues(self) -> list[QueueState]:
        """All of them, whether they work or not."""
        with self.runner.lock:
            if self._session is not None:
                return self._session.queues()
            return [QueueState(index, self.model.queue_size, 0, 0, False, 0) for index in range(self.model.queue_count)]

    def _config_changed(self) -> None:
        if self._session is not None:
            self._session.config_changed()

    def replace(self, succeed: Callable[[Model], Model], patience: float = 5.0) -> None:
        """Put what *succeed* makes of the model in its place, between two batches; a driver goes on with it.

        TimeoutError when requests are in flight for *patience* seconds, ValueError when a driver would see another device; the
        model stays then.
        """
        end = time.monotonic() + patience
        while True:
            with self.runner.lock:
                for index in list(self.runner.rings):
                    self.runner.release(index)
                held = {index: ring.queue.in_flight for index, ring in self.runner.rings.items() if ring.queue.in_flight}
                if not held:
                    self._replace(succeed)
                    return
            if time.monotonic() > end:
                raise TimeoutError(f"{self.name}: queue {min(held)} has {held[min(held)]} requests in flight after {patience:g} s")
            time.sleep(0.005)

    def _replace(self, succeed: Callable[[Model], Model]) -> None:
        old, config = self.model, self.model.config()
        new = succeed(old)
        try:
            for what in ("device_id", "queue_count", "queue_size", "groups", "address_spaces"):
                if getattr(old, what) != getattr(new, what):
                    raise ValueError(f"{self.name}: {what} was {getattr(old, what)} and would be {getattr(new, what)}: that takes a new device")
            if self._session is not None:
                self._session.succeed(new)
        except BaseException:
            new.close()
            raise
        new.config_changed = self._config_changed
        self.model = new
        self.runner.replace(new)
        old.close()
        if new.config() != config:
            self._config_changed()

    def close(self) -> None:
        """Give the model's own resources back; the session, if any, is closed before."""
        self.runner.close()
        self.model.close()


class ModelIotlb(DeviceIotlb):
    """What the rings of one opening wait for."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._runner.missed = self._missed
        self._event: EventFd | None = None

    @property
    def enabled(self) -> bool:
        """Whether rings are to wait."""
        return self._event is not None

    def enable(self, event: int) -> None:
        """Keeps a descriptor of its own."""
        with self._runner.lock:
            old, self._event = self._event, EventFd.borrow(event)
        if old is not None:
            old.close()

    def misses(self) -> list[Miss]:
        """By pages, each once."""
        with self._runner.lock:
            found = [miss for ring in self._runner.rings.values() for miss in ring.queue.misses()]
        return list(dict.fromkeys(Miss(Iova(iova & -PAGE), perm) for iova, perm in found))

    def refuse(self, miss: Miss) -> None:
        """The fault that it would have been at once in a ring that does not wait."""
        with self._runner.lock:
            self._runner.refuse(miss.iova, miss.perm)

    def _missed(self) -> None:
        if self._event is not None:
            self._runner.signal(self._event)


class ModelBackend(RuledBackend):
    """One opening of a model. Rings are served by a thread of their own."""

    offered_backend_features = (
        B.IOTLB_MSG_V2 | B.IOTLB_BATCH | B.IOTLB_ASID | B.SUSPEND | B.RESUME | B.ENABLE_AFTER_DRIVER_OK | B.IOTLB_PERSIST
    )

    def __init__(self, device: ModelDevice, on_close: Callable[[], None]) -> None:
        super().__init__(device.name)
        model = device.model
        self._device = device
        self._lock = device.runner.lock
        self._model = model
        self._on_close = on_close
        self.queue_size = model.queue_size
        self._offered = model.features | RING_FEATURES
        self._table: IotlbTable[SharedMapping] = IotlbTable(model.address_spaces)
        self._maps = [IovaMap() for _ in range(model.address_spaces)]
        self._group_space = [0] * model.groups
        self._runner = device.runner
        self._runner.broken = self._ring_broke
        self.iotlb: ModelIotlb = ModelIotlb(self._runner)

    def capability(self, op: Op[Any, Any]) -> Capability:
        """Native for whatever has a method."""
        return Capability(NATIVE) if op in self.methods else Capability(ABSENT, "a model has no such thing")

    def facts(self) -> dict[str, object]:
        """The model."""
        return {"transport": "in this process", "model": type(self._model).__name__}

    def succeed(self, model: Model) -> None:
        """Go on with *model*, as far as its driver has come; ValueError when it lacks a feature that the driver accepted. The lock is held."""
        offered = model.features | RING_FEATURES
        accepted = int(self._features & self._offered)
        if lost := accepted ^ (accepted & int(offered)):
            raise ValueError(f"{self.name}: the driver uses features 0x{lost:x}, which would be gone")
        if self._runner.running:
            model.start(accepted)
        self._model, self._offered = model, offered

    def close(self) -> None:
        """Reset, unmap, let the next one open."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                self._on_reset(keep_mappings=False)
            finally:
                self._forget()
                if self._config_call is not None:
                    self._config_call.close()
                self.iotlb.enable(-1)
                self._on_close()

    # Life cycle --------------------------------------------------------------------------------------------------------

    def _get_features(self, request: Empty) -> U64:
        return U64(self._offered)

    def _on_features(self, features: int) -> None:
        """Bits that were not offered are dropped in silence, as vdpa_sim does; those that the model cannot do without must be there."""
        if self._model.required & ~features:
            raise refuse(errno.EINVAL, f"the driver does without features 0x{self._model.required & ~features:x}, which it must accept")

    def _on_status(self, new: int, starts: bool) -> None:
        if starts:
            self._model.start(self._features & self._offered)
            self._serve_enabled()
            self._runner.start()

    def _on_reset(self, keep_mappings: bool) -> None:
        self._runner.stop()
        self._group_space = [0] * len(self._group_space)
        if not keep_mappings:
            for space in self._maps:
                space.clear()
            for entry in self._table.clear():
                entry.value.close()
        if self._status:
            self._model.reset()

    def _get_device_id(self, request: Empty) -> U32:
        return U32(self._model.device_id)

    def _ring_broke(self, index: int, why: str) -> None:
        _log.warning("%s: queue %d: %s; the device needs a reset", self.name, index, why)
        self._status |= Status.NEEDS_RESET
        self.config_changed()
        self._device.on_broken(index, why)

    def state(self) -> DeviceState:
        """How the device stands. The lock is held, here and below."""
        return DeviceState(self._status, self._features & self._offered, bool(self._status & Status.NEEDS_RESET))

    def queues(self) -> list[QueueState]:
        """How each queue stands."""
        found = []
        for index in range(self._model.queue_count):
            ring, served = self._rings[index] if index < len(self._rings) else Ring(self.queue_size), self._runner.rings.get(index)
            if served is not None:
                found.append(QueueState(index, ring.num, served.queue.base, served.queue.used_idx, True, served.queue.in_flight))
            else:
                found.append(QueueState(index, ring.num, base := self._base(ring), base, False, 0))
        return found

    # Configuration space -----------------------------------------------------------------------------------------------

    def config_changed(self) -> None:
        """Tell the driver that the configuration space, or the status, changed."""
        with self._lock:
            if self._config_call is not None:
                self._runner.signal(self._config_call)

    def _config_bytes(self) -> int:
        return len(self._model.config())

    def _read_config(self, offset: int, length: int) -> bytes:
        return self._model.config()[offset : offset + length]

    def _write_config(self, offset: int, data: bytes) -> None:
        self._model.write_config(offset, data)

    # Queues ------------------------------------------------------------------------------------------------------------

    def _queues(self) -> int:
        return self._model.queue_count

    def _get_vring_base(self, request: VringState) -> VringState:
        ring = self._ring(request.index)
        served = self._runner.rings.get(request.index)
        return VringState(request.index, served.queue.base if served and not self._suspended else self._base(ring))

    def _on_event(self, index: int, ring: Ring) -> None:
        if served := self._runner.rings.get(index):
            self._runner.recall(index, ring.call)
            if served.kick is not ring.kick:
                self._runner.rekick(index, ring.kick)

    def _on_enable(self, index: int, ring: Ring) -> None:
        if ring.enabled:
            self._serve(index, ring)
        elif index in self._runner.rings:
            self._runner.release(index)
            if served := self._runner.remove(index):
                ring.base = served.queue.base

    def _serve_enabled(self) -> None:
        for index, ring in enumerate(self._rings):
            if ring.enabled:
                self._serve(index, ring)

    def _serve(self, index: int, ring: Ring) -> None:
        """Let a ring work from its base on."""
        space = self._maps[self._group_space[self._group(index)]]
        accepted = self._features & self._offered
        try:
            if ring.addr is None:
                raise ValueError("enabled without an address")
            queue = DeviceQueue(
                space,
                ring.num,
                ring.addr.desc,
                ring.addr.avail,
                ring.addr.used,
                base=ring.base,
                event_idx=bool(accepted & Feature.RING_EVENT_IDX),
                indirect=bool(accepted & Feature.RING_INDIRECT_DESC),
                packed=bool(accepted & Feature.RING_PACKED),
                wait=self.iotlb.enabled,
                in_order=bool(accepted & Feature.IN_ORDER),
            )
        except (OSError, ValueError) as error:
            self._ring_broke(index, reason(error))
            return
        self._runner.add(index, ServedQueue(queue, ring.kick, ring.call))

    def _on_suspend(self) -> None:
        self._runner.pause()
        for index, served in self._runner.rings.items():
            self._rings[index].base = served.queue.base

    def _on_resume(self) -> None:
        for index in list(self._runner.rings):
            self._runner.remove(index)
        self._runner.resume()
        self._serve_enabled()

    # Address spaces and mappings ---------------------------------------------------------------------------------------

    def _get_iova_range(self, request: Empty) -> IovaRange:
        return IovaRange(Iova(self._table.first), Iova(self._table.last))

    def _get_group_num(self, request: Empty) -> U32:
        return U32(len(self._group_space))

    def _get_as_num(self, request: Empty) -> U32:
        return U32(self._model.address_spaces)

    def _group(self, index: int) -> int:
        return self._model.group_of(index, self._features)

    def _get_vring_group(self, request: VringState) -> VringState:
        self._ring(request.index)
        return VringState(request.index, self._group(request.index))

    def _set_group_asid(self, request: VringState) -> None:
        self._ring(request.index)
        if request.index >= len(self._group_space) or request.num >= self._model.address_spaces:
            raise refuse(errno.EINVAL)
        self._group_space[request.index] = request.num

    def _iotlb_update(self, request: IotlbUpdate) -> None:
        request = self._for_memory(request)
        self._table.check(request)
        mapping = SharedMapping(request.fd, request.size, request.offset, request.perm)
        self._table.enter(request, mapping)
        self._maps[request.asid].add(request.iova, request.size, mapping.address, request.perm)
        self._runner.retry()

    def _iotlb_invalidate(self, request: IotlbInvalidate) -> None:
        request = self._for_memory(request)
        for entry in self._table.remove(request):
            self._maps[request.asid].remove(entry.iova, entry.size)
            entry.value.close()

    def _iotlb_batch_begin(self, request: IotlbBatchBegin) -> None:
        request = self._for_memory(request)
        self._table.begin(request)

    def _iotlb_batch_end(self, request: IotlbBatchEnd) -> None:
        request = self._for_memory(request)
        self._table.end(request)


