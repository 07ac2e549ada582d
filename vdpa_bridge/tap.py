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

_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETVNETHDRSZ, _TUNSETVNETLE, _TUNSETCARRIER = 0x400454CA, 0x400454D0, 0x400454D8, 0x400454DC, 0x400454E2
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x2, 0x1000, 0x4000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFMTU, _SIOCSIFHWADDR = 0x8913, 0x8914, 0x8922, 0x8924
_IFF_UP, _ARPHRD_ETHER = 1, 1
_NAME_MAX = 15

F_CSUM = 1
"""TUN_F_CSUM: the reader takes frames whose checksum is yet to be made."""
F_TSO4, F_TSO6, F_TSO_ECN = 2, 4, 8
"""TUN_F_TSO4 and so on: it takes TCP segments that are yet to be cut, too."""

_WHY = {
    errno.ENOENT: "no /dev/net/tun: modprobe tun",
    errno.EPERM: "it takes CAP_NET_ADMIN to make an interface; as root, once: ip tuntap add dev {name} mode tap user $USER",
    errno.EBUSY: "another process is attached to it",
    errno.EINVAL: "there is an interface of that name that is no tap, or one with several queues",
}


class Tap:
    """The interface *name*, made if it is not there; it goes with this object unless it was made to persist (ip tuntap add).

    Reads and writes are of one frame with its header each, and never wait. Synchronization: as a file.
    """

    def __init__(self, name: str) -> None:
        """ValueError for what is no name, OSError with what to type where it cannot be had."""
        encoded = name.encode()
        if not 0 < len(encoded) <= _NAME_MAX or b"/" in encoded or name in (".", "..") or name.split() != [name]:
            raise ValueError(f"{name!r} is no name of an interface: up to {_NAME_MAX} bytes without blanks and slashes")
        self.name = name
        self._fd = -1
        try:
            self._fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.ioctl(self._fd, _TUNSETIFF, struct.pack("16sH22x", encoded, _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
            fcntl.ioctl(self._fd, _TUNSETVNETLE, struct.pack("i", 1))
        except OSError as error:
            self.close()
            why = _WHY.get(error.errno or 0, os.strerror(error.errno or 0)).format(name=name)
            raise OSError(error.errno, f"tap {name}: {why}") from None

    def fileno(self) -> int:
        """To read, write and poll; -1 when closed."""
        return self._fd

    def set_header(self, size: int) -> None:
        """Bytes of the virtio_net_hdr: 12 for virtio 1, 10 before."""
        fcntl.ioctl(self._fd, _TUNSETVNETHDRSZ, struct.pack("i", size))

    def set_offload(self, flags: int) -> None:
        """What frames that are read may leave to the reader: nothing, or F_CSUM and, beside it, the others."""
        fcntl.ioctl(self._fd, _TUNSETOFFLOAD, flags)

    def set_carrier(self, up: bool) -> None:
        """Whether the cable is in."""
        fcntl.ioctl(self._fd, _TUNSETCARRIER, struct.pack("i", up))

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
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
