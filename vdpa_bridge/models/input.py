# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""An input device (virtio 1.2, 5.8): what it is and does comes from a feed, an input device of this machine or a script.

Rule of this file: nothing is dropped here. Events wait for the driver's buffers, and once MOST of them wait, the feed does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Protocol, Self

from ..virtio.config import PAD, Field
from ..virtio.ids import DeviceId
from ..virtio.input import (
    AXIS,
    DATA_BYTES,
    EV_ABS,
    EV_KEY,
    EV_LED,
    EV_REL,
    EVENT,
    EVENTS,
    IDS,
    STATUS,
    Event,
    InputInfo,
    Select,
    pack_bits,
)
from .base import Model, Queue
from .input_script import ScriptFeed, read_script
from .needs import Needs
from .options import check_options, parse_switch
from .sources import Sources

MOST = 1024
"""Events that wait for buffers, and those that make their update complete."""

_VIRTUAL = 0x06
_BUTTONS = tuple(range(0x110, 0x115))
_AXES: dict[int, tuple[int, ...]] = dict.fromkeys((0, 1), (0, 0x7FFF, 0, 0, 0))
KINDS = {
    "keyboard": InputInfo("vdpa_bridge keyboard", ids=(_VIRTUAL, 0, 1, 1), events={EV_KEY: tuple(range(1, 249)), EV_LED: (0, 1, 2)}),
    "mouse": InputInfo("vdpa_bridge mouse", ids=(_VIRTUAL, 0, 2, 1), events={EV_KEY: _BUTTONS, EV_REL: (0, 1, 6, 8)}),
    "tablet": InputInfo("vdpa_bridge tablet", ids=(_VIRTUAL, 0, 3, 1), properties=(0,), events={EV_KEY: _BUTTONS, EV_REL: (8,), EV_ABS: (0, 1)}, axes=_AXES),
}
"""What a device without a physical one can be: all keys and the lights of a keyboard; buttons and wheels, with ways or places."""


class Outlet(Protocol):
    """A model, as its feed sees it."""

    sources: Sources

    @property
    def full(self) -> bool:
        """Whether the feed has to wait until ``Feed.go_on``."""

    def say(self, queues: Mapping[int, Queue], events: Iterable[Event]) -> None:
        """Tell the driver of *events*, soon."""


class Feed(Protocol):
    """Where events come from."""

    def start(self) -> None:
        """The driver is ready: what happened before is past."""

    def stop(self) -> None:
        """The driver is gone."""

    def go_on(self, queues: Mapping[int, Queue]) -> None:
        """There is room again."""

    def status(self, event: Event) -> None:
        """The driver wants a light or a sound, or anything else: it can be told any event."""

    def close(self) -> None:
        """Give files back."""


