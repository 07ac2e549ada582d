# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the frames of a network device go to and come from.

Rule of this file: a packet is a frame behind a virtio_net_hdr of 12 bytes. Nothing here waits: what the other side has no
room for yet is held, one packet for each queue, until it has; nobody gives another one meanwhile.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pcap import Capture

_log = logging.getLogger(__name__)

HEADER = 12
"""Bytes of ``struct virtio_net_hdr_v1``."""
LONGEST = 65535 + 14 + 4
"""Bytes of a frame: the longest IP packet behind an Ethernet header with a VLAN tag."""
SHORTEST = 14
PLAIN = bytes(HEADER)
"""The header of a frame that leaves nothing to do."""
BATCH = 64
"""Frames taken at once."""


class Netdev(ABC):
    """One end of a wire. Synchronization: one thread at a time."""

    queues: int = 1
    """Descriptors that frames come and go by, each for a queue pair."""
    offloads: int = 0
    """Features (NetFeature) of a device that it can stand behind: work that packets may leave undone."""
    mtu: int = 0
    """What the other side is set up for; 0 if it does not say."""
    link: bool = True
    """Whether somebody is there."""
    reaches: tuple[str, ...] = ()
    """Sockets that are connected to later."""
    controls: tuple[int, ...] = ()
    """Requests by ioctl(2) on what it has open."""
    native: bool = False
    """Whether each read from a descriptor gives one packet, and each write takes one, as they are here: an engine can do both."""
    capture: Capture | None = None
    """What notes the frames that pass; closed with this one."""
    leaving: Callable[[int], None] = staticmethod(lambda fd: None)
    """Called with a descriptor that was watched, before it is closed."""

    def __init__(self) -> None:
        self._held: dict[int, bytes] = {}
        self._holders = 0
        self.lost = 0
        """Frames that could not be given on."""

    @abstractmethod
    def watched(self, queue: int) -> int:
        """The descriptor that is readable when ``receive`` is worth calling; -1 if there is none."""

    @abstractmethod
    def receive(self, queue: int) -> list[bytes]:
        """Packets that are there, some tens of them; what is not a frame is left out. It may change ``link`` and what is watched."""

    @abstractmethod
    def _put(self, queue: int, packet: bytes) -> int:
        """Bytes of *packet* that are taken. BlockingIOError if there is no room, other OSError when the packet is lost."""

    def _form(self, packet: bytes) -> bytes:
        """*packet* as the other side wants it: a frame and nothing else, unless a kind of wire has other needs."""
        return packet[HEADER:]

    def send(self, queue: int, packet: bytes) -> None:
        """Take a packet. What could not be written at once is ``blocked``."""
        self._write(queue, self._form(packet))

    def flush(self, queue: int) -> None:
        """There is room: go on with what is held."""
        if (data := self._held.pop(queue, None)) is not None:
            self._write(queue, data)

    def blocked(self, queue: int) -> bool:
        """Whether something is held: the descriptor is waited for until it is writable."""
        return queue in self._held

    def _write(self, queue: int, data: bytes) -> None:
        try:
            done = self._put(queue, data)
        except BlockingIOError:
            done = 0
        except OSError as error:
            self._lose(error)
            return
        if done < len(data):
            self._held[queue] = data[done:]

    def _lose(self, error: OSError) -> None:
        self.lost += 1
        if self.lost == 1:  # a driver can bring it about as fast as it likes
            _log.warning("%s: a frame was lost, as will be all others like it: %s", self, error.strerror or error)

    def start(self, features: int) -> None:  # noqa: B027 - most wires carry frames alone
        """A driver is ready that accepted *features*."""

    @property
    def settled(self) -> bool:
        """Whether nothing is to be asked of the other side before the next packet comes."""
        return True

    def settle(self) -> None:  # noqa: B027
        """Ask it."""

    def failed(self, error: OSError) -> None:
        """An engine saw a packet lost."""
        self._lose(error)

    def use(self, queue: int, on: bool) -> None:  # noqa: B027 - most have one queue, always used
        """Whether the driver uses a queue pair; one that it does not use gets no frames."""

    def set_link(self, up: bool) -> None:  # noqa: B027
        """Tell the other side whether the device's end is plugged in, if it can be told."""

    def refresh(self) -> None:  # noqa: B027
        """Look anew whether the other side is there."""

    def stop(self) -> None:
        """The driver is gone, and with it what it left half sent."""
        self._held.clear()

    def hold(self) -> None:
        """One more uses it: the device that takes another one's place, while that one is there."""
        self._holders += 1

    def release(self) -> None:
        """One less; the last one closes it."""
        self._holders -= 1
        if not self._holders:
            self.close()
            if self.capture is not None:
                self.capture.close()

    @abstractmethod
    def close(self) -> None:
        """Give everything back; harmless when done before."""
