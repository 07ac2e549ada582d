# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""No wake-up is lost, whatever the order in which memory shows what both ends of a ring store; and each barrier is needed for that.

The programs are the calls of the ring core, step by step, with the letters that its comments give to pairs of barriers: [A] to [D]
for split rings, [E] to [H] for packed ones. A driver publishes chains one by one, sleeping or not in between, and waits until all
are done; a device serves them and sleeps when there are none. Then each barrier is taken away in turn.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.weak import Check, Either, Fence, Jump, Load, Machine, Set, Signal, Sleep, Step, Store, without

CORE = Path(__file__).parents[2] / "userspace" / "src"
BASE = 0xFFFF
"""Where split rings start: the index wraps."""
WRAP = 0x8000
AVAIL, USED = 1 << 7, 1 << 15
ASK, ASK_AT = 0, 2
"""Values of an event structure's flags; 1 is: do not."""
LATE, LOST = "data is read before it is there", "a wake-up is lost"


def passes_event(event: int, after: int, before: int) -> bool:
    return (after - event - 1) & 0xFFFF < (after - before) & 0xFFFF


class Split:
    """Chain *n* is data ``out n`` for the device and ``in n`` from it; indices count from BASE."""

    files = ("driver.c", "device.c")
    letters = "ABCD"
    """Of the barriers: publishing, asking for kicks, using, asking for calls."""

    def __init__(self, chains: int, event_idx: bool) -> None:
        self.chains = self.num = chains
        self.event_idx = event_idx
        self.places = {"avail": BASE, "used": BASE, "kick wish": BASE if event_idx else 0, "call wish": BASE if event_idx else 0}

    def place(self, what: str, count: int) -> str:
        return what

    def value(self, what: str, count: int) -> int:
        """What is stored when chain *count* is made available or used."""
        return (BASE + count + 1) & 0xFFFF

    def there(self, what: str, seen: int, count: int) -> bool:
        return seen != (BASE + count) & 0xFFFF

    def ask(self, count: int) -> int:
        return (BASE + count) & 0xFFFF if self.event_idx else 0

    def hush(self, count: int) -> int:
        return (BASE + count - 1) & 0xFFFF if self.event_idx else 1

    def due(self, wish: int, after: int) -> bool:
        """Whether to signal that the index went from the one before *after* to it."""
        return passes_event(wish, (BASE + after) & 0xFFFF, (BASE + after - 1) & 0xFFFF) if self.event_idx else not wish


