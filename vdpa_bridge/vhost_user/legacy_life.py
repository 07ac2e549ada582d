# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The device under a legacy vhost-user client: when it is brought up, rests, and is reset.

Rule of this file: the life cycle is derived, because many clients never send DRIVER_OK (vhost-user spec, "Ring states").
The device is brought up, with all that was said so far, when the first ring has size, addresses and kick and is
enabled; it is reset when the last one is stopped. Memory stays known across that and is mapped again where needed.
The client's guest physical addresses become the IOVAs.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from .. import ops
from ..backends.base import Backend
from ..device import UNDERSTOOD, first_error
from ..eventfd import kick, was_kicked
from ..flags import VHOST_ONLY_FEATURES, VHOST_USER_F_PROTOCOL_FEATURES, BackendFeature, Feature, Status
from ..ops import Call
from ..wire import EMPTY, U8, U64, IotlbBatchBegin, IotlbBatchEnd, VringFile, VringState
from .legacy_memory import ClientMemory
from .legacy_state import ClientRing

_RUNNING = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK


class LifeCycle:
    """A device and what its client has said of itself, its memory and its rings so far. Does not own the back-end."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._features = 0
        self._backend_features = 0
        self._owned = False
        self._running = False
        self._mapped = False
        self._status = 0
        self._memory = ClientMemory()
        self._rings: dict[int, ClientRing] = {}

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
