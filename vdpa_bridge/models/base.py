# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a device model is: an id, features, a configuration space, and something to do with chains.

Rule of this file and of all models: nothing here knows sockets, ioctls, memory maps or eventfds. A model outlives the
sessions of its drivers: what it stores stays, what a driver negotiated goes with the driver.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, Self

from ..engines import Engine
from ..flags import Feature
from ..virtio.config import Field, pack_config
from ..virtqueue import Chain
from .needs import Needs
from .options import check_options
from .sources import Sources

RING_FEATURES = (
    Feature.VERSION_1
    | Feature.ACCESS_PLATFORM
    | Feature.RING_INDIRECT_DESC
    | Feature.RING_EVENT_IDX
    | Feature.RING_PACKED
    | Feature.IN_ORDER
)
"""What the rings under every model can do; offered with each model's own features. Models may give chains back in any order:
for a driver that accepted IN_ORDER the rings keep them until those before them are back."""


class Queue(Protocol):
    """The device's end of one virtqueue, as a model sees it."""

    @property
    def waits(self) -> bool:
        """Whether the next chain is there, but its memory is not mapped yet: ``process`` is called for the queue when it is."""

    def pop(self, limit: int = 64) -> list[Chain]:
        """Take up to *limit* chains that the driver made available; empty when there are none."""

    def put_back(self, chains: list[Chain]) -> None:
        """Leave the last ones of those that were popped in the queue after all; ``process`` is called when there are more."""

    def push(self, done: list[tuple[Chain, int]]) -> None:
        """Give chains back, each with the number of bytes written into it, and interrupt the driver if it wants that."""


class Model(ABC):
    """A virtio device.

    Synchronization: the kit calls a model from one thread at a time, never concurrently.
    """

    device_id: ClassVar[int]
    """A ``virtio.ids.DeviceId``, or another number for a type of one's own."""
    queue_size: ClassVar[int] = 256
    """Largest ring of any queue."""
    layout: ClassVar[tuple[Field, ...]] = ()
    """The configuration space: each field has the value of the attribute of that name."""

    features: int = 0
    """The device type's own feature bits; RING_FEATURES come on top."""
    required: int = 0
    """Those without which no driver is served: SET_FEATURES refuses it with EINVAL."""
    queue_count: int
    """How many virtqueues there are."""
    groups: int = 1
    """How many groups the queues form (``group_of``). Groups can be put into different address spaces."""
    address_spaces: int = 1
    """How many address spaces there are."""
    threads: int = 0
    """How many threads its engines run in, which they name by a number below this."""
    needs: Needs = Needs()
    """What the model opens or connects to after it is made."""
    sources: Sources | None = None
    """What it waits for besides its queues, watched while the driver is ready. Made in ``__init__`` where there is something."""
    config_changed: Callable[[], None] = staticmethod(lambda: None)
    """To call from ``process``, a source or ``refresh``: the driver is told that the configuration space changed."""

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """Made of a target's options; ValueError that names a wrong one. There are none unless a model says so."""
        check_options(cls.__name__, options, ())
        return cls()

    def config(self) -> bytes:
        """The configuration space as the driver reads it now: by default what ``layout`` says."""
        return pack_config(self.layout, {field.name: getattr(self, field.name) for field in self.layout if field.name})

    def write_config(self, offset: int, data: bytes) -> None:  # noqa: B027 - most devices ignore writes
        """The driver wrote *data* at *offset*; the range lies inside the configuration space."""

    def group_of(self, index: int, features: int) -> int:
        """The group of queue *index* for a driver that accepted *features*."""
        return 0

    def start(self, features: int) -> None:  # noqa: B027 - most models need no notice
        """The driver is ready (DRIVER_OK), with *features* accepted."""

    def reset(self) -> None:  # noqa: B027
        """The driver reset the device."""

    @abstractmethod
    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        """Queue *index* may hold chains: serve a batch of them. *queues* are those that work now.

        Called again when chains are left in a queue that was popped from, so that no queue starves another. A queue left alone
        (receive buffers without anything to receive) is looked at after the next kick; one that had fewer chains than were asked
        for brings a call with its own index once it has more.
        """

    def release(self, queue: Queue, index: int) -> None:  # noqa: B027 - most devices keep no chain for later
        """Queue *index* stops, to work again from where it stood perhaps: give back the chains of it that are kept, or they are lost."""

    def rest(self) -> None:  # noqa: B027
        """Nothing is served until further notice: let what is under way outside end. It may take a few seconds."""

    def engine(self, index: int) -> Engine | None:
        """What serves queue *index* in C from now on, in place of ``process``, which it asks for what it does not do; None: nothing.

        Asked after ``start``, each time the ring begins to work. Queues that share an engine get the same one.
        """
        return None

    def rests(self, index: int) -> None:  # noqa: B027
        """The engine of queue *index* serves it no more; another queue of the same engine may go on."""

    def refresh(self) -> str:
        """Look anew at what may have changed outside (the size of a file); what did, for the log, empty if nothing."""
        return ""

    def resize(self, size: int) -> str:
        """Have *size* bytes from now on; what has changed, as of ``refresh``. ValueError when that cannot be, OSError when it fails."""
        raise ValueError("it has no size that could be changed")

    def plug(self, up: bool) -> None:
        """Put the cable in, or out; called as ``ModelDevice.change`` calls its action. ValueError unless it is a network interface."""
        raise ValueError("it has no link")

    def snapshot(self) -> dict[str, Any]:
        """What a driver has changed and a successor has to know: plain values, by which ``restore`` makes it the same device."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take over what ``snapshot`` of a predecessor said; ValueError for what cannot be."""

    @classmethod
    def succeed(cls, predecessor: Model, options: Mapping[str, str]) -> Self:
        """Made from newer code in the place of *predecessor*, which is closed afterwards. What cannot be opened twice is taken from there."""
        successor = cls.from_options(options)
        try:
            successor.restore(predecessor.snapshot())
        except BaseException:
            successor.close()
            raise
        return successor

    def close(self) -> None:
        """The device goes away; give back files."""
        if self.sources is not None:
            self.sources.close()
