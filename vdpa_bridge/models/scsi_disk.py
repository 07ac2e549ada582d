# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A SCSI disk on a file (SPC-4, SBC-3): one logical unit, which knows commands and nothing of who brings them.

Rule of this file: a command is checked wholly before any of it is done. What goes wrong is a ``Check`` with sense data, told
with the command itself, so that none is kept for REQUEST SENSE but the unit attention of a reset.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Protocol

BLOCK = 512
LARGEST = 1 << 62
"""Bytes of a disk; keeps every offset that passes the range check within a signed 64-bit file offset."""
_VENDOR, _PRODUCT, _REVISION = b"VDPA-BR ", b"DISK            ", b"1.0 "


class Code(IntEnum):
    """Operation codes."""

    TEST_UNIT_READY = 0x00
    REQUEST_SENSE = 0x03
    READ_6 = 0x08
    WRITE_6 = 0x0A
    INQUIRY = 0x12
    MODE_SENSE_6 = 0x1A
    READ_CAPACITY_10 = 0x25
    READ_10 = 0x28
    WRITE_10 = 0x2A
    SYNCHRONIZE_CACHE_10 = 0x35
    MODE_SENSE_10 = 0x5A
    READ_16 = 0x88
    WRITE_16 = 0x8A
    SYNCHRONIZE_CACHE_16 = 0x91
    SERVICE_ACTION_IN_16 = 0x9E
    REPORT_LUNS = 0xA0


class Check(Exception):
    """CHECK CONDITION: the sense key, and the additional code with its qualifier in one number of 16 bits."""

    def __init__(self, key: int, code: int) -> None:
        super().__init__(f"sense key {key}, code {code:#06x}")
        self.sense = sense_data(key, code)


class Data(Protocol):
    """What a command transfers with, without a copy of ours."""

    sent: int
    """Bytes that came with the command."""
    room: int
    """Bytes that there is room for."""

    def from_file(self, fd: int, offset: int, length: int) -> int:
        """Read from a file into the driver's buffers; how many bytes there were."""

    def to_file(self, fd: int, offset: int, length: int) -> int:
        """Write to a file what the driver sent; how many bytes went."""


class Overrun(Exception):
    """The command is to transfer more than there is room for, or came."""


def sense_data(key: int, code: int) -> bytes:
    """Of the fixed format (SPC-4, 4.5.3)."""
    return struct.pack(">BxB4xB4xHxxxx", 0x70, key, 10, code)


def illegal(code: int) -> Check:
    """ILLEGAL REQUEST."""
    return Check(5, code)


INVALID_OPCODE, OUT_OF_RANGE, INVALID_FIELD, NO_SUCH_UNIT = 0x2000, 0x2100, 0x2400, 0x2500
POWER_ON, BUS_RESET = 0x2900, 0x2903
"""What UNIT ATTENTION tells of."""


