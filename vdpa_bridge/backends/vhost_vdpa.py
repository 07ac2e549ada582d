# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A device in the kernel: /dev/vhost-vdpa-N (drivers/vhost/vdpa.c).

Operations are ioctls, IOTLB messages are writes of ``struct vhost_msg_v2``. What differs between kernel drivers and
would show above is evened out here: mappings vanish with a reset unless IOTLB_PERSIST is acknowledged, requests that
this kernel does not know are EOPNOTSUPP, and IOTLB errors say what was wrong (the kernel says EFAULT to all of them).
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

from .. import _ioctl, ops
from ..errors import device_error, reason
from ..flags import BackendFeature
from ..memory import U64_MAX, Doorbell, IotlbTable, SharedMapping, as_seen
from ..ops import Op, Rep, Req
from ..wire import (
    EMPTY,
    U8,
    Empty,
    IotlbInvalidate,
    IotlbPayload,
    IotlbUpdate,
)
from . import memlock
from .base import ABSENT, NATIVE, Backend, Capability
from .hints import hint, lacking

ENOTSUPP = 524
"""The kernel's internal errno that leaks from open() and mmap() of vhost-vdpa; libc has no name for it."""

_NOT_MAPPED = "the kernel refuses the mapping: no owner (SET_OWNER), a descriptor that cannot be shared, or memory that cannot be pinned"
_OPEN_HINTS = {
    errno.ENOENT: "no such device; `vdpa-bridge list` shows those there are",
    errno.EBUSY: "another process has it open",
    errno.EACCES: "open needs read and write permission on the node",
    errno.EIO: "the device does not answer; for VDUSE: its daemon is stuck or gone",
    ENOTSUPP: "the device needs an IOMMU that this machine does not give it",
}


def reserved_regions(fd: int) -> list[tuple[int, int, str]]:
    """First, last and kind of what the IOMMU in front of a device keeps for others. The kernel maps there, and the device
    does not get at it: x86 takes writes to the ``msi`` window for interrupts."""
    number = os.fstat(fd).st_rdev
    node = Path(f"/sys/dev/char/{os.major(number)}:{os.minor(number)}").resolve()
    files = [parent / "iommu_group" / "reserved_regions" for parent in node.parents]
    lines = next((file.read_text().splitlines() for file in files if file.exists()), [])
    found = [(int(first, 16), int(last, 16), kind) for first, last, kind in (line.split() for line in lines)]
    return [region for region in found if region[2] != "direct-relaxable"]


_DRIVERS = {"vp-vdpa": "vp_vdpa", "vduse": "VDUSE"}
"""Homes of ``vdpa_bridge.differences``, by driver or class of the parent device."""


def _traits(fd: int) -> tuple[str, ...]:
    """Which home of the table of differences the open node is, as sysfs says."""
    number = os.fstat(fd).st_rdev
    parent = Path(f"/sys/dev/char/{os.major(number)}:{os.minor(number)}").resolve().parents[1]
    names = [(parent / link).resolve().name for link in ("driver", "subsystem")]
    return tuple(_DRIVERS[name] for name in names if name in _DRIVERS)


