# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A back-end as a kernel device: messages of VDUSE made into operations, in a thread.

Rule of this file: the kernel's driver is served as any driver is, by operations on the waist. Kicks go from the kernel
to the device by an eventfd that both hold; calls come here, since the kernel has no eventfd for them, and cost one
ioctl each. Every message is answered, whatever happens, because the kernel breaks a device for good that keeps it
waiting (msg_timeout of /sys/class/vduse/NAME).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import select
import threading
from collections.abc import Callable
from typing import Any, Self

from .. import ops
from ..backends.base import Backend
from ..device import Device, RingSetup, first_error
from ..errors import ProtocolError, device_error, reason
from ..flags import BackendFeature, Feature, Status
from ..memory import VDUSE_DOMAIN
from ..ops import Call
from ..virtio.features import BlockFeature, NetFeature
from ..virtio.ids import DeviceId, device_name
from ..wire import RW, U8, U64, IotlbUpdate, Iova
from . import uapi

_log = logging.getLogger(__name__)

_WITHHELD = {
    DeviceId.BLOCK: BlockFeature.CONFIG_WCE,
    DeviceId.NET: (
        NetFeature.CTRL_VQ | NetFeature.CTRL_RX | NetFeature.CTRL_VLAN | NetFeature.CTRL_RX_EXTRA
        | NetFeature.GUEST_ANNOUNCE | NetFeature.MQ | NetFeature.CTRL_MAC_ADDR | NetFeature.CTRL_GUEST_OFFLOADS
    ),
}  # fmt: skip
"""Features that VDUSE refuses because they need the device to be asked (vduse_dev.c, features_is_valid), with those that depend on them."""
_PATIENCE = 30.0
"""Seconds for an operation that is under way to end: the kernel waits no longer either (VDUSE_MSG_DEFAULT_TIMEOUT)."""

MapKey = tuple[int, int, int, int, object]


