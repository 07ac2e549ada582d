# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Numbers, structs and ioctls of <linux/vduse.h>, API version 0.

Rule of this file: a method is one ioctl or one message; what they mean together is in ``exporter``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

from .. import _ioctl
from ..errors import device_error

VDUSE = 0x81
NAME_MAX = 256
CONFIG_MAX = 4096
"""Bytes of configuration space that the kernel takes (vduse_dev.c, vduse_validate_config)."""
DOMAIN_SIZE = 0x48000000
"""Bytes of IOVA space in which virtio_vdpa's memory lies: VDUSE_IOVA_SIZE of drivers/vdpa/vdpa_user/vduse_dev.c."""
U64_MAX = (1 << 64) - 1

DEV_CONFIG = struct.Struct("=256sIIQII52xI")
IOTLB_ENTRY = struct.Struct("=QQQB7x")
CONFIG_DATA = struct.Struct("=II")
VQ_CONFIG = struct.Struct("=IH26x")
VQ_INFO = struct.Struct("=IIQQQ4HB7x")
VQ_EVENTFD = struct.Struct("=Ii")
REQUEST = struct.Struct("=II16x128s")
RESPONSE = struct.Struct("=II16x128s")
VQ_STATE = struct.Struct("=I4H")
INDEX = struct.Struct("=I")
U64 = struct.Struct("=Q")
NAME = struct.Struct(f"={NAME_MAX}s")

GET_API_VERSION = _ioctl.ior(0x00, U64, VDUSE)
SET_API_VERSION = _ioctl.iow(0x01, U64, VDUSE)
CREATE_DEV = _ioctl.iow(0x02, DEV_CONFIG, VDUSE)
DESTROY_DEV = _ioctl.iow(0x03, NAME, VDUSE)
IOTLB_GET_FD = _ioctl.iowr(0x10, IOTLB_ENTRY, VDUSE)
DEV_GET_FEATURES = _ioctl.ior(0x11, U64, VDUSE)
DEV_SET_CONFIG = _ioctl.iow(0x12, CONFIG_DATA, VDUSE)
DEV_INJECT_CONFIG_IRQ = _ioctl.io(0x13, VDUSE)
VQ_SETUP = _ioctl.iow(0x14, VQ_CONFIG, VDUSE)
VQ_GET_INFO = _ioctl.iowr(0x15, VQ_INFO, VDUSE)
VQ_SETUP_KICKFD = _ioctl.iow(0x16, VQ_EVENTFD, VDUSE)
VQ_INJECT_IRQ = _ioctl.iow(0x17, INDEX, VDUSE)

_CONTROL = "/dev/vduse/control"
_APPEARS = 5.0
"""Seconds for the node of a new device to appear."""


class Message(IntEnum):
    """``enum vduse_req_type``."""

    GET_VQ_STATE = 0
    SET_STATUS = 1
    UPDATE_IOTLB = 2


OK, FAILED = 0, 1
"""VDUSE_REQ_RESULT_OK and _FAILED."""


@dataclass(frozen=True)
class Request:
    """A message from the kernel; *body* is 128 bytes."""

    kind: int
    number: int
    body: bytes


@dataclass(frozen=True)
class QueueInfo:
    """What the driver said about a queue. *base* as in SET_VRING_BASE, for either ring format."""

    num: int
    desc: int
    driver: int
    device: int
    state: tuple[int, int, int, int]
    ready: bool

    def base(self, packed: bool) -> int:
        """Where the ring starts, as SET_VRING_BASE says it."""
        return pack_state(self.state) if packed else self.state[0]


def pack_state(state: tuple[int, int, int, int]) -> int:
    """``struct vduse_vq_state_packed`` (avail counter, avail index, used counter, used index) as a vring base."""
    avail_counter, avail, used_counter, used = state
    return (used | (used_counter & 1) << 15) << 16 | avail | (avail_counter & 1) << 15


def unpack_state(base: int) -> tuple[int, int, int, int]:
    """The inverse of ``pack_state``."""
    return base >> 15 & 1, base & 0x7FFF, base >> 31 & 1, base >> 16 & 0x7FFF


@dataclass(frozen=True)
class Entry:
    """One entry of the device's IOTLB: IOVA [first, last] is *fd* from *offset* on. The descriptor is the receiver's."""

    first: int
    last: int
    offset: int
    perm: int
    fd: int


