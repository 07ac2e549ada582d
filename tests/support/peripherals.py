# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Small devices for the tests of drivers: each does what its section of virtio 1.2 asks for, and nothing else.

Rule of this file: written from the specification, not from the drivers; what a driver may not do is an error of the device.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Mapping
from typing import ClassVar

from vdpa_bridge.models import Model
from vdpa_bridge.models.base import Queue
from vdpa_bridge.virtio.features import ConsoleFeature, I2cFeature, VsockFeature
from vdpa_bridge.virtio.ids import DeviceId


class Talker(Model):
    """A device that has something to say on queues of its own accord: what waits in ``outgoing`` is sent as buffers come."""

    features = 0

    def __init__(self) -> None:
        self.outgoing: dict[int, deque[bytes]] = {}

    def reset(self) -> None:
        self.outgoing.clear()

    def say(self, queue: int, data: bytes) -> None:
        self.outgoing.setdefault(queue, deque()).append(data)

    def config(self) -> bytes:
        return b""

    def hear(self, queue: int, data: bytes) -> None:
        """A chain with *data* came on *queue*, with no room to answer."""
        raise NotImplementedError

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        if index not in self.speaks:
            for chain in queues[index].pop(1):
                self.hear(index, chain.read())
                queues[index].push([(chain, 0)])
        for queue in self.speaks & set(queues):
            waiting = self.outgoing.get(queue)
            while waiting and (chains := queues[queue].pop(1)):
                queues[queue].push([(chains[0], chains[0].write(waiting.popleft()))])

    speaks: frozenset[int] = frozenset()
    """The queues that bring buffers to be filled."""


class EchoConsole(Talker):
    """Repeats on each port what is written there. Port 1 is called ``echo``."""

    device_id = DeviceId.CONSOLE
    features = ConsoleFeature.SIZE | ConsoleFeature.MULTIPORT
    queue_count = 6
    speaks = frozenset({0, 2, 4})

    def config(self) -> bytes:
        return struct.pack("<HHII", 80, 25, 2, 0)

    def start(self, features: int) -> None:
        self._open = set() if features & ConsoleFeature.MULTIPORT else {0}

    def hear(self, queue: int, data: bytes) -> None:
        if queue != 3:
            port = {1: 0, 5: 1}[queue]
            if port in self._open:
                self.say(queue - 1, data)
            return
        port, event, value = struct.unpack("<IHH", data)
        if (port, event, value) == (0xFFFFFFFF, 0, 1):
            for number in (0, 1):
                self.say(2, struct.pack("<IHH", number, 1, 1))
        elif (event, value) == (3, 1) and port == 1:
            self.say(2, struct.pack("<IHH", 1, 7, 1) + b"echo\0")
        elif (event, value) == (6, 1) and port in (0, 1):
            self._open.add(port)


class ScsiDisk(Model):
    """One disk of 512 KiB at target 1, unit 2; it reports a reset first, as units do."""

    device_id = DeviceId.SCSI
    features = 0
    queue_count = 3
    SENSE, CDB = 96, 32

    def __init__(self, block: int = 512) -> None:
        self.block = block
        self.data = bytearray(512 << 10)
        self.attention = True

    def config(self) -> bytes:
        return struct.pack("<IIIIIIIHHI", 1, 126, 64, 8, 16, self.SENSE, self.CDB, 0, 2, 3)

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        for chain in queues[index].pop() if index == 2 else ():
            request = chain.read()
            cdb, sent = request[19 : 19 + self.CDB], request[19 + self.CDB :]
            head, room = 12 + self.SENSE, chain.writable - 12 - self.SENSE
            status, sense, answer, response = 0, b"", b"", 0
            if request[:2] != b"\1\1":
                response = 3
            elif request[2:4] != b"\x40\2" and cdb[0] != 0xA0:
                answer = b"\x7f" + bytes(95) if cdb[0] == 0x12 else b""
                status, sense = (0, b"") if answer else (2, _sense(5, 0x25))
            elif self.attention and cdb[0] not in (0x12, 0xA0):
                self.attention, status, sense = False, 2, _sense(6, 0x29)
            else:
                status, sense, answer = self._command(cdb, sent, room)
            answer = answer[: max(room, 0)]
            header = struct.pack("<IIHBB", len(sense), room - len(answer), 0, status, response) + sense.ljust(self.SENSE, b"\0")
            chain.write(header)
            queues[index].push([(chain, head + chain.write(answer, head) if answer else head)])

    def _command(self, cdb: bytes, sent: bytes, room: int) -> tuple[int, bytes, bytes]:
        blocks = len(self.data) // self.block
        if cdb[0] == 0x12 and cdb[1] & 1:
            return 0, b"", b"\0\x80\0\x06SERIAL"
        if cdb[0] == 0x12:
            return 0, b"", bytes((0, 0, 5, 2, 31, 0, 0, 0)) + b"VDPA    " + b"TEST DISK       " + b"1.0 "
        if cdb[0] == 0xA0:
            return 0, b"", struct.pack(">IIHHI", 8, 0, 2, 0, 0)
        if cdb[0] == 0x25:
            return 0, b"", struct.pack(">II", blocks - 1, self.block)
        if cdb[0] == 0x35:
            return 0, b"", b""
        if cdb[0] in (0x28, 0x2A):
            start, count = struct.unpack_from(">I", cdb, 2)[0] * self.block, struct.unpack_from(">H", cdb, 7)[0] * self.block
            if start + count > len(self.data) or (count != room if cdb[0] == 0x28 else count != len(sent)):
                return 2, _sense(5, 0x21), b""
            if cdb[0] == 0x28:
                return 0, b"", bytes(self.data[start : start + count])
            self.data[start : start + count] = sent
            return 0, b"", b""
        return 2, _sense(5, 0x20), b""


