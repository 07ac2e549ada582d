# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What all drivers share: bring-up, memory, rings, waiting, and an end that leaves nothing behind.

Rules of this file: a device that misbehaves costs a DeviceBroken, never a hang or a wrong access - every wait has an end,
and memory goes back to the pool only when the device gave its chain back. Nothing here knows a device type: a plain
``Driver`` can post any chain to any queue of any device.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time
from collections.abc import Callable, Collection, Sequence
from typing import ClassVar, Self, TypedDict

from ..device import Device
from ..errors import DeviceBroken, FeatureError, ProtocolError
from ..flags import BackendFeature, Feature, Status, status_text
from ..memory import PAGE, Buffer, Doorbell
from ..virtio.ids import DeviceId, device_name
from ..virtqueue import PACKED_BEGIN, DriverQueue, RingLayout
from ..wire import Iova
from .pool import Pool, Space, place
from .ring import Pending, Posted, Ring, Segments, drain, segments

RING_FEATURES = Feature.RING_INDIRECT_DESC | Feature.RING_EVENT_IDX
TIMEOUT = 5.0
_APART_POOL = 16 << 10
"""Bytes for data of queues in an address space of their own: commands and answers."""
LOOK = 0.5
"""Seconds of waiting after which the status byte is looked at, for devices that cannot signal a change."""


class Options(TypedDict, total=False):
    """Keyword arguments of ``Driver`` that drivers pass on."""

    required: int
    ring_features: int
    queue_size: int
    pool_size: int
    timeout: float
    isolated: Collection[int]
    doorbells: bool


