# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Events from an input device of this machine (/dev/input/eventN), and lights and sounds for it.

Rule of this file: what a driver may have the device do is lights and sounds that it has. Any other event that is written to
such a node would be input to this machine.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from evdev import InputDevice
from evdev.eventio import EvdevError

from ..virtio.input import EV_ABS, EV_KEY, EV_LED, EV_MSC, EV_REL, EV_SND, EV_SW, EV_SYN, REPORT, Event, InputInfo
from .base import Queue
from .needs import Needs

if TYPE_CHECKING:
    from .input import Outlet

_log = logging.getLogger(__name__)

_PASSED_ON = (EV_KEY, EV_REL, EV_ABS, EV_MSC, EV_SW, EV_LED, EV_SND)
_SYN_DROPPED = 3
_GET_KEYS, _GET_AXIS = 0x80604518, 0x80184540
"""Requests (linux/input.h): EVIOCGKEY with room for all keys, EVIOCGABS of the first axis."""


class EvdevDevice:
    """The device at *path*, for this process alone if *grab*; what it is."""

    def __init__(self, path: str, grab: bool) -> None:
        """OSError when it is no such device, cannot be opened, or somebody else has it to himself."""
        self.path = path
        try:
            self.node = InputDevice(path)
        except OSError as error:
            why = "it is no input device" if error.errno in (errno.ENOTTY, errno.EINVAL) else error.strerror
            raise OSError(error.errno, f"{path}: {why}") from None
        try:
            if grab:
                self.node.grab()
        except OSError as error:
            self.node.close()
            raise OSError(error.errno, f"{path}: {error.strerror}: somebody has grabbed it; grab=off shares it with others that do not") from None
        codes = self.node.capabilities(absinfo=False)
        axes = {code: self.node.absinfo(code) for code in codes.get(EV_ABS, ())}
        events = {kind: tuple(codes[kind]) for kind in _PASSED_ON if codes.get(kind)}
        self.needs = Needs(controls=(_GET_KEYS, *(_GET_AXIS + code for code in axes)))
        self.info = InputInfo(
            self.node.name,
            self.node.uniq or "",
            tuple(self.node.info),
            tuple(self.node.input_props()),
            events,
            {code: (axis.min, axis.max, axis.fuzz, axis.flat, axis.resolution) for code, axis in axes.items()},
        )


class EvdevFeed:
    """A feed (``Feed``): what *device*, which it owns from now on, does while a driver is ready."""

    def __init__(self, outlet: Outlet, device: EvdevDevice) -> None:
        self._outlet, self._device, self._node = outlet, device, device.node
        self._down: set[int] = set()
        self._ready = self._lost = self._complained = False
        self._update: list[Event] = []
        outlet.sources.add(self._node.fd, self._read)

    def start(self) -> None:
        """From the next update on."""
        self._ready = True

    def stop(self) -> None:
        """No update, and no key, is under way."""
        self._ready = False
        self._update.clear()
        self._down.clear()

    def go_on(self, queues: Mapping[int, Queue]) -> None:
        """What waited in the kernel comes."""
        self._outlet.sources.await_events(self._node.fd, 1)

    def _read(self, queues: Mapping[int, Queue], events: int) -> None:
        try:
            for each in self._node.read():
                self._take(Event(each.type, each.code, each.value), queues)
        except BlockingIOError:
            pass
        except OSError as error:
            _log.warning("input: %s is gone: %s", self._device.path, error.strerror)
            self._outlet.sources.remove(self._node.fd)
            self._resume(queues, set())
            return
        if self._outlet.full:
            self._outlet.sources.await_events(self._node.fd, 0)

    def _take(self, event: Event, queues: Mapping[int, Queue]) -> None:
        """Updates are passed on complete. After SYN_DROPPED (the kernel had no room) the rest of one is dropped, and the state of keys is asked for."""
        if event.type == EV_SYN:
            if event.code == _SYN_DROPPED:
                self._lost = True
            elif event.code == REPORT.code:
                update, self._update = [*self._update, REPORT], []
                if self._lost:
                    self._lost = False
                    self._resume(queues, set(self._node.active_keys()))
                elif self._ready:
                    self._tell(update, queues)
        elif event.type in self._device.info.events:
            self._update.append(event)

    def _tell(self, update: list[Event], queues: Mapping[int, Queue]) -> None:
        for event in update:
            if event.type == EV_KEY:
                (self._down.add if event.value else self._down.discard)(event.code)
        self._outlet.say(queues, update)

    def _resume(self, queues: Mapping[int, Queue], down: set[int]) -> None:
        """Let the driver know that exactly these keys are down, and where the axes are."""
        keys = [Event(EV_KEY, code, int(code in down)) for code in sorted(self._down ^ down)]
        axes = []
        with contextlib.suppress(OSError):  # the device is gone
            axes = [Event(EV_ABS, code, self._node.absinfo(code).value) for code in self._device.info.axes]
        if self._ready and keys + axes:
            self._tell([*keys, *axes, REPORT], queues)

    def status(self, event: Event) -> None:
        """Lights and sounds."""
        if event.type not in (EV_LED, EV_SND) or event.code not in self._device.info.events.get(event.type, ()):
            return
        try:
            self._node.write(event.type, event.code, event.value)
            self._node.syn()
        except (OSError, EvdevError) as error:
            if not self._complained:
                self._complained = True
                _log.warning("input: %s: lights and sounds stay as they are: %s", self._device.path, error)

    def close(self) -> None:
        """Others may have the device."""
        self._outlet.sources.remove(self._node.fd)
        self._node.close()
