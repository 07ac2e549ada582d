# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A GPIO controller (virtio 1.2, 5.18) of simulated lines, which are set and watched from outside by lines of text.

Rule of this file: a request that the specification forbids, or that no line can carry out, is answered with an error; an event
buffer that is of no use comes back at once and says that there was no interrupt. The ring goes on in either case.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, Self

from ..virtio.config import PAD, Field
from ..virtio.features import GpioFeature as F
from ..virtio.gpio import Direction, Irq
from ..virtio.ids import DeviceId
from ..virtqueue import Chain
from .base import Model, Queue
from .control import Control, Peer
from .gpio_lines import Line, Lines, Refused
from .options import check_options, parse_count
from .sources import Sources

REQUESTS, EVENTS = 0, 1
MOST_LINES = 4096
COMMANDS = ("get LINE", "set LINE 0|1", "list", "watch")

_REQUEST = struct.Struct("<HHI")
_EVENT = struct.Struct("<H")
_INVALID, _VALID = b"\0", b"\1"
"""struct virtio_gpio_irq_response"""


class Type(IntEnum):
    """VIRTIO_GPIO_MSG_*."""

    GET_LINE_NAMES = 1
    GET_DIRECTION = 2
    SET_DIRECTION = 3
    GET_VALUE = 4
    SET_VALUE = 5
    SET_IRQ_TYPE = 6


