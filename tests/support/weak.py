# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Runs small programs of two threads in every way that C11's memory model allows, and tells what can come of them.

Rule of this file: the machine is weaker than any processor the project runs on, except that no store is seen before it is
executed. Memory keeps the messages of all stores. A thread has a view, the oldest message of each place that it may still
read, and a load takes any from there on: so stores are late (store-load reordering), and come in any order, unless release and
acquire or fences forbid it. The semantics are those of "A Promising Semantics for Relaxed-Memory Concurrency" (Kang et al.,
2017) without promises. Every place has one writer at a time, so a store's message always comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

T = TypeVar("T")
Registers = dict[str, int]
Value = Callable[[Registers], int]
Place = str | Callable[[Registers], str]
View = tuple[int, ...]


@dataclass(frozen=True)
class Store:
    """Write *value* to *place*; with a *barrier*, which is its name, as in memory_order_release, else relaxed."""

    place: Place
    value: Value
    barrier: str = ""


@dataclass(frozen=True)
class Load:
    """Read *place* into *register*; with a *barrier* as in memory_order_acquire, else relaxed."""

    register: str
    place: Place
    barrier: str = ""


@dataclass(frozen=True)
class Fence:
    """atomic_thread_fence(memory_order_seq_cst); without its name there is none."""

    barrier: str = ""


@dataclass(frozen=True)
class Set:
    """A register without memory."""

    register: str
    value: Value


@dataclass(frozen=True)
class Jump:
    """Go to the label *to* if *when* is true."""

    to: str
    when: Value = lambda registers: 1


@dataclass(frozen=True)
class Either:
    """Go to the label, or do not."""

    to: str


@dataclass(frozen=True)
class Signal:
    """Add to the eventfd *place* if *when* is true. System calls on one eventfd are in one order, and no more than that."""

    place: str
    when: Value


@dataclass(frozen=True)
class Sleep:
    """Wait until the eventfd *place* is signalled, and take it."""

    place: str


@dataclass(frozen=True)
class Check:
    """False is an error of the program."""

    holds: Value
    what: str


Step = Store | Load | Fence | Set | Jump | Either | Signal | Sleep | Check | str
"""A string is a label; registers without a value at the start lose theirs there."""


def without(program: list[Step], barrier: str) -> list[Step]:
    """The program with that barrier taken away, which has to be in it."""
    changed = [replace(step, barrier="") if isinstance(step, Store | Load | Fence) and step.barrier == barrier else step for step in program]
    assert changed != program, barrier
    return changed


class Message(NamedTuple):
    """What a store left, and what who reads it with acquire has to have seen."""

    value: int
    view: View


class Thread(NamedTuple):
    """Where a thread is. ``pending``: what its relaxed loads would have shown with acquire; ``shown``: its view at its last fence."""

    at: int
    registers: tuple[tuple[str, int], ...]
    view: View
    pending: View
    shown: View


class State(NamedTuple):
    """Both threads, all messages by place, and what fences have in common."""

    threads: tuple[Thread, ...]
    memory: tuple[tuple[Message, ...], ...]
    fenced: View


def _join(one: View, other: View) -> View:
    return tuple(map(max, one, other))


def _with(many: tuple[T, ...], at: int, one: T) -> tuple[T, ...]:
    return (*many[:at], one, *many[at + 1 :])


