# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The device under a legacy vhost-user client: when it is brought up, rests, and is reset.

Rule of this file: the life cycle is derived, because many clients never send DRIVER_OK (vhost-user spec, "Ring states").
The device is brought up, with all that was said so far, when the first ring has size, addresses and kick and is
enabled; it is reset when the last one is stopped. Memory stays known across that and is mapped again where needed.
The client's guest physical addresses become the IOVAs, and ACCESS_PLATFORM is acknowledged for it; a client that
accepts it itself has IOVAs of its own, which ``legacy_iotlb`` translates. A device that cannot have the client's memory
or rings as they are gets a relay in front of it, from then on as long as the client is there.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from .. import ops
from ..backends.base import Backend
from ..backends.relay import RelayBackend
from ..device import UNDERSTOOD, first_error
from ..errors import reason
from ..eventfd import kick, was_kicked
from ..flags import VHOST_ONLY_FEATURES, VHOST_USER_F_PROTOCOL_FEATURES, BackendFeature, Feature, Status
from ..memory import U64_MAX
from ..ops import Call
from ..wire import EMPTY, U8, U64, EventFile, IotlbBatchBegin, IotlbBatchEnd, IotlbInvalidate, Iova, VringFile, VringState
from .backend_channel import BackendEnd
from .legacy_iotlb import ClientIotlb
from .legacy_memory import ClientMemory
from .legacy_state import ClientRing

_log = logging.getLogger(__name__)

_RESET, _DRIVER, _FEATURES_OK, _RUNNING = (
    (ops.SET_STATUS, U8(status))
    for status in (
        0,
        Status.ACKNOWLEDGE | Status.DRIVER,
        Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK,
        Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK,
    )
)


