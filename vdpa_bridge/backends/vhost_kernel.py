# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rings served by the kernel for devices that it knows half of: /dev/vhost-net and /dev/vhost-vsock (drivers/vhost).

The kernel has the data queues, their eventfds and a device IOTLB: those operations are its own, and ring addresses are
IOVAs as everywhere, since ACCESS_PLATFORM is always acknowledged to it. Identity, status and configuration space are
kept here. Rules of this file: the node gets an owner, features, mappings and rings with DRIVER_OK and not before; a
reset opens the node anew, so that nothing of the last driver is left in the kernel.

A queue that the kernel gives up is stopped, and the device needs a reset: an address that is not mapped would otherwise
stay a question in the kernel, one more for every kick.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import select
import threading
from abc import abstractmethod
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar

from .. import _ioctl, ops
from ..errors import device_error
from ..flags import BackendFeature as B
from ..flags import Feature, Status
from ..memory import IotlbTable, SharedMapping
from ..ops import Op
from ..virtio.config import config_size
from ..virtio.ids import DeviceId
from ..wire import (
    EMPTY,
    U8,
    U32,
    U64,
    Empty,
    IotlbBatchBegin,
    IotlbBatchEnd,
    IotlbInvalidate,
    IotlbMsg,
    IotlbPayload,
    IotlbUpdate,
    Iova,
    IovaRange,
    Payload,
    VringAddr,
    VringFile,
    VringState,
)
from .base import ABSENT, EMULATED, NATIVE, Capability
from .rules import Ring, RuledBackend, refuse

_log = logging.getLogger(__name__)

SET_MEM_TABLE = _ioctl.iow(0x03, U64.layout)
"""``struct vhost_memory`` without regions: its 8 bytes are two zeroes."""

_RINGS = Feature.RING_INDIRECT_DESC | Feature.RING_EVENT_IDX | Feature.VERSION_1 | Feature.ACCESS_PLATFORM
"""What is taken over of the kernel's word: bits 26 and 27 mean something else there."""
_NATIVE = {
    *(ops.GET_FEATURES, ops.SET_FEATURES, ops.GET_VRING_BASE, ops.IOTLB_UPDATE, ops.IOTLB_INVALIDATE),
    *(ops.SET_VRING_NUM, ops.SET_VRING_ADDR, ops.SET_VRING_BASE, ops.SET_VRING_KICK, ops.SET_VRING_CALL),
}
_HOW: dict[Op[Any, Any], str] = {
    ops.SET_OWNER: "this process owns the node from DRIVER_OK on",
    ops.SET_STATUS: "kept in this process; DRIVER_OK sets the node up, a reset opens it anew",
    ops.GET_STATUS: "kept in this process",
    ops.SET_CONFIG_CALL: "fires when the kernel gives a queue up",
    ops.SET_VRING_ERR: "fires when the kernel gives a queue up",
    ops.SET_VRING_ENABLE: "the kernel begins or ends to serve the ring",
    ops.SUSPEND: "the kernel ends to serve all rings",
    ops.RESUME: "the kernel serves the enabled rings from where they stand",
    ops.IOTLB_BATCH_BEGIN: "every change takes effect at once",
    ops.IOTLB_BATCH_END: "every change takes effect at once",
}
_PATIENCE = 5.0
"""Seconds that the watching thread may need to end; the kernel may be flushing a queue for it."""


class _Watch:
    """A thread that hears what the kernel says unasked: addresses that it does not find, and rings that it gave up on."""

    def __init__(self, fd: int, told: Callable[[str], None]) -> None:
        self._fd, self._told = fd, told
        self.errors = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """What the kernel is given as the error eventfd of each ring."""
        self._end = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="vhost watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        poll = select.poll()
        for fd in (self._end, self._fd, self.errors):
            poll.register(fd, select.POLLIN)
        while self._end not in (ready := dict(poll.poll())):
            if self._fd in ready:
                miss = IotlbMsg.unpack(os.read(self._fd, IotlbMsg.layout.size))
                self._told(f"address {miss.iova:#x} is not mapped")
            if self.errors in ready:
                os.eventfd_read(self.errors)
                self._told("the kernel gave a ring up: what the driver wrote there makes no sense to it, or nobody takes it any more")

    def close(self) -> None:
        """Before the node is closed."""
        os.eventfd_write(self._end, 1)
        self._thread.join(_PATIENCE)
        os.close(self._end)
        os.close(self.errors)