class Machine:
    """Programs over *places* and *registers* with their values at the start."""

    def __init__(self, places: dict[str, int], registers: Registers, *programs: list[Step]) -> None:
        self._index = {place: at for at, place in enumerate(places)}
        self._programs = programs
        self._kept = frozenset(registers)
        self._labels = [{step: at for at, step in enumerate(program) if isinstance(step, str)} for program in programs]
        nothing = (0,) * len(places)
        thread = Thread(0, tuple(sorted(registers.items())), nothing, nothing, nothing)
        self._start = State((thread,) * len(programs), tuple((Message(value, nothing),) for value in places.values()), nothing)

    def explore(self) -> tuple[int, str]:
        """How many states there are, and what is wrong in one: a check, or threads that sleep while the first one has not ended."""
        seen, todo = {self._start}, [self._start]
        while todo:
            state = todo.pop()
            moved = False
            for found in self._successors(state):
                moved = True
                if isinstance(found, str):
                    return len(seen), found
                found = self._forgotten(self._settled(found))
                if found not in seen:
                    seen.add(found)
                    todo.append(found)
            if not moved and state.threads[0].at < len(self._programs[0]):
                return len(seen), "a wake-up is lost"
        return len(seen), ""

    def _settled(self, state: State) -> State:
        """Steps that only their thread sees are no turns of their own."""
        for number, program in enumerate(self._programs):
            while (thread := state.threads[number]).at < len(program):
                step = program[thread.at]
                if not isinstance(step, Jump | Set | str) and step != Fence():
                    break
                state = next(s for s in self._execute(state, number, thread, step) if isinstance(s, State))
        return state

    def _forgotten(self, state: State) -> State:
        """Without the messages that no thread can read any more; times are counted from the oldest that is left."""
        oldest = tuple(map(min, *(thread.view for thread in state.threads)))
        if not any(oldest):
            return state

        def since(view: View) -> View:
            return tuple(max(time - first, 0) for time, first in zip(view, oldest, strict=True))

        threads = tuple(t._replace(view=since(t.view), pending=since(t.pending), shown=since(t.shown)) for t in state.threads)
        memory = tuple(tuple(Message(m.value, since(m.view)) for m in many[first:]) for many, first in zip(state.memory, oldest, strict=True))
        return State(threads, memory, since(state.fenced))

    def _successors(self, state: State) -> Iterator[State | str]:
        for number, (thread, program) in enumerate(zip(state.threads, self._programs, strict=True)):
            if thread.at < len(program):
                yield from self._execute(state, number, thread, program[thread.at])

    def _execute(self, state: State, number: int, thread: Thread, step: Step) -> Iterator[State | str]:
        registers = dict(thread.registers)
        after = thread._replace(at=thread.at + 1)
        match step:
            case Store(place, value, barrier):
                yield self._stored(state, number, after, self._find(place, registers), value(registers), thread.view if barrier else thread.shown)
            case Load(register, place, barrier):
                index = self._find(place, registers)
                for time in range(thread.view[index], len(state.memory[index])):
                    yield self._put(state, number, self._loaded(after, index, time, state.memory[index][time], register, bool(barrier)))
            case Fence(barrier) if barrier:
                view = _join(_join(thread.view, thread.pending), state.fenced)
                yield self._put(state, number, after._replace(view=view, pending=view, shown=view))._replace(fenced=view)
            case Set(register, value):
                yield self._put(state, number, self._set(after, register, value(registers)))
            case Jump(to, when):
                yield self._put(state, number, after._replace(at=self._labels[number][to]) if when(registers) else after)
            case Either(to):
                yield self._put(state, number, after)
                yield self._put(state, number, after._replace(at=self._labels[number][to]))
            case Signal(place, when):
                yield self._called(state, number, after, self._index[place], 1) if when(registers) else self._put(state, number, after)
            case Sleep(place):
                if state.memory[self._index[place]][-1].value:
                    yield self._called(state, number, after, self._index[place], 0)
            case Check(holds, what):
                yield self._put(state, number, after) if holds(registers) else what
            case Fence():
                yield self._put(state, number, after)
            case _:  # a label, behind which only the registers there were at the start are used
                kept = tuple((name, value) for name, value in thread.registers if name in self._kept)
                yield self._put(state, number, after._replace(registers=kept))

    def _find(self, place: Place, registers: Registers) -> int:
        return self._index[place if isinstance(place, str) else place(registers)]

    @staticmethod
    def _set(thread: Thread, register: str, value: int) -> Thread:
        return thread._replace(registers=tuple(sorted({**dict(thread.registers), register: value}.items())))

    def _loaded(self, thread: Thread, index: int, time: int, message: Message, register: str, acquire: bool) -> Thread:
        view = _with(thread.view, index, time)
        pending = _join(_join(thread.pending, view), message.view)
        return self._set(thread._replace(view=_join(view, message.view) if acquire else view, pending=pending), register, message.value)

    @staticmethod
    def _put(state: State, number: int, thread: Thread) -> State:
        return state._replace(threads=_with(state.threads, number, thread))

    def _stored(self, state: State, number: int, thread: Thread, index: int, value: int, shown: View) -> State:
        """*shown* goes with the message."""
        time = len(state.memory[index])
        view = _with(thread.view, index, time)
        message = Message(value, _with(shown, index, time))
        memory = _with(state.memory, index, (*state.memory[index], message))
        return self._put(state, number, thread._replace(view=view, pending=_join(thread.pending, view)))._replace(memory=memory)

    def _called(self, state: State, number: int, thread: Thread, index: int, value: int) -> State:
        """A system call on an eventfd: it sees the last one on it, and is seen by the next."""
        last = state.memory[index][-1]
        view = _join(thread.view, last.view)
        return self._stored(state, number, thread._replace(view=view, pending=_join(thread.pending, view)), index, value, view)
