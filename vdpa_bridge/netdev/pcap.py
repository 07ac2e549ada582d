# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Captures as the other end, or beside it: frames played from a file, and all frames written to one.

Formats: read are pcap (micro- and nanoseconds, either byte order) and pcapng; written is pcapng with nanoseconds and the
direction of each frame as the driver sees it (draft-ietf-opsawg-pcap, draft-ietf-opsawg-pcapng).
Rule of this file: a capture is somebody else's file: every length in it is checked before it is used.
"""

from __future__ import annotations

import logging
import os
import struct
import time
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO

from .base import BATCH, LONGEST, PLAIN, SHORTEST, Netdev

_log = logging.getLogger(__name__)

_ETHERNET = 1
_CLASSIC = (0xA1B2C3D4, 0xA1B23C4D)
_SECTION, _INTERFACE, _SIMPLE, _ENHANCED = 0x0A0D0D0A, 1, 3, 6
_BYTE_ORDER = 0x1A2B3C4D
_LARGEST = 1 << 20
"""Bytes of a record."""
_INBOUND, _OUTBOUND = 1, 2


def frames_of(file: BinaryIO) -> Iterator[bytes]:
    """The frames of a capture, in order; ValueError, now or later, when it is none, is damaged, or not of Ethernet."""
    magic = _exactly(file, 4)
    for order in "<>":
        if struct.unpack(order + "I", magic)[0] in _CLASSIC:
            _need_ethernet(struct.unpack_from(order + "I", _exactly(file, 20), 16)[0] & 0xFFFF)
            return _classic(file, struct.Struct(order + "8xII"))
    if struct.unpack("<I", magic)[0] == _SECTION:  # which is the same in both orders
        return _blocks(file, _section(file))
    raise ValueError("it is neither pcap nor pcapng")


def _exactly(file: BinaryIO, size: int) -> bytes:
    if size > _LARGEST:
        raise ValueError(f"it has a record of {size} bytes")
    data = file.read(size)
    if len(data) < size:
        raise ValueError("it ends too early")
    return data


def _need_ethernet(link_type: int) -> None:
    if link_type != _ETHERNET:
        raise ValueError(f"it has link type {link_type}, not Ethernet ({_ETHERNET})")


def _classic(file: BinaryIO, record: struct.Struct) -> Iterator[bytes]:
    while file.peek(1):  # type: ignore[attr-defined] # a BufferedReader
        kept, _ = record.unpack(_exactly(file, record.size))
        yield _exactly(file, kept)


def _section(file: BinaryIO) -> str:
    """The byte order of a section whose type was read."""
    size, mark = _exactly(file, 4), _exactly(file, 4)
    for order in "<>":
        if struct.unpack(order + "I", mark)[0] == _BYTE_ORDER:
            (length,) = struct.unpack(order + "I", size)
            if length >= 28 and length % 4 == 0:
                _exactly(file, length - 12)
                return order
    raise ValueError("it has a section that is none")


def _blocks(file: BinaryIO, order: str) -> Iterator[bytes]:
    kinds: list[int] = []
    while file.peek(1):  # type: ignore[attr-defined]
        kind, length = struct.unpack(order + "II", _exactly(file, 4) + _exactly(file, 4))
        if kind == _SECTION:
            file.seek(-4, os.SEEK_CUR)
            order, kinds = _section(file), []
            continue
        if length < 12 or length % 4:
            raise ValueError(f"it has a block of {length} bytes")
        body = _exactly(file, length - 12)
        _exactly(file, 4)
        if kind == _INTERFACE and len(body) >= 8:
            kinds.append(struct.unpack_from(order + "H", body)[0])
        elif kind in (_ENHANCED, _SIMPLE):
            yield _frame(body, order, kinds, kind == _SIMPLE)


def _frame(body: bytes, order: str, kinds: list[int], simple: bool) -> bytes:
    """Of a packet block; a simple one is cut where its interface cuts, at the block's end at the latest."""
    at = 4 if simple else 20
    if len(body) < at:
        raise ValueError("it has a packet block without a packet")
    if simple:
        interface, kept = 0, min(struct.unpack_from(order + "I", body)[0], len(body) - at)
    else:
        interface, kept = struct.unpack_from(order + "I8xI", body)
    if interface >= len(kinds) or kept > len(body) - at:
        raise ValueError("it has a packet block of no interface, or one that ends too early")
    _need_ethernet(kinds[interface])
    return body[at : at + kept]