class Packed(Split):
    """A ring of a few descriptors; where one stands says which, and on which lap."""

    files = ("packed_driver.c", "packed_device.c")
    letters = "EFGH"

    def __init__(self, chains: int, event_idx: bool, num: int = 2) -> None:
        self.chains, self.num = chains, num
        self.event_idx = event_idx
        self.places = {f"flags {n}": 0 for n in range(num)} | {"kick wish": self.ask(0), "call wish": self.ask(0)}

    def cursor(self, count: int) -> int:
        return count % self.num | (0 if count // self.num % 2 else WRAP)

    def place(self, what: str, count: int) -> str:
        return f"flags {count % self.num}"

    def value(self, what: str, count: int) -> int:
        lap = self.cursor(count) & WRAP
        return (AVAIL if lap else USED) if what == "avail" else (AVAIL | USED if lap else 0)

    def there(self, what: str, seen: int, count: int) -> bool:
        return seen == self.value(what, count)

    def ask(self, count: int) -> int:
        return ASK_AT << 16 | self.cursor(count) if self.event_idx else ASK

    def hush(self, count: int) -> int:
        return 1 << 16

    def due(self, wish: int, after: int) -> bool:
        if wish >> 16 != ASK_AT:
            return wish >> 16 == ASK
        cursor = self.cursor(after)
        at = (wish & 0x7FFF) - (self.num if (wish ^ cursor) & WRAP else 0)
        to = cursor & 0x7FFF
        return passes_event(at, to, to - 1)


def programs(ring: Split) -> tuple[list[Step], list[Step]]:
    """The driver's and the device's."""
    publish, kick, use, call = ((f"{letter} driver", f"{letter} device") for letter in ring.letters)
    driver: list[Step] = [
        "next",
        Jump("reap", lambda r: r["sent"] == ring.chains or r["sent"] - r["done"] == ring.num),
        Either("reap"),
        Store(lambda r: f"out {r['sent']}", lambda r: 1),
        Store(lambda r: ring.place("avail", r["sent"]), lambda r: ring.value("avail", r["sent"]), publish[0]),
        Set("sent", lambda r: r["sent"] + 1),
        Fence(kick[0]),
        Load("wish", "kick wish"),
        Signal("kick", lambda r: ring.due(r["wish"], r["sent"])),
        Jump("next"),
        "reap",
        Jump("end", lambda r: r["done"] == ring.chains),
        Jump("next", lambda r: r["done"] == r["sent"]),
        Load("seen", lambda r: ring.place("used", r["done"]), use[0]),
        Jump("arm", lambda r: not ring.there("used", r["seen"], r["done"])),
        Load("data", lambda r: f"in {r['done']}"),
        Check(lambda r: r["data"], LATE),
        Set("done", lambda r: r["done"] + 1),
        Jump("next"),
        "arm",
        Store("call wish", lambda r: ring.ask(r["done"])),
        Fence(call[0]),
        Load("seen", lambda r: ring.place("used", r["done"])),
        Jump("hush", lambda r: ring.there("used", r["seen"], r["done"])),
        Sleep("call"),
        "hush",
        Store("call wish", lambda r: ring.hush(r["done"])),
        Jump("next"),
        "end",
    ]
    device: list[Step] = [
        "pop",
        Jump("end", lambda r: r["taken"] == ring.chains),
        Load("seen", lambda r: ring.place("avail", r["taken"]), publish[1]),
        Jump("arm", lambda r: not ring.there("avail", r["seen"], r["taken"])),
        Load("data", lambda r: f"out {r['taken']}"),
        Check(lambda r: r["data"], LATE),
        Store(lambda r: f"in {r['taken']}", lambda r: 1),
        Store(lambda r: ring.place("used", r["taken"]), lambda r: ring.value("used", r["taken"]), use[1]),
        Set("taken", lambda r: r["taken"] + 1),
        Fence(call[1]),
        Load("wish", "call wish"),
        Signal("call", lambda r: ring.due(r["wish"], r["taken"])),
        Jump("pop"),
        "arm",
        Store("kick wish", lambda r: ring.ask(r["taken"])),
        Fence(kick[1]),
        Load("seen", lambda r: ring.place("avail", r["taken"])),
        Jump("hush", lambda r: ring.there("avail", r["seen"], r["taken"])),
        Sleep("kick"),
        "hush",
        Store("kick wish", lambda r: ring.hush(r["taken"])),
        Jump("pop"),
        "end",
    ]
    return driver, device


def outcome(ring: Split, missing: str = "") -> str:
    """What can go wrong, with one barrier taken away."""
    driver, device = programs(ring)
    if missing.endswith("driver"):
        driver = without(driver, missing)
    elif missing:
        device = without(device, missing)
    data = {f"{way} {n}": 0 for way in ("out", "in") for n in range(ring.chains)}
    states, wrong = Machine({**ring.places, **data, "kick": 0, "call": 0}, {"sent": 0, "done": 0, "taken": 0}, driver, device).explore()
    assert wrong or states > 1000
    return wrong


FORMS = {
    f"{type(ring).__name__.lower()} of {ring.num}, {'event index' if ring.event_idx else 'flags'}": ring
    for event_idx in (False, True)
    for ring in (Split(2, event_idx), Packed(2, event_idx), Packed(3, event_idx, num=1))
}
MISSING = [f"{letter} {end}" for letter in ("publish", "kick", "use", "call") for end in ("driver", "device")]


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_lost(form: str) -> None:
    assert outcome(FORMS[form]) == ""


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("form", FORMS)
def test_each_barrier_is_needed(form: str, missing: str) -> None:
    ring = FORMS[form]
    what, end = missing.split()
    letter = dict(zip(("publish", "kick", "use", "call"), ring.letters, strict=True))[what]
    assert outcome(ring, f"{letter} {end}") == (LOST if what in ("kick", "call") else LATE)


@pytest.mark.parametrize("kind", [Split, Packed])
def test_the_code_has_these_barriers(kind: type[Split]) -> None:
    """Each letter stands at both ends, at a fence or at a store or load of that order."""
    order = {"driver": ("release", "acquire"), "device": ("acquire", "release")}
    for file, end in zip(kind.files, ("driver", "device"), strict=True):
        code = (CORE / file).read_text()
        publish, kick, use, call = kind.letters
        for letter, wanted in ((publish, order[end][0]), (kick, "seq_cst"), (use, order[end][1]), (call, "seq_cst")):
            found = re.findall(rf"pair \[{letter}\].*?memory_order_(\w+)\)", code, re.S)
            assert found == [wanted], (file, letter)
