# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A SCSI host with disks on files (virtio 1.2, 5.6): target 0, whose units are the disks in the order they were named.

Rule of this file: commands are carried out one after the other as they come, so none is ever open when a task management
function is answered; those that came before it are carried out first.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

from ..virtio.features import ScsiFeature as F
from ..virtio.ids import DeviceId
from ..virtqueue import Chain
from .base import Model, Queue
from .image import memory_image, open_image
from .options import check_options, parse_count, parse_size, parse_switch
from .scsi_disk import (
    BUS_RESET,
    INVALID_FIELD,
    LARGEST,
    NO_SUCH_UNIT,
    Check,
    Code,
    Overrun,
    ScsiDisk,
    illegal,
    sense_data,
    standard_inquiry,
)

CONTROL, EVENTS, REQUESTS = range(3)
MOST_UNITS = 255
DEFAULT_SIZE = "256M"
DEFAULT_SENSE, DEFAULT_CDB = 96, 32
"""Bytes; a driver may choose others (virtio 1.2, 5.6.4)."""

_CONFIG = struct.Struct("<IIIIIIIHHI")
_SENSE_AT, _CDB_AT = 20, 24
_HEADER = struct.Struct("<8sQBBB")
_RESPONSE = struct.Struct("<IIHBB")
_REPORT_LUNS_UNIT = b"\xc1\x01" + bytes(6)
_TASK_MANAGEMENT, _QUERY, _SUBSCRIBE = range(3)
_CLEAR_ACA, _I_T_NEXUS_RESET, _UNIT_RESET, _LAST_FUNCTION = 2, 4, 5, 7


class Response(IntEnum):
    """What became of a request (virtio 1.2, 5.6.6.1 and 5.6.6.2)."""

    OK = 0
    OVERRUN = 1
    BAD_TARGET = 3
    FAILURE = 9
    FUNCTION_REJECTED = 11
    INCORRECT_LUN = 12


class _NoTarget(Exception):
    """The request is for a target that is not there."""


@dataclass
class _Transfer:
    """The buffers of one command, behind its header and before its response."""

    chain: Chain
    head: int
    back: int

    def __post_init__(self) -> None:
        self.sent = self.chain.readable - self.head
        self.room = self.chain.writable - self.back

    def from_file(self, fd: int, offset: int, length: int) -> int:
        """See ``scsi_disk.Data``."""
        return self.chain.preadv(fd, offset, self.back, length)

    def to_file(self, fd: int, offset: int, length: int) -> int:
        """See ``scsi_disk.Data``."""
        return self.chain.pwritev(fd, offset, self.head, length)


