# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A device between a driver and an honest device that spoils its answers, by a seed; and a small honest file system."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping

from vdpa_bridge.models import Model
from vdpa_bridge.models.base import Queue
from vdpa_bridge.virtio.ids import DeviceId
from vdpa_bridge.virtqueue import Chain

_BYTES = (0x00, 0x01, 0x02, 0x7F, 0x80, 0xFF)


class _LyingQueue:
    """Gives chains back with other content or another length than the honest device wants, late, or never."""

    def __init__(self, inner: Queue, rng: random.Random, kept: list[Chain]) -> None:
        self._inner, self._rng, self._kept = inner, rng, kept
        self.pop = inner.pop

    def push(self, done: list[tuple[Chain, int]]) -> None:
        spoilt = []
        for chain, written in done:
            way = self._rng.randrange(12)
            if way == 0:
                self._kept.append(chain)
                continue
            if way == 1:
                written = self._rng.randrange(written + 1)
            elif way == 2:
                written = chain.writable
            elif way < 6 and chain.writable:
                for _ in range(self._rng.choice((1, 1, 4, 50))):
                    chain.write(bytes([self._rng.choice(_BYTES)]), self._rng.randrange(min(chain.writable, 200)))
            spoilt.append((chain, written))
        self._inner.push(spoilt)


class Liar(Model):
    """*honest*, but for one answer in two; its configuration is spoilt now and then, too."""

    def __init__(self, honest: Model, seed: int) -> None:
        self._honest, self._rng = honest, random.Random(seed)
        self._kept: list[Chain] = []
        self.device_id = honest.device_id  # type: ignore[misc]
        self.features, self.queue_count = honest.features, honest.queue_count
        self._spoil = self._rng.random() < 0.3

    def config(self) -> bytes:
        data = bytearray(self._honest.config())
        if self._spoil and data:
            data[self._rng.randrange(len(data))] = self._rng.choice(_BYTES)
        return bytes(data)

    def write_config(self, offset: int, data: bytes) -> None:
        self._honest.write_config(offset, data)

    def start(self, features: int) -> None:
        self._honest.start(features)

    def reset(self) -> None:
        self._kept.clear()
        self._honest.reset()

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        self._honest.process({at: _LyingQueue(queue, self._rng, self._kept) for at, queue in queues.items()}, index)


class Files(Model):
    """A read-only tree over FUSE: ``dir`` with ``file`` in it, and a link to it. Nodes count how often they were looked up."""

    device_id = DeviceId.FS
    features = 0
    queue_count = 2
    CONTENT = bytes(range(256)) * 600
    NODES = (None, (0o40755, {"dir": 2, "link": 4}), (0o40755, {"file": 3}), (0o100644, CONTENT), (0o120777, b"dir/file"))

    def __init__(self) -> None:
        self.known = [0] * len(self.NODES)
        self.opened = 0

    def config(self) -> bytes:
        return b"files".ljust(36, b"\0") + struct.pack("<I", 1)

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        for chain in queues[index].pop():
            request = chain.read()
            _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
            if opcode == 2:
                self.known[node] -= struct.unpack_from("<Q", request, 40)[0]
                queues[index].push([(chain, 0)])
                continue
            answer = self._answer(opcode, node, request[40:], chain.writable - 16)
            error, data = (answer, b"") if isinstance(answer, int) else (0, answer)
            queues[index].push([(chain, chain.write(struct.pack("<IiQ", 16 + len(data), -error, unique) + data))])

    def _attributes(self, number: int) -> bytes:
        mode, content = self.NODES[number] or (0, b"")
        return struct.pack("<6Q10I", number, len(content), 1, 5, 6, 7, 0, 500_000_000, 0, mode, 1, 10, 20, 0, 4096, 0)

    def _answer(self, opcode: int, number: int, body: bytes, room: int) -> bytes | int:
        mode, content = self.NODES[number] or (0, b"")
        directory = mode >> 12 == 4
        if opcode == 26:
            return struct.pack("<IIIIHHI", 7, 36, 65536, 0, 12, 9, 65536).ljust(64, b"\0")
        if opcode == 1:
            child = content.get(str(body.rstrip(b"\0"), "ascii")) if isinstance(content, dict) else None
            if child is None:
                return 2
            self.known[child] += 1
            return struct.pack("<4QII", child, 1, 0, 0, 0, 0) + self._attributes(child)
        if opcode == 3:
            return struct.pack("<QII", 0, 0, 0) + self._attributes(number)
        if opcode == 5:
            return bytes(content) if mode >> 12 == 10 else 22
        if opcode in (14, 27):
            if directory != (opcode == 27):
                return 20 if opcode == 27 else 21
            self.opened += 1
            return struct.pack("<QII", 77, 0, 0)
        if opcode in (18, 29):
            self.opened -= 1
            return b""
        handle, offset, size = struct.unpack_from("<QQI", body) if opcode in (15, 28) else (0, 0, 0)
        if opcode == 15 and handle == 77:
            return bytes(content)[offset : offset + min(size, room)]
        if opcode == 28 and isinstance(content, dict):
            entries = [(child, name.encode()) for name, child in [(".", number), *content.items()]][offset:]
            return b"".join(
                struct.pack("<QQII", child, offset + at + 1, len(name), (self.NODES[child] or (0,))[0] >> 12) + name.ljust(-(-len(name) // 8) * 8, b"\0")
                for at, (child, name) in enumerate(entries[:1])
            )
        return 0 if opcode == 38 else 38