class VhostVdpa(Backend):
    """One opening of /dev/vhost-vdpa-N. Takes over *fd* when one is given."""

    def __init__(self, path: str, fd: int = -1) -> None:
        self.name = path
        self._table: IotlbTable[SharedMapping] | None = None
        self._reserved: list[tuple[int, int, str]] = []
        self._backend_features = 0
        self._missing: set[Op[Any, Any]] = set()
        self._owned: bool | None = False if fd < 0 else None  # None: whoever opened it may have taken it
        if fd < 0:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as error:
                raise device_error(error.errno or 0, "open", path, _OPEN_HINTS.get(error.errno or 0, "")) from None
        self._fd = fd
        self.traits = _traits(fd)

    def call(self, op: Op[Req, Rep], request: Req) -> Rep:
        """One ioctl, or one write for an IOTLB operation."""
        if self._fd < 0:
            raise device_error(errno.EBADF, op.name, self.name, "this session is closed")
        if op.msgtype is not None:
            self._iotlb(op, request)
            return EMPTY  # type: ignore[return-value]
        if op.request is Empty:
            buffer = bytearray(_ioctl.size(op.number) or 8)  # kernels that lack the request read from it before ENOTTY
        else:
            buffer = bytearray(request.pack())
            if request.room:
                buffer += bytes(request.room)
        try:
            fcntl.ioctl(self._fd, op.number, buffer)
        except OSError as error:
            raise self._explain(op, error.errno or errno.EIO) from None
        if op is ops.SET_STATUS and buffer[0] == 0:
            self._after_reset()
        elif op is ops.SET_OWNER:
            self._owned = True
        elif op is ops.SET_BACKEND_FEATURES:
            self._backend_features = int.from_bytes(buffer, "little")
        if op.reply is Empty:
            return EMPTY  # type: ignore[return-value]
        return op.reply.unpack(buffer)

    def _explain(self, op: Op[Any, Any], number: int) -> OSError:
        if number == errno.ENOTTY:
            self._missing.add(op)
            return device_error(errno.EOPNOTSUPP, op.name, self.name, f"this kernel does not know it (since Linux {op.since})")
        if lacking(op, number):
            self._missing.add(op)
        return device_error(number, op.name, self.name, hint(op, number))

    # IOTLB ------------------------------------------------------------------------------------------------------

    def _mappings(self) -> IotlbTable[SharedMapping]:
        """The table, made on first use: the device's address spaces and IOVA range do not change."""
        if self._table is None:
            spaces, first, last = 1, 0, U64_MAX
            try:
                spaces = max(1, self.call(ops.GET_AS_NUM, EMPTY).value)
                limits = self.call(ops.GET_IOVA_RANGE, EMPTY)
                first, last = limits.first, limits.last
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
            if last < U64_MAX:  # the platform's IOMMU, not one of the device
                self._reserved = reserved_regions(self._fd)
            self._table = IotlbTable(spaces, first, last)
        return self._table

    def _iotlb(self, op: Op[Any, Any], request: Any) -> None:
        if self._owned is False:
            raise device_error(errno.EPERM, op.name, self.name, hint(op, errno.EPERM))
        table = self._mappings()
        request = as_seen(request, self._backend_features)
        try:
            if op is ops.IOTLB_UPDATE:
                self._update(table, request)
            elif op is ops.IOTLB_INVALIDATE:
                for entry in table.inside(request):
                    self._write(IotlbInvalidate(entry.iova, entry.size, entry.asid))
                    table.remove(IotlbInvalidate(entry.iova, entry.size, entry.asid))
                    entry.value.close()
            elif op is ops.IOTLB_BATCH_BEGIN:
                table.begin(request)
                self._write(request)
            elif table.end(request):
                self._write(request)  # without a batch, nor an address space yet, the kernel answers EFAULT
        except OSError as error:
            raise device_error(error.errno or errno.EFAULT, op.name, self.name, reason(error)) from None

    def _update(self, table: IotlbTable[SharedMapping], request: IotlbUpdate) -> None:
        table.check(request)
        first, last = request.iova, request.iova + request.size - 1
        for start, end, kind in self._reserved:
            if first <= end and start <= last:
                raise OSError(errno.EINVAL, f"[{first:#x}, {last:#x}] runs into [{start:#x}, {end:#x}], which the IOMMU reserves ({kind})")
        mapping = SharedMapping(request.fd, request.size, request.offset, request.perm)
        try:
            self._map(request, mapping.address)
        except OSError:
            mapping.close()
            raise
        table.enter(request, mapping)

    def _map(self, request: IotlbUpdate, address: int) -> None:
        """Write the message, and put a name to the EFAULT that vhost_chr_write_iter makes of every error."""
        for last in (False, True):
            try:
                return self._write(request, address)
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
                if last or memlock.suffices(request.size):
                    raise OSError(error.errno, _NOT_MAPPED) from None
                if refusal := memlock.make_room(request.size):
                    raise OSError(errno.ENOMEM, refusal) from None

    def _write(self, request: IotlbPayload, uaddr: int = 0) -> None:
        os.write(self._fd, request.message(uaddr))

    def _after_reset(self) -> None:
        """Drop all mappings after a reset, unless they persist.

        vdpa_sim forgets its own table then while vhost-vdpa remembers the ranges, others keep both; with this, all are alike.
        """
        if not self._backend_features & BackendFeature.IOTLB_PERSIST:
            self._drop_mappings()

    def _drop_mappings(self) -> None:
        if self._table is None:
            return
        if self._table.batch is not None:
            self._quietly(ops.IOTLB_BATCH_END.request(self._table.batch))
        for entry in self._table.clear():
            self._quietly(IotlbInvalidate(entry.iova, entry.size, entry.asid))
            entry.value.close()

    def _quietly(self, request: IotlbPayload) -> None:
        try:
            self._write(request)
        except OSError:
            pass  # the close that follows, or the reset before, has done it

    # ------------------------------------------------------------------------------------------------------------

    def capability(self, op: Op[Any, Any]) -> Capability:
        """Native, unless the kernel or the device said no, or the back-end feature is not offered."""
        if op in self._missing:
            return Capability(ABSENT, "the device or this kernel does not have it")
        if op.gate is not None:
            offered = self.call(ops.GET_BACKEND_FEATURES, EMPTY).value
            if not offered & op.gate:
                return Capability(ABSENT, f"back-end feature {op.gate.name} not offered")
        return Capability(NATIVE)

    def facts(self) -> dict[str, object]:
        """The node."""
        page = self.doorbell(0)
        if page is not None:
            page.close()
        return {"transport": "ioctls on the character device", "kicks": "by eventfd" if page is None else "by doorbell page or eventfd"}

    def doorbell(self, index: int) -> Doorbell | None:
        """A page that the kernel driver offers (its get_vq_notification), if it is a whole one. ENOBUFS for a queue that is not there."""
        if not 0 <= index < self.call(ops.GET_VQS_COUNT, EMPTY).value:  # the kernel hands the number on unchecked
            raise device_error(errno.ENOBUFS, "mmap of a doorbell", self.name, "no such queue (GET_VQS_COUNT)")
        try:
            return Doorbell(self._fd, index)
        except OSError as error:
            if error.errno not in (ENOTSUPP, errno.EOPNOTSUPP, errno.EINVAL):
                raise device_error(error.errno or errno.EIO, "mmap of a doorbell", self.name, reason(error)) from None
            return None

    def close(self) -> None:
        """Unmap everything explicitly (VDUSE keeps stale maps otherwise), reset, close."""
        if self._fd >= 0:
            self._drop_mappings()
            fd, self._fd = self._fd, -1
            try:
                fcntl.ioctl(fd, ops.SET_STATUS.number, bytearray(U8(0).pack()))
            except OSError:
                pass  # the kernel resets on close as well
            finally:
                os.close(fd)