class ScsiModel(Model):
    """A host with *disks*, which it owns from now on. Queue 0 is for control, 1 for events, of which there are none, the others for commands."""

    device_id = DeviceId.SCSI
    features = F.CHANGE  # there is none to tell of, but QEMU (7.2) accepts the bit for its guests, offered or not

    def __init__(self, disks: Sequence[ScsiDisk], queues: int = 1) -> None:
        self.disks = list(disks)
        self.queue_count = REQUESTS + queues
        self._sense, self._cdb = DEFAULT_SENSE, DEFAULT_CDB

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """``file=PATH,PATH`` or ``size=256M,1G``, a disk each; ``readonly=on``, ``serial=TEXT``, ``queues=N``."""
        check_options("scsi", options, ("file", "size", "readonly", "serial", "queues"))
        if "file" in options and "size" in options:
            raise ValueError("a SCSI host has file=PATH,PATH or size=256M,1G, not both")
        readonly = parse_switch("readonly", options.get("readonly", "off"))
        queues = parse_count("queues", options.get("queues", "1"), 1, 64)
        serial = options.get("serial", "vdpa_bridge")
        if not serial.isascii() or not serial.isprintable() or len(serial) > 32:
            raise ValueError(f"serial={serial}; it is up to 32 printable ASCII characters")
        places = options.get("file", options.get("size", DEFAULT_SIZE)).split(",")
        if len(places) > MOST_UNITS:
            raise ValueError(f"{len(places)} disks; a SCSI host has up to {MOST_UNITS}")
        disks: list[ScsiDisk] = []
        try:
            for number, place in enumerate(places):
                fd = open_image(place, readonly) if "file" in options else memory_image(min(parse_size(place), LARGEST + 1))
                try:
                    disks.append(ScsiDisk(fd, f"{serial}-{number}", readonly=readonly))
                except BaseException:
                    os.close(fd)
                    raise
        except BaseException:
            for disk in disks:
                disk.close()
            raise
        return cls(disks, queues)

    def config(self) -> bytes:
        """``struct virtio_scsi_config``: 36 bytes."""
        return _CONFIG.pack(self.queue_count - REQUESTS, self.queue_size - 2, 0xFFFF, 128, 16, self._sense, self._cdb, 0, 0, len(self.disks) - 1)

    def write_config(self, offset: int, data: bytes) -> None:
        """The sizes of sense data and commands are the driver's to choose; anything else is left as it is."""
        space = bytearray(self.config())
        space[offset : offset + len(data)] = data
        sense, cdb = struct.unpack_from("<II", space, _SENSE_AT)
        if 18 <= sense <= 4096:
            self._sense = sense
        if 16 <= cdb <= 256:
            self._cdb = cdb

    def reset(self) -> None:
        """Sizes are as they were, and units report the reset."""
        self._sense, self._cdb = DEFAULT_SENSE, DEFAULT_CDB
        for disk in self.disks:
            disk.reset()

    def close(self) -> None:
        """Close the files."""
        for disk in self.disks:
            disk.close()

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        """Serve a batch of one queue."""
        if index >= REQUESTS:
            self._commands(queues[index], 16)
        elif index == CONTROL:
            for chain in queues[CONTROL].pop(1):
                for other in sorted(set(queues) - {CONTROL, EVENTS}):
                    self._commands(queues[other], self.queue_size + 1)  # more than there can be: what is left comes later
                queues[CONTROL].push([(chain, chain.write(self._control(chain.read(0, 24))))])

    def _unit(self, lun: bytes) -> ScsiDisk | None:
        """The disk under an address of 8 bytes (virtio 1.2, 5.6.6.1), None where the target has no such unit."""
        if lun[0] != 1 or lun[1]:
            raise _NoTarget
        number = int.from_bytes(lun[2:4], "big")
        if number >> 14 > 1 or any(lun[4:]):  # neither simple nor flat
            return None
        number &= 0x3FFF
        return self.disks[number] if number < len(self.disks) else None

    # Commands --------------------------------------------------------------------------------------------------------

    def _commands(self, queue: Queue, limit: int) -> None:
        queue.push([(chain, self._command(chain)) for chain in queue.pop(limit)])

    def _command(self, chain: Chain) -> int:
        """Carry out one request; return the bytes written, which is 0 for a chain that has no place for a response."""
        head, back = _HEADER.size + self._cdb, _RESPONSE.size + self._sense
        if chain.writable < back:
            return 0
        transfer = _Transfer(chain, head, back)
        status, sense, done, response = 0, b"", 0, Response.OK
        try:
            if chain.readable < head or (transfer.sent and transfer.room):  # INOUT, transfers both ways, is not offered
                response = Response.FAILURE
            else:
                request = chain.read(0, head)
                answer = self._run(request[:8], request[_HEADER.size :], transfer)
                if isinstance(answer, bytes):
                    if len(answer) > transfer.room:
                        raise Overrun
                    answer = chain.write(answer, back)
                done = answer
        except Check as check:
            status, sense = 2, check.sense
        except Overrun:
            response = Response.OVERRUN
        except _NoTarget:
            response = Response.BAD_TARGET
        residual = max(transfer.sent, 0) + transfer.room - done
        chain.write(_RESPONSE.pack(len(sense), residual, 0, status, response) + sense.ljust(self._sense, b"\0"))
        return back + (done if transfer.room else 0)

    def _run(self, lun: bytes, cdb: bytes, transfer: _Transfer) -> bytes | int:
        if lun == _REPORT_LUNS_UNIT:
            if cdb[0] == Code.INQUIRY and not cdb[1] & 1 and not cdb[2]:
                return standard_inquiry(0x1E)[: struct.unpack_from(">H", cdb, 3)[0]]
            if cdb[0] != Code.REPORT_LUNS:
                return _nobody(cdb)
            return self._report_luns(cdb)
        unit = self._unit(lun)
        if cdb[0] == Code.REPORT_LUNS:
            return self._report_luns(cdb)
        return _nobody(cdb) if unit is None else unit.run(cdb, transfer)

    def _report_luns(self, cdb: bytes) -> bytes:
        """SPC-4, 6.33. Well-known units alone (1) are not told of."""
        most = struct.unpack_from(">I", cdb, 6)[0]
        if cdb[2] > 2 or most < 16:
            raise illegal(INVALID_FIELD)
        luns = [] if cdb[2] == 1 else [struct.pack(">H6x", number) for number in range(len(self.disks))]
        return (struct.pack(">I4x", 8 * len(luns)) + b"".join(luns))[:most]

    # Control -----------------------------------------------------------------------------------------------------------

    def _control(self, request: bytes) -> bytes:
        """One request of the control queue; what does not even say what it is gets a failure."""
        kind = int.from_bytes(request[:4], "little") if len(request) >= 4 else -1
        if kind == _TASK_MANAGEMENT and len(request) == 24:
            return bytes([self._function(int.from_bytes(request[4:8], "little"), request[8:16])])
        if kind in (_QUERY, _SUBSCRIBE) and len(request) >= 16:
            try:
                response = Response.OK if self._unit(request[4:12]) else Response.INCORRECT_LUN
            except _NoTarget:
                response = Response.BAD_TARGET
            return struct.pack("<IB", 0, response)  # no event is ever told
        return bytes([Response.FAILURE])

    def _function(self, function: int, lun: bytes) -> Response:
        """Task management: nothing is open, so there is nothing to abort or to be found; a reset is told by the units."""
        try:
            unit = self._unit(lun)
        except _NoTarget:
            return Response.BAD_TARGET
        if function == _I_T_NEXUS_RESET:
            for disk in self.disks:
                disk.reset(BUS_RESET)
        elif unit is None:
            return Response.INCORRECT_LUN
        elif function == _UNIT_RESET:
            unit.reset(BUS_RESET)
        elif function == _CLEAR_ACA or function > _LAST_FUNCTION:
            return Response.FUNCTION_REJECTED
        return Response.OK


def _nobody(cdb: bytes) -> bytes:
    """What a target answers for a unit that it has not (SPC-4, 4.6.4)."""
    if cdb[0] == Code.INQUIRY and not cdb[1] & 1 and not cdb[2]:
        return standard_inquiry(0x7F)[: struct.unpack_from(">H", cdb, 3)[0]]
    if cdb[0] == Code.REQUEST_SENSE and not cdb[1] & 1:
        return sense_data(5, NO_SUCH_UNIT)[: cdb[4]]
    raise illegal(NO_SUCH_UNIT)
