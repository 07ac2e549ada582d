# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The kernel's rules about operations, for devices that are not in the kernel.

Rule of this file: one method per operation, found by the operation's name, with the checks, their order and the errno of
drivers/vhost/vdpa.c and drivers/vdpa/vdpa_sim/vdpa_sim.c. What a device then does about it is a hook (``_on_...``) of
the home that it lives in. The contract tests compare all of it with the kernel.
"""

from __future__ import annotations

import errno
import threading
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

from .. import ops
from ..errors import RemoteProtocolError, device_error
from ..eventfd import EventFd
from ..flags import BackendFeature as B
from ..flags import Feature, Status
from ..memory import M, as_seen
from ..ops import Op, Rep, Req
from ..virtqueue import PACKED_BEGIN
from ..wire import (
    EMPTY,
    U8,
    U16,
    U32,
    U64,
    ConfigData,
    ConfigRange,
    Empty,
    EventFile,
    VringAddr,
    VringFile,
    VringState,
)
from .base import Backend
from .hints import hint


def refuse(number: int, why: str = "") -> OSError:
    """The error of an operation; without *why* the usual hint is added."""
    return OSError(number, why)


@dataclass
class Ring:
    """What a driver has said about one queue."""

    num: int
    addr: VringAddr | None = None
    base: int | None = None
    """What SET_VRING_BASE said, or where the ring stopped; None for the beginning."""
    kick: EventFd | None = None
    call: EventFd | None = None
    err: EventFd | None = None
    enabled: bool = False

    def close(self) -> None:
        """Give the eventfds back."""
        for event in (self.kick, self.call, self.err):
            if event is not None:
                event.close()
        self.kick = self.call = self.err = None


class RuledBackend(Backend):
    """A session whose state is kept here, by the kernel's rules. Synchronization: any thread; operations take turns."""

    offered_backend_features: int
    queue_size: int
    methods: ClassVar[dict[Op[Any, Any], Callable[[Any, Any], Any]]]
    """The method of each operation that this home has."""

    def __init_subclass__(cls) -> None:
        named = {op: getattr(cls, f"_{op.name.lower()}", None) for op in ops.TABLE}
        cls.methods = {op: method for op, method in named.items() if method is not None}

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock: AbstractContextManager[object] = threading.RLock()
        self._owned = False
        self._closed = False
        self._backend_features = 0
        self._rings: list[Ring] = []
        self._status = 0
        self._features = 0
        self._suspended = False
        self._config_call: EventFd | None = None

    def call(self, op: Op[Req, Rep], request: Req) -> Rep:
        """Carry out one operation."""
        method = self.methods.get(op)
        try:
            if self._closed:
                raise refuse(errno.EBADF, "this session is closed")
            if method is None:
                if isinstance(request, VringState):
                    self._ring(request.index)  # vhost_vdpa_vring_ioctl asks for owner and queue first
                raise refuse(errno.EOPNOTSUPP, self.capability(op).note)
            with self._lock:
                reply = method(self, request)
        except RemoteProtocolError:
            raise
        except OSError as error:
            number = error.errno or errno.EIO
            raise device_error(number, op.name, self.name, error.strerror or hint(op, number)) from None
        return EMPTY if reply is None else reply  # type: ignore[return-value]

    # Hooks -------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _queues(self) -> int:
        """Number of queues."""

    @abstractmethod
    def _on_features(self, features: int) -> None:
        """The driver's features are accepted."""

    @abstractmethod
    def _on_status(self, new: int, starts: bool) -> None:
        """The status byte grows to *new*; *starts* when DRIVER_OK comes with it. It is stored when this returns."""

    @abstractmethod
    def _on_reset(self, keep_mappings: bool) -> None:
        """Stop all rings and forget the driver; the state kept here goes right afterwards."""

    @abstractmethod
    def _on_enable(self, index: int, ring: Ring) -> None:
        """``ring.enabled`` changed while the device runs."""

    @abstractmethod
    def _on_event(self, index: int, ring: Ring) -> None:
        """The kick or call eventfd of a ring changed; the old one is closed when this returns."""

    @abstractmethod
    def _on_suspend(self) -> None:
        """Stop all rings and note where they stand in ``ring.base``."""

    @abstractmethod
    def _on_resume(self) -> None:
        """Let the enabled rings go on from ``ring.base``."""

    @abstractmethod
    def _config_bytes(self) -> int:
        """Size of the configuration space."""

    @abstractmethod
    def _read_config(self, offset: int, length: int) -> bytes:
        """Bytes of the configuration space; the range is checked."""

    @abstractmethod
    def _write_config(self, offset: int, data: bytes) -> None:
        """The range is checked."""

    # Features and status -------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """The state after a reset."""
        for ring in self._rings:
            ring.close()
        self._rings = [Ring(self.queue_size) for _ in self._rings]
        self._status = 0
        self._features = 0
        self._suspended = False

    def _set_features(self, request: U64) -> None:
        if self._status & Status.FEATURES_OK:
            raise refuse(errno.EBUSY)
        if not request.value & Feature.ACCESS_PLATFORM:
            raise refuse(errno.EINVAL)
        self._on_features(request.value)
        self._features = request.value

    def _get_backend_features(self, request: Empty) -> U64:
        return U64(self.offered_backend_features)

    def _set_backend_features(self, request: U64) -> None:
        if request.value & ~self.offered_backend_features:
            raise refuse(errno.EOPNOTSUPP)
        self._backend_features = request.value

    def _set_owner(self, request: Empty) -> None:
        if self._owned:
            raise refuse(errno.EBUSY)
        self._owned = True

    def _need_owner(self) -> None:
        if not self._owned:
            raise refuse(errno.EPERM)

    def _for_memory(self, request: M) -> M:
        """An IOTLB message as it counts; EPERM without an owner."""
        self._need_owner()
        return as_seen(request, self._backend_features)

    def _get_status(self, request: Empty) -> U8:
        return U8(self._status)

    def _set_status(self, request: U8) -> None:
        new, old = request.value, self._status
        if new and old & ~new:
            raise refuse(errno.EINVAL)
        if not new:
            self._on_reset(bool(self._backend_features & B.IOTLB_PERSIST))
            self._forget()
            return
        self._on_status(new, bool(new & ~old & Status.DRIVER_OK))
        self._status |= new

    # Configuration space -------------------------------------------------------------------------------------------------

    def _bounded(self, offset: int, length: int) -> None:
        size = self._config_bytes()
        if not length or offset > size or length > size - offset:
            raise refuse(errno.EINVAL)

    def _get_config(self, request: ConfigRange) -> ConfigData:
        self._bounded(request.offset, request.length)
        return ConfigData(request.offset, self._read_config(request.offset, request.length))

    def _set_config(self, request: ConfigData) -> None:
        self._bounded(request.offset, len(request.data))
        self._write_config(request.offset, request.data)

    def _get_config_size(self, request: Empty) -> U32:
        return U32(self._config_bytes())

    def _set_config_call(self, request: EventFile) -> None:
        old, self._config_call = self._config_call, EventFd.borrow(request.fd)
        if old is not None:
            old.close()

    # Queues --------------------------------------------------------------------------------------------------------------

    def _get_vqs_count(self, request: Empty) -> U32:
        return U32(self._queues())

    def _get_vring_num(self, request: Empty) -> U16:
        return U16(self.queue_size)

    def _ring(self, index: int) -> Ring:
        if not self._owned:
            raise refuse(errno.EPERM)
        if index >= len(self._rings):
            count = self._queues()
            if index >= count:
                raise refuse(errno.ENOBUFS)
            self._rings = [Ring(self.queue_size) for _ in range(count)]
        return self._rings[index]

    @property
    def _running(self) -> bool:
        return bool(self._status & Status.DRIVER_OK) and not self._suspended

    @property
    def _packed(self) -> bool:
        """Rings are packed: their base is two indices with their wrap counters."""
        return bool(self._features & Feature.RING_PACKED)

    def _base(self, ring: Ring) -> int:
        """Where a ring stands that does not work."""
        if ring.base is None:
            return PACKED_BEGIN if self._packed else 0
        return ring.base

    def _get_vring_size(self, request: VringState) -> VringState:
        ring = self._ring(request.index)
        return VringState(request.index, ring.num if self._status & Status.DRIVER_OK else self.queue_size)

    def _set_vring_num(self, request: VringState) -> None:
        ring = self._ring(request.index)
        if not 0 < request.num <= self.queue_size or request.num & (request.num - 1):
            raise refuse(errno.EINVAL)
        ring.num = request.num

    def _set_vring_addr(self, request: VringAddr) -> None:
        ring = self._ring(request.index)
        if request.flags & ~1:
            raise refuse(errno.EOPNOTSUPP)
        if request.avail % 2 or request.used % 4 or request.log % 4 or self._running:
            raise refuse(errno.EINVAL)
        ring.addr = request

    def _set_vring_base(self, request: VringState) -> None:
        ring = self._ring(request.index)
        if (request.num > 0xFFFF and not self._packed) or self._running:
            raise refuse(errno.EINVAL)
        ring.base = request.num

    def _set_event(self, which: str, request: VringFile) -> None:
        ring = self._ring(request.index)
        old = getattr(ring, which)
        setattr(ring, which, EventFd.borrow(request.fd))
        try:
            self._on_event(request.index, ring)
        finally:
            if old is not None:
                old.close()

    def _set_vring_kick(self, request: VringFile) -> None:
        self._set_event("kick", request)

    def _set_vring_call(self, request: VringFile) -> None:
        self._set_event("call", request)

    def _set_vring_err(self, request: VringFile) -> None:
        self._set_event("err", request)

    def _set_vring_enable(self, request: VringState) -> None:
        ring = self._ring(request.index)
        enable = bool(request.num)
        if enable != ring.enabled:
            ring.enabled = enable
            if self._running:
                self._on_enable(request.index, ring)

    def _suspend(self, request: Empty) -> None:
        if self._running:
            self._on_suspend()
            self._suspended = True

    def _resume(self, request: Empty) -> None:
        if self._suspended:
            self._suspended = False
            self._on_resume()

    # Groups, for devices with one of them and one address space -----------------------------------------------------------

    def _get_group_num(self, request: Empty) -> U32:
        return U32(1)

    def _get_as_num(self, request: Empty) -> U32:
        return U32(1)

    def _get_vring_group(self, request: VringState) -> VringState:
        self._ring(request.index)
        return VringState(request.index, 0)

    def _set_group_asid(self, request: VringState) -> None:
        self._ring(request.index)
        if request.index or request.num:
            raise refuse(errno.EINVAL)
