# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A SCSI host driver (virtio 1.2, 5.6): any command to any logical unit, and the few that make a disk of one.

Rule of this file: what a command brings is counted by the device's own residual, checked against the room that there was.
Big-endian is SCSI's (SPC-4, SBC-3), little-endian virtio's.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Unpack

from ..device import Device
from ..errors import DeviceBroken
from ..virtio.config import parse_config
from ..virtio.ids import DeviceId
from .base import Driver, Options

REQUESTS = 2
"""The first request queue, behind those of control and events."""
TEST_UNIT_READY, INQUIRY, READ_CAPACITY_10, READ_10, WRITE_10, SYNCHRONIZE_CACHE_10 = 0x00, 0x12, 0x25, 0x28, 0x2A, 0x35
READ_16, WRITE_16, SERVICE_ACTION_IN_16, REPORT_LUNS = 0x88, 0x8A, 0x9E, 0xA0
CHECK_CONDITION, UNIT_ATTENTION = 0x02, 0x6

_RESPONSE = struct.Struct("<IIHBB")
_CONFIG_BYTES = 36
_CHUNK = 128 << 10
_TRIES = 4
"""A unit says UNIT ATTENTION once for every thing that happened to it, a reset before all."""
_RESPONSES = {
    1: (errno.EIO, "it wants to write more than there is room for"),
    2: (errno.ECANCELED, "it was aborted"),
    3: (errno.ENODEV, "there is no such target"),
    4: (errno.EIO, "it was lost in a reset"),
    5: (errno.EBUSY, "the unit is busy"),
    6: (errno.EIO, "the transport failed"),
    7: (errno.EIO, "the target failed"),
    8: (errno.EIO, "the nexus failed"),
    9: (errno.EIO, "the device reports a failure"),
}
_KEYS: tuple[str, ...] = ("NO SENSE", "RECOVERED ERROR", "NOT READY", "MEDIUM ERROR", "HARDWARE ERROR", "ILLEGAL REQUEST", "UNIT ATTENTION", "DATA PROTECT")
_KEYS += ("BLANK CHECK", "VENDOR SPECIFIC", "COPY ABORTED", "ABORTED COMMAND", "OBSOLETE", "VOLUME OVERFLOW", "MISCOMPARE", "COMPLETED")


class ScsiError(OSError):
    """A command that ended with a status other than GOOD."""

    def __init__(self, text: str, status: int, sense: bytes) -> None:
        super().__init__(errno.EIO, text)
        self.status, self.sense = status, sense

    @property
    def key(self) -> int:
        """The sense key, 0 without sense data."""
        return _key(self.sense)


def _key(sense: bytes) -> int:
    """The sense key in fixed or descriptor format (SPC-4, 4.5)."""
    at = 1 if sense and sense[0] & 0x7F in (0x72, 0x73) else 2
    return sense[at] & 0xF if len(sense) > at else 0


@dataclass(frozen=True)
class Inquiry:
    """What a unit says of itself."""

    type: int
    """Peripheral device type: 0 for a disk, 5 for an optical one."""
    vendor: str
    product: str
    revision: str