class LifeCycle:
    """A device and what its client has said of itself, its memory and its rings so far. Does not own the back-end.

    *relay*: whether a relay may come between us and the device; ``relayed`` then says why it did.
    """

    def __init__(self, backend: Backend, relay: bool = True) -> None:
        self._device = self._backend = backend
        self._may_relay = relay
        self.relayed = ""
        self._features = 0
        self._backend_features = 0
        self._owned = False
        self._running = False
        self._is_reset = True  # by being opened
        self._mapped = False
        self._status = 0
        self._memory = ClientMemory()
        self._iotlb = None if backend.iotlb is None else ClientIotlb(backend, backend.iotlb, self._memory)
        self._rings: dict[int, ClientRing] = {}
        self._channel: BackendEnd | None = None

    def _all(self, calls: list[Call]) -> list[Any]:
        """The replies to all of *calls*; the first error of any."""
        replies = self._backend.call_many(calls)
        if error := first_error(replies):
            raise error
        return replies

    def _own(self) -> None:
        """Once a connection: owner, and back-end features."""
        if not self._owned:
            offered = self._backend.call(ops.GET_BACKEND_FEATURES, EMPTY).value
            self._backend_features = offered & UNDERSTOOD
            self._all([(ops.SET_OWNER, EMPTY), (ops.SET_BACKEND_FEATURES, U64(self._backend_features))])
            self._owned = True

    def _batch(self, calls: list[Call]) -> list[Call]:
        if len(calls) < 2 or not self._backend_features & BackendFeature.IOTLB_BATCH:
            return calls
        return [(ops.IOTLB_BATCH_BEGIN, IotlbBatchBegin(0)), *calls, (ops.IOTLB_BATCH_END, IotlbBatchEnd(0))]

    def _ring_calls(self, index: int, ring: ClientRing) -> list[Call]:
        assert ring.addr is not None
        address = replace(ring.addr, flags=0, log=0) if self._translates else self._memory.ring(index, ring.addr)
        ring.set_up = True
        calls: list[Call] = [(ops.SET_VRING_KICK, VringFile(index, -1))] if ring.bound else []  # it would ring the doorbell too early, see _start
        calls += [
            (ops.SET_VRING_NUM, VringState(index, ring.num)),
            (ops.SET_VRING_ADDR, address),
            (ops.SET_VRING_BASE, VringState(index, ring.base)),
            (ops.SET_VRING_CALL, VringFile(index, ring.call)),
        ]
        if self._is_enabled(ring):  # virtio-pci has no way to say that a ring is not
            calls.append((ops.SET_VRING_ENABLE, VringState(index, 1)))
        return calls

    @staticmethod
    def _kick_call(index: int, ring: ClientRing) -> Call:
        ring.bound = True
        return ops.SET_VRING_KICK, VringFile(index, ring.kick)

    def _is_enabled(self, ring: ClientRing) -> bool:
        return ring.enabled or not self._features & VHOST_USER_F_PROTOCOL_FEATURES

    def _sync(self) -> None:
        """Bring the device up, or let a further ring in, when what is needed for it has been said."""
        ready = {i: r for i, r in self._rings.items() if r.ready}
        if not self._running:
            if ready and self._may_start(list(ready.values())):
                self._bring_up(ready)
            return
        fresh = {i: r for i, r in ready.items() if not r.set_up}
        if fresh:
            with self._at_rest() as kept:
                if kept:
                    for index, ring in fresh.items():
                        self._all([*self._ring_calls(index, ring), self._kick_call(index, ring)])

    @property
    def waits_for(self) -> str:
        """What the client has to say before its rings can work, empty if they do or if there are none yet. Any thread."""
        silent = [index for index, ring in list(self._rings.items()) if ring.ready and not ring.told and not self._is_enabled(ring)]
        if self._running or not silent:
            return ""
        others = "" if self._enables_late or not self._owned else "; this device enables no ring once it runs, so all have to be spoken of before"
        return f"{', '.join(f'ring {index}' for index in silent)} set up, but not enabled: SET_VRING_ENABLE{others}"

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
        self._negotiate()
        obstacle = self._obstacle()
        if not obstacle:
            try:
                self._start(ready)
                return
            except OSError as error:
                if not self._relay_helps(error):
                    raise
                obstacle = reason(error)
        self._interpose(obstacle)
        self._negotiate()
        self._start(ready)

    def _negotiate(self) -> None:
        """Own the device, and bring it from reset to FEATURES_OK."""
        self._own()
        before, self._is_reset = [] if self._is_reset else [_RESET], False
        features = self._features & ~VHOST_ONLY_FEATURES | Feature.ACCESS_PLATFORM
        *_, status = self._all([*before, _DRIVER, (ops.SET_FEATURES, U64(features)), _FEATURES_OK, (ops.GET_STATUS, EMPTY)])
        if not status.value & Status.FEATURES_OK:
            raise OSError(errno.EINVAL, f"the device refuses the features {features:#x}")

    def _start(self, ready: dict[int, ClientRing]) -> None:
        """From FEATURES_OK on: memory, rings, DRIVER_OK."""
        self._map()
        calls: list[Call] = []
        for index, ring in ready.items():
            calls += self._ring_calls(index, ring)
        try:
            self._all(calls)
            # DRIVER_OK is not sent along: a device that refused a ring's base must not start it at 0. Kicks come behind it: a client need
            # not wait, and vp_vdpa rings the doorbell for it while the queue has no interrupt yet, which is lost then (kernel 6.12)
            self._all([_RUNNING, *(self._kick_call(index, ring) for index, ring in ready.items())])
        except OSError:
            self._reset()
            raise
        self._running = True
        for ring in ready.values():
            if was_kicked(ring.kick):
                kick(ring.kick)  # a kick before DRIVER_OK is lost (vdpa_sim_net.c, vdpa_sim_blk.c), and so is one before a restart

    @property
    def _translates(self) -> bool:
        """Whether the client's guest has an IOMMU, so that addresses are IOVAs of its own."""
        return bool(self._features & Feature.ACCESS_PLATFORM)

    def _map(self) -> None:
        """All memory; or none of it, where each page is asked for when it is needed."""
        if self._iotlb is not None:
            if self._translates and self._channel is None:
                raise OSError(errno.EINVAL, "ACCESS_PLATFORM is accepted, but SET_BACKEND_REQ_FD brought no socket to ask for translations on")
            self._iotlb.listen(self._channel if self._translates else None)
        if self._mapped == self._translates:
            try:
                self._all(self._batch([region.gone if self._mapped else region.there for region in self._memory.regions]))
            except OSError:  # some are mapped, and a reset may keep them: the client gets to send a better table
                self._backend.call_many(self._batch([region.gone for region in self._memory.regions]))
                raise
            self._mapped = not self._mapped

    # The relay -------------------------------------------------------------------------------------------------------------

    @property
    def _can_relay(self) -> bool:
        """A relay cannot wait for mappings."""
        return self._may_relay and not self.relayed and not self._features & Feature.ACCESS_PLATFORM

    def _obstacle(self) -> str:
        """What the client will ask of a negotiated device in vain: where its packed rings stand. Split ones say it themselves."""
        if self._features & Feature.RING_PACKED and self._can_relay:
            try:
                self._backend.call(ops.GET_VRING_BASE, VringState(0, 0))
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:
                    return f"the device does not say where packed rings stand: {reason(error)}"
        return ""

    def _relay_helps(self, error: OSError) -> bool:
        """Whether what the device refused may go with a relay: memory out of its reach, a ring that starts elsewhere than at 0."""
        return self._can_relay and error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSPC)

    def _remap(self, calls: list[Call]) -> bool:
        """Change the mappings of the device. False: a relay came in between, to be brought up when all memory is known."""
        try:
            self._all(calls)
        except OSError as error:
            if not self._relay_helps(error):
                raise
            self._interpose(reason(error))
            return False
        return True

    def _interpose(self, why: str) -> None:
        """Put a relay in front of the device. It has to be brought up anew, with all that the client has said."""
        self._stop_all()
        self._backend.call(ops.IOTLB_INVALIDATE, IotlbInvalidate(Iova(0), U64_MAX))
        self._backend, self.relayed = RelayBackend(self._device, why), why
        self._iotlb = None
        self._owned = self._mapped = False
        _log.warning("requests are relayed from now on: %s", why, extra={"event": "relay"})
        self._watch_config()

    def _watch_config(self) -> None:
        """Have changes of the configuration told to the client, if it listens."""
        if self._channel is not None:
            self._backend.call(ops.SET_CONFIG_CALL, EventFile(self._channel.changed))

    def close_relay(self) -> None:
        """End the relay, if there is one; the device is closed then."""
        if self._backend is not self._device:
            self._backend.close()

    # At rest ---------------------------------------------------------------------------------------------------------------

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
            self._stop_all()
            yield False
            self._sync()

    def _stop_all(self) -> None:
        """Reset the device and know where its rings stood. One that does not tell has used.idx complete when it is reset."""
        if any(ring.set_up for ring in self._rings.values()) and self._backend_features & BackendFeature.SUSPEND:
            self._backend.call(ops.SUSPEND, EMPTY)
        working = [ring for ring in self._rings.values() if ring.set_up]
        told = [self._told_base(index) for index, ring in self._rings.items() if ring.set_up]
        self._reset()
        for ring, base in zip(working, told, strict=True):
            ring.base = self._read_base(ring) if base is None else base

    def _told_base(self, index: int) -> int | None:
        """Next available index of a ring at rest; None when the device does not tell it, but the ring does."""
        try:
            return self._backend.call(ops.GET_VRING_BASE, VringState(index, 0)).num
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP or self._features & Feature.RING_PACKED:
                raise
        return None

    def _read_base(self, ring: ClientRing) -> int:
        """The same from the ring: a device that has stopped has completed all that it took."""
        assert ring.addr is not None
        return self._memory.used_index(ring.addr)

    def _reset(self) -> None:
        self._running = False
        for ring in self._rings.values():
            ring.set_up = False
        if self._owned:
            self._backend.call(*_RESET)
            self._is_reset = True
            self._mapped = self._mapped and bool(self._backend_features & BackendFeature.IOTLB_PERSIST)
        if self._iotlb is not None:
            self._iotlb.reset()
