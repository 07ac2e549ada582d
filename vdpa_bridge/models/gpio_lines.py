# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Lines that are not there: levels, wires between two of them, and interrupts (virtio 1.2, 5.18.6 and 5.18.7).

Rule of this file: the level of a line is derived, so that it is right whatever happens in which order: an output has the value that
its driver gave it, any other line that of the output it is wired to, or what is set from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..virtio.gpio import Direction, Irq


class Refused(Exception):
    """What a line cannot do; the text says why."""


class Line:
    """One line. Its *name* may be empty."""

    def __init__(self, number: int, name: str, high: bool = False) -> None:
        self.number = number
        self.name = name
        self.direction = Direction.NONE
        self.wire: Line | None = None
        """The line at the other end of the wire."""
        self.irq = Irq.NONE
        self.level = high
        self._value = False
        self._outside = high
        self._latched = False

    def __str__(self) -> str:
        return self.name or str(self.number)

    @property
    def _driver(self) -> Line | None:
        """The output that says the level."""
        return next((line for line in (self, self.wire) if line is not None and line.direction == Direction.OUT), None)

    @property
    def state(self) -> list[int]:
        """All that happened to it, as numbers."""
        return [self.direction, self._value, self._outside, self.irq, self._latched, self.level]

    @state.setter
    def state(self, state: Sequence[int]) -> None:
        direction, value, outside, irq, latched, level = state
        self.direction, self.irq = Direction(direction), Irq(irq)
        self._value, self._outside, self._latched, self.level = map(bool, (value, outside, latched, level))

    def sense(self) -> bool:
        """Take the level anew; whether it is another. An edge that is an interrupt is latched."""
        driver = self._driver
        level = self._outside if driver is None else driver._value
        if level == self.level:
            return False
        self.level = level
        self._latched |= self.irq in (Irq.BOTH, Irq.RISING if level else Irq.FALLING)
        return True

    # What happens to it; ``Lines.after`` follows ------------------------------------------------------------------------------

    def set_from_outside(self, high: bool) -> None:
        """Refused while an output drives it."""
        if (driver := self._driver) is not None:
            raise Refused(f"{self} is an output" if driver is self else f"{self} is wired to {driver}, an output")
        self._outside = high

    def set_value(self, high: bool) -> None:
        """What the line has as an output, now or later."""
        self._value = high

    def set_direction(self, direction: Direction) -> None:
        """NONE forgets all that the driver said of the line. Refused to become an output with an interrupt enabled."""
        if direction == Direction.OUT and self.irq != Irq.NONE:
            raise Refused(f"{self} has an interrupt, which outputs have not")
        self.direction = direction
        if direction == Direction.NONE:
            self.irq, self._latched, self._value = Irq.NONE, False, False

    def set_irq(self, irq: Irq) -> None:
        """Enable the interrupt, or disable it, with which a latched one is forgotten. Refused of outputs, and when another type is enabled."""
        if irq != Irq.NONE:
            if self.direction == Direction.OUT:
                raise Refused(f"{self} is an output")
            if self.irq not in (Irq.NONE, irq):
                raise Refused(f"{self} has its interrupt enabled with another type")
        else:
            self._latched = False
        self.irq = irq

    def take_interrupt(self) -> bool:
        """Whether an interrupt is due; a latched one is no more afterwards."""
        due = self._latched or self.irq == (Irq.HIGH if self.level else Irq.LOW)
        self._latched = False
        return due


class Lines:
    """All lines of a controller. *changed* is called for each whose level is another."""

    def __init__(self, names: Iterable[str], wires: Iterable[tuple[str, str]] = (), high: Iterable[str] = ()) -> None:
        """*names* of all lines, empty for one without; *wires* between two; those *high* from outside at first. ValueError."""
        self.changed: Callable[[Line], None] = lambda line: None
        self.all = [Line(number, name) for number, name in enumerate(names)]
        self._named: dict[str, Line] = {}
        for line in filter(lambda line: line.name, self.all):
            if self._named.setdefault(line.name, line) is not line:
                raise ValueError(f"two lines are called {line.name}")
        for pair in wires:
            one, other = map(self.find, pair)
            if one is other or one.wire is not None or other.wire is not None:
                raise ValueError(f"loop={pair[0]}:{pair[1]}; a wire goes from one line to another, and each has one at most")
            one.wire, other.wire = other, one
        for name in high:
            self.find(name).set_from_outside(True)
        self.after(*self.all)

    def find(self, text: str) -> Line:
        """The line of that name, or else of that number; ValueError."""
        if text in self._named:
            return self._named[text]
        if text.isdecimal() and int(text) < len(self.all):
            return self.all[int(text)]
        raise ValueError(f"no line {text!r}; there are {len(self.all)}: {', '.join(self._named) or 'none has a name'}")

    def after(self, *lines: Line) -> None:
        """Something happened to *lines*: sense the levels there and at the other ends of their wires."""
        for line in lines:
            for each in (line, line.wire):
                if each is not None and each.sense():
                    self.changed(each)

    def restore(self, states: Sequence[Sequence[int]]) -> None:
        """Take over the state of each; ValueError when they are not as many."""
        for line, state in zip(self.all, states, strict=True):
            line.state = state

    def reset(self) -> None:
        """As they are for a new driver. What is set from outside stays."""
        for line in self.all:
            line.set_direction(Direction.NONE)
        self.after(*self.all)