class InputModel(Model):
    """A device that is *info*, and does what *feed*, which it owns from now on, says."""

    device_id = DeviceId.INPUT
    queue_count = 2
    layout = (Field("select", "B"), Field("subsel", "B"), Field("size", "B"), Field(PAD, "5s"), Field("data", f"{DATA_BYTES}s"))

    def __init__(self, info: InputInfo, feed: Callable[[Outlet], Feed], needs: Needs = Needs()) -> None:  # noqa: B008 - frozen
        """*feed* makes it, for this model; what that raises is raised."""
        self.info = info
        self.needs = needs
        self.select = self.subsel = 0
        self._waiting: deque[Event] = deque()
        self.sources: Sources = Sources(idle=True)
        try:
            self._feed = feed(self)
        except BaseException:
            self.sources.close()
            raise

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """``evdev=PATH``, ``grab=on``; or ``kind=keyboard``, ``name=TEXT``, ``serial=TEXT``, ``script=PATH``, ``control=PATH``."""
        check_options("input", options, ("evdev", "grab", "kind", "name", "serial", "script", "control"))
        if "evdev" in options:
            if more := sorted(options.keys() - {"evdev", "grab"}):
                raise ValueError(f"{more[0]}= and evdev=; the device at {options['evdev']} says itself what it is and does")
            from .input_evdev import EvdevDevice, EvdevFeed  # which takes a while, and not everybody needs

            device = EvdevDevice(options["evdev"], parse_switch("grab", options.get("grab", "on")))
            return cls(device.info, lambda outlet: EvdevFeed(outlet, device), device.needs)
        if "grab" in options:
            raise ValueError("grab= goes with evdev=")
        kind = options.get("kind", "keyboard")
        if kind not in KINDS:
            raise ValueError(f"kind={kind}; it is {', '.join(KINDS)}")
        info = replace(KINDS[kind], name=options.get("name", KINDS[kind].name), serial=options.get("serial", ""))
        for text in (info.name, info.serial):
            if len(text.encode()) > DATA_BYTES:
                raise ValueError(f"{text!r} is longer than {DATA_BYTES} bytes")
        steps = read_script(options["script"], info) if "script" in options else []
        # What it is told by names, it looks up there.
        needs = Needs(modules=("evdev",)) if "control" in options else Needs()
        return cls(info, lambda outlet: ScriptFeed(outlet, info, steps, options.get("control")), needs)

    # Configuration space -------------------------------------------------------------------------------------------------

    @property
    def _answer(self) -> bytes:
        """What there is to say to the selectors (virtio 1.2, 5.8.4); nothing for what the device does not have."""
        info = self.info
        if self.select == Select.EVENT_BITS:
            return pack_bits(info.events.get(self.subsel, ()))
        if self.select == Select.ABSOLUTE:
            return AXIS.pack(*info.axes[self.subsel]) if self.subsel in info.axes else b""
        if self.subsel:
            return b""
        answers: dict[int, bytes] = {
            Select.NAME: info.name.encode(errors="replace"),
            Select.SERIAL: info.serial.encode(errors="replace"),
            Select.IDS: IDS.pack(*info.ids) if info.ids else b"",
            Select.PROPERTIES: pack_bits(info.properties),
        }
        return answers.get(self.select, b"")

    @property
    def size(self) -> int:
        """Bytes of ``data`` that mean something."""
        return len(self.data)

    @property
    def data(self) -> bytes:
        """The answer to the selectors."""
        return self._answer[:DATA_BYTES]

    def write_config(self, offset: int, data: bytes) -> None:
        """The selectors come first; QEMU writes all of the space with them."""
        for at, byte in enumerate(data[: max(2 - offset, 0)], offset):
            if at:
                self.subsel = byte
            else:
                self.select = byte

    # Events ----------------------------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """See ``Outlet``."""
        return len(self._waiting) >= MOST

    def say(self, queues: Mapping[int, Queue], events: Iterable[Event]) -> None:
        """See ``Outlet``."""
        self._waiting.extend(events)
        self._send(queues)

    def _send(self, queues: Mapping[int, Queue]) -> None:
        """Fill buffers, an event each; one too small for it goes back empty."""
        if (queue := queues.get(EVENTS)) is None:
            return
        left = self.queue_size  # a driver may give buffers as fast as they are filled
        while left > 0 and self._waiting and (chains := queue.pop(min(len(self._waiting), left))):
            left -= len(chains)
            queue.push([(chain, chain.write(EVENT.pack(*self._waiting.popleft())) if chain.writable >= EVENT.size else 0) for chain in chains])

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        """Use buffers that came, or hear what the driver wants."""
        if index == EVENTS:
            was_full = self.full
            self._send(queues)
            if was_full and not self.full:
                self._feed.go_on(queues)
        elif index == STATUS:
            wishes = queues[STATUS].pop()
            for chain in wishes:
                if chain.readable >= EVENT.size:
                    self._feed.status(Event(*EVENT.unpack(chain.read(0, EVENT.size))))
            queues[STATUS].push([(chain, 0) for chain in wishes])

    def start(self, features: int) -> None:
        """The driver hears of what happens from now on."""
        self._feed.start()

    def reset(self) -> None:
        """What it has not heard, it never will."""
        self._waiting.clear()
        self.select = self.subsel = 0
        self._feed.stop()

    def close(self) -> None:
        """The feed goes, too."""
        self._feed.close()
        super().close()