class Driver:
    """Drives a Device, which it resets but does not own. A context manager; ready when constructed.

    Synchronization: one thread at a time.
    """

    device_id: ClassVar[int | None] = None
    """The device type that the driver is for; None for any."""
    table_entries: ClassVar[int] = 16
    """Buffers of the longest chain that goes into one indirect table."""
    overstated: ClassVar[bool] = False
    """Whether devices of the type count more bytes written than they were given room for, and are forgiven."""

    def __init__(
        self,
        device: Device,
        *,
        wanted: int = 0,
        required: int = 0,
        ring_features: int = RING_FEATURES,
        queues: Sequence[int] | None = None,
        queue_size: int = 256,
        pool_size: int = 4 << 20,
        timeout: float = TIMEOUT,
        isolated: Collection[int] = (),
        doorbells: bool = True,
    ) -> None:
        """Bring the device up with *queues* (default: all) of at most *queue_size* entries and *pool_size* bytes for data.

        *wanted* features are taken where offered, *required* ones must be. *timeout* in seconds is for every wait. Queues that are
        *isolated* get memory in an address space of their own, and the device sees no other through them, nor that through others.
        Where the device has *doorbells*, kicks are stores, not system calls; with one for every queue NOTIFICATION_DATA is wanted, too.
        FeatureError when device and driver do not fit, ValueError for queues that are not there, OSError from the device.
        """
        self.device = device
        self.name = device.name
        self.timeout = timeout
        self._wanted, self._required = wanted | ring_features, required
        self._rings: dict[int, Ring] = {}
        self._spaces: list[Space] = []
        self._closed = False
        self._mapped = False
        self._events: list[int] = []
        self._doorbells: dict[int, Doorbell] = {}
        self._poller = select.poll()
        limits = device.identify()
        if self.device_id is not None and limits.device_id != self.device_id:
            raise FeatureError(f"{self.name} is a {device_name(limits.device_id)} device, not {device_name(self.device_id)}")
        self._indices = list(range(limits.queues) if queues is None else dict.fromkeys(queues))
        if wrong := [index for index in self._indices if not 0 <= index < limits.queues]:
            raise ValueError(f"{self.name} has {limits.queues} queues, there is no queue {wrong[0]}")
        most = min(queue_size, limits.queue_size)
        if most < 1:
            raise ValueError(f"{self.name} takes rings of up to {limits.queue_size} entries, {queue_size} are wanted")
        self._num = 1 << most.bit_length() - 1
        ring_size = max(RingLayout.contiguous(self._num, self.table_entries, packed).size for packed in (False, True))
        ring_size = -(-ring_size // PAGE) * PAGE
        pool_size = -(-pool_size // PAGE) * PAGE
        together = [index for index in self._indices if index not in isolated]
        apart = [index for index in self._indices if index in isolated]
        size = Space.span(ring_size, together, pool_size)
        whole = size + bool(apart) * Space.span(ring_size, apart, _APART_POOL)
        try:
            iova = place(limits.iova_range, whole)
            self._spaces.append(Space(iova, ring_size, together, pool_size))
            if apart:
                self._spaces.append(Space(Iova(iova + size), ring_size, apart, _APART_POOL, asid=1))
            self._eventfds = [(self._eventfd(), self._eventfd()) for _ in self._indices]
            self._config_call = self._eventfd()
            if doorbells:
                pages = {index: device.backend.doorbell(index) for index in self._indices}
                self._doorbells = {index: page for index, page in pages.items() if page is not None}
            if len(self._doorbells) == len(self._indices) > 0:
                self._wanted |= Feature.NOTIFICATION_DATA
            elif (self._wanted | self._required) & Feature.NOTIFICATION_DATA:
                raise FeatureError(f"{self.name}: NOTIFICATION_DATA needs a doorbell page for every queue; an eventfd carries no data")
            for _, call in self._eventfds:
                self._poller.register(call, select.POLLIN)
            self._poller.register(self._config_call, select.POLLIN)
            self._bring_up()
        except BaseException:
            self.close()
            raise

    # Life cycle --------------------------------------------------------------------------------------------------------

    def _eventfd(self) -> int:
        try:
            fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError as error:
            raise OSError(error.errno, f"{self.name}: no eventfds for {len(self._indices)} queues: {error.strerror}; ask for fewer") from None
        self._events.append(fd)
        return fd

    def _bring_up(self) -> None:
        self._need_open()
        self._forget_rings()
        self.features = int(self.device.negotiate(self._wanted, self._required))
        self._unmap()
        groups = self._groups()
        event_idx = bool(self.features & Feature.RING_EVENT_IDX)
        self._indirect = bool(self.features & Feature.RING_INDIRECT_DESC)
        table = self.table_entries if self._indirect else 0
        packed = bool(self.features & Feature.RING_PACKED)
        for index, (kick, call) in zip(self._indices, self._eventfds, strict=True):
            space = self._space(index)
            area = space.rings[index]
            queue: DriverQueue[Pending] = DriverQueue(
                area.address,
                area.size,
                area.iova,
                self._num,
                table_entries=table,
                event_idx=event_idx,
                owner=space.region,
                packed=packed,
                overstated=self.overstated,
                in_order=bool(self.features & Feature.IN_ORDER),
                notification_data=bool(self.features & Feature.NOTIFICATION_DATA),
            )
            self._rings[index] = Ring(index, queue, kick, call, PACKED_BEGIN if packed else 0, self._doorbells.get(index))
        for space in self._spaces:
            space.renew()
        self._pool = self._spaces[0].pool
        for fd in self._events:
            drain(fd)
        self._mapped = True
        try:
            updates = [space.update() for space in self._spaces]
            self.device.start([ring.setup() for ring in self._rings.values()], updates, self._config_call, groups)
        except DeviceBroken:
            raise
        except OSError:
            self._mapped = False  # a refused start leaves no mapping of ours, and what lies there may be somebody else's
            raise
        self._ready()

    def _space(self, queue: int) -> Space:
        """The memory that *queue* sees."""
        return next(space for space in self._spaces if queue in space.rings)

    def _groups(self) -> dict[int, int]:
        """The address space of each group that is isolated; FeatureError when the device cannot keep its queues apart from the others."""
        if len(self._spaces) < 2:
            return {}
        limits = self.device.identify()
        if limits.address_spaces < 2 or not self.device.backend_features & BackendFeature.IOTLB_ASID:
            raise FeatureError(f"{self.name} has one address space: its queues cannot be isolated from one another")
        groups = {index: self.device.group_of(index) for index in self._indices}
        apart = {group for index, group in groups.items() if index in self._spaces[1].rings}
        if apart & {group for index, group in groups.items() if index in self._spaces[0].rings}:
            raise FeatureError(f"{self.name} keeps queues in one group that are to be isolated from one another (groups {groups})")
        return dict.fromkeys(apart, self._spaces[1].asid)

    def _forget_rings(self) -> None:
        rings, self._rings = self._rings, {}
        for ring in rings.values():
            ring.close()

    def _ready(self) -> None:
        """The device runs: read its configuration, fill its queues. Called by every bring-up."""

    def _replenish(self) -> None:
        """Chains came back: post what waits for room. Called while waiting, too."""

    def restart(self) -> None:
        """Reset the device and bring it up again with empty rings. Chains that it had are forgotten."""
        self._need_open()
        try:
            self._bring_up()
        except BaseException:
            self.close()
            raise

    def suspend(self) -> None:
        """Let the device stop with its rings as they are; EOPNOTSUPP where it cannot. Chains can still be posted."""
        self._need_open()
        self.device.suspend()

    def resume(self) -> None:
        """Go on after ``suspend``; chains posted meanwhile are served, and those that the device had not come to (vdpa_sim forgets
        kicks that it has not worked off)."""
        self._need_open()
        self.device.resume()
        for ring in self._rings.values():
            ring.notify()

    def _unmap(self) -> None:
        """After a reset: it took the mappings away unless the back-end keeps them. A device may have lost one that its
        back-end kept (kernel 6.12: vdpa_sim), so it is made anew each time."""
        if self._mapped and self.device.backend_features & BackendFeature.IOTLB_PERSIST:
            self.device.unmap([space.update() for space in self._spaces])
        self._mapped = False

    def close(self) -> None:
        """Reset the device and give everything back; harmless when done before."""
        if self._closed:
            return
        self._closed = True
        mapped, self._mapped = self._mapped, False
        self._forget_rings()
        try:
            with contextlib.suppress(OSError, ProtocolError):  # a device that is gone holds nothing of ours that we could take back
                self.device.reset()
                if mapped and self.device.backend_features & BackendFeature.IOTLB_PERSIST:
                    self.device.unmap([space.update() for space in self._spaces])
        finally:
            for fd in self._events:
                os.close(fd)
            self._events = []
            for page in self._doorbells.values():
                page.close()
            for space in self._spaces:
                space.region.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _need_open(self) -> None:
        if self._closed:
            raise ValueError(f"the driver of {self.name} is closed")

    def ring(self, index: int) -> Ring:
        """The driver's end of queue *index*; ValueError when the driver does not have it."""
        self._need_open()
        if index not in self._rings:
            raise ValueError(f"{self.name}: the driver has no queue {index}, only {', '.join(map(str, self._rings)) or 'none'}")
        return self._rings[index]

    @property
    def indices(self) -> list[int]:
        """The queues that the driver has."""
        return list(self._rings)

    @property
    def pool(self) -> Pool:
        """Where its buffers are taken from, and given back to."""
        return self._pool

    def broken_rings(self) -> list[str]:
        """Each ring that is broken, and why."""
        return [f"queue {ring.index}: {ring.queue.broken}" for ring in self._rings.values() if ring.queue.broken]

    def read_config(self, most: int) -> bytes:
        """The device's configuration space, its first *most* bytes if it has more."""
        size = min(self.device.identify().config_size, most)
        return self.device.get_config(0, size) if size else b""

    # Chains ----------------------------------------------------------------------------------------------------------

    def post(self, queue: int, readable: Sequence[bytes] = (), writable: Sequence[int] = ()) -> Posted:
        """Give the device a chain of buffers: *readable* by it, then *writable* ones of that many bytes (zeroed), right or wrong.

        ValueError when it cannot be a chain, MemoryError when pool or ring have no room.
        """
        ring = self.ring(queue)
        sizes = [len(data) for data in readable] + list(writable)
        if not sizes or min(sizes) < 1:
            raise ValueError("a chain has one buffer or more, none of them empty")
        pool = self._space(queue).pool
        buffers: list[Buffer] = []
        sent = 0
        try:
            for size in sizes:
                buffers.append(pool.take(size))  # noqa: PERF401 - what was taken must be known when a later one fails
            inputs, outputs = buffers[: len(readable)], buffers[len(readable) :]
            for buffer, data in zip(inputs, readable, strict=True):
                buffer.data[:] = data
            for buffer in outputs:
                buffer.data[:] = bytes(buffer.size)
            posted = Posted(queue, pool, inputs, outputs)
            sent = self._submit(ring, [(segments(inputs), segments(outputs), posted)])
            if not sent:
                raise MemoryError(f"{self.name}: queue {queue} has {ring.queue.free} descriptors left, {len(sizes)} are wanted")
        finally:
            if not sent:
                for buffer in buffers:
                    pool.give(buffer)
        return posted

    def transact(
        self, queue: int, readable: Sequence[bytes] = (), writable: Sequence[int] = (), timeout: float | None = None
    ) -> tuple[int, list[bytes]]:
        """``post`` and wait: the bytes that the device says it wrote, and the whole content of each writable buffer."""
        posted = self.post(queue, readable, writable)
        self.wait(
            lambda: posted.written >= 0,
            f"a chain of {len(readable)} readable and {len(writable)} writable buffers on queue {queue}",
            timeout,
        )
        return posted.written, posted.data

    def ask(self, queue: int, readable: Sequence[bytes] = (), room: int = 0, timeout: float | None = None) -> bytes:
        """``transact`` with *room* bytes for the answer, which is what the device wrote of them."""
        written, data = self.transact(queue, readable, [room] if room else [], timeout)
        return b"".join(data)[:written]

    def _submit(self, ring: Ring, requests: Sequence[tuple[Segments, Segments, Pending]]) -> int:
        try:
            return ring.submit(requests)
        except OSError as error:
            raise self._broken(ring, error) from None

    def _publish(self, queue: int) -> None:
        """Let the device see what was added to *queue*."""
        ring = self.ring(queue)
        try:
            ring.publish()
        except OSError as error:
            raise self._broken(ring, error) from None

    def poll(self) -> bool:
        """Take back what the device has finished, without waiting; True when there was something.

        Later queues come first: where one feeds the other (net: what is sent may be received), the lower one is complete.
        """
        self._need_open()
        found = False
        for ring in reversed(list(self._rings.values())):
            try:
                found |= ring.take_back()
            except OSError as error:
                raise self._broken(ring, error) from None
        if found:
            self._replenish()
        return found

    def wait(self, done: Callable[[], bool], what: str, timeout: float | None = None) -> None:
        """Serve completions until *done*, at most *timeout* seconds (default: the driver's).

        TimeoutError that says *what* was waited for, DeviceBroken when the device gave up or broke a ring.
        """
        timeout = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        while True:
            self.poll()
            if done():
                return
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(errno.ETIMEDOUT, f"{self.name}: no end of {what} within {timeout:g} s; device status {status_text(self._status())}")
            if self._arm():
                continue
            ready = [fd for fd, _ in self._poller.poll(min(left, LOOK) * 1000)]
            for fd in ready:
                drain(fd)
            if not ready or self._config_call in ready:
                self._status()
            for ring in self._rings.values():
                ring.queue.disable_call()

    def _arm(self) -> bool:
        """Ask for calls on all queues; True when something came in meanwhile."""
        more = False
        for ring in self._rings.values():
            try:
                more |= ring.queue.enable_call()
            except OSError as error:
                raise self._broken(ring, error) from None
        return more

    def _status(self) -> int:
        """The status byte; DeviceBroken when the device does not run any more."""
        status = self.device.get_status()
        if status & (Status.NEEDS_RESET | Status.FAILED):
            raise DeviceBroken(f"{self.name} gave up: device status {status_text(status)}; reset it (restart)")
        if not status & Status.DRIVER_OK:
            raise DeviceBroken(f"{self.name} was reset by somebody else: device status {status_text(status)}; bring it up again (restart)")
        return status

    def _broken(self, ring: Ring, error: OSError) -> OSError:
        if error.errno != errno.EPROTO:
            return error
        return DeviceBroken(f"{self.name}: queue {ring.index}: {error.strerror}")

    def __repr__(self) -> str:
        kind = DeviceId(self.device_id).name.lower() if self.device_id is not None else "generic"
        return f"<{type(self).__name__} {self.name}: {kind}, {'closed' if self._closed else f'queues {self._indices}'}>"
