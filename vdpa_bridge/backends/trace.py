# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A back-end around a back-end that writes one line for each operation.

Rule of this file: it changes nothing, neither requests nor replies nor errors, and knows no operation beyond the names
of flag bits. Lines look as strace's do::

    GET_STATUS() = value=15 ACKNOWLEDGE|DRIVER|DRIVER_OK|FEATURES_OK <12 us>
    SET_VRING_NUM(index=9 num=256) = ENOBUFS <8 us>
    + GET_DEVICE_ID() = value=2
    + GET_FEATURES() = value=0x300000000
    + 2 requests pipelined <31 us>

What ``call_many`` sends together cannot be timed apart, so its lines carry a ``+`` and the time stands behind the last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

from ..errors import ProtocolError, errno_name, reason
from ..flags import BackendFeature, Status, bit_names
from ..memory import Doorbell
from ..ops import Call, Op, Rep, Req
from ..wire import EMPTY, describe
from .base import Backend, Capability

Sink = Callable[[str], None]
"""Takes a line without its end. Called from whichever thread calls the back-end."""

_FLAGS: dict[str, type[IntEnum]] = {"STATUS": Status, "BACKEND_FEATURES": BackendFeature}


def format_payload(op: Op[Any, Any], payload: Any) -> str:
    """The fields of a request or reply of *op*; status and back-end features by the names of their bits as well."""
    text = describe(payload)
    flags = _FLAGS.get(op.name.removeprefix("GET_").removeprefix("SET_"))
    if flags is not None and getattr(payload, "value", None):
        text += " " + "|".join(bit_names(flags, payload.value))
    return text


class TraceBackend(Backend):
    """Wraps *backend* and owns it; *write* gets the lines, *label* stands before each.

    Synchronization: as *backend*; *write* must be callable from any thread that calls this.
    """

    def __init__(self, backend: Backend, write: Sink, label: str = "") -> None:
        self.backend = backend
        self.name = backend.name
        self.traits = backend.traits
        self.iotlb = backend.iotlb
        self._write = write
        self._label = f"{label}: " if label else ""
        self._closed = False

    def call(self, op: Op[Req, Rep], request: Req) -> Rep:
        """Carry out one operation and write its line."""
        start = time.perf_counter_ns()
        try:
            reply = self.backend.call(op, request)
        except (OSError, ProtocolError) as error:
            self._line(op, request, error, time.perf_counter_ns() - start)
            raise
        self._line(op, request, reply, time.perf_counter_ns() - start)
        return reply

    def call_many(self, calls: Sequence[Call]) -> list[Any]:
        """Carry out all at once and write a group of lines."""
        start = time.perf_counter_ns()
        try:
            results = self.backend.call_many(calls)
        except (OSError, ProtocolError) as error:
            for op, request in calls:
                self._write(f"{self._label}+ {op.name}({format_payload(op, request)}) ...")
            self._total(len(calls), time.perf_counter_ns() - start, f" = {type(error).__name__}: {reason(error)}")
            raise
        spent = time.perf_counter_ns() - start
        for (op, request), result in zip(calls, results, strict=True):
            self._line(op, request, result, None)
        self._total(len(calls), spent)
        return results

    def _total(self, count: int, spent: int, end: str = "") -> None:
        self._write(f"{self._label}+ {count} request{'s' * (count != 1)} pipelined{end} <{spent // 1000} us>")

    def _line(self, op: Op[Any, Any], request: Any, result: Any, spent: int | None) -> None:
        """One operation; *spent* in nanoseconds, None for one in a group."""
        if isinstance(result, ProtocolError):
            end = f"{type(result).__name__}: {reason(result)}"
        elif isinstance(result, OSError):
            end = errno_name(result.errno or 0)
        else:
            end = "ok" if result is EMPTY else format_payload(op, result)
        before, after = ("+ ", "") if spent is None else ("", f" <{spent // 1000} us>")
        self._write(f"{self._label}{before}{op.name}({format_payload(op, request)}) = {end}{after}")

    def capability(self, op: Op[Any, Any]) -> Capability:
        """The wrapped back-end's."""
        return self.backend.capability(op)

    def doorbell(self, index: int) -> Doorbell | None:
        """The wrapped back-end's; what is said by it leaves no line."""
        return self.backend.doorbell(index)

    @property
    def relayed(self) -> str:
        """The wrapped back-end's."""
        return self.backend.relayed

    def facts(self) -> dict[str, object]:
        """The wrapped back-end's."""
        return self.backend.facts()

    def close(self) -> None:
        """Close the wrapped back-end and say so, once."""
        if self._closed:
            return
        self._closed = True
        start = time.perf_counter_ns()
        self.backend.close()
        self._write(f"{self._label}close() <{(time.perf_counter_ns() - start) // 1000} us>")
