# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A tap interface: a network card of this system whose frames a process takes and gives (linux/if_tun.h).

Rule of this file: a frame is preceded by its virtio_net_hdr, as a virtio device wants it, so that nobody has to touch either.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from pathlib import Path
from typing import Self

_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETVNETHDRSZ, _TUNSETQUEUE = 0x400454CA, 0x400454D0, 0x400454D8, 0x400454D9
_TUNSETVNETLE, _TUNSETCARRIER = 0x400454DC, 0x400454E2
_IFF_TAP, _IFF_MULTI_QUEUE, _IFF_ATTACH_QUEUE, _IFF_DETACH_QUEUE, _IFF_NO_PI, _IFF_VNET_HDR = 0x2, 0x100, 0x200, 0x400, 0x1000, 0x4000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFMTU, _SIOCSIFHWADDR = 0x8913, 0x8914, 0x8922, 0x8924
_IFF_UP, _ARPHRD_ETHER = 1, 1
_NAME_MAX = 15

CONTROLS = (_TUNSETOFFLOAD, _TUNSETVNETHDRSZ, _TUNSETQUEUE, _TUNSETCARRIER)
"""Requests on an interface that is there, which take no capability."""

F_CSUM = 1
"""TUN_F_CSUM: the reader takes frames whose checksum is yet to be made."""
F_TSO4, F_TSO6, F_TSO_ECN, F_UFO, F_USO4, F_USO6 = 2, 4, 8, 16, 32, 64
"""TUN_F_TSO4 and so on: it takes TCP segments and UDP datagrams that are yet to be cut, too."""

_WHY = {
    errno.ENOENT: "no /dev/net/tun: modprobe tun",
    errno.EPERM: "it takes CAP_NET_ADMIN to make an interface; as root, once: ip tuntap add dev {name} mode tap user $USER",
    errno.EBUSY: "another process is attached to it",
    errno.EINVAL: "there is an interface of that name that is no tap, or one without several queues (ip tuntap add ... multi_queue)",
    errno.E2BIG: "other processes are attached to all of its queues",
}


class Tap:
    """The interface *name*, made if it is not there; it goes with this object unless it was made to persist (ip tuntap add).

    Reads and writes are of one frame with its header each, and never wait. With several queues each is a descriptor of its
    own; the kernel keeps to the queue by which a flow came. Synchronization: as a file.
    """

    def __init__(self, name: str, queues: int = 1) -> None:
        """ValueError for what is no name, OSError with what to type where it cannot be had."""
        encoded = name.encode()
        if not 0 < len(encoded) <= _NAME_MAX or b"/" in encoded or name in (".", "..") or name.split() != [name]:
            raise ValueError(f"{name!r} is no name of an interface: up to {_NAME_MAX} bytes without blanks and slashes")
        self.name = name
        self.made = not Path("/sys/class/net", name).exists()
        """Whether the interface was not there before."""
        self._fds: list[int] = []
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        if queues > 1 or self._has_queues():
            flags |= _IFF_MULTI_QUEUE
        try:
            for _ in range(queues):
                self._fds.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
                fcntl.ioctl(self._fds[-1], _TUNSETIFF, struct.pack("16sH22x", encoded, flags))
                fcntl.ioctl(self._fds[-1], _TUNSETVNETLE, struct.pack("i", 1))
        except OSError as error:
            self.close()
            why = _WHY.get(error.errno or 0, os.strerror(error.errno or 0)).format(name=name)
            raise OSError(error.errno, f"tap {name}: {why}") from None

    def fileno(self, queue: int = 0) -> int:
        """To read, write and poll; -1 when closed."""
        return self._fds[queue] if self._fds else -1

    def attach(self, queue: int, on: bool) -> None:
        """Take part with one of several queues, or not; a queue that does not has no frames and cannot be polled."""
        fcntl.ioctl(self._fds[queue], _TUNSETQUEUE, struct.pack("16xH22x", _IFF_ATTACH_QUEUE if on else _IFF_DETACH_QUEUE))

    def set_header(self, size: int) -> None:
        """Bytes of the virtio_net_hdr: 12 for virtio 1, 10 before."""
        fcntl.ioctl(self._fds[0], _TUNSETVNETHDRSZ, struct.pack("i", size))

    def set_offload(self, flags: int) -> None:
        """What frames that are read may leave to the reader: nothing, or F_CSUM and, beside it, the others."""
        fcntl.ioctl(self._fds[0], _TUNSETOFFLOAD, flags)

    def knows(self, flags: int) -> bool:
        """Whether the kernel can leave this to a reader; it does nothing of the kind afterwards."""
        try:
            self.set_offload(flags)
        except OSError:
            return False
        self.set_offload(0)
        return True

    def set_carrier(self, up: bool) -> None:
        """Whether the cable is in."""
        fcntl.ioctl(self._fds[0], _TUNSETCARRIER, struct.pack("i", up))

    def set_identity(self, mac: bytes, mtu: int) -> None:
        """Give the interface an address (empty: leave it) and an MTU, where it has others."""
        if mac and self._sysfs("address") != mac.hex(":"):
            self._configure(_SIOCSIFHWADDR, struct.pack("H6s8x", _ARPHRD_ETHER, mac), f"address {mac.hex(':')}")
        if self._sysfs("mtu") != str(mtu):
            self._configure(_SIOCSIFMTU, struct.pack("i12x", mtu), f"mtu {mtu}")

    @property
    def address(self) -> bytes:
        """The MAC address of this system's end."""
        return bytes.fromhex(self._sysfs("address").replace(":", ""))

    @property
    def mtu(self) -> int:
        """Bytes of payload in a frame."""
        return int(self._sysfs("mtu"))

    @property
    def up(self) -> bool:
        """Whether frames pass; they do not once the interface is gone."""
        try:
            return bool(int(self._sysfs("flags"), 16) & _IFF_UP)
        except FileNotFoundError:
            return False

    def set_up(self) -> None:
        """Bring the interface up (ip link set dev NAME up)."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16s16x", self.name.encode()))
        flags: int = struct.unpack_from("H", answer, 16)[0]
        if not flags & _IFF_UP:
            self._configure(_SIOCSIFFLAGS, struct.pack("H14x", flags | _IFF_UP), "up")

    def _has_queues(self) -> bool:
        try:
            return bool(int(self._sysfs("tun_flags"), 16) & _IFF_MULTI_QUEUE)
        except FileNotFoundError:
            return False

    def _sysfs(self, attribute: str) -> str:
        return Path("/sys/class/net", self.name, attribute).read_text().strip()

    def _configure(self, request: int, value: bytes, words: str) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            try:
                fcntl.ioctl(sock, request, struct.pack("16s", self.name.encode()) + value)
            except OSError as error:
                raise OSError(error.errno, f"tap {self.name}: {error.strerror}; as root: ip link set dev {self.name} {words}") from None

    def close(self) -> None:
        """Detach; harmless when done before."""
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