class ScsiDriver(Driver):
    """A host. *target* and *lun* name a unit; 0 and 0 is the first."""

    device_id = DeviceId.SCSI
    overstated = True  # QEMU (7.2) counts what it read, too

    def __init__(self, device: Device, **options: Unpack[Options]) -> None:
        """See ``Driver``."""
        self._tag = 0
        self._blocks: dict[tuple[int, int], tuple[int, int]] = {}
        super().__init__(device, queues=(0, 1, REQUESTS), **options)

    def _ready(self) -> None:
        config = parse_config(DeviceId.SCSI, self.features, self.read_config(_CONFIG_BYTES))
        if "max_lun" not in config:
            raise DeviceBroken(f"{self.name} has a configuration space of {self.device.identify().config_size} bytes, {_CONFIG_BYTES} belong to it")
        self._cdb, self._sense = int(config["cdb_size"]), int(config["sense_size"])
        if not 16 <= self._cdb <= 256 or not 18 <= self._sense <= 4096:
            raise DeviceBroken(f"{self.name} wants commands of {self._cdb} bytes and gives {self._sense} of sense data")
        self.last = int(config["max_target"]), int(config["max_lun"])
        """The highest numbers of a target and a logical unit."""
        most = int(config["max_sectors"]) * 512 or _CHUNK
        self._chunk = min(_CHUNK, most, self._pool.size // 4)
        self._blocks.clear()

    # Commands --------------------------------------------------------------------------------------------------------

    def command(self, cdb: bytes, data: bytes = b"", room: int = 0, target: int = 0, lun: int = 0, timeout: float | None = None) -> bytes:
        """Carry out *cdb* with *data* to the unit or *room* bytes from it; return what came.

        ScsiError for a status other than GOOD, OSError when the device could not deliver the command (ENODEV: no such target),
        DeviceBroken for an answer that is none. UNIT ATTENTION is taken notice of, and the command tried again.
        """
        for left in reversed(range(_TRIES)):
            try:
                return self._once(cdb, data, room, target, lun, timeout)
            except ScsiError as error:
                if error.key != UNIT_ATTENTION or not left:
                    raise
        raise AssertionError("unreachable")

    def _once(self, cdb: bytes, data: bytes, room: int, target: int, lun: int, timeout: float | None) -> bytes:
        if not 0 <= target <= 0xFF or not 0 <= lun < 0x4000 or not 1 <= len(cdb) <= self._cdb:
            raise ValueError(f"target {target}, lun {lun}, a command of {len(cdb)} bytes; {self.name} takes 0-255, 0-16383, 1-{self._cdb}")
        self._tag += 1
        place = struct.pack(">BBHI", 1, target, 0x4000 | lun, 0)
        header = place + struct.pack("<QBBB", self._tag, 0, 0, 0) + cdb.ljust(self._cdb, b"\0")
        head = _RESPONSE.size + self._sense
        written, answer = self.transact(REQUESTS, [header, data] if data else [header], [head, room] if room else [head], timeout)
        what = f"{self.name}: command {cdb[0]:#04x} to target {target}, unit {lun}"
        if written < _RESPONSE.size:
            raise DeviceBroken(f"{what}: an answer of {written} bytes, less than its header")
        sensed, residual, _, status, response = _RESPONSE.unpack_from(answer[0])
        if response:
            number, why = _RESPONSES.get(response, (errno.EIO, f"response {response}"))
            raise OSError(number, f"{what}: {why}")
        if sensed > self._sense:
            raise DeviceBroken(f"{what}: {sensed} bytes of sense data, there is room for {self._sense}")
        if status:
            sense = answer[0][_RESPONSE.size : _RESPONSE.size + sensed]
            why = f"{_KEYS[_key(sense)]}, sense data {sense.hex()}" if status == CHECK_CONDITION else f"status {status:#04x}"
            raise ScsiError(f"{what}: {why}", status, sense)
        if not room:
            return b""
        came = room - residual
        if came < 0 or written < head + came:
            raise DeviceBroken(f"{what}: {residual} of {room} bytes are said not to have come, {written - head} were written")
        return answer[1][:came]

    def _exactly(self, cdb: bytes, room: int, target: int, lun: int, least: int | None = None) -> bytes:
        """What a command brings, *least* bytes (default: all there is room for) at the least."""
        came = self.command(cdb, room=room, target=target, lun=lun)
        if len(came) < (room if least is None else least):
            raise DeviceBroken(f"{self.name}: command {cdb[0]:#04x} to target {target}, unit {lun} brought {len(came)} of {room} bytes")
        return came

    def inquiry(self, target: int = 0, lun: int = 0) -> Inquiry:
        """What the unit is. OSError ENODEV where there is none."""
        answer = self._exactly(bytes((INQUIRY, 0, 0, 0, 96, 0)), 96, target, lun, 36)
        if answer[0] >> 5:
            raise OSError(errno.ENODEV, f"{self.name}: target {target} has no unit {lun}")
        vendor, product, revision = (str(answer[a:b], "ascii", "backslashreplace").strip() for a, b in ((8, 16), (16, 32), (32, 36)))
        return Inquiry(answer[0] & 0x1F, vendor, product, revision)

    def serial(self, target: int = 0, lun: int = 0) -> str:
        """The unit's serial number (VPD page 0x80)."""
        answer = self._exactly(bytes((INQUIRY, 1, 0x80, 0, 255, 0)), 255, target, lun, 4)
        return str(answer[4 : 4 + answer[3]], "ascii", "backslashreplace").strip()

    def luns(self, target: int = 0) -> list[int]:
        """The numbers of a target's units. OSError ENODEV where there is no target."""
        room = 8 + 256 * 8
        answer = self._exactly(struct.pack(">BBBBBBIBB", REPORT_LUNS, 0, 0, 0, 0, 0, room, 0, 0), room, target, 0, 8)
        count = min(int.from_bytes(answer[:4], "big"), len(answer) - 8) // 8
        return [struct.unpack_from(">H", answer, 8 + 8 * at)[0] & 0x3FFF for at in range(count)]

    def units(self) -> Iterator[tuple[int, int, Inquiry]]:
        """Target, number and description of every unit there is."""
        for target in range(min(self.last[0], 255) + 1):
            try:
                luns = self.luns(target)
            except OSError as error:
                if error.errno != errno.ENODEV:
                    raise
                continue
            for lun in luns:
                yield target, lun, self.inquiry(target, lun)

    # Disks -----------------------------------------------------------------------------------------------------------

    def capacity(self, target: int = 0, lun: int = 0) -> tuple[int, int]:
        """How many blocks the disk has, and the bytes of each."""
        last, size = struct.unpack(">II", self._exactly(bytes((READ_CAPACITY_10, *bytes(9))), 8, target, lun))
        if last == 0xFFFFFFFF:
            cdb = struct.pack(">BBQIBB", SERVICE_ACTION_IN_16, 0x10, 0, 32, 0, 0)
            last, size = struct.unpack_from(">QI", self._exactly(cdb, 32, target, lun, 12))
        if not 1 <= size <= _CHUNK or last >= 1 << 63:
            raise DeviceBroken(f"{self.name}: target {target}, unit {lun} says that it has {last + 1} blocks of {size} bytes")
        self._blocks[target, lun] = last + 1, size
        return last + 1, size

    def read(self, offset: int, length: int, target: int = 0, lun: int = 0) -> bytes:
        """*length* bytes from *offset*, whole blocks both."""
        return b"".join(
            self._exactly(_transfer(READ_10, READ_16, block, count), count * size, target, lun)
            for block, count, size in self._pieces(offset, length, target, lun)
        )

    def write(self, offset: int, data: bytes, target: int = 0, lun: int = 0) -> None:
        """Write *data* at *offset*, whole blocks both; stable after ``flush``."""
        for block, count, size in self._pieces(offset, len(data), target, lun):
            at = block * size - offset
            self.command(_transfer(WRITE_10, WRITE_16, block, count), data[at : at + count * size], target=target, lun=lun)

    def flush(self, target: int = 0, lun: int = 0) -> None:
        """Make completed writes stable."""
        self.command(bytes((SYNCHRONIZE_CACHE_10, *bytes(9))), target=target, lun=lun)

    def _pieces(self, offset: int, length: int, target: int, lun: int) -> Iterator[tuple[int, int, int]]:
        """Block, number of blocks and their size of every transfer; ValueError before the first when the range is none of the disk."""
        blocks, size = self._blocks.get((target, lun)) or self.capacity(target, lun)
        if offset % size or length % size or offset < 0 or length < 0:
            raise ValueError(f"offset {offset} and length {length} are not multiples of {size}")
        if offset + length > blocks * size:
            raise ValueError(f"[{offset}, {offset + length}) leaves the disk, which has {blocks * size} bytes")
        step = max(self._chunk // size, 1)
        end = (offset + length) // size
        return ((block, min(step, end - block), size) for block in range(offset // size, end, step))


def _transfer(short: int, long: int, block: int, count: int) -> bytes:
    """A READ or WRITE: of 10 bytes where block and count fit."""
    if block < 1 << 32 and count < 1 << 16:
        return struct.pack(">BBIBHB", short, 0, block, 0, count, 0)
    return struct.pack(">BBQIBB", long, 0, block, count, 0, 0)
