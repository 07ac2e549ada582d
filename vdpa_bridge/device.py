# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A vDPA device by named, typed operations, and its life cycle: once, above every home.

Rule of this file: nothing here asks where the device lives. What a home cannot do shows as OSError(EOPNOTSUPP); where
virtio or vhost-vdpa says what to do then, it is done here.

Bring-up order (virtio 1.2, 3.1.1, and what the kernel's parents need; all of them accept this one): owner, back-end
features, reset, ACKNOWLEDGE, DRIVER, features, FEATURES_OK and read back, mappings, rings, DRIVER_OK and read back.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from . import ops
from .backends.base import Backend
from .errors import DeviceBroken, FeatureError
from .flags import BackendFeature, Feature, Status, bit_names, status_text
from .ops import Call, Op
from .virtio.ids import device_name
from .wire import (
    EMPTY,
    U8,
    U64,
    ConfigData,
    ConfigRange,
    EventFile,
    IotlbBatchBegin,
    IotlbBatchEnd,
    IotlbInvalidate,
    IotlbUpdate,
    Iova,
    IovaRange,
    VringAddr,
    VringFile,
    VringState,
)

UNDERSTOOD = (
    BackendFeature.IOTLB_MSG_V2
    | BackendFeature.IOTLB_BATCH
    | BackendFeature.IOTLB_ASID
    | BackendFeature.SUSPEND
    | BackendFeature.RESUME
    | BackendFeature.ENABLE_AFTER_DRIVER_OK
    | BackendFeature.IOTLB_PERSIST
)
"""Back-end features that this class acknowledges when offered."""
MOST_QUEUES = 1 << 16


@dataclass(frozen=True)
class Identity:
    """What a device says of itself before anything is negotiated."""

    device_id: int
    features: int
    backend_features: int
    queues: int
    queue_size: int
    config_size: int
    iova_range: IovaRange
    groups: int
    address_spaces: int


_QUESTIONS: tuple[tuple[Op[Any, Any], str, int | None], ...] = (
    (ops.GET_DEVICE_ID, "device_id", None),
    (ops.GET_FEATURES, "features", None),
    (ops.GET_BACKEND_FEATURES, "backend_features", 0),
    (ops.GET_VQS_COUNT, "queues", None),
    (ops.GET_VRING_NUM, "queue_size", None),
    (ops.GET_CONFIG_SIZE, "config_size", None),
    (ops.GET_IOVA_RANGE, "iova_range", 0),
    (ops.GET_GROUP_NUM, "groups", 1),
    (ops.GET_AS_NUM, "address_spaces", 1),
)
"""What ``identify`` asks, the field of Identity, and what holds where an older kernel does not know."""


@dataclass(frozen=True)
class RingSetup:
    """One ring as the driver wants it; addresses are IOVAs, descriptors are lent, -1 for none."""

    index: int
    num: int
    desc: int
    avail: int
    used: int
    kick: int = -1
    call: int = -1
    base: int = 0

    def calls(self, enable: bool = True) -> list[Call]:
        """The operations that set the ring up."""
        address = VringAddr(self.index, 0, Iova(self.desc), Iova(self.used), Iova(self.avail), 0)
        calls: list[Call] = [
            (ops.SET_VRING_NUM, VringState(self.index, self.num)),
            (ops.SET_VRING_ADDR, address),
            (ops.SET_VRING_BASE, VringState(self.index, self.base)),
            (ops.SET_VRING_KICK, VringFile(self.index, self.kick)),
            (ops.SET_VRING_CALL, VringFile(self.index, self.call)),
        ]
        if enable:
            calls.append((ops.SET_VRING_ENABLE, VringState(self.index, 1)))
        return calls


def first_error(results: Sequence[Any]) -> OSError | None:
    """The first error among the results of ``call_many``."""
    for result in results:
        if isinstance(result, OSError):
            return result
    return None


class Device:
    """A device, wherever it lives. Owns its back-end. Every method raises OSError when the device says no.

    Synchronization: one thread at a time.
    """

    def __init__(self, backend: Backend, also_close: Callable[[], None] | None = None) -> None:
        """*also_close* is called after the back-end is closed (a model that lives for this device alone)."""
        self.backend = backend
        self._also_close = also_close
        self.features = 0
        """Feature bits accepted by the last ``negotiate``."""
        self.backend_features = 0
        self._owned = False
        self._identity: Identity | None = None

    @property
    def name(self) -> str:
        """The target, for messages."""
        return self.backend.name

    def close(self) -> None:
        """Reset the device and let it go; harmless when done before."""
        self.backend.close()
        if self._also_close is not None:
            self._also_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Questions -------------------------------------------------------------------------------------------------------

    def identify(self) -> Identity:
        """Ask all there is to ask of a device at rest; one round trip over a socket. Cached, as none of it changes."""
        if self._identity is None:
            numbers: dict[str, int] = {}
            limits = IovaRange(Iova(0), Iova((1 << 64) - 1))
            for (_, name, default), reply in zip(_QUESTIONS, self.backend.call_many([(op, EMPTY) for op, _, _ in _QUESTIONS]), strict=True):
                if isinstance(reply, OSError):
                    if reply.errno != errno.EOPNOTSUPP or default is None:
                        raise reply
                    numbers[name] = default
                elif isinstance(reply, IovaRange):
                    limits = reply
                else:
                    numbers[name] = int(reply.value)
            numbers.pop("iova_range", None)
            if numbers["queues"] > MOST_QUEUES:
                raise DeviceBroken(f"{self.name} says that it has {numbers['queues']} queues; virtio numbers them with 16 bits")
            self._identity = Identity(iova_range=limits, **numbers)
        return self._identity

    def get_device_id(self) -> int:
        """Virtio device id."""
        return self.backend.call(ops.GET_DEVICE_ID, EMPTY).value

    def get_features(self) -> int:
        """Feature bits offered."""
        return self.backend.call(ops.GET_FEATURES, EMPTY).value

    def get_status(self) -> int:
        """Device status byte."""
        return self.backend.call(ops.GET_STATUS, EMPTY).value

    def set_status(self, status: int) -> None:
        """Write the status byte. 0 resets; otherwise bits can only be added. Read it back to see what the device made of it."""
        self.backend.call(ops.SET_STATUS, U8(status))

    def get_config(self, offset: int, length: int) -> bytes:
        """*length* bytes of configuration space from *offset*; EINVAL outside of it."""
        return self.backend.call(ops.GET_CONFIG, ConfigRange(offset, length)).data

    def set_config(self, offset: int, data: bytes) -> None:
        """Write configuration space; that it returns does not mean that the device took it (virtio 1.2, 2.5)."""
        self.backend.call(ops.SET_CONFIG, ConfigData(offset, data))

    def set_config_call(self, fd: int) -> None:
        """Let *fd* be signalled when the configuration changes; -1 for none."""
        self.backend.call(ops.SET_CONFIG_CALL, EventFile(fd))

    def get_vring_base(self, index: int) -> int:
        """Next available index of a ring that is suspended or stopped."""
        return self.backend.call(ops.GET_VRING_BASE, VringState(index, 0)).num

    # Memory ----------------------------------------------------------------------------------------------------------

    def map(self, updates: Iterable[IotlbUpdate]) -> None:
        """Enter mappings, in one batch per address space where the back-end batches. None is left when one is refused."""
        done = list(updates)
        self._all(self._updates(done), undo=done)

    def unmap(self, updates: Iterable[IotlbUpdate]) -> None:
        """Take mappings away that ``map`` made."""
        self._all(self._batched([(ops.IOTLB_INVALIDATE, IotlbInvalidate(u.iova, u.size, u.asid)) for u in updates]))

    def _updates(self, updates: Iterable[IotlbUpdate]) -> list[Call]:
        return self._batched([(ops.IOTLB_UPDATE, update) for update in updates])

    def _batched(self, messages: Sequence[tuple[Op[Any, Any], IotlbUpdate | IotlbInvalidate]]) -> list[Call]:
        """*messages*, those of one address space together, and in a batch where they are several."""
        calls: list[Call] = []
        for asid in dict.fromkeys(message.asid for _, message in messages):
            some = [(op, message) for op, message in messages if message.asid == asid]
            batch = len(some) > 1 and bool(self.backend_features & BackendFeature.IOTLB_BATCH)
            calls += [(ops.IOTLB_BATCH_BEGIN, IotlbBatchBegin(asid))] * batch + [*some] + [(ops.IOTLB_BATCH_END, IotlbBatchEnd(asid))] * batch
        return calls

    def _all(self, calls: list[Call], undo: Sequence[IotlbUpdate] = (), reset: bool = False) -> list[Any]:
        """All replies, or the first error. Before it is raised, a device that may run already is *reset*, and mappings are undone."""
        results = self.backend.call_many(calls)
        if error := first_error(results):
            if reset:
                with contextlib.suppress(OSError):
                    self.reset()
            for (op, request), result in zip(calls, results, strict=True):
                if op is ops.IOTLB_UPDATE and request in undo and not isinstance(result, OSError):
                    assert isinstance(request, IotlbUpdate)
                    with contextlib.suppress(OSError):
                        self.backend.call(ops.IOTLB_INVALIDATE, IotlbInvalidate(request.iova, request.size, request.asid))
            raise error
        return results

    # Life cycle --------------------------------------------------------------------------------------------------------

    def own(self) -> None:
        """Become the owner and acknowledge back-end features, once."""
        self._all(self._ownership())
        self._owned = True

    def _ownership(self) -> list[Call]:
        """What makes us the owner, nothing when we are."""
        if self._owned:
            return []
        self.backend_features = self.identify().backend_features & UNDERSTOOD
        calls: list[Call] = [(ops.SET_OWNER, EMPTY)]
        if self.backend_features:
            calls.append((ops.SET_BACKEND_FEATURES, U64(self.backend_features)))
        return calls

    def reset(self) -> None:
        """Status 0: rings and features are forgotten, mappings too unless IOTLB_PERSIST is acknowledged."""
        self.set_status(0)
        self.features = 0

    def negotiate(self, wanted: int, required: int = 0) -> int:
        """Reset, then agree on ``wanted & offered`` and set FEATURES_OK; return the bits agreed on.

        VERSION_1 and ACCESS_PLATFORM are always wanted: vDPA devices are modern and see IOVAs.
        FeatureError when a *required* bit is not offered or the device does not accept the set.
        """
        offered = self.identify().features
        agreed = offered & (wanted | required | Feature.VERSION_1 | Feature.ACCESS_PLATFORM)
        if missing := required & ~offered:
            raise FeatureError(f"{self.name} does not offer {', '.join(bit_names(Feature, missing))}")
        driver = Status.ACKNOWLEDGE | Status.DRIVER
        results = self._all(
            [
                *self._ownership(),
                (ops.SET_STATUS, U8(0)),
                (ops.SET_STATUS, U8(driver)),
                (ops.SET_FEATURES, U64(agreed)),
                (ops.SET_STATUS, U8(driver | Status.FEATURES_OK)),
                (ops.GET_STATUS, EMPTY),
            ]
        )
        self._owned = True
        status = results[-1].value
        if not status & Status.FEATURES_OK:
            raise FeatureError(f"{self.name} refuses the feature set {agreed:#x}: FEATURES_OK did not stay set (status {status_text(status)})")
        self.features = agreed
        return agreed

    def group_of(self, index: int) -> int:
        """The group of queue *index*: queues of one group are in one address space. 0 for all where the device has no groups."""
        try:
            return self.backend.call(ops.GET_VRING_GROUP, VringState(index, 0)).num
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return 0

    def start(
        self,
        rings: Sequence[RingSetup],
        updates: Sequence[IotlbUpdate] = (),
        config_call: int = -1,
        spaces: Mapping[int, int] | None = None,
    ) -> None:
        """Map *updates*, set *rings* up, set DRIVER_OK. When anything is refused, the device is reset and the refusal raised.

        *spaces* says which groups of queues use another address space than 0; a reset puts them back.

        ValueError for a ring that the device cannot have, before anything is sent.
        """
        limits = self.identify()
        for ring in rings:
            if ring.index >= limits.queues:
                raise ValueError(f"{self.name} has {limits.queues} queues, there is no queue {ring.index}")
            if ring.num > limits.queue_size or ring.num < 1 or ring.num & (ring.num - 1):
                raise ValueError(f"{self.name} takes split rings of 2^n entries up to {limits.queue_size}, not {ring.num}")
        calls: list[Call] = [(ops.SET_GROUP_ASID, VringState(group, asid)) for group, asid in (spaces or {}).items()]
        calls += self._updates(updates)
        for ring in rings:
            calls += ring.calls()
        if config_call >= 0:
            calls.append((ops.SET_CONFIG_CALL, EventFile(config_call)))
        running = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
        self._all(calls, undo=updates, reset=True)  # all of it: a device must not start with a ring that it refused
        try:
            status = self._all([(ops.SET_STATUS, U8(running)), (ops.GET_STATUS, EMPTY)], reset=True)[-1].value
        except OSError:
            with contextlib.suppress(OSError):
                self.unmap(updates)
            raise
        if status & (Status.NEEDS_RESET | Status.FAILED) or not status & Status.DRIVER_OK:
            raise DeviceBroken(f"{self.name} did not start: status {status_text(status)}")

    @property
    def can_suspend(self) -> bool:
        """Whether ``suspend`` and ``resume`` are there."""
        both = BackendFeature.SUSPEND | BackendFeature.RESUME
        return self.backend_features & both == both

    def suspend(self) -> None:
        """Stop all rings and keep their state; EOPNOTSUPP where the back-end cannot."""
        self.backend.call(ops.SUSPEND, EMPTY)

    def resume(self) -> None:
        """Go on after ``suspend``."""
        self.backend.call(ops.RESUME, EMPTY)

    def __repr__(self) -> str:
        kind = device_name(self._identity.device_id) if self._identity else "not identified"
        return f"<Device {self.name}: {kind}>"