class VhostKernel(RuledBackend):
    """One opening of a vhost node. Subclasses say what device it makes."""

    offered_backend_features = B.IOTLB_MSG_V2 | B.IOTLB_BATCH | B.SUSPEND | B.RESUME | B.ENABLE_AFTER_DRIVER_OK | B.IOTLB_PERSIST
    queue_size = 1024
    """The kernel takes chains of up to UIO_MAXIOV buffers."""
    node: ClassVar[str]
    device_id: ClassVar[DeviceId]
    how: ClassVar[dict[Op[Any, Any], str]] = _HOW
    """How an operation is emulated, where that is worth a word."""
    own_features: ClassVar[int]
    """Bits of the device type that are the kernel's to offer."""
    served = (0, 1)
    """The queues that the kernel serves."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._table: IotlbTable[SharedMapping] = IotlbTable()
        self._most = most_mappings()
        self._fd = -1
        self._watch: _Watch | None = None
        self._started: set[int] = set()
        self._broken = ""
        """Why the device needs a reset."""
        try:
            self._renew()
            self._kernel = U64.unpack(self._tell(ops.GET_FEATURES.number, U64(0))).value & (_RINGS | self.own_features)
            if not self._kernel & Feature.ACCESS_PLATFORM:
                raise device_error(errno.EOPNOTSUPP, "open", name, f"this kernel's {self.node} has no device IOTLB")
        except BaseException:
            self.close()
            raise

    # The node ------------------------------------------------------------------------------------------------------------

    def _tell(self, number: int, request: Payload = EMPTY) -> bytes:
        buffer = bytearray(request.pack())
        try:
            fcntl.ioctl(self._fd, number, buffer)
        except OSError as error:
            raise refuse(error.errno or errno.EIO) from None
        return bytes(buffer)

    def _renew(self) -> None:
        """A new opening in place of the old one."""
        self._hang_up()
        try:
            self._fd = os.open(self.node, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise device_error(error.errno or errno.EIO, "open", self.node, self._open_hint(error.errno)) from None
        self._claim()

    def _open_hint(self, number: int | None) -> str:
        if number == errno.ENOENT:
            return f"modprobe {os.path.basename(self.node).replace('-', '_')}"
        return "open needs read and write permission on the node" if number == errno.EACCES else ""

    def _hang_up(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._started.clear()
        self._broken = ""

    def _claim(self) -> None:
        """Make the fresh opening the device that it is to be."""

    @abstractmethod
    def _let_run(self, rings: Collection[int], on: bool) -> None:
        """Have the kernel begin, or end, to serve *rings*."""

    def _bring_up(self) -> None:
        if self._fd < 0:
            self._renew()
        self._tell(ops.SET_OWNER.number)
        self._tell(ops.SET_BACKEND_FEATURES.number, U64(B.IOTLB_MSG_V2))
        self._tell(SET_MEM_TABLE, U64(0))  # beside the IOTLB the kernel wants a table, be it empty
        self._tell(ops.SET_FEATURES.number, U64(self._features & self._kernel | Feature.ACCESS_PLATFORM))
        self._watch = _Watch(self._fd, self._gave_up)
        for entry in self._table:
            self._write(IotlbUpdate(entry.iova, entry.size, -1, 0, entry.perm), entry.value.address)

    def _gave_up(self, why: str) -> None:
        """Stop all rings for good. Any thread, with or without the lock."""
        with contextlib.suppress(OSError):
            self._let_run(self.served, False)
        if not self._broken:
            self._broken = why
            _log.warning("%s: %s; the device needs a reset", self.name, why)
        for event in (self._config_call, *(ring.err for ring in self._rings)):
            if event is not None:
                event.nudge()

    # Waist ---------------------------------------------------------------------------------------------------------------

    def capability(self, op: Op[Any, Any]) -> Capability:
        """Native for what the kernel is told or asked."""
        if op not in self.methods:
            return Capability(ABSENT, "one address space serves rings and buffers")
        return Capability(NATIVE) if op in _NATIVE else Capability(EMULATED, self.how.get(op, "answered by this process"))

    def facts(self) -> dict[str, object]:
        """The node."""
        return {"transport": "ioctls on the character device", "node": self.node}

    def close(self) -> None:
        """End what runs, then give the memory back."""
        with self._lock:
            self._closed = True
            self._hang_up()
            for entry in self._table.clear():
                entry.value.close()
            self._forget()
            if self._config_call is not None:
                self._config_call.close()

    # Features and status -------------------------------------------------------------------------------------------------

    def _get_device_id(self, request: Empty) -> U32:
        return U32(self.device_id)

    def _get_features(self, request: Empty) -> U64:
        return U64(self._kernel)

    def _on_features(self, features: int) -> None:
        """Bits that were not offered are dropped in silence, as vdpa_sim does."""

    def _get_status(self, request: Empty) -> U8:
        return U8(self._status | (Status.NEEDS_RESET if self._broken else 0))

    def _on_status(self, new: int, starts: bool) -> None:
        if starts:
            try:
                self._bring_up()
            except BaseException:
                self._hang_up()
                raise
            self._settle(True)

    def _on_reset(self, keep_mappings: bool) -> None:
        if self._status & Status.DRIVER_OK or self._fd < 0:
            self._renew()
        if not keep_mappings:
            for entry in self._table.clear():
                entry.value.close()

    # Configuration space -------------------------------------------------------------------------------------------------

    @abstractmethod
    def _config(self) -> bytes:
        """The configuration space as it is now."""

    def _config_bytes(self) -> int:
        return config_size(self.device_id) or 0

    def _read_config(self, offset: int, length: int) -> bytes:
        return self._config()[offset : offset + length]

    def _write_config(self, offset: int, data: bytes) -> None:
        """Nothing in it is the driver's to write."""

    # Queues --------------------------------------------------------------------------------------------------------------

    def _queues(self) -> int:
        return len(self.served)

    def _wanted(self) -> set[int]:
        """The rings that are to work while the device runs."""
        return {index for index in self.served if index < len(self._rings) and self._rings[index].enabled}

    def _settle(self, running: bool) -> None:
        """Let the rings work that should and no others. What the kernel refuses breaks the device, as everywhere else."""
        wanted = self._wanted() if running and not self._broken else set()
        gone, fresh = self._started - wanted, wanted - self._started
        if gone:
            self._let_run(gone, False)
            for index in sorted(gone):
                self._rings[index].base = self._kernel_base(index)
                self._tell(ops.SET_VRING_KICK.number, VringFile(index, -1))
            self._started -= gone
        if not fresh:
            return
        try:
            for index in sorted(fresh):
                self._describe(index, self._rings[index])
            self._let_run(fresh, True)
        except OSError as error:
            self._gave_up(f"queues {sorted(fresh)} do not start: {error.strerror or os.strerror(error.errno or 0)}")
            return
        self._started |= fresh
        for index in fresh:  # last, as a kick that was given before counts only now
            self._on_event(index, self._rings[index])

    def _describe(self, index: int, ring: Ring) -> None:
        if ring.addr is None:
            raise OSError(errno.EINVAL, "enabled without an address")
        assert self._watch is not None
        self._tell(ops.SET_VRING_NUM.number, VringState(index, ring.num))
        # Without the log flag, as there is no log.
        self._tell(ops.SET_VRING_ADDR.number, VringAddr(index, 0, ring.addr.desc, ring.addr.used, ring.addr.avail, 0))
        self._tell(ops.SET_VRING_BASE.number, VringState(index, self._base(ring)))
        self._tell(ops.SET_VRING_ERR.number, VringFile(index, self._watch.errors))

    def _kernel_base(self, index: int) -> int:
        return VringState.unpack(self._tell(ops.GET_VRING_BASE.number, VringState(index, 0))).num

    def _get_vring_base(self, request: VringState) -> VringState:
        ring = self._ring(request.index)
        return VringState(request.index, self._kernel_base(request.index) if request.index in self._started else self._base(ring))

    def _on_event(self, index: int, ring: Ring) -> None:
        if index in self._started:
            self._tell(ops.SET_VRING_CALL.number, VringFile(index, ring.call.fd if ring.call else -1))
            self._tell(ops.SET_VRING_KICK.number, VringFile(index, ring.kick.fd if ring.kick else -1))

    def _on_enable(self, index: int, ring: Ring) -> None:
        self._settle(True)

    def _on_suspend(self) -> None:
        self._settle(False)

    def _on_resume(self) -> None:
        self._settle(True)

    # Mappings ------------------------------------------------------------------------------------------------------------

    def _get_iova_range(self, request: Empty) -> IovaRange:
        return IovaRange(Iova(self._table.first), Iova(self._table.last))

    def _write(self, request: IotlbPayload, uaddr: int = 0) -> None:
        os.write(self._fd, request.message(uaddr))

    def _iotlb_update(self, request: IotlbUpdate) -> None:
        request = self._for_memory(request)
        self._table.check(request)
        if len(self._table) >= self._most:
            raise refuse(errno.ENOSPC, f"the kernel holds {self._most} mappings (vhost.max_iotlb_entries) and would drop the oldest")
        mapping = SharedMapping(request.fd, request.size, request.offset, request.perm)
        try:
            if self._watch is not None:
                self._write(request, mapping.address)
        except BaseException:
            mapping.close()
            raise
        self._table.add(request, mapping)

    def _iotlb_invalidate(self, request: IotlbInvalidate) -> None:
        request = self._for_memory(request)
        for entry in self._table.inside(request):
            one = IotlbInvalidate(entry.iova, entry.size)
            if self._watch is not None:
                self._write(one)  # when it returns, no ring touches the memory any more
            self._table.remove(one)
            entry.value.close()

    def _iotlb_batch_begin(self, request: IotlbBatchBegin) -> None:
        self._table.begin(self._for_memory(request))

    def _iotlb_batch_end(self, request: IotlbBatchEnd) -> None:
        self._table.end(self._for_memory(request))


def most_mappings() -> int:
    """What the kernel's IOTLB of a vhost node holds."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/sys/module/vhost/parameters/max_iotlb_entries").read_text())
    return 2048
