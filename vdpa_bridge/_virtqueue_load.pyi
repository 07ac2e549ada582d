# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Types of the load generators in `_virtqueue`: what `_virtqueue_load.pxi` is to the source, this is to `_virtqueue.pyi`."""

from typing import Self, TypeVar, final

from typing_extensions import Buffer

from ._virtqueue import DriverQueue, Slots

_T = TypeVar("_T")

LOAD_MORE: int
LOAD_DONE: int
LOAD_SILENT: int
LOAD_BROKEN: int
LOAD_FAILED: int
"""How a load generator stands after a slice: see userspace/include/load.h."""
POLL_ALWAYS: int
"""As *poll*: never sleep."""
SHORTEST_FRAME: int
"""Bytes of the shortest frame that `NetLoad` can stamp."""
LARGEST_BATCH: int
"""Frames that `NetLoad` shows a device at once at most."""

@final
class Histogram:
    """How often each value was seen: exact below 64, within 1/32 of the value from there on."""

    def __new__(cls) -> Self: ...
    def add(self, value: int) -> None:
        """One more of `value`, a 64-bit number."""
    def merge(self, other: Histogram) -> None:
        """All that `other` has, too."""
    def quantile(self, part: float) -> int:
        """The least value that the share `part` (0 to 1) of all values does not exceed, rounded up to its bucket's end; 0 when empty."""
    def buckets(self) -> list[int]:
        """How many values each bucket has."""
    @property
    def count(self) -> int: ...
    @property
    def total(self) -> int:
        """The sum of all values."""
    @property
    def least(self) -> int: ...
    @property
    def most(self) -> int: ...

def fill_pattern(data: Buffer, sector: int, generation: int, seed: int) -> None:
    """Fill whole sectors of 512 bytes so that they say which they are, of which write and run. ValueError: not whole, or not aligned to 8."""

def check_pattern(data: Buffer, sector: int, generation: int, seed: int) -> str | None:
    """What is wrong with sectors that `fill_pattern` filled: lost, torn, misdirected or foreign writes, or None."""

@final
class BlkLoad:
    """Block requests on one queue, `depth` in flight. Memory of `memory()` bytes lies at `address` and `iova`, and is kept alive by `owner`.

    Synchronization: one thread runs it, to which the queue belongs until the last run ended; the rest is for any.
    """

    def __new__(
        cls, queue: DriverQueue[_T], kick: int, call: int, doorbell: int, index: int, address: int, iova: int,
        *, depth: int, block: int, segment: int, first: int, blocks: int, reads: int, random: bool, verify: bool, seed: int,
        interval: int = 0, goal: int = 0, patience: int, poll: int = 0, owner: object = None,
    ) -> Self:
        """Blocks of `block` bytes, in buffers of `segment` at most, from sector `first` on; `reads` of 100 are reads. A request is due each
        `interval` nanoseconds (0: at once), `goal` in all (0: no end); `patience` nanoseconds without an answer are too many.

        ValueError: the queue is in use, or has no room for `depth` requests.
        """
    @staticmethod
    def memory(depth: int, block: int) -> int:
        """Bytes that `depth` requests need."""
    def run(self, nanoseconds: int) -> int:
        """Go on for so long, without the GIL; LOAD_MORE, or why it ended early. OSError when kicking or sleeping fails."""
    def stop(self) -> None:
        """Start nothing new."""
    def sweep(self) -> None:
        """Next, read back all that was written. ValueError: requests are in flight, or it was not to `verify`."""
    def forget(self) -> None:
        """Count from 0 on. Not while it runs."""
    @property
    def counts(self) -> tuple[int, int, int]:
        """Reads and writes that came back, and reads that were compared."""
    @property
    def in_flight(self) -> int: ...
    @property
    def latencies(self) -> tuple[Histogram, Histogram]:
        """Of reads and of writes, in nanoseconds from when they were due."""
    @property
    def failed(self) -> tuple[bool, int, int]:
        """After LOAD_FAILED: whether it was a write, of which sector, and the status."""
    @property
    def wrong(self) -> str | None:
        """After LOAD_FAILED: what is wrong with the data, if that was it."""

@final
class NetLoad:
    """Frames over one queue pair, whose slots and rings (kick, call, doorbell, index) belong to the thread that runs it.

    The frames lie in the outgoing slots; each that goes out is stamped behind its Ethernet header.
    """

    def __new__(
        cls, outgoing: Slots[_T], incoming: Slots[_T], sender: tuple[int, int, int, int], receiver: tuple[int, int, int, int],
        *, mode: int, header: int, frame: int, room: int, batch: int, window: int, linger: int, seed: int,
        interval: int = 0, goal: int = 0, patience: int, poll: int = 0,
    ) -> Self:
        """`mode` 1 sends, 2 receives, 3 waits for what it sent. `header` bytes of virtio_net_hdr before `frame` bytes; receive buffers have
        `room` bytes. `window`: frames that may be out and not back; `linger`: nanoseconds after which they are lost. Others: see `BlkLoad`.

        ValueError: frames too short or too long, or too many at once; frames are being sent, or others' chains are on a queue.
        """
    def run(self, nanoseconds: int) -> int:
        """See `BlkLoad.run`."""
    def stop(self) -> None:
        """Send nothing new."""
    def forget(self) -> None:
        """Count from 0 on. Not while it runs."""
    @property
    def counts(self) -> tuple[int, int, int, int, int, int, int]:
        """Frames sent, received, bytes received; of those received ours, out of order, others'; lost."""
    @property
    def in_flight(self) -> int:
        """Frames that the device has to send."""
    @property
    def latency(self) -> Histogram:
        """Of our frames that came back, in nanoseconds."""
    @property
    def headless(self) -> int:
        """After LOAD_FAILED: bytes of a received buffer, fewer than a header has."""