class Exporter:
    """The device of *backend*, which it owns, as VDUSE device *name*, served by a thread from ``start`` to ``close``."""

    def __init__(self, backend: Backend, name: str, ended: Callable[[], object] = lambda: None) -> None:
        """*ended* is called by the thread when it ends by itself."""
        self.name = name
        self._ended = ended
        self.failed: str | None = None
        """Why the thread ended by itself."""
        self._device = Device(backend)
        self._control: uapi.Control | None = None
        self._node: uapi.Node | None = None
        self._made = False
        self._queues = 0
        self._status = 0
        self._features = 0
        self._maps: dict[MapKey, IotlbUpdate] = {}
        self._kicks: dict[int, int] = {}
        self._calls: dict[int, int] = {}
        self._config_call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.epoll()
        self._thread = threading.Thread(target=self._run, name=f"vduse {name}", daemon=True)

    def start(self) -> Self:
        """Make the kernel device and serve it; it comes to life when it is added to the vdpa bus. OSError says what is in the way."""
        if not re.fullmatch(r"[\w.-]{1,255}", self.name, re.ASCII):  # a name in /dev/vduse, and NUL-terminated for the kernel
            raise device_error(errno.EINVAL, "VDUSE", self.name, "this is not a name of letters, digits, . and - (at most 255)")
        identity = self._device.identify()
        kind = identity.device_id
        if kind not in _WITHHELD:
            raise device_error(errno.EOPNOTSUPP, "VDUSE", self.name, f"the kernel takes disks and network devices this way, not {device_name(kind)}")
        offered = identity.features & ~_WITHHELD[DeviceId(kind)] | Feature.ACCESS_PLATFORM
        if not offered & Feature.VERSION_1:
            raise device_error(errno.EOPNOTSUPP, "VDUSE", self.name, "the device is a legacy one, without VERSION_1")
        self._queues = 2 if kind == DeviceId.NET else identity.queues
        config = self._device.get_config(0, identity.config_size)
        if len(config) > uapi.CONFIG_MAX:
            raise device_error(errno.E2BIG, "VDUSE", self.name, f"{len(config)} bytes of configuration space, the kernel takes {uapi.CONFIG_MAX}")
        self._control = uapi.Control()
        self._make(kind, offered, config)
        self._node = node = uapi.Node(self.name)
        for index in range(self._queues):
            node.set_up_queue(index, identity.queue_size)
        self._device.own()
        self._device.reset()
        self._device.set_config_call(self._config_call)
        for fd in (node.fd, self._config_call, self._stop):
            self._poll.register(fd, select.EPOLLIN)
        self._thread.start()
        return self

    def _make(self, kind: int, features: int, config: bytes) -> None:
        assert self._control is not None
        try:
            self._control.create(self.name, kind, features, self._queues, config)
        except FileExistsError:  # of a process that is gone; if it is not, destroying it is refused
            try:
                self._control.destroy(self.name)
                self._control.create(self.name, kind, features, self._queues, config)
            except OSError as error:
                raise device_error(
                    error.errno or 0, "VDUSE", self.name, f"this name is in use: another process serves it, or the device is still on the bus (vdpa-bridge mgmt dev del {self.name})"
                ) from None
        except OSError as error:
            why = {errno.EPERM: "a network device needs CAP_NET_ADMIN", errno.EINVAL: "the kernel refuses this kind of device"}.get(error.errno or 0, "")
            raise device_error(error.errno or 0, "making VDUSE device", self.name, why) from None
        self._made = True

    def close(self) -> None:
        """Take the kernel device away, after it left the vdpa bus, and close the back-end; harmless when done before."""
        if self._thread.is_alive():
            os.eventfd_write(self._stop, 1)
            self._thread.join(_PATIENCE)
        if self._node is not None:
            self._node.close()
        if self._control is not None:
            try:
                if self._made:
                    self._control.destroy(self.name)
                    self._made = False
            except OSError as error:
                _log.error("%s: the kernel keeps the device: %s (vdpa-bridge mgmt dev del %s)", self.name, reason(error), self.name)
            self._control.close()
            self._control = None
        self._device.close()
        self._forget_rings()
        self._poll.close()
        for name in ("_config_call", "_stop"):
            if (fd := getattr(self, name)) >= 0:
                os.close(fd)
                setattr(self, name, -1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # The thread --------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        node = self._node
        assert node is not None
        try:
            while self._serve(node, self._poll.poll()):
                pass
        except OSError as error:
            self.failed = f"the kernel gave the device up, as it does when a message is not answered in time: {reason(error)}"
            self._ended()

    def _serve(self, node: uapi.Node, events: list[tuple[int, int]]) -> bool:
        """Deal with *events*; False when it is time to end."""
        for fd, what in events:
            if fd == self._stop:
                return False
            if fd == node.fd:
                if what & select.EPOLLERR:
                    raise OSError(errno.EIO, "the device is broken")
                if (request := node.receive()) is not None:
                    self._answer(node, request)
                return True  # the answer may have closed what the other events are about; they come again
            with contextlib.suppress(BlockingIOError):  # whoever shares it may have read it
                os.eventfd_read(fd)
            if fd == self._config_call:
                self._carry_out("config", lambda: self._config_changed(node))
            else:
                node.interrupt(next(index for index, call in self._calls.items() if call == fd))
        return True

    def _answer(self, node: uapi.Node, request: uapi.Request) -> None:
        body = b""
        try:
            message = uapi.Message(request.kind)
        except ValueError:
            _log.error("%s: message %d is of a newer kernel than this program", self.name, request.kind)
            node.answer(request, uapi.FAILED)
            return
        if message is uapi.Message.GET_VQ_STATE:
            (index,) = uapi.INDEX.unpack_from(request.body)
            state = self._carry_out(message.name, lambda: self._state(node, index))
            done = state is not None
            body = uapi.VQ_STATE.pack(index, *(state or (0, 0, 0, 0)))
        elif message is uapi.Message.SET_STATUS:
            done = self._carry_out(message.name, lambda: self._set_status(node, request.body[0])) is not None
        else:
            done = self._carry_out(message.name, lambda: self._map(node) if self._status & Status.DRIVER_OK else True) is not None
        node.answer(request, uapi.OK if done else uapi.FAILED, body)

    def _carry_out(self, what: str, action: Callable[[], Any]) -> Any:
        """What *action* returns, None when it failed, which is logged."""
        try:
            return action()
        except (OSError, ProtocolError) as error:
            _log.error("%s: %s: %s", self.name, what, reason(error))
        except Exception:
            _log.exception("%s: %s failed by a defect of this program", self.name, what)
        return None

    def _config_changed(self, node: uapi.Node) -> None:
        if self._status and self._device.get_status() & Status.NEEDS_RESET:
            _log.error("%s: the device needs a reset, which VDUSE cannot tell its driver", self.name)
        node.set_config(self._device.get_config(0, self._device.identify().config_size))

    # Messages ----------------------------------------------------------------------------------------------------------

    def _set_status(self, node: uapi.Node, new: int) -> bool:
        fresh = new & ~self._status
        if not new:
            self._reset()
        if fresh & Status.FEATURES_OK:
            self._features = node.features()
            self._all([(ops.SET_FEATURES, U64(self._features)), (ops.SET_STATUS, U8(new & ~Status.DRIVER_OK))])
            if not self._device.get_status() & Status.FEATURES_OK:
                raise OSError(errno.EINVAL, f"the device refuses the features {self._features:#x}")
        if fresh & Status.DRIVER_OK:
            self._bring_up(node, new)
        elif new:
            self._device.set_status(new)
        self._status = new
        return True

    def _all(self, calls: list[Call]) -> None:
        if error := first_error(self._device.backend.call_many(calls)):
            raise error

    @property
    def _packed(self) -> bool:
        return bool(self._features & Feature.RING_PACKED)

    def _bring_up(self, node: uapi.Node, status: int) -> None:
        self._map(node)
        calls: list[Call] = []
        for index in range(self._queues):
            queue = node.queue(index)
            if not queue.ready:
                continue
            self._kicks[index] = kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._calls[index] = call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._poll.register(call, select.EPOLLIN)
            ring = RingSetup(index, queue.num, queue.desc, queue.driver, queue.device, kick, call, queue.base(self._packed))
            calls += ring.calls()
        try:
            self._all(calls)  # all of it: a device must not start with a ring that it refused
            self._device.set_status(status)
        except OSError:
            self._reset()
            raise
        for index, kick in self._kicks.items():
            node.set_kick(index, kick)  # what was kicked before is signalled now

    def _reset(self) -> None:
        """Status 0, in that order: while rings work, their memory stays."""
        self._status = self._features = 0
        gone, self._maps = self._maps, {}
        try:
            self._device.reset()
            if gone and self._device.backend_features & BackendFeature.IOTLB_PERSIST:
                self._device.unmap(gone.values())
        finally:
            self._forget_rings()

    def _forget_rings(self) -> None:
        """After the reset, when the kernel and the device hold none of them any more."""
        for fd in self._calls.values():
            self._poll.unregister(fd)  # closing does not, as the device may have a duplicate
        for fd in (*self._calls.values(), *self._kicks.values()):
            os.close(fd)
        self._calls.clear()
        self._kicks.clear()

    def _state(self, node: uapi.Node, index: int) -> tuple[int, int, int, int]:
        if not self._status & Status.DRIVER_OK:
            return node.queue(index).state
        if not self._device.can_suspend:
            base = self._device.get_vring_base(index)
        else:
            self._device.suspend()
            try:
                base = self._device.get_vring_base(index)
            finally:
                self._device.resume()
        return uapi.unpack_state(base) if self._packed else (base, 0, 0, 0)

    # Memory ------------------------------------------------------------------------------------------------------------

    def _map(self, node: uapi.Node) -> bool:
        """Let the device have what the kernel's table has. What stays is not touched."""
        wanted = self._table(node)
        try:
            gone = [update for key, update in self._maps.items() if key not in wanted]
            fresh = {key: update for key, update in wanted.items() if key not in self._maps}
            if gone:
                self._device.unmap(gone)
            self._maps = {key: update for key, update in self._maps.items() if key in wanted}
            if fresh:
                self._device.map(fresh.values())
            self._maps.update(fresh)
        finally:
            for update in wanted.values():
                os.close(update.fd)
        return True

    def _table(self, node: uapi.Node) -> dict[MapKey, IotlbUpdate]:
        """The kernel's table now. Its descriptors are the caller's.

        virtio_vdpa's part of it grows without a word; it is one file in which offset and IOVA are the same, so all of it is mapped at once. What else is there beside
        a domain is what a former client of vhost_vdpa left (vduse_dev.c clears nothing when that one goes).
        """
        table: dict[MapKey, IotlbUpdate] = {}
        first = 0
        while first <= uapi.U64_MAX and (entry := node.entry(first)) is not None:
            if os.readlink(f"/proc/self/fd/{entry.fd}") == VDUSE_DOMAIN:
                for update in table.values():
                    os.close(update.fd)
                return {(0, uapi.DOMAIN_SIZE, 0, RW, VDUSE_DOMAIN): IotlbUpdate(Iova(0), uapi.DOMAIN_SIZE, entry.fd, 0, RW, 0)}
            file = os.fstat(entry.fd)
            size = entry.last - entry.first + 1
            key = (entry.first, size, entry.offset, entry.perm, (file.st_dev, file.st_ino))
            table[key] = IotlbUpdate(Iova(entry.first), size, entry.fd, entry.offset, entry.perm, 0)
            first = entry.last + 1
        return table

