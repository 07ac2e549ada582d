# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Events from a script: a file, which is played whenever a driver is ready, or lines of people and programs on a socket.

A line is an update, of one event or of several with commas between them::

    key leftshift press, key a press      # names as in linux/input-event-codes.h, KEY_ and the like may be left out
    key a                                 # press, and release in an update of its own
    rel x 5, rel y -3
    abs x 16384
    event 1 30 1                          # type, code and value
    sleep 0.1                             # seconds

Rule of this file: steps are carried out in their order, each when its time has come and the driver has kept up with those
before; the file and the socket do not wait for each other.
"""

from __future__ import annotations

import logging
import os
import stat
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..outside.timer import Timer
from ..virtio.input import EV_ABS, EV_KEY, EV_LED, EV_REL, REPORT, Event, InputInfo
from .base import Queue
from .control import Control, Peer

if TYPE_CHECKING:
    from .input import Outlet

_log = logging.getLogger(__name__)

LONGEST_SLEEP = 86400.0
MOST_STEPS = 4096
"""Steps of the socket that wait at most."""
_PREFIXES = {"key": (EV_KEY, ("KEY_", "BTN_")), "rel": (EV_REL, ("REL_",)), "abs": (EV_ABS, ("ABS_",))}
_USAGE = "a line is: key NAME [press|release], rel NAME N, abs NAME N, event TYPE CODE VALUE, or sleep SECONDS"

Step = tuple[Event, ...] | float
"""An update, or seconds to wait."""


def parse_line(line: str, info: InputInfo) -> list[Step]:
    """The steps of one line for the device that *info* is. ValueError that says what is wrong with it."""
    words = line.partition("#")[0].split()
    if not words:
        return []
    if words[0] == "sleep":
        return [_seconds(words)]
    update: list[Event] = []
    releases: list[Event] = []
    for part in " ".join(words).split(","):
        event = _event(part.split(), info)
        update.append(event)
        if part.split()[0] == "key" and len(part.split()) == 2:
            releases.append(event._replace(value=0))
    return [(*events, REPORT) for events in (update, releases) if events]


def _seconds(words: list[str]) -> float:
    try:
        (text,) = words[1:]
        seconds = float(text)
    except ValueError:
        raise ValueError(f"{' '.join(words)!r}: {_USAGE}") from None
    if not 0 <= seconds <= LONGEST_SLEEP:
        raise ValueError(f"{text} is no number of seconds from 0 to {LONGEST_SLEEP:g}")
    return seconds


def _event(words: list[str], info: InputInfo) -> Event:
    match words:
        case ["key", name]:
            kind, value = "key", 1
        case ["key", name, ("press" | "release") as action]:
            kind, value = "key", int(action == "press")
        case [("rel" | "abs") as kind, name, text]:
            value = _number(text)
        case ["event", type_text, code_text, text]:
            return _checked(Event(_number(type_text), _number(code_text), _number(text)), " ".join(words), info)
        case _:
            raise ValueError(f"{' '.join(words)!r}: {_USAGE}")
    event_type, prefixes = _PREFIXES[kind]
    codes = _codes(kind, name.upper(), prefixes)
    code = next((code for code in codes if code in info.events.get(event_type, ())), codes[0])
    return _checked(Event(event_type, code, value), name, info)


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise ValueError(f"{text!r} is no number") from None


def _codes(kind: str, name: str, prefixes: tuple[str, ...]) -> list[int]:
    """What *name* may mean: LEFT is a key and a button."""
    from evdev import ecodes  # which takes a while, and not everybody needs

    names = [name] if name.startswith(prefixes) else [prefix + name for prefix in prefixes]
    if codes := [ecodes.ecodes[each] for each in names if each in ecodes.ecodes]:
        return codes
    raise ValueError(f"there is no {kind} {name}; linux/input-event-codes.h has the names")


def _checked(event: Event, name: str, info: InputInfo) -> Event:
    if event.code not in info.events.get(event.type, ()):
        raise ValueError(f"{info.name} has no {name}")
    lowest, highest = info.axes[event.code][:2] if event.type == EV_ABS else (-(1 << 31), (1 << 31) - 1)
    if not lowest <= event.value <= highest:
        raise ValueError(f"{event.value} is not within {lowest} and {highest}")
    return event


class Player:
    """Steps that are carried out one after the other."""

    def __init__(self, outlet: Outlet) -> None:
        """OSError when there are no descriptors left."""
        self._outlet = outlet
        self.steps: deque[Step] = deque()
        """Those that wait."""
        self._sleeps = False
        self._timer = Timer()
        outlet.sources.add(self._timer.fileno(), self._wake)

    def play(self, steps: Iterable[Step], queues: Mapping[int, Queue]) -> None:
        """Carry these out, too."""
        self.steps.extend(steps)
        self.go_on(queues)

    def go_on(self, queues: Mapping[int, Queue]) -> None:
        """Carry out what can be now."""
        while self.steps and not self._sleeps and not self._outlet.full:
            step = self.steps.popleft()
            if isinstance(step, float):
                self._timer.start(step)
                self._sleeps = True
            else:
                self._outlet.say(queues, step)

    def _wake(self, queues: Mapping[int, Queue], events: int) -> None:
        self._timer.stop()
        self._sleeps = False
        self.go_on(queues)

    def begin(self, steps: Iterable[Step]) -> None:
        """Carry these out, and what was left no more; as soon as queues work."""
        self.stop()
        self.steps.extend(steps)
        self._timer.start(0)
        self._sleeps = True

    def stop(self) -> None:
        """Forget all steps."""
        self._timer.stop()
        self._sleeps = False
        self.steps.clear()

    def close(self) -> None:
        """Harmless when done before."""
        if self._timer.fileno() >= 0:
            self._outlet.sources.remove(self._timer.fileno())
            self._timer.close()


def read_script(path: str, info: InputInfo) -> list[Step]:
    """The steps of a file. OSError; ValueError that names the line that is wrong."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is no regular file; control=PATH makes a socket for events as they come")
    steps: list[Step] = []
    with open(path, encoding="utf-8", errors="backslashreplace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                steps += parse_line(line, info)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    return steps


class ScriptFeed:
    """A feed (``Feed``) that plays *steps* and listens at *control*, both if there are any."""

    def __init__(self, outlet: Outlet, info: InputInfo, steps: list[Step], control: str | None) -> None:
        """OSError when the socket cannot be had."""
        self._info, self._steps = info, steps
        self._ready = False
        self._lights: dict[int, int] = {}
        self._file, self._live = Player(outlet), Player(outlet)
        self._control = None
        try:
            self._control = Control(control, outlet.sources, self._hear) if control is not None else None
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """The file is played from its beginning."""
        self._ready = True
        self._file.begin(self._steps)

    def stop(self) -> None:
        """What has not happened never does."""
        self._ready = False
        self._lights.clear()
        for player in (self._file, self._live):
            player.stop()

    def go_on(self, queues: Mapping[int, Queue]) -> None:
        """Both that waited do."""
        self._file.go_on(queues)
        self._live.go_on(queues)

    def _hear(self, queues: Mapping[int, Queue], peer: Peer, line: str) -> None:
        """A line on the socket; ``ok`` means that it is carried out after those before it."""
        try:
            steps = parse_line(line, self._info)
            if steps and not self._ready:
                raise ValueError("no driver is ready")
            if len(self._live.steps) + len(steps) > MOST_STEPS:
                raise ValueError(f"{MOST_STEPS} updates wait already")
        except ValueError as error:
            peer.say(f"error {error}")
            return
        peer.say("ok")
        self._live.play(steps, queues)

    def status(self, event: Event) -> None:
        """Lights are noted in the log, and told to those on the socket."""
        if event.type != EV_LED or event.code not in self._info.events.get(EV_LED, ()) or self._lights.get(event.code, 0) == event.value:
            return
        self._lights[event.code] = event.value
        _log.info("input: %s: light %d is %s", self._info.name, event.code, "on" if event.value else "off")
        for peer in self._control.peers if self._control is not None else ():
            peer.say(f"light {event.code} {event.value}")

    def close(self) -> None:
        """Nobody is listened to any more."""
        for player in (self._file, self._live):
            player.close()
        if self._control is not None:
            self._control.close()