class Playback(Netdev):
    """The frames of *path* for each driver from the beginning, as fast as it takes them; what is sent goes nowhere. Empty: no frames."""

    def __init__(self, path: str = "") -> None:
        """OSError when *path* cannot be read, ValueError when it is no capture."""
        super().__init__()
        self._path = path
        self._file = open(path, "rb") if path else None  # noqa: SIM115 - closed with this object
        self._ready = -1
        self._frames: Iterator[bytes] = iter(())
        try:
            self._rewind()
            self._ready = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except ValueError as error:
            self.close()
            raise ValueError(f"{path}: {error}") from None
        except BaseException:
            self.close()
            raise

    def __str__(self) -> str:
        return f"capture {self._path}" if self._path else "no wire"

    def _rewind(self) -> None:
        if self._file is not None:
            self._file.seek(0)
            self._frames = frames_of(self._file)

    def start(self, features: int) -> None:
        """From the beginning."""
        self._rewind()
        if self._file is not None:
            os.eventfd_write(self._ready, 1)

    def stop(self) -> None:
        """Silence."""
        self._pause()

    def _pause(self) -> None:
        try:
            os.eventfd_read(self._ready)
        except BlockingIOError:
            pass  # silent already

    def watched(self, queue: int) -> int:
        """An eventfd, readable while there are frames."""
        return self._ready

    def receive(self, queue: int) -> list[bytes]:
        """The next ones."""
        packets: list[bytes] = []
        try:
            packets += islice((PLAIN + frame for frame in self._frames if SHORTEST <= len(frame) <= LONGEST), BATCH)
        except (OSError, ValueError) as error:
            _log.warning("%s: %s", self, error)
            self._frames = iter(())
        if not packets:
            self._pause()
        return packets

    def _put(self, queue: int, packet: bytes) -> int:
        return len(packet)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        if self._ready >= 0:
            os.close(self._ready)
            self._ready = -1


class Capture:
    """A pcapng file that grows with every frame."""

    def __init__(self, path: str) -> None:
        """OSError when *path* cannot be written; what is there is replaced."""
        self._path = path
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed with this object
        self._add(_SECTION, struct.pack("<IHHq", _BYTE_ORDER, 1, 0, -1))
        resolution = struct.pack("<HHB3x", 9, 1, 9)  # if_tsresol: 10 to the -9 seconds
        self._add(_INTERFACE, struct.pack("<HHI", _ETHERNET, 0, 0) + resolution + bytes(4))

    def frame(self, frame: bytes, sent: bool) -> None:
        """One more, *sent* by the driver or received; without a word when the file is closed."""
        now = time.time_ns()
        head = struct.pack("<IIIII", 0, now >> 32, now & 0xFFFFFFFF, len(frame), len(frame))
        flags = struct.pack("<HHI", 2, 4, _OUTBOUND if sent else _INBOUND)  # epb_flags
        self._add(_ENHANCED, head + frame + bytes(-len(frame) % 4) + flags + bytes(4))

    def _add(self, kind: int, body: bytes) -> None:
        if self._file.closed:
            return
        block = struct.pack("<II", kind, len(body) + 12) + body + struct.pack("<I", len(body) + 12)
        try:
            if self._file.write(block) != len(block):
                raise OSError("the file is full")
        except OSError as error:
            _log.warning("capture %s ends here: %s", self._path, error.strerror or error)
            self._file.close()

    def close(self) -> None:
        """The file is complete at any time."""
        self._file.close()
