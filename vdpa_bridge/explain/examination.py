# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Checks, what comes of them, and those that fit a device wherever it lives.

Rule of this file: it knows Device and nothing of the way to it. A check changes nothing that closing the device does not
undo, and has an end.
"""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from .. import ops
from ..backends.base import ABSENT, Backend
from ..backends.memlock import make_room, pinned, suffices
from ..device import Device, Identity
from ..drivers.pool import place
from ..errors import FeatureError, ProtocolError, reason
from ..flags import Feature
from ..memory import PAGE, Region
from ..virtio.features import feature_mask, feature_names
from ..virtio.ids import DeviceId, device_name
from ..wire import EMPTY, IotlbInvalidate, Iova, IovaRange
from .causes import BROKEN, CANNOT_OPEN, FEATURE_WITHHELD, IOVA_RANGE, MEMLOCK, TOO_OLD, Cause

OK, PROBLEM, UNKNOWN = "ok", "problem", "unknown"

_NEEDED: dict[int, tuple[ops.Op[Any, Any], ...]] = {DeviceId.BLOCK: (ops.GET_CONFIG,)}
"""Operations without which the driver of a device type cannot work at all."""


class Problem(Exception):
    """A check found what is wrong. *words* fill in the cause's cure, unless *cure* is a better one."""

    def __init__(self, cause: Cause, says: str, cure: str = "", **words: object) -> None:
        super().__init__(says)
        self.cause = cause
        self.cure = cure or cause.typed(**words)


class Unknown(Exception):
    """A check could not tell; the text says why, and *cure* how to find out."""

    def __init__(self, says: str, cure: str = "") -> None:
        super().__init__(says)
        self.cure = cure


@dataclass(frozen=True)
class Check:
    """One question. *look* answers it; when it finds a problem, the checks after it have no object unless *alone*."""

    name: str
    look: Callable[[], str]
    alone: bool = False


@dataclass(frozen=True)
class Finding:
    """The answer to a check."""

    check: str
    verdict: str
    says: str
    cure: str = ""
    """What to type."""
    cause: Cause | None = None


