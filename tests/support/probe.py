# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""One opening of a device whose answers are compared with the reference's (``vdpa_bridge.differences``)."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vdpa_bridge import ops
from vdpa_bridge.backends.base import Backend
from vdpa_bridge.differences import documented
from vdpa_bridge.flags import BackendFeature, Feature, Status
from vdpa_bridge.memory import Region
from vdpa_bridge.ops import Op, Rep, Req
from vdpa_bridge.wire import EMPTY, U8, U64, Iova, Payload, VringAddr, VringFile, VringState

from .homes import Home

NEGOTIATED = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
RUNNING = NEGOTIATED | Status.DRIVER_OK
RING_IOVA = 0x100000
"""Away from 0 and from the interrupt window of x86."""


def name_of(number: int) -> str:
    """``EINVAL``, or ``success``."""
    return errno.errorcode.get(number, str(number)) if number else "success"


class Probe:
    """Asks, and judges the answers. Owns the back-end and what it makes for it."""

    def __init__(self, home: Home, backend: Backend) -> None:
        self.home = home
        self.backend = backend
        self._things: list[Any] = []

    # Asking ----------------------------------------------------------------------------------------------------------

    def ask(self, op: Op[Req, Rep], request: Req) -> Rep:
        """An operation that must succeed."""
        return self.backend.call(op, request)

    def get(self, op: Op[Any, Any]) -> int:
        """The number that a question without arguments is answered by."""
        return int(self.ask(op, EMPTY).value)

    def errno(self, op: Op[Any, Any], request: Payload = EMPTY) -> int:
        """The errno of an operation, 0 when it succeeds."""
        (answer,) = Backend.call_many(self.backend, [(op, request)])
        if not isinstance(answer, OSError):
            return 0
        assert answer.errno, f"{op.name}: {answer!r} carries no errno"
        assert op.name in str(answer), f"the error does not name its operation: {answer}"
        return answer.errno

    def expect(self, number: int, op: Op[Any, Any], request: Payload = EMPTY, scenario: str = "") -> None:
        """The reference answers with *number*; this home too, or as a row for *scenario* says."""
        if row := documented(self.home.traits, op.name, scenario):
            assert row.instead != number, f"row {row} repeats the reference"
            number = number if row.instead is None else row.instead
        got = self.errno(op, request)
        assert got == number, f"{op.name} {request} on {self.home}: {name_of(got)} instead of {name_of(number)} {scenario and f'({scenario})'}"

    def offers(self, feature: BackendFeature) -> bool:
        """Whether GET_BACKEND_FEATURES has it."""
        return bool(self.get(ops.GET_BACKEND_FEATURES) & feature)

    # Getting somewhere -------------------------------------------------------------------------------------------------

    def own(self, *features: BackendFeature) -> None:
        """SET_OWNER, and those of *features* that are offered."""
        self.ask(ops.SET_OWNER, EMPTY)
        wanted = sum(features) & self.get(ops.GET_BACKEND_FEATURES)
        self.ask(ops.SET_BACKEND_FEATURES, U64(wanted))

    def status(self, value: int) -> None:
        """SET_STATUS."""
        self.ask(ops.SET_STATUS, U8(value))

    def negotiate(self) -> None:
        """Reset, then up to FEATURES_OK."""
        for value in (0, Status.ACKNOWLEDGE, Status.ACKNOWLEDGE | Status.DRIVER):
            self.status(value)
        self.ask(ops.SET_FEATURES, U64(self.get(ops.GET_FEATURES) & (Feature.VERSION_1 | Feature.ACCESS_PLATFORM)))
        self.status(NEGOTIATED)
        assert self.get(ops.GET_STATUS) == NEGOTIATED

    def region(self, size: int = 4096, iova: int = RING_IOVA) -> Region:
        """Memory that goes with the probe; not mapped for the device yet."""
        region = Region(Iova(iova), size)
        self._things.append(region)
        return region

    def eventfd(self) -> int:
        """An eventfd that goes with the probe."""
        return self.own_fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    def own_fd(self, fd: int) -> int:
        """Close *fd* with the probe."""
        self._things.append(_Fd(fd))
        return fd

    def ring(self, index: int = 0, iova: int = RING_IOVA, num: int = 16, *, call: bool = True, enable: bool = True) -> None:
        """Set a ring up in mapped memory at *iova* (desc, avail, used: a KiB each)."""
        self.ask(ops.SET_VRING_NUM, VringState(index, num))
        self.ask(ops.SET_VRING_ADDR, VringAddr(index, 0, Iova(iova), Iova(iova + 2048), Iova(iova + 1024), 0))
        self.ask(ops.SET_VRING_BASE, VringState(index, 0))
        self.ask(ops.SET_VRING_KICK, VringFile(index, self.eventfd()))
        self.ask(ops.SET_VRING_CALL, VringFile(index, self.eventfd() if call else -1))
        if enable:
            self.ask(ops.SET_VRING_ENABLE, VringState(index, 1))

    def run(self, *features: BackendFeature) -> None:
        """All the way to DRIVER_OK with ring 0 alone, empty."""
        self.own(*features)
        self.negotiate()
        self.ask(ops.IOTLB_UPDATE, self.region().update())
        self.ring()
        self.status(RUNNING)
        assert self.get(ops.GET_STATUS) == RUNNING

    def close(self) -> None:
        """Close the device, then what was made for it."""
        self.backend.close()
        while self._things:
            self._things.pop().close()


class _Fd:
    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        os.close(self.fd)


@contextmanager
def probing(home: Home, backend: Backend) -> Iterator[Probe]:
    """A probe that is closed at the end."""
    probe = Probe(home, backend)
    try:
        yield probe
    finally:
        probe.close()