class Control:
    """/dev/vduse/control: makes devices and takes them away."""

    def __init__(self) -> None:
        try:
            self._fd = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            hints = {
                errno.ENOENT: "this kernel has no VDUSE: modprobe vduse (CONFIG_VDPA_USER)",
                errno.EACCES: "making kernel devices needs root",
            }
            raise device_error(error.errno or 0, "open", _CONTROL, hints.get(error.errno or 0, "")) from None
        try:
            fcntl.ioctl(self._fd, SET_API_VERSION, U64.pack(0))
        except BaseException:
            os.close(self._fd)
            raise

    def create(self, name: str, device_id: int, features: int, queues: int, config: bytes) -> None:
        """Make a device; OSError EEXIST when there is one of this name."""
        header = DEV_CONFIG.pack(name.encode(), 0, device_id, features, queues, 4096, len(config))
        fcntl.ioctl(self._fd, CREATE_DEV, header + config)

    def destroy(self, name: str) -> None:
        """Take a device away that nobody uses: EBUSY while it is on the vdpa bus, or open."""
        fcntl.ioctl(self._fd, DESTROY_DEV, NAME.pack(name.encode()))

    def close(self) -> None:
        """Close; devices stay. Harmless when done before."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Node:
    """/dev/vduse/NAME, opened: the daemon's side of one device."""

    def __init__(self, name: str) -> None:
        path = f"/dev/vduse/{name}"
        end = time.monotonic() + _APPEARS
        while True:
            try:
                self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
                return
            except OSError as error:
                if error.errno != errno.ENOENT or time.monotonic() > end:
                    raise device_error(error.errno or 0, "open", path) from None
            time.sleep(0.01)

    def receive(self) -> Request | None:
        """The next message, None when there is none."""
        try:
            return Request(*REQUEST.unpack(os.read(self.fd, REQUEST.size)))
        except BlockingIOError:
            return None

    def answer(self, request: Request, result: int, body: bytes = b"") -> None:
        """Every message has one answer."""
        os.write(self.fd, RESPONSE.pack(request.number, result, body))

    def features(self) -> int:
        """What the driver accepted; valid from FEATURES_OK on."""
        buffer = bytearray(U64.size)
        fcntl.ioctl(self.fd, DEV_GET_FEATURES, buffer)
        return int(U64.unpack(buffer)[0])

    def set_config(self, config: bytes) -> None:
        """Replace the configuration space and, where there is a driver, interrupt it."""
        fcntl.ioctl(self.fd, DEV_SET_CONFIG, CONFIG_DATA.pack(0, len(config)) + config)
        try:
            fcntl.ioctl(self.fd, DEV_INJECT_CONFIG_IRQ)
        except OSError as error:
            if error.errno != errno.EINVAL:  # no driver that could be told
                raise

    def set_up_queue(self, index: int, max_size: int) -> None:
        """Before the device comes to the vdpa bus."""
        fcntl.ioctl(self.fd, VQ_SETUP, VQ_CONFIG.pack(index, max_size))

    def queue(self, index: int) -> QueueInfo:
        """What the driver has set up; complete when DRIVER_OK comes."""
        buffer = bytearray(VQ_INFO.pack(index, *[0] * (4 + 4 + 1)))
        fcntl.ioctl(self.fd, VQ_GET_INFO, buffer)
        _, num, desc, driver, device, a, b, c, d, ready = VQ_INFO.unpack(buffer)
        return QueueInfo(num, desc, driver, device, (a, b, c, d), bool(ready))

    def set_kick(self, index: int, fd: int) -> None:
        """Let the driver's kicks signal an eventfd, those that came already too; the kernel forgets it with a reset. -1 for none."""
        fcntl.ioctl(self.fd, VQ_SETUP_KICKFD, VQ_EVENTFD.pack(index, fd))

    def interrupt(self, index: int) -> None:
        """Call the driver; nothing when the queue is not ready any more."""
        try:
            fcntl.ioctl(self.fd, VQ_INJECT_IRQ, INDEX.pack(index))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise

    def entry(self, first: int) -> Entry | None:
        """The first entry of the IOTLB at or behind IOVA *first*, None when there is none."""
        buffer = bytearray(IOTLB_ENTRY.pack(0, first, U64_MAX, 0))
        try:
            fd = fcntl.ioctl(self.fd, IOTLB_GET_FD, buffer)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return None
        offset, first, last, perm = IOTLB_ENTRY.unpack(buffer)
        return Entry(first, last, offset, perm, fd)

    def close(self) -> None:
        """Close; what was not answered waits for the next opener. Harmless when done before."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
