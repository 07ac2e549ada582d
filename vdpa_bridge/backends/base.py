# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The waist: one method that carries out one operation.

Rule of this file: nothing per operation. A back-end is one opening of one device: opening resets the device, closing
resets it and takes all mappings and event descriptors away, as with /dev/vhost-vdpa-N.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from .. import ops
from ..memory import Doorbell
from ..ops import Call, Op, Rep, Req
from ..wire import Iova

NATIVE, EMULATED, ABSENT = "native", "emulated", "absent"


@dataclass(frozen=True)
class Capability:
    """Whether a back-end does an operation itself, has it emulated, or cannot; *note* says how or why."""

    level: str
    note: str = ""


@dataclass(frozen=True)
class Miss:
    """A page that a ring waits for, and the access that it needs (RO, WO, RW)."""

    iova: Iova
    perm: int


class DeviceIotlb(ABC):
    """Of a device whose rings can wait for mappings: IOTLB_UPDATE brings them later, IOTLB_INVALIDATE takes them under way.

    The kernel's vDPA devices cannot: what is not mapped is a fault for them. Synchronization: any thread, nothing waits.
    """

    @abstractmethod
    def enable(self, event: int) -> None:
        """From the next start on (DRIVER_OK), a ring that misses a mapping waits instead of breaking, and adds to the eventfd *event*.

        -1: as before.
        """

    @abstractmethod
    def misses(self) -> list[Miss]:
        """What rings wait for now."""

    @abstractmethod
    def refuse(self, miss: Miss) -> None:
        """There will be no such mapping: break the rings that wait for it."""


class Backend(ABC):
    """One opening of one device. Descriptors in a request are lent for the call.

    Errors: OSError with the kernel's errno for that operation; ProtocolError when the way to the device is broken.
    Synchronization: one call at a time, from any thread.
    """

    name: str
    """The target as the user wrote it, for messages."""
    traits: tuple[str, ...] = ()
    """The homes of ``vdpa_bridge.differences`` that this is."""
    iotlb: DeviceIotlb | None = None
    """Where the device can live without all of its mappings."""

    @property
    def relayed(self) -> str:
        """Why requests pass through a process of this project on their way to the device; empty when they do not."""
        return ""

    @abstractmethod
    def call(self, op: Op[Req, Rep], request: Req) -> Rep:
        """Carry out one operation."""

    def call_many(self, calls: Sequence[Call]) -> list[Any]:
        """Carry out all, in order, and return for each its reply or its OSError: one error does not stop the rest.

        A back-end behind a socket pipelines them, so that many cost one round trip.
        """
        results: list[Any] = []
        for op, request in calls:
            try:
                results.append(self.call(op, request))
            except OSError as error:
                results.append(error)
        return results

    @abstractmethod
    def capability(self, op: Op[Any, Any]) -> Capability:
        """How this back-end comes by *op*."""

    def capabilities(self) -> dict[str, Capability]:
        """``capability`` of every operation, in the table's order."""
        return {op.name: self.capability(op) for op in ops.TABLE}

    def facts(self) -> dict[str, object]:
        """What else there is to tell about the way to the device (negotiated bits, peer, ...), for ``show``."""
        return {}

    def doorbell(self, index: int) -> Doorbell | None:
        """Queue *index*'s page for kicks without a system call, to be closed by the caller; None where there is none: kick by eventfd."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Reset the device and give everything back; harmless when done before."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
