# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Types of the gate, loops and engines in `_virtqueue`: what `_virtqueue_engine.pxi` and `_virtqueue_tap.pxi` are to the source, this is to `_virtqueue.pyi`."""

from collections.abc import Collection
from typing import Self, TypeAlias, final

from ._virtqueue import DeviceQueue

@final
class Gate:
    """A device's lock: recursive, and closed to loops (`Loop`) while it is held, which then have no chain in hand.

    Entering waits for what loops have in flight. Synchronization: any thread.
    """

    def __enter__(self) -> Self: ...
    def __exit__(self, kind: object, value: object, trace: object) -> None: ...

class Engine:
    """Serves one queue of a device, or a few that belong together; made by its subclasses. What it has and has not is up to these.

    Synchronization: everything is used with the device's gate held.
    """

    served: range
    """Indices of its queues."""
    thread: int
    """Which of the device's loops it runs in."""
    @property
    def in_flight(self) -> int:
        """Requests that are under way outside; 0 while the gate is held."""

@final
class BlkMemory:
    """A file that lives in memory, mapped (userspace/include/blk_memory.h), for the engines of all queues of a disk. *file* outlives it.

    Synchronization: any thread.
    """

    def __new__(cls, file: int, size: int, writable: bool) -> Self:
        """Its first *size* bytes. OSError as mmap has it."""
    def close(self) -> None:
        """Unmap it, once no engine serves a queue any more. Harmless when done before."""
    def forget(self, offset: int, length: int) -> None:
        """The file may have holes there, or have them no more."""

@final
class BlkEngine(Engine):
    """Reads, writes and flushes of a disk's queue on a file (userspace/include/blk_engine.h)."""

    capacity: int
    """Sectors of 512 bytes."""
    stable_writes: bool
    """Whether a write is on the medium when it ends."""
    def __init__(
        self,
        index: int,
        file: int,
        capacity: int,
        *,
        medium: str = "cached",
        memory: BlkMemory | None = None,
        direct: int = -1,
        align: int = 512,
        block: int = 1,
        readonly: bool = False,
        stable_writes: bool = False,
        io_uring: bool = True,
        depth: int = 128,
        thread: int = 0,
    ) -> None:
        """For queue *index*. *file* and *direct* are descriptors that outlive the engine.

        *medium*: "cached" for files, "resident" for those in memory (which *memory* is), "direct" to pass by the page cache with the descriptor *direct*
        (opened with O_DIRECT) for what is aligned to *align* bytes, "null" for no file: reads give zeroes. Requests that cut a
        logical *block* (in sectors) are left to the model. *stable_writes* for a
        driver without VIRTIO_BLK_F_FLUSH. At most *depth* requests are in flight, a power of 2; *io_uring* False keeps them in the
        loop's thread, as where the kernel has no io_uring. ValueError for what does not fit.
        """
    @property
    def io_uring(self) -> bool:
        """Whether requests that would wait go through io_uring."""
    @property
    def failure(self) -> int:
        """errno of the first request that failed after it was put in flight, or 0."""

@final
class NetEngine(Engine):
    """A queue pair of a network device without a wire (userspace/include/net_engine.h)."""

    def __init__(self, pair: int, kind: str, header: int, *, thread: int = 0) -> None:
        """*kind*: "loop", "echo", "sink" or "source"; *header* bytes of struct virtio_net_hdr, 10 or 12. ValueError for others."""
    def follow(self, mac: bytes, used: bool) -> None:
        """The device's address, and whether the pair is in use."""

Terms: TypeAlias = tuple[bool, bool, bool, int]
"""What headers may ask for: a checksum, ECN; whether they tell that the checksum is right; a bit for each type of segmentation."""

def header_agreed(packet: bytes, terms: Terms) -> bytes | None:
    """The header of 12 bytes that *packet* may pass with; None where it may not (userspace/include/net_rules.h). ValueError for less than a header."""

@final
class NetFilter:
    """Which frames a driver gets (userspace/include/net_rules.h). Of pairs, the first is for unicast, the second for multicast."""

    def __init__(
        self,
        mac: bytes,
        *,
        promisc: bool = False,
        every: tuple[bool, bool] = (False, False),
        none: tuple[bool, bool] = (False, False),
        nobcast: bool = False,
        tables: tuple[Collection[bytes], Collection[bytes]] = ...,
        vlans: Collection[int] | None = None,
    ) -> None:
        """*vlans*: tags that frames with one need to have; None for any. ValueError for what is no address or tag, and for more than 64 in a table."""
    def accepts(self, frame: bytes) -> bool:
        """Whether a frame passes."""

@final
class TapEngine(Engine):
    """A queue pair on a queue of a tap (userspace/include/tap_engine.h).

    Before it touches the tap it asks its owner, who then calls `use`; it asks again when a transfer failed in a new way (`failed`).
    """

    def __init__(self, pair: int, header: int, *, merge: bool = False, thread: int = 0) -> None:
        """*header* bytes of struct virtio_net_hdr, 10 or 12; *merge*: frames may lie in several buffers. ValueError for another header."""
    def follow(self, *, wants: NetFilter, from_driver: Terms, to_driver: Terms, used: bool, plugged: bool) -> None:
        """What commands said; whether the driver uses the pair, and the cable is in."""
    def use(self, fd: int, gone: bool = False) -> None:
        """Frames come and go by *fd*, which never waits and stays open until it is replaced; -1 for none, and then what waits for buffers is dropped.
        *gone*: there will never be one. OSError as of epoll."""
    def ask(self) -> None:
        """Ask for the owner before the next frame is received."""
    def failed(self) -> int:
        """errno of a transfer that failed since the last time, or 0."""
    @property
    def fd(self) -> int:
        """What `use` said."""
    @property
    def sent(self) -> tuple[int, int, int]:
        """Frames, those of them that are still to be cut, and frames dropped."""
    @property
    def received(self) -> tuple[int, int, int]:
        """The same of the other direction."""

@final
class Loop:
    """A thread's worth of engines of one device. Synchronization: with the gate held, `run` excepted."""

    def __new__(cls, gate: Gate, budget: int = 50_000) -> Self:
        """It looks for work for *budget* nanoseconds before it sleeps, or for less (``Poll``)."""
    def run(self) -> Engine | None:
        """Serve until an engine needs its model, which is left alone until `look`; None once closed. Without the gate, in one thread."""
    def attach(self, engine: Engine, index: int, queue: DeviceQueue, kick: int = -1, call: int = -1) -> None:
        """Serve the device's queue *index*, one of the engine's, from now on. The eventfds stay open until it is detached.

        ValueError: it is served already, or not the engine's. OSError: its kicks cannot be waited for.
        """
    def detach(self, engine: Engine, index: int) -> None:
        """Serve that queue no more."""
    def look(self, engine: Engine) -> None:
        """Look at an engine's queues without a kick; nothing for one that has none here."""
    def set_call(self, engine: Engine, index: int, call: int) -> None:
        """Interrupt the driver by another eventfd, or by none (-1)."""
    def pause(self, paused: bool = True) -> None:
        """Leave all queues alone, or serve them again."""
    def close(self) -> None:
        """Let `run` return None."""
    def free(self) -> None:
        """Give its descriptors back, after `run` has returned None; harmless when done before."""
    @property
    def budget(self) -> int:
        """Nanoseconds."""
