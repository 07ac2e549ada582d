# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""One device of a service: where it lives, and the server that gives it to clients and tells of them.

Rule of this file: one line per client that comes, goes, is dropped (with the rule that it broke) or cannot be served.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from ..backends.base import Backend
from ..backends.model import ModelDevice
from ..backends.relay import relayed
from ..models import Model
from ..targets import Target
from ..vhost_user.server import Server
from .journal import CONTEXT, event
from .listening import Listener, PeerCredentials
from .spec import DeviceSpec

Wrap = Callable[[Backend, str], Backend]
"""What to put around each session with a device, given the device's name: a tracer, for one."""

Identify = Callable[[socket.socket], PeerCredentials]
"""Says who is at the other end."""

OnClient = Callable[[str, PeerCredentials, bool], None]
"""Hears the name of the device, who it is, and whether the client came."""


class ServedDevice:
    """A device as its target says. ``open`` gives one session after the other; a model lives until ``close``."""

    def __init__(self, spec: DeviceSpec, wrap: Wrap) -> None:
        self.spec = spec
        self.held = False
        """Whether requests wait, where the device is a model."""
        self.on_broken: Callable[[int, str], None] = lambda index, why: None
        """Called when a ring of the model broke."""
        self._target = Target.parse(spec.target, spec.name)
        self._wrap = wrap
        self._first: Backend | None = None

    def make(self) -> Model:
        """The device's model, with its files open. ValueError when it is no model, which a sandbox could not open later."""
        model = self._target.make()
        if model is None:
            raise ValueError(f"--sandbox is for models: {self.spec.target} is opened anew for each client; serve it by a process of its own")
        return model

    def prepare(self) -> None:
        """Open the device for the first client; what cannot be opened shows now."""
        self._first = self._open()

    def open(self) -> Backend:
        """A session with the device. OSError, ProtocolError and ValueError as targets have them."""
        first, self._first = self._first, None
        return first if first is not None else self._open()

    def _open(self) -> Backend:
        backend = self._target.open()
        if self.model is not None:
            self.model.on_broken = self.on_broken
            self.hold(self.held)
        return self._wrap(relayed(backend) if self.spec.relay == "on" else backend, self.spec.name)

    @property
    def model(self) -> ModelDevice | None:
        """The model in this process that the device is, once it was opened."""
        return self._target.model

    def hold(self, held: bool) -> None:
        """Let requests wait until further notice, or not; of a model."""
        self.held = held
        if self.model is not None and self.model.runner.held != held:
            self.model.hold(held)

    def resize(self, size: int) -> str:
        """Give a model that many bytes, and tell its driver; what changed. ValueError when that cannot be, OSError when it fails."""
        model, changed = self.model, ""
        if model is None:
            raise ValueError(f"it is no model in this process: {self.spec.target}")

        def resize() -> None:
            nonlocal changed
            changed = model.model.resize(size)

        model.change(resize)
        return changed

    def refresh(self) -> str:
        """Let a model look again at what is outside (how large a disk is), and tell its driver; what changed, for the log. OSError."""
        return self._target.refresh()

    def reload(self) -> str:
        """Go on with newer code of the model, if there is any; what was done, for the log. OSError, ValueError, TimeoutError."""
        return self._target.reload()

    def close(self) -> None:
        """Give everything back; no session is open any more, but for one that nobody came for."""
        if self._first is not None:
            self._first.close()
            self._first = None
        self._target.close()


class ServiceServer(Server):
    """The server of one device.

    In its thread, *on_client* is called after a client came or went, with who it is and whether it came; *on_end* when nobody else can come.
    """

    def __init__(self, device: ServedDevice, listener: Listener, identify: Identify, on_client: OnClient, on_end: Callable[[], None]) -> None:
        spec = device.spec
        super().__init__(device.open, listener.place, sock=listener.sock, vdpa=spec.vdpa, timeout=spec.timeout, relay=spec.relay == "auto")
        self.device = device
        self.listener = listener
        self.peer: PeerCredentials | None = None
        """The client that is being served."""
        self.ended = False
        """Whether the only client is gone."""
        self._identify, self._on_client, self._on_end = identify, on_client, on_end

    @property
    def relayed(self) -> str:
        """Why the client's requests go through a relay, empty if they do not."""
        session = self.session
        return "" if session is None else "asked for" if self.device.spec.relay == "on" else session.relayed

    def run(self) -> None:
        """As the server does; what is logged meanwhile belongs to this device."""
        CONTEXT.device = self.device.spec.name
        super().run()
        if not self._stopping.is_set():
            self.ended = True
            self._on_end()

    def attend(self, client: socket.socket | None) -> None:
        """Note who it is."""
        gone, self.peer = self.peer, None if client is None else self._identify(client)
        CONTEXT.peer = self.peer
        if (who := self.peer or gone) is not None:
            self._on_client(self.device.spec.name, who, client is not None)

    def tell(self, level: int, name: str, why: str = "", **more: object) -> None:
        """One line of the log."""
        event(level, name, why, "", **more)
