# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""One target going through one scenario: steps, and what came of each.

Rule of this file: an outcome is a short text that can be compared between homes: ``ok``, a value made comparable, or
the name of an errno. What a device, peer or driver may raise becomes an outcome; anything else is a defect and goes up.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..backends.base import ABSENT, Backend
from ..device import Device
from ..errors import DeviceBroken, FeatureError, ProtocolError, errno_name, reason
from ..ops import Op
from ..targets import Target
from ..virtio.ids import DeviceId
from ..wire import EMPTY, Payload

T = TypeVar("T")

OK, NOT_OFFERED, NOT_REACHED = "ok", "not offered", "not reached"

_LABEL = re.compile(r"([A-Za-z][\w.-]*)=(.+)")
_HOMES = ("qemu-storage-daemon",)
"""Homes of the table of differences that a target cannot tell by itself; its label does."""


class Stop(Exception):
    """Nothing more can be done in this scenario; the steps that are left were not reached."""


@dataclass(frozen=True)
class Outcome:
    """What came of a step. *detail* is for readers only; *micros* is the median over all runs."""

    value: str
    detail: str = ""
    micros: float = 0.0


@dataclass
class Place:
    """A target of the comparison. *label* heads its column."""

    label: str
    target: Target
    wrap: Callable[[Backend, str], Backend] = lambda backend, label: backend
    loops: bool = True
    """Whether the network behind a network device gives back what is sent to all."""
    facts: dict[str, object] = field(default_factory=dict)
    told: tuple[str, ...] = ()
    """Traits of the back-end."""
    absent: dict[str, str] = field(default_factory=dict)
    """Operations that this home says it lacks, and why."""

    @classmethod
    def parse(cls, text: str) -> Place:
        """``TARGET`` or ``LABEL=TARGET``; ValueError as `Target.parse` has it."""
        found = _LABEL.fullmatch(text)
        label, rest = (found[1], found[2]) if found else (text, text)
        return cls(label, Target.parse(rest))

    def open(self) -> Device:
        """A new session."""
        return Device(self.wrap(self.target.open(), self.label))

    @property
    def traits(self) -> tuple[str, ...]:
        """The homes of ``vdpa_bridge.differences`` that this target is."""
        return (*(home for home in _HOMES if self.label == home), *self.told)

    def learn(self, device: Device) -> None:
        """Note what the home says of itself; after the operations, as only then a kernel device knows what is missing."""
        self.facts = device.backend.facts()
        self.told = device.backend.traits
        for name, capability in device.backend.capabilities().items():
            if capability.level == ABSENT:
                self.absent[name] = capability.note


Key = tuple[str, str]
"""Operation and case."""


class Run:
    """One scenario on one target, with a session of its own."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.outcomes: dict[Key, Outcome] = {}
        self._device: Device | None = None

    def open(self, case: str = "") -> None:
        """Begin a session, after ending the one before."""
        if self._device is not None:
            self._device.close()
        self._device = self.must("open", case, self.place.open)

    @property
    def device(self) -> Device:
        """The open session."""
        assert self._device is not None
        return self._device

    @property
    def kind(self) -> int:
        """Virtio device id."""
        return self.device.identify().device_id

    @property
    def is_blk(self) -> bool:
        """Whether it is a disk."""
        return self.kind == DeviceId.BLOCK

    @property
    def is_net(self) -> bool:
        """Whether it is a network device."""
        return self.kind == DeviceId.NET

    def step(
        self,
        operation: str,
        case: str,
        action: Callable[[], T],
        show: Callable[[T], str] = lambda value: OK,
        detail: Callable[[T], str] = lambda value: "",
    ) -> T | None:
        """Carry out and time *action*; *show* makes its result comparable. None when it failed, which is an outcome as well."""
        done = self._attempt(operation, case, action, show, detail)
        return done[0] if done else None

    def _attempt(
        self,
        operation: str,
        case: str,
        action: Callable[[], T],
        show: Callable[[T], str],
        detail: Callable[[T], str],
    ) -> list[T]:
        """Its result alone, or nothing when it failed."""
        start = time.perf_counter_ns()
        try:
            value = action()
        except (OSError, ProtocolError, FeatureError, ValueError, MemoryError) as error:
            self._failed(operation, case, error, time.perf_counter_ns() - start)
            if isinstance(error, ProtocolError):
                raise Stop from None
            return []
        spent = (time.perf_counter_ns() - start) / 1000
        self._add(operation, case, Outcome(show(value), detail(value), spent))
        return [value]

    def must(
        self,
        operation: str,
        case: str,
        action: Callable[[], T],
        show: Callable[[T], str] = lambda value: OK,
        detail: Callable[[T], str] = lambda value: "",
    ) -> T:
        """A step without which the rest makes no sense."""
        done = self._attempt(operation, case, action, show, detail)
        if not done:
            raise Stop
        return done[0]

    def op(
        self,
        op: Op[Any, Any],
        case: str = "",
        request: Payload = EMPTY,
        show: Callable[[Any], str] = lambda reply: OK,
        detail: Callable[[Any], str] = lambda reply: "",
    ) -> Any:
        """A step of exactly one operation, right or wrong."""
        return self.step(op.name, case, lambda: self.device.backend.call(op, request), show, detail)

    def not_offered(self, operation: str, case: str, why: str) -> None:
        """A step that this device need not do."""
        self._add(operation, case, Outcome(NOT_OFFERED, why))

    def _failed(self, operation: str, case: str, error: BaseException, spent: int) -> None:
        if isinstance(error, OSError) and not isinstance(error, (DeviceBroken, ProtocolError)) and error.errno:
            name = errno_name(error.errno)
        else:
            name = type(error).__name__
        self._add(operation, case, Outcome(name, reason(error), spent / 1000))

    def _add(self, operation: str, case: str, outcome: Outcome) -> None:
        if (operation, case) in self.outcomes:
            raise AssertionError(f"a scenario has two steps {operation} {case}")
        self.outcomes[operation, case] = outcome

    def close(self) -> None:
        """End the session, if there is one."""
        if self._device is None:
            return
        with contextlib.suppress(OSError, ProtocolError):  # the connection broke; the step in which it did tells
            self.place.learn(self._device)
        self._device.close()