def _sense(key: int, code: int) -> bytes:
    return bytes((0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, code, 0, 0, 0, 0, 0))


class SocketHost(Talker):
    """A host (context 2) whose port 7 repeats what comes, up to 8 KiB ahead of its reader, and says SHUTDOWN after SHUTDOWN."""

    device_id = DeviceId.VSOCK
    features = VsockFeature.STREAM
    queue_count = 3
    speaks = frozenset({0, 2})
    CID, ROOM = 42, 8192
    HEADER = struct.Struct("<QQIIIHHIII")

    def __init__(self) -> None:
        super().__init__()
        self.credit: dict[int, list[int]] = {}
        self.resets: list[int] = []

    def reset(self) -> None:
        super().reset()
        self.credit.clear()

    def config(self) -> bytes:
        return struct.pack("<Q", self.CID)

    def tell(self, port: int, op: int, data: bytes = b"", flags: int = 0, source: int = 7) -> None:
        taken = self.credit.get(port, [0])[0]
        self.say(0, self.HEADER.pack(2, self.CID, source, port, len(data), 1, op, flags, self.ROOM, taken) + data)

    def hear(self, queue: int, data: bytes) -> None:
        source, to, port, to_port, length, kind, op, flags, _, _ = self.HEADER.unpack_from(data)
        payload = data[self.HEADER.size :]
        assert (source, to, kind, length) == (self.CID, 2, 1, len(payload))
        if op == 1:
            self.credit[port] = [0]
            self.tell(port, 2 if to_port == 7 else 3, source=to_port)
        elif op == 3:
            self.resets.append(port)
        elif op == 4:
            both = flags == 3
            self.tell(port, 3 if both else 4, flags=0 if both else 3)
        elif op == 5 and port in self.credit:
            self.credit[port][0] += length
            for at in range(0, length, 1000):
                self.tell(port, 5, payload[at : at + 1000])


class Keyboard(Talker):
    """Two keys; every status event comes back as an event."""

    device_id = DeviceId.INPUT
    queue_count = 2
    speaks = frozenset({0})
    ANSWERS: ClassVar = {(1, 0): b"test keyboard", (2, 0): b"K1", (3, 0): struct.pack("<HHHH", 3, 0x1234, 0x5678, 1), (0x11, 1): b"\0\0\0\x40\x01"}

    def __init__(self) -> None:
        super().__init__()
        self._selected = (0, 0)

    def config(self) -> bytes:
        answer = self.ANSWERS.get(self._selected, b"")
        return bytes((*self._selected, len(answer), *bytes(5))) + answer.ljust(128, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        assert (offset, len(data)) == (0, 2)
        self._selected = data[0], data[1]

    def hear(self, queue: int, data: bytes) -> None:
        self.say(0, data)


class Lines(Model):
    """Three lines; the last is what any was set to last. A value may be set before the direction (5.18.6.6)."""

    device_id = DeviceId.GPIO
    features = 0
    queue_count = 1
    NAMES = b"out\0\0in\0"

    def __init__(self) -> None:
        self.directions = [0, 0, 0]
        self.values = [0, 0, 0]

    def config(self) -> bytes:
        return struct.pack("<HHI", 3, 0, len(self.NAMES))

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        for chain in queues[0].pop():
            kind, line, value = struct.unpack("<HHI", chain.read())
            answer = b"\0\0"
            if kind == 1:
                answer = b"\0" + self.NAMES
            elif kind == 2:
                answer = bytes((0, self.directions[line]))
            elif kind == 3:
                self.directions[line] = value
            elif kind == 4 and self.directions[line]:
                answer = bytes((0, self.values[line]))
            elif kind == 5:
                self.values = [value if at in (line, 2) else each for at, each in enumerate(self.values)]
            else:
                answer = b"\1\0"
            queues[0].push([(chain, chain.write(answer))])


class Bus(Model):
    """A memory of 256 bytes at address 0x50: a write's first byte is where to, a read goes on from there."""

    device_id = DeviceId.I2C
    features = I2cFeature.ZERO_LENGTH_REQUEST
    queue_count = 1

    def __init__(self) -> None:
        self.memory = bytearray(256)
        self._at = 0
        self._failed = False

    def config(self) -> bytes:
        return b""

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        for chain in queues[0].pop():
            request = chain.read()
            address, _, flags = struct.unpack_from("<HHI", request)
            data, room = request[8:], chain.writable - 1
            failed = self._failed or address != 0x50 << 1
            self._failed = failed and bool(flags & 1)
            answer = b""
            if flags & 2:
                answer = bytes(self.memory[(self._at + at) % 256] for at in range(room))
            elif data and not failed:
                self._at = data[0]
                for at, byte in enumerate(data[1:]):
                    self.memory[(self._at + at) % 256] = byte
            queues[0].push([(chain, chain.write(answer + bytes([failed])))])
