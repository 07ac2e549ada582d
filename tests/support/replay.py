# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Clients that are replayed: they say what replays.toml has, in its order, and use the rings for data in between.

Rule of this file: a client is as strict about replies as the real ones are (flags exactly, sizes exactly, nothing that was not
asked for), and memory and rings are those of a guest, which outlive a connection.
"""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from vdpa_bridge.flags import VHOST_USER_F_PROTOCOL_FEATURES, Feature, ProtocolFeature
from vdpa_bridge.memory import Buffer, Region
from vdpa_bridge.vhost_user import messages as m
from vdpa_bridge.vhost_user.framing import NEED_REPLY, REPLY_FLAGS, VERSION, frame
from vdpa_bridge.virtqueue import DriverQueue, RingLayout
from vdpa_bridge.wire import U64, Iova, Payload, VringAddr, VringState

from .raw import Raw

RING = 16
FRAME = 1024
"""Bytes of data in a request, and of a frame with its header."""
SIZE = 1 << 20
PLACES = {"ram": Iova(0x100000), "more": Iova(1 << 32)}
"""Where the guest has its regions."""
USER = 0x7F0000000000
"""What is between that and where a client with addresses of its own has them."""
WANTED = Feature.VERSION_1 | (1 << 24) - 1
"""Features: all of a device type; rings are plain."""
PATIENCE, QUIET = 10.0, 0.05
"""Seconds to wait for what must come, and for what must not."""
MESSAGES = {row.name: row for row in m.BY_NUMBER.values()}


@dataclass(frozen=True)
class Script:
    """One client of replays.toml; a phase that it does not have is empty."""

    name: str
    version: str
    source: str
    device: str
    rings: int
    protocol: list[str]
    acks: bool
    addresses: str
    phases: dict[str, list[str | list[str]]] = field(hash=False)

    def __str__(self) -> str:
        return f"{self.name.partition(' ')[0]}-{self.device}"

    def guest(self) -> Guest:
        """A guest for it."""
        return Guest(self.rings, grows=bool(self.phases["hotplug"]))

    @classmethod
    def all(cls) -> list[Self]:
        """The clients of the file."""
        table = tomllib.loads(Path(__file__).with_name("replays.toml").read_text())
        phases = ("connect", "start", "hotplug", "unplug", "pause", "resume", "update", "stop", "reconnect")
        return [cls(**{k: v for k, v in row.items() if k not in phases}, phases={k: row.get(k, []) for k in phases}) for row in table["client"]]


class Guest:
    """Memory, rings and eventfds of a guest; *grows*: part of its memory is plugged in later."""

    def __init__(self, rings: int, grows: bool) -> None:
        self.present = ["ram"] if grows else list(PLACES)
        self.regions = {name: Region(place, SIZE) for name, place in PLACES.items()}
        self._areas = [self.regions["ram"].allocate(RingLayout.contiguous(RING).size, 4096) for _ in range(rings)]
        self.kicks = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(rings)]
        self.calls = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(rings)]
        self._buffers = {name: [region.allocate(size) for size in (16, FRAME, FRAME, 1)] for name, region in self.regions.items()}
        self._seed = 0
        self.boot()

    def boot(self) -> None:
        """Its driver makes the rings anew."""
        ram = self.regions["ram"]
        self.queues: list[DriverQueue[str]] = [DriverQueue(a.address, a.size, a.iova, RING, owner=ram) for a in self._areas]

    def index(self, ring: int, which: str) -> int:
        """avail.idx or used.idx, as they are in memory."""
        at = (self.queues[ring].avail if which == "avail" else self.queues[ring].used) - self.regions["ram"].iova + 2
        return int.from_bytes(os.pread(self.regions["ram"].fd, 2, at), "little")

    def post(self, ring: int, readable: Sequence[Buffer], writable: Sequence[Buffer]) -> None:
        """One chain."""
        queue = self.queues[ring]
        assert queue.add_many([([(b.iova, b.size) for b in readable], [(b.iova, b.size) for b in writable], "")]) == 1
        if queue.publish():
            os.eventfd_write(self.kicks[ring], 1)

    def done(self, ring: int, patience: float = PATIENCE) -> int:
        """Bytes written into the chain that comes back next; -1 when none does. Interrupts are waited for, nothing else; one may come for nothing."""
        end = time.monotonic() + patience
        while select.select([self.calls[ring]], [], [], max(0.0, end - time.monotonic()))[0]:
            os.eventfd_read(self.calls[ring])
            if came := self.queues[ring].reap():
                ((_, written),) = came
                return written
        return -1

    def work(self, device: str, where: str = "ram") -> None:
        """Use all rings of the device with buffers in region *where*: data goes in and comes out as it was."""
        for ring in range(0, len(self.queues), 2) if device == "net" else range(len(self.queues)):
            if device != "net" or ring + 1 < len(self.queues):
                self._work(device, ring, where)

    def _work(self, device: str, ring: int, where: str) -> None:
        self._seed += 1
        header, out, back, status = self._buffers[where]
        out.data[:] = random.Random(self._seed).randbytes(FRAME)
        back.data[:] = bytes(FRAME)
        if device == "rng":
            self.post(ring, [], [back])
            assert self.done(ring) == FRAME
            assert len(set(bytes(back.data))) > 200, "random bytes are of all values"
            return
        if device == "net":
            out.data[:18] = bytes(12) + b"\xff" * 6
            self.post(ring, [], [back])
            self.post(ring + 1, [out], [])
            assert (self.done(ring), self.done(ring + 1)) == (FRAME, 0)
        else:
            for kind, chain, written in ((1, ([header, out], [status]), 1), (0, ([header], [back, status]), FRAME + 1)):
                header.data[:] = struct.pack("<IIQ", kind, 0, 8 * self._seed)
                status.data[:] = b"\xff"
                self.post(ring, *chain)
                assert self.done(ring) == written
                assert bytes(status.data) == b"\0"
        assert bytes(back.data) == bytes(out.data)

    def work_waits(self, device: str, until: Callable[[], None]) -> None:
        """Nothing is served before *until* was carried out, and then it is."""
        header, out, back, status = self._buffers["ram"]
        header.data[:] = struct.pack("<IIQ", 0, 0, 0)
        out.data[:18] = bytes(12) + b"\xff" * 6
        chains = {"rng": [([], [back])], "blk": [([header], [back, status])], "net": [([], [back]), ([out], [])]}[device]
        for ring, chain in enumerate(chains):
            self.post(ring, *chain)
        assert self.done(len(chains) - 1, QUIET) == -1
        until()
        assert self.done(0) >= FRAME
        assert device != "net" or self.done(1) == 0

    def close(self) -> None:
        """Everything goes."""
        self.queues.clear()
        for fd in [*self.kicks, *self.calls]:
            os.close(fd)
        for region in self.regions.values():
            region.close()


WORDS = {"hotplug": "memory hotplug", "pause": "pause", "stop": "restart", "reconnect": "reconnect"}


def words_of(script: Script) -> set[str]:
    """What was seen working when a client was replayed, beside its rings."""
    memory = "memory slots" if "ADD_MEM_REG ram" in script.phases["start"] else "memory table"
    return {memory, "successor", *(word for phase, word in WORDS.items() if script.phases[phase])}


class Replayed:
    """A client with a guest, connected to *path*. It owns its connection only."""

    def __init__(self, script: Script, guest: Guest, path: str) -> None:
        self.script, self.guest = script, guest
        self._raw = Raw(path, PATIENCE)
        self._offered = self._protocol = self._queues = 0
        self._acks = False
        self._channel, self._theirs = socket.socketpair()

    def play(self, phase: str) -> None:
        """Say all of *phase*, which the client must have."""
        steps = self.script.phases[phase]
        assert steps, f"{self.script} has no {phase}"
        for step in steps:
            if isinstance(step, str):
                self._say(step)
                continue
            rings = range(self.script.rings)
            if step[0] == "all":
                rings, step = range(self._queues), step[1:]
            for ring in rings:
                for text in step:
                    self._say(text, ring)

    def _say(self, text: str, ring: int = 0) -> None:
        name, *words = text.split()
        row = MESSAGES[name]
        payload, fds = self._payload(name, words, ring)
        self._raw.send(frame(row.number, payload.pack() if payload else b"", VERSION | NEED_REPLY * self._acks), fds)
        if row.reply is not None or self._acks:
            reply = self._raw.reply()
            assert reply is not None, f"the server hung up at {text}"
            number, flags, data = reply
            assert (number, flags) == (row.number, REPLY_FLAGS), f"{text} is answered by {number}, flags {flags:#x}"
            self._heard(name, payload, data)
        if name == "SET_PROTOCOL_FEATURES":
            self._acks = self.script.acks and bool(self._protocol & ProtocolFeature.REPLY_ACK)

    def _heard(self, name: str, request: Payload | None, data: bytes) -> None:
        if name == "GET_CONFIG":
            assert isinstance(request, m.ConfigSpace)
            assert len(data) == len(request.pack())
            assert data[:8] == request.pack()[:8]
            return
        assert len(data) == 8
        value = U64.unpack(data).value
        if name == "GET_FEATURES":
            self._offered = value
        elif name == "GET_PROTOCOL_FEATURES":
            wanted = sum(ProtocolFeature[bit] if bit in ProtocolFeature.__members__ else 0 for bit in self.script.protocol)
            self._protocol = value & wanted
        elif name == "GET_QUEUE_NUM":
            assert value >= self.script.rings, f"{self.script.rings} rings are wanted, there are {value}"
            self._queues = value
        elif MESSAGES[name].reply is None:
            assert value == 0, f"{name} failed"

    def _payload(self, name: str, words: list[str], ring: int) -> tuple[Payload | None, list[int]]:
        guest = self.guest
        if name == "SET_FEATURES":
            return U64(VHOST_USER_F_PROTOCOL_FEATURES | (0 if words else self._offered & WANTED)), []
        if name == "SET_PROTOCOL_FEATURES":
            return U64(self._protocol), []
        if name == "GET_CONFIG":
            offset, size, flags = map(int, words)
            return m.ConfigSpace(offset, flags, bytes(size)), []
        if name == "SET_MEM_TABLE":
            return m.MemTable(tuple(map(self._region, guest.present))), [guest.regions[word].fd for word in guest.present]
        if name == "ADD_MEM_REG":
            guest.present = list(dict.fromkeys([*guest.present, words[0]]))
            return m.MemReg.of(self._region(words[0])), [guest.regions[words[0]].fd]
        if name == "REM_MEM_REG":
            guest.present.remove(words[0])
            return m.MemReg.of(self._region(words[0])), []
        if name == "SET_BACKEND_REQ_FD":
            self._drop_channel()
            self._channel, self._theirs = socket.socketpair()
            return None, [self._theirs.fileno()]
        if name in ("SET_VRING_KICK", "SET_VRING_CALL"):
            return U64(ring), [(guest.kicks if name == "SET_VRING_KICK" else guest.calls)[ring]]
        if name == "SET_VRING_ADDR":
            queue, away = guest.queues[ring], self._away
            return VringAddr(ring, 0, Iova(queue.desc + away), Iova(queue.used + away), Iova(queue.avail + away), 0), []
        if name == "SET_VRING_BASE":
            return VringState(ring, int(words[0]) if words[0].isdecimal() else guest.index(ring, words[0])), []
        if name in ("SET_VRING_NUM", "SET_VRING_ENABLE", "GET_VRING_BASE"):
            return VringState(ring, RING if name == "SET_VRING_NUM" else int((words or ["0"])[0])), []
        return None, []

    @property
    def _away(self) -> int:
        return USER if self.script.addresses == "user" else 0

    def _region(self, name: str) -> m.MemoryRegion:
        return m.MemoryRegion(PLACES[name], SIZE, PLACES[name] + self._away, 0)

    def _drop_channel(self) -> None:
        self._channel.close()
        self._theirs.close()

    def close(self) -> None:
        """Vanish, as a client does that is killed."""
        self._raw.sock.close()
        self._drop_channel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def live(script: Script, guest: Guest, path: str, turns: int = 3) -> None:
    """The client's life: all its phases, and *turns* of its guest if it can stop; it vanishes from a device that runs."""
    device = script.device
    with Replayed(script, guest, path) as client:
        client.play("connect")
        for turn in range(turns if script.phases["stop"] else 1):
            if turn:
                client.play("stop")
                guest.boot()
            client.play("start")
            guest.work(device)
            if script.phases["hotplug"] and not turn:
                client.play("hotplug")
            guest.work(device, guest.present[-1])
            if script.phases["unplug"]:
                client.play("unplug")
                guest.work(device)
            if script.phases["pause"]:
                client.play("pause")
                guest.work_waits(device, lambda: client.play("resume"))
                guest.work(device)
            if script.phases["update"]:
                client.play("update")