class GpioModel(Model):
    """Requests, and an event queue whose buffers are kept until their line has an interrupt."""

    device_id = DeviceId.GPIO
    features = F.IRQ
    queue_count = 2
    layout = (Field("ngpio", "H"), Field(PAD, "2s"), Field("gpio_names_size", "I"))

    def __init__(self, lines: Lines, control: str = "") -> None:
        """*control*: where to make a socket for commands, of which ``COMMANDS`` are the grammar; OSError."""
        self.lines = lines
        self.ngpio = len(lines.all)
        named = any(line.name for line in lines.all)
        self._names = b"".join(line.name.encode() + b"\0" for line in lines.all) if named else b""
        self.gpio_names_size = len(self._names)
        self._events: dict[int, Chain] = {}
        """The event buffer of each line whose interrupt is unmasked."""
        self._irqs = False
        self._control: Control | None = None
        if control:
            self.sources = Sources(idle=True)
            try:
                self._control = Control(control, self.sources, self._hear)
            except BaseException:
                self.sources.close()
                raise
            lines.changed = self._tell

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """``lines=8``, ``names=led,button,...``, ``loop=led:button,2:3``, ``high=button,...``, ``control=PATH``."""
        check_options("gpio", options, ("lines", "names", "loop", "high", "control"))
        names = _words(options, "names")
        for name in names:
            if not name.isascii() or not name.isprintable() or ":" in name or name != name.strip():
                raise ValueError(f"names={name!r}; a name is printable ASCII without a colon")
        count = parse_count("lines", options.get("lines", str(len(names) or 8)), 1, MOST_LINES)
        if len(names) > count:
            raise ValueError(f"{len(names)} names for {count} lines")
        wires = []
        for pair in _words(options, "loop"):
            one, colon, other = pair.partition(":")
            if not colon:
                raise ValueError(f"loop={pair}; it is LINE:LINE")
            wires.append((one, other))
        lines = Lines([*names, *[""] * (count - len(names))], wires, _words(options, "high"))
        return cls(lines, os.path.abspath(options["control"]) if "control" in options else "")

    def start(self, features: int) -> None:
        """Interrupts are had by those who accept them."""
        self._irqs = bool(features & F.IRQ)

    def reset(self) -> None:
        """Levels set from outside stay; everything else the driver has made."""
        self._events.clear()
        self.lines.reset()

    def snapshot(self) -> dict[str, Any]:
        """The state of each line."""
        return {"lines": [line.state for line in self.lines.all]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Levels, directions, values and interrupts as they were."""
        self.lines.restore(state["lines"])

    def close(self) -> None:
        """Take the socket away."""
        if self._control is not None:
            self._control.close()
        super().close()

    # The driver ---------------------------------------------------------------------------------------------------------

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        """Serve a batch."""
        queue = queues[index]
        if index == REQUESTS:
            queue.push([(chain, _answer(chain, self._request(chain))) for chain in queue.pop()])
        else:
            queue.push([(chain, _answer(chain, _INVALID)) for chain in queue.pop() if not self._unmasks(chain)])
        self._interrupt(queues)

    def _request(self, chain: Chain) -> bytes:
        try:
            if chain.readable != _REQUEST.size:
                raise Refused("not a request")
            kind, number, value = _REQUEST.unpack(chain.read())
            if kind == Type.GET_LINE_NAMES:
                if not self._names:
                    raise Refused("no line has a name")
                return b"\0" + self._names
            if number >= self.ngpio:
                raise Refused(f"there is no line {number}")
            return bytes((0, self._carry_out(kind, self.lines.all[number], value)))
        except (Refused, ValueError):  # of an enumeration, that is
            return b"\1\0"

    def _carry_out(self, kind: int, line: Line, value: int) -> int:
        """The value of the answer; Refused, ValueError."""
        if kind == Type.GET_DIRECTION:
            return line.direction
        if kind == Type.GET_VALUE:
            if line.direction == Direction.NONE:
                raise Refused(f"{line} is not in use")
            return line.level
        if kind == Type.SET_DIRECTION:
            line.set_direction(Direction(value))
        elif kind == Type.SET_VALUE:
            if value > 1:
                raise Refused(f"{value} is no level")
            line.set_value(bool(value))
        elif kind == Type.SET_IRQ_TYPE and self._irqs:
            line.set_irq(Irq(value))
        else:
            raise Refused(f"there is no request {kind}")
        self.lines.after(line)
        return 0

    def _unmasks(self, chain: Chain) -> bool:
        """Keep the buffer of a line whose interrupt is enabled and that has none here; False for any other."""
        if chain.readable != _EVENT.size or not chain.writable:
            return False
        (number,) = _EVENT.unpack(chain.read())
        if number >= self.ngpio or number in self._events or self.lines.all[number].irq == Irq.NONE:
            return False
        self._events[number] = chain
        return True

    def _interrupt(self, queues: Mapping[int, Queue]) -> None:
        """Give back the buffers of lines that have an interrupt, and of those whose interrupt is disabled by now."""
        if (queue := queues.get(EVENTS)) is None:
            return
        done = []
        for number, chain in list(self._events.items()):
            line = self.lines.all[number]
            if line.irq == Irq.NONE or line.take_interrupt():
                del self._events[number]
                done.append((chain, _answer(chain, _INVALID if line.irq == Irq.NONE else _VALID)))
        if done:
            queue.push(done)

    def release(self, queue: Queue, index: int) -> None:
        """Kept buffers go back without an interrupt; a driver that waits for one sends them again."""
        if index == EVENTS:
            kept, self._events = self._events, {}
            queue.push([(chain, _answer(chain, _INVALID)) for chain in kept.values()])

    # Outside --------------------------------------------------------------------------------------------------------------

    def _hear(self, queues: Mapping[int, Queue], peer: Peer, text: str) -> None:
        """One command: its answer begins with ``ok`` or ``error``."""
        word, _, rest = text.partition(" ")
        try:
            if word == "get" and rest:
                peer.say(f"ok {self.lines.find(rest).level:d}")
            elif word == "set" and rest[-2:] in (" 0", " 1"):
                line = self.lines.find(rest[:-2].strip())
                line.set_from_outside(rest[-1] == "1")
                self.lines.after(line)
                self._interrupt(queues)
                peer.say("ok")
            elif text == "list":
                rows = [f"{line.number} {line.direction.name.lower()} {line.level:d} {line.name}".rstrip() for line in self.lines.all]
                peer.say("\n".join([f"ok {len(rows)}", *rows]))
            elif text == "watch":
                peer.watches = True
                peer.say("ok")
            else:
                raise ValueError(f"not a command; there is: {', '.join(COMMANDS)}")
        except (Refused, ValueError) as error:
            peer.say(f"error {error}")

    def _tell(self, line: Line) -> None:
        if self._control is not None:
            for peer in [peer for peer in self._control.peers if peer.watches]:
                peer.say(f"change {line} {line.level:d}")


def _answer(chain: Chain, answer: bytes) -> int:
    """Bytes written; 0 when the driver took the buffer's memory away meanwhile."""
    try:
        return chain.write(answer)
    except OSError:
        return 0


def _words(options: Mapping[str, str], name: str) -> list[str]:
    return options[name].split(",") if options.get(name) else []