class ScsiDisk:
    """The disk in the file behind *fd*, which it owns, with blocks of 512 bytes."""

    def __init__(self, fd: int, serial: str, *, readonly: bool = False) -> None:
        """ValueError when the file is too large, or not one block, which leaves *fd* to the caller."""
        size = os.lseek(fd, 0, os.SEEK_END)
        if not BLOCK <= size <= LARGEST:
            raise ValueError(f"a disk of {size} bytes; it has {BLOCK} to {LARGEST}")
        self._fd = fd
        self._blocks = size // BLOCK
        self._serial = serial.encode("ascii", "replace")
        self._readonly = readonly
        self._attention = POWER_ON
        self._commands: dict[int, Callable[[bytes, Data], bytes | int]] = {
            Code.TEST_UNIT_READY: self._test_unit_ready,
            Code.REQUEST_SENSE: self._request_sense,
            Code.READ_6: self._read,
            Code.WRITE_6: self._write,
            Code.INQUIRY: self._inquiry,
            Code.MODE_SENSE_6: self._mode_sense,
            Code.READ_CAPACITY_10: self._capacity,
            Code.READ_10: self._read,
            Code.WRITE_10: self._write,
            Code.SYNCHRONIZE_CACHE_10: self._synchronize,
            Code.MODE_SENSE_10: self._mode_sense,
            Code.READ_16: self._read,
            Code.WRITE_16: self._write,
            Code.SYNCHRONIZE_CACHE_16: self._synchronize,
            Code.SERVICE_ACTION_IN_16: self._capacity_16,
        }

    def reset(self, why: int = POWER_ON) -> None:
        """There was a reset, which the next command is told."""
        self._attention = why

    def close(self) -> None:
        """Close the file; harmless when done before."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def run(self, cdb: bytes, data: Data) -> bytes | int:
        """Carry out a command of 16 bytes or more: what it answers, or how many bytes it transferred. Check and Overrun else."""
        command = self._commands.get(cdb[0])
        if self._attention and cdb[0] not in (Code.INQUIRY, Code.REQUEST_SENSE):  # SPC-4, 5.14: these do not report one
            why, self._attention = self._attention, 0
            raise Check(6, why)
        if command is None:
            raise illegal(INVALID_OPCODE)
        return command(cdb, data)

    # Blocks ------------------------------------------------------------------------------------------------------------

    def _area(self, cdb: bytes) -> tuple[int, int]:
        """Where in the file the blocks of a command lie, and their bytes."""
        group = cdb[0] >> 5
        if group == 0:
            block, count = int.from_bytes(cdb[1:4], "big") & 0x1FFFFF, cdb[4] or 256
        elif group == 1:
            block, count = struct.unpack_from(">I", cdb, 2)[0], struct.unpack_from(">H", cdb, 7)[0]
        else:
            block, count = struct.unpack_from(">QI", cdb, 2)
        if block > self._blocks or count > self._blocks - block:
            raise illegal(OUT_OF_RANGE)
        return block * BLOCK, count * BLOCK

    def _protection(self, cdb: bytes) -> None:
        if cdb[0] >> 5 and cdb[1] >> 5:  # a format with protection information is what the disk has not
            raise illegal(INVALID_FIELD)

    def _read(self, cdb: bytes, data: Data) -> int:
        self._protection(cdb)
        offset, length = self._area(cdb)
        if length > data.room:
            raise Overrun
        try:
            if length and data.from_file(self._fd, offset, length) != length:
                raise Check(3, 0x1100)  # unrecovered read error: the file has shrunk
        except OSError as error:
            raise _failed(error, 0x1100) from error
        return length

    def _write(self, cdb: bytes, data: Data) -> int:
        self._protection(cdb)
        offset, length = self._area(cdb)
        if self._readonly:
            raise Check(7, 0x2700)
        if length > data.sent:
            raise Overrun
        try:
            if length and data.to_file(self._fd, offset, length) != length:
                raise Check(3, 0x0C00)
            if cdb[0] >> 5 and cdb[1] & 8:  # FUA
                os.fdatasync(self._fd)
        except OSError as error:
            raise _failed(error, 0x0C00) from error
        return length

    def _synchronize(self, cdb: bytes, data: Data) -> int:
        self._area(cdb)
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise _failed(error, 0x0C00) from error
        return 0

    # What the disk says of itself --------------------------------------------------------------------------------------

    def _test_unit_ready(self, cdb: bytes, data: Data) -> bytes:
        return b""

    def _request_sense(self, cdb: bytes, data: Data) -> bytes:
        if cdb[1] & 1:  # descriptor format
            raise illegal(INVALID_FIELD)
        why, self._attention = self._attention, 0
        return sense_data(6 if why else 0, why)[: cdb[4]]

    def _inquiry(self, cdb: bytes, data: Data) -> bytes:
        most = struct.unpack_from(">H", cdb, 3)[0]
        if not cdb[1] & 1:
            if cdb[2]:
                raise illegal(INVALID_FIELD)
            return standard_inquiry(0)[:most]
        identity = _VENDOR + self._serial
        pages = {
            0x00: b"\x00\x80\x83",
            0x80: self._serial,
            0x83: struct.pack(">BBxB", 2, 1, len(identity)) + identity,  # ASCII, a vendor's name and what follows it
        }
        if (page := pages.get(cdb[2])) is None:
            raise illegal(INVALID_FIELD)
        return (struct.pack(">BBH", 0, cdb[2], len(page)) + page)[:most]

    def _mode_sense(self, cdb: bytes, data: Data) -> bytes:
        """The pages for caching (there is a write cache) and control, without block descriptors; nothing can be changed or saved."""
        control, page, subpage = cdb[2] >> 6, cdb[2] & 0x3F, cdb[3]
        if control == 3:
            raise illegal(0x3900)  # saving parameters is not supported
        caching = 0 if control == 1 else 4
        pages = {0x08: bytes((0x08, 18, caching)) + bytes(17), 0x0A: bytes((0x0A, 10)) + bytes(10)}
        if (page != 0x3F and page not in pages) or subpage not in ((0, 0xFF) if page == 0x3F else (0,)):
            raise illegal(INVALID_FIELD)
        body = b"".join(pages.values()) if page == 0x3F else pages[page]
        specific = 0x90 if self._readonly else 0x10  # WP, and DPOFUA: the bits of that name are taken
        if cdb[0] == Code.MODE_SENSE_6:
            return (struct.pack(">BBBB", 3 + len(body), 0, specific, 0) + body)[: cdb[4]]
        return (struct.pack(">HBBBBH", 6 + len(body), 0, specific, 0, 0, 0) + body)[: struct.unpack_from(">H", cdb, 7)[0]]

    def _capacity(self, cdb: bytes, data: Data) -> bytes:
        return struct.pack(">II", min(self._blocks - 1, 0xFFFFFFFF), BLOCK)

    def _capacity_16(self, cdb: bytes, data: Data) -> bytes:
        if cdb[1] & 0x1F != 0x10:
            raise illegal(INVALID_FIELD)
        return struct.pack(">QI20x", self._blocks - 1, BLOCK)[: struct.unpack_from(">I", cdb, 10)[0]]


def standard_inquiry(kind: int) -> bytes:
    """What a unit is: 0 a disk, 0x7f none at all, though the target is there."""
    return struct.pack(">BBBBBBBB", kind, 0, 6, 0x02, 31, 0, 0, 0x02) + _VENDOR + _PRODUCT + _REVISION


def _failed(error: OSError, code: int) -> Exception:
    """What the file's error is to the driver; memory that it took away is no error of the medium."""
    return error if error.errno == errno.EFAULT else Check(3, code)
