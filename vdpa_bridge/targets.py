# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Targets: how a user names a device, wherever it lives.

    /dev/vhost-vdpa-N                 a kernel device by its node
    vdpa:NAME                         a kernel device by its name on the vdpa bus
    vhost-user:PATH[?type=blk&vdpa=prefer|require|off&timeout=5&queue-size=256&config-size=8]
    vhost-net:TAP[?mac=52:54:00:12:34:56]   a NIC of the kernel's own vhost, on a tap interface
    vhost-vsock:CID                         a socket device of the kernel's own vhost, with that context id
    model:blk?file=PATH[&readonly=on&direct=on&queues=N&threads=N]   model:blk?size=256M[&serial=TEXT]   model:net[?mac=..&mtu=..&pairs=N]
    model:scsi?file=PATH,PATH[&readonly=on&serial=TEXT&queues=N]   model:rng
    model:gpio[?lines=8&names=led,button&loop=led:button&control=PATH]
    model:i2c[?devices=eeprom@50:file=PATH;size=256,ram@51,thermometer@48]
    model:console[?ports=pty:link=PATH,listen:path=PATH;name=TEXT]
    model:input?evdev=PATH[&grab=off]   model:input[?kind=keyboard&name=TEXT&script=PATH&control=PATH]
    model:vsock?cid=N&uds=PATH[&peers=CID:PATH,CID:PATH]
    child:...                         the same as model:..., in a sandboxed process of its own [sandbox=degrade|off]
    model:FILE.py[:CLASS][?...]   model:PACKAGE.MODULE:CLASS[?...]   a model of one's own

Rule of this file: the only place where a string decides which home a device has.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlencode

from .backends.base import Backend
from .backends.child import ChildDevice
from .backends.model import ModelDevice
from .backends.vhost_net import VhostNet
from .backends.vhost_user import open_vhost_user
from .backends.vhost_vdpa import VhostVdpa
from .backends.vhost_vsock import VhostVsock
from .device import Device
from .errors import ProtocolError
from .models import Model, ModelCode, make_model
from .models.options import parse_duration
from .system.vdpa_bus import bus_device, bus_devices, has_bus
from .virtio.config import parse_mac
from .virtio.ids import parse_device_id

if TYPE_CHECKING:
    from .explain import Examination, Wishes

GRAMMAR = (
    "a target is /dev/vhost-vdpa-N, vdpa:NAME, vhost-user:PATH[?type=blk&vdpa=require|prefer|off], "
    "vhost-net:TAP, vhost-vsock:CID, model:blk?file=PATH, model:blk?size=256M, model:net or child:net"
)

_OPTIONS: dict[str, set[str] | None] = {
    "vdpa": set(),
    "vhost-user": {"type", "vdpa", "timeout", "queue-size", "config-size"},
    "vhost-net": {"mac"},
    "vhost-vsock": set(),
    "model": None,
    "child": None,
}
"""Schemes and their options; a model knows its own."""