@dataclass
class Explanation:
    """All answers."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def first(self) -> Finding | None:
        """The first problem: what to cure before anything else."""
        return next((found for found in self.findings if found.cause is not None), None)

    @property
    def status(self) -> int:
        """Exit status: of the first problem, or 0."""
        return self.first.cause.status if self.first is not None and self.first.cause is not None else 0


@dataclass(frozen=True)
class Wishes:
    """What is wanted of the device."""

    features: Sequence[str] = ()
    """By name, as ``show`` prints them."""
    memory: int = 8 << 20
    """Bytes that will be mapped for it."""


class Examination:
    """The checks of one device, and what they share. *opener* gives a session with it, which ``close`` ends."""

    def __init__(self, opener: Callable[[], Backend], wishes: Wishes) -> None:
        self.wishes = wishes
        self._opener = opener
        self._session: Device | None = None

    def checks(self) -> Sequence[Check]:
        """In the order in which things would go wrong."""
        return [Check("open", self.opens), *self.device_checks()]

    def run(self) -> Explanation:
        """Make them, until one finds a problem that leaves nothing to look at behind it."""
        explanation = Explanation()
        for check in self.checks():
            try:
                finding = Finding(check.name, OK, check.look())
            except Problem as problem:
                finding = Finding(check.name, PROBLEM, str(problem), problem.cure, problem.cause)
            except Unknown as unknown:
                finding = Finding(check.name, UNKNOWN, str(unknown), unknown.cure)
            except (OSError, ProtocolError, FeatureError) as error:
                cause = BROKEN if self._session is not None else CANNOT_OPEN
                finding = Finding(check.name, PROBLEM, reason(error), cause.typed(), cause)
            explanation.findings.append(finding)
            if finding.verdict == PROBLEM and not check.alone:
                break
        return explanation

    def close(self) -> None:
        """End the session, if there is one."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Checks of an open device ------------------------------------------------------------------------------------------

    def open(self) -> Device:
        """The session: opened by the first who asks. Errors as the home has them."""
        if self._session is None:
            self._session = Device(self._opener())
        return self._session

    def opens(self) -> str:
        """Whether a session can be had."""
        return f"{self.open().name} can be opened"

    def device_checks(self) -> list[Check]:
        """For whatever could be opened."""
        return [
            Check("device", self.identity),
            Check("operations", self.operations),
            Check("features", self.features, alone=True),
            Check("addresses", self.addresses, alone=True),
            Check("locked memory", self.locked_memory, alone=True),
        ]

    def device_id(self) -> int | None:
        """What the device says it is; None when it cannot tell."""
        try:
            return self.open().get_device_id()
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return None

    def identity(self) -> str:
        """What it is."""
        if self.device_id() is None:
            raise Unknown("a stock back-end does not say what device it is", "add ?type=blk, ?type=net, ... to the target")
        facts = self.open().identify()
        return f"{described(facts)}: {facts.queues} queue{'s' * (facts.queues != 1)} of up to {facts.queue_size} entries"

    def operations(self) -> str:
        """Whether the driver of such a device has what it needs."""
        backend = self.open().backend
        for op in (ops.GET_FEATURES, *_NEEDED.get(self.device_id() or 0, ())):
            capability = backend.capability(op)
            if capability.level == ABSENT:
                raise Problem(TOO_OLD, f"{op.name} cannot be had: {capability.note}", operation=op.name)
        levels = [capability.level for capability in backend.capabilities().values()]
        absent = levels.count(ABSENT)
        return "all there" if not absent else f"{len(levels) - absent} of {len(levels)} there, and all that is needed"

    def features(self) -> str:
        """Whether it offers what is wanted."""
        number, offered = self.device_id(), self.open().get_features()
        wanted = feature_mask(number, list(self.wishes.features)) | Feature.VERSION_1
        if missing := wanted & ~offered:
            raise self.withheld(feature_names(number, missing), missing, offered)
        return f"{offered:#x}: {' '.join(feature_names(number, offered))}"

    def withheld(self, names: list[str], missing: int, offered: int) -> Problem:
        """The problem that features are *missing*; where one can find out why, that is in it."""
        return Problem(FEATURE_WITHHELD, f"{', '.join(names)} not offered", "do without, or configure the back-end to offer it")

    def _limits(self) -> IovaRange:
        try:
            return self.open().backend.call(ops.GET_IOVA_RANGE, EMPTY)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return IovaRange(Iova(0), Iova((1 << 64) - 1))

    def addresses(self) -> str:
        """Whether it can address the memory that is to be mapped."""
        limits, size = self._limits(), self.wishes.memory
        first, last = f"{limits.first:#x}", f"{limits.last:#x}"
        try:
            place(limits, size)
        except ValueError as error:
            raise Problem(IOVA_RANGE, str(error), size=limits.last - limits.first + 1, first=first, last=last) from None
        return f"{first} to {last}"

    def locked_memory(self) -> str:
        """Whether it pins what is mapped, and as much can be pinned: within the limit, or by raising it, as a back-end does."""
        if not self._pins():
            return "the device does not pin memory"
        size, before = self.wishes.memory, resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if not suffices(size):
            refusal = make_room(size)
            resource.setrlimit(resource.RLIMIT_MEMLOCK, before)
            if refusal:
                says = f"the device pins memory: {size} bytes are wanted, this process may lock {before[0]}, and no more than {before[1]}"
                raise Problem(MEMLOCK, says, kib=-(-size // 1024), size=size)
        return f"the device pins memory, and this process may lock {size} bytes"

    def _pins(self) -> bool:
        """Whether a page that is mapped for it is locked, or would be."""
        backend = self.open().backend
        backend.call(ops.SET_OWNER, EMPTY)
        with Region(place(self._limits(), PAGE), PAGE) as region:
            before = pinned()
            try:
                backend.call(ops.IOTLB_UPDATE, region.update())
            except OSError as error:
                if error.errno != errno.ENOMEM:
                    raise
                return True
            locked = pinned() > before
            backend.call(ops.IOTLB_INVALIDATE, IotlbInvalidate(region.iova, region.size))
        return locked


def described(facts: Identity) -> str:
    """``a block device``."""
    name = device_name(facts.device_id)
    return name if name.startswith("device ") else f"a {name} device"