@dataclass
class Target:
    """A parsed target. ``open`` gives one session with the device; a model lives as long as its target."""

    text: str
    scheme: str
    place: str
    options: dict[str, str] = field(default_factory=dict)
    name: str = ""
    """What a model is called in messages; by default its target."""
    model: ModelDevice | None = None
    """From the first ``open`` to ``close``, where the target is a model."""
    _child: ChildDevice | None = None
    """The same, where that lives in a process of its own."""
    _made: Model | None = None
    """From ``make`` to ``open``."""
    _code: ModelCode | None = None
    """The model's, where it is a user's own."""

    @classmethod
    def parse(cls, text: str, name: str = "") -> Target:
        """ValueError that shows the grammar when *text* is no target."""
        scheme, colon, rest = text.partition(":")
        if not colon or "/" in scheme:
            return cls(text, "path", text)
        place, _, query = rest.partition("?")
        try:
            options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
        except ValueError:
            raise ValueError(f"{text}: options are written ?key=value&key=value, not ?{query}") from None
        if scheme not in _OPTIONS or not place:
            raise ValueError(f"{text}: {GRAMMAR}")
        known = _OPTIONS[scheme]
        if known is not None and (unknown := set(options) - known):
            choices = ", ".join(sorted(known)) or "none"
            raise ValueError(f"{text}: unknown option {', '.join(sorted(unknown))}; there is: {choices}")
        return cls(text, scheme, place, options, name)

    def open(self) -> Backend:
        """One session with the device. OSError and ProtocolError as the home has them, with advice; ValueError for wrong options."""
        try:
            return self._open()
        except (OSError, ProtocolError) as error:
            self.advise(error)
            raise

    def _open(self) -> Backend:
        if self.scheme == "model":
            if self.model is None:
                made, self._made = self._made or self._make_model(), None
                poll = parse_duration("poll", self.options["poll"]) if "poll" in self.options else None
                self.model = ModelDevice(made, self.name or self.text, poll)
            return self.model.open()
        if self.scheme == "child":
            if self._child is not None and self._child.ended:
                self._child.close()
                self._child = None
            if self._child is None:
                self._child = self._start_child()
            return self._child.open()
        if self.scheme == "vhost-user":
            return self._open_socket(self.place)
        if self.scheme == "vhost-net":
            mac = self.options.get("mac")
            return VhostNet(self.text, self.place, parse_mac(mac) if mac else None)
        if self.scheme == "vhost-vsock":
            return VhostVsock(self.text, _cid(self.text, self.place))
        path = _node_of(self.place) if self.scheme == "vdpa" else self.place
        mode = os.stat(path).st_mode if os.path.exists(path) else 0
        if stat.S_ISSOCK(mode):
            return self._open_socket(path)
        if path in _HALVES:
            raise ValueError(f"{path} is half a device; write {_HALVES[path]}")
        if mode and not stat.S_ISCHR(mode):
            raise ValueError(f"{path} is neither a character device nor a socket; {GRAMMAR}")
        return VhostVdpa(path)

    def _start_child(self) -> ChildDevice:
        options = dict(self.options)
        sandbox = options.pop("sandbox", "on")
        if sandbox not in ("on", "degrade", "off"):
            raise ValueError(f"{self.text}: sandbox={sandbox}; it is on, degrade or off")
        query = urlencode(options)
        return ChildDevice(f"model:{self.place}{'?' if query else ''}{query}", self.name or self.text, sandbox)

    def make(self) -> Model | None:
        """The model that will be opened, with its files open and without a thread; None where the target is another home. Errors as of ``open``."""
        if self.scheme == "model" and self.model is None and self._made is None:
            self._made = self._make_model()
        return self._made

    def _make_model(self) -> Model:
        if not ModelCode.names(self.place):
            return make_model(self.place, self._own)
        self._code = ModelCode(self.place)
        return self._code.load().from_options(self._own)

    @property
    def _own(self) -> dict[str, str]:
        """The model's own options, without those that all models have."""
        return {key: value for key, value in self.options.items() if key != "poll"}

    def reload(self) -> str:
        """Put newer code of an open model in its place, if its file has changed; what was done, empty if nothing.

        The model stays as it was after OSError and ValueError (the code does not load, or would be another device) and
        TimeoutError (requests are in flight).
        """
        if self._code is None or self.model is None or not self._code.changed:
            return ""
        kind = self._code.load()
        self.model.replace(lambda old: kind.succeed(old, self._own))
        return f"{self.place} was loaded again"

    def refresh(self) -> str:
        """Let a model look anew at what is outside, and tell its driver; what changed, as far as it is known here. OSError."""
        if self._child is not None:
            self._child.refresh()
        return self.model.refresh() if self.model is not None else ""

    def advise(self, error: BaseException) -> None:
        """Note in *error* how to find out more; not for a model, whose errors say all."""
        advice = f"vdpa-bridge explain {shlex.quote(self.text)} says more"
        if self.scheme not in ("model", "child") and advice not in getattr(error, "__notes__", ()):
            error.add_note(advice)

    def examination(self, wishes: Wishes, wrap: Callable[[Backend], Backend] = lambda backend: backend) -> Examination:
        """What finds out why the device does not work; *wrap* gets the session that it opens."""
        from . import explain
        from .explain.node import NodeExamination
        from .explain.socket_path import SocketExamination

        def opener() -> Backend:
            return wrap(self.open())

        if self.scheme in ("model", "child", "vhost-net", "vhost-vsock"):
            return explain.Examination(opener, wishes)
        if self.scheme == "vdpa":
            return NodeExamination(opener, wishes, name=self.place)
        if self.scheme == "path" and self.place.startswith("/dev/") and not Path(self.place).is_socket():
            return NodeExamination(opener, wishes, path=self.place)
        return SocketExamination(opener, wishes, self.place, self.options)

    def _open_socket(self, path: str) -> Backend:
        kind = self.options.get("type")
        mode = self.options.get("vdpa", "prefer")
        if mode not in ("require", "prefer", "off"):
            raise ValueError(f"{self.text}: vdpa={mode}; it is require, prefer or off")
        return open_vhost_user(
            path,
            name=self.text,
            device_id=parse_device_id(kind) if kind else None,
            vdpa=mode,
            timeout=_number(self.text, "timeout", self.options.get("timeout", "5")),
            queue_size=int(_number(self.text, "queue-size", self.options.get("queue-size", "256"))),
            config_size=int(_number(self.text, "config-size", self.options["config-size"])) if "config-size" in self.options else None,
        )

    def close(self) -> None:
        """Let a model go; sessions are closed by those who opened them."""
        if self._child is not None:
            self._child.close()
            self._child = None
        if self._made is not None:
            self._made.close()
            self._made = None
        if self.model is not None:
            self.model.close()
            self.model = None


_HALVES = {VhostNet.node: "vhost-net:TAP", VhostVsock.node: "vhost-vsock:CID"}


def _cid(text: str, place: str) -> int:
    if not place.isdecimal() or not 3 <= int(place) < 0xFFFFFFFF:
        raise ValueError(f"{text}: a context id is a number from 3 to 4294967294")
    return int(place)


def _number(text: str, key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{text}: {key}={value} is not a number") from None


def _node_of(name: str) -> str:
    """``/dev/vhost-vdpa-3`` for a device on the vdpa bus."""
    if not has_bus():
        raise FileNotFoundError(f"vdpa:{name}: this kernel has no vdpa bus (modprobe vdpa vhost-vdpa)")
    device = bus_device(name)
    if device is None:
        present = ", ".join(device.name for device in bus_devices()) or "none"
        raise FileNotFoundError(f"vdpa:{name}: no such device; there is: {present}")
    if not device.node:
        raise FileNotFoundError(f"vdpa:{name} has no node: it is bound to {device.driver or 'no driver'}, not to vhost_vdpa")
    return device.node


def connect(text: str) -> Device:
    """The device behind a target. Closing it ends the session (and the model, for ``model:`` targets)."""
    target = Target.parse(text)
    return Device(target.open(), target.close)
