# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Many devices in one process, from the first that is opened to the last that is given back.

Rules of this file: no device waits for another, neither at work nor at the end; all or nothing starts, unless the user
wants what can be had; a thread that dies takes the process with it, and not in silence.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Self

from ..errors import ProtocolError, reason
from ..models import Model
from .journal import CONTEXT, event
from .listening import Listener, PeerCredentials
from .manager import Notifier
from .server import Identify, ServedDevice, ServiceServer, Wrap
from .spec import DeviceSpec

if TYPE_CHECKING:
    from .qmp import Monitor

STOP = (signal.SIGTERM, signal.SIGINT)
GRACE = 5.0
"""Seconds for devices to be given back; what takes longer is left to the end of the process."""
_RELOAD = 5.0
"""Seconds after which a reload that hangs in a device's file is reported."""
_LOOK = 0.3
"""Seconds between two looks at the files of models."""
_DIED = 0
"""What is written to the pipe of signals when a thread died; no signal has this number."""
_ENDED = 255
"""The same when a device's only client is gone."""
_QUIT = 254
"""The same when the monitor was told to end the service."""


class Interrupted(Exception):
    """A signal came before the service was ready. *signal* says which."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} before it was ready")
        self.signal = signal.Signals(number)


class Signals:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1, and the ends of threads, in the order in which they come. Main thread only."""

    def __enter__(self) -> Self:
        self._interruptible = False
        handled = (*STOP, signal.SIGHUP, signal.SIGUSR1)
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(self._read, True)
        self._before = {number: signal.signal(number, self._handle) for number in handled}
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._hook, threading.excepthook = threading.excepthook, self._died
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)  # by whoever started us
        return self

    def __exit__(self, *exc: object) -> None:
        threading.excepthook = self._hook
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within, SIGTERM and SIGINT raise Interrupted."""
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._interruptible and number in STOP:
            raise Interrupted(number)

    def _died(self, args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None:
            name = args.thread.name if args.thread is not None else "?"
            text = f"thread {name!r} died: {type(args.exc_value).__name__}: {reason(args.exc_value)}"
            trace = (args.exc_type, args.exc_value, args.exc_traceback)
            logging.getLogger("vdpa_bridge").critical(text, exc_info=trace, extra={"event": "died"})
        with contextlib.suppress(OSError):
            os.write(self._write, bytes([_DIED]))

    def ended(self) -> None:
        """A device's only client is gone. Any thread."""
        os.write(self._write, bytes([_ENDED]))

    def quit(self) -> None:
        """The service is to end. Any thread."""
        os.write(self._write, bytes([_QUIT]))

    def fileno(self) -> int:
        """Readable when one came: for those who wait for other things as well."""
        return self._read

    def wait(self) -> int:
        """The next one's number, 0 for the death of a thread, 255 for ``ended``, 254 for ``quit``."""
        return os.read(self._read, 1)[0]


class Service:
    """Serves *specs*, whose names and socket paths differ, with the sockets of *inherited* (by name) for those that have no path.

    *keep_going*: a device that cannot be opened is tried again for each client, and one whose socket cannot be had is left out.
    *wrap* goes around each session with a device. *live*: models of users' own are loaded anew when their files change.
    *qmp*: where monitors come to, empty for nowhere.
    """

    def __init__(
        self,
        specs: Sequence[DeviceSpec],
        inherited: dict[str, Listener],
        notifier: Notifier,
        *,
        wrap: Wrap,
        keep_going: bool = False,
        live: bool = False,
        qmp: str = "",
    ) -> None:
        self._specs = specs
        self._listeners = inherited
        self._notifier = notifier
        self._keep_going = keep_going
        self._devices = [ServedDevice(spec, wrap) for spec in specs]
        self._identify: Identify = PeerCredentials.of
        self.servers: list[ServiceServer] = []
        self._live = live
        self.held = False
        """Whether requests wait, until ``hold`` says otherwise."""
        self._qmp = qmp
        self._monitor: Monitor | None = None
        self._signals: Signals | None = None
        self._end_reason = "host-signal"
        self._stopping = threading.Event()
        self._lock = threading.Lock()

    @property
    def served(self) -> int:
        """Connections that ended so far, of all devices."""
        return sum(server.served for server in self.servers)

    def make(self, signals: Signals) -> list[Model]:
        """The models, with all open that they have to open, and no thread yet. ValueError when a device is none; else as ``start``."""
        _use_all_descriptors()
        with signals.interruptible():
            return [device.make() for device in self._devices]

    def listen(self) -> list[Listener]:
        """Have all sockets, and return those of devices. OSError as of the first that fails."""
        for spec in self._specs:
            if spec.name not in self._listeners:
                try:
                    self._listeners[spec.name] = Listener.bind(spec.socket_path or "", spec.mode, spec.group)
                except OSError as error:
                    self._failed(spec, error)
        if self._qmp and self._monitor is None:
            from .qmp import Monitor
            from .qmp_commands import COMMANDS

            self._monitor = Monitor(self._qmp, lambda name, arguments: COMMANDS[name].carry_out(self, arguments))
        return [*self._listeners.values()]

    def confide(self, notifier: Notifier, identify: Identify) -> None:
        """From now on, others speak with the service manager, and know who clients are."""
        self._notifier.close()
        self._notifier, self._identify = notifier, identify

    def start(self, signals: Signals) -> None:
        """Open all devices, then all sockets, then serve. Errors as of the first that fails; Interrupted."""
        _use_all_descriptors()
        self._signals = signals
        with signals.interruptible():
            for device in self._devices:
                device.on_broken = partial(self._broke, device.spec.name)
                try:
                    device.prepare()
                except (OSError, ProtocolError) as error:
                    self._failed(device.spec, error)
        self.listen()
        for device in self._devices:
            if (listener := self._listeners.pop(device.spec.name, None)) is not None:
                self.servers.append(ServiceServer(device, listener, self._identify, self._tell, signals.ended))
        if not self.servers:
            raise OSError(errno.ENODEV, "no device is left to serve")
        for server in self.servers:
            server.start()
        if self._monitor is not None:
            self._monitor.start()
        if self._live:
            threading.Thread(target=self._watch_code, name="watcher of code", daemon=True).start()
        self._notifier.send("READY=1", self._state())

    def _failed(self, spec: DeviceSpec, error: Exception) -> None:
        if not self._keep_going:
            if len(self._specs) == 1:
                raise error
            raise OSError(getattr(error, "errno", None) or errno.EIO, f"{spec.name}: {reason(error)}") from error
        event(logging.ERROR, "unavailable", reason(error), device=spec.name)

    def run(self, signals: Signals) -> tuple[str, bool]:
        """Serve until SIGTERM or SIGINT, until nobody can come any more, or until a thread died; which, and whether that is well."""
        while (number := signals.wait()) != _DIED:
            if number in STOP:
                return f"stopped by {signal.Signals(number).name}", True
            if number == _QUIT:
                return "stopped by the monitor", True
            if number == signal.SIGHUP:
                threading.Thread(target=self.reload, name="reload", daemon=True).start()
            elif number != _ENDED:
                self.log_status()
            elif all(server.ended for server in self.servers):
                return "ended with the only client", True
        return "stopped because a thread died", False

    def log_status(self) -> None:
        """One line for each device."""
        for server in self.servers:
            peer = server.peer
            text = f"serves process {peer.pid} of user {peer.uid}" if peer is not None else "waits for a client"
            if why := server.relayed:
                text += f"; relay: {why}"
            if server.session is not None and (owed := server.session.waits_for):
                text += f"; waits: {owed}"
            event(logging.WARNING, "status", text, device=server.device.spec.name, served=server.served)

    def stop(self) -> bool:
        """Take sockets away, drop clients, give devices back; whether all of that was done in time."""
        self._stopping.set()
        self._emit("SHUTDOWN", guest=False, reason=self._end_reason)
        if self.servers:
            self._notifier.send("STOPPING=1", "STATUS=stopping")
        servers = {server.device: server for server in self.servers}
        for server in self.servers:
            server.listener.remove()
        left = _all_at_once({device.spec.name: _Ending(device, servers.get(device)) for device in self._devices}, GRACE)
        for name in left:
            event(logging.ERROR, "stuck", f"not given back within {GRACE:g} s; the end of this process will do it", device=name)
        for listener in self._listeners.values():
            listener.close()
        if self._monitor is not None:
            self._monitor.close()
        return not left

    # For the monitor, in any thread ---------------------------------------------------------------------------------------

    def hold(self, held: bool) -> None:
        """Let the requests of all models wait until further notice, or go on."""
        with self._lock:
            if held == self.held:
                return
            self.held = held
            for device in self._devices:
                device.hold(held)
            self._emit("STOP" if held else "RESUME")

    def resize(self, name: str, size: int) -> None:
        """Give the model that is called so another size, and tell its driver. ValueError when that cannot be, OSError when it fails."""
        device = next(device for device in self._devices if device.spec.name == name)
        if changed := device.resize(size):
            self._resized(name, changed)

    def quit(self) -> None:
        """End as on SIGTERM."""
        self._end_reason = "host-qmp-quit"
        if self._signals is not None:
            self._signals.quit()

    def _emit(self, name: str, **data: object) -> None:
        if self._monitor is not None:
            self._monitor.emit(name, **data)

    def _broke(self, name: str, queue: int, why: str) -> None:
        self._emit("VDPA_DEVICE_BROKEN", device=name, queue=queue, reason=why)

    def _resized(self, name: str, changed: str) -> None:
        event(logging.INFO, "resize", changed, device=name)
        self._emit("VDPA_DEVICE_RESIZED", device=name, change=changed)

    # For clients, the service manager and signals -----------------------------------------------------------------------------

    def _tell(self, name: str, who: PeerCredentials, came: bool) -> None:
        self._emit("VDPA_CLIENT_CONNECTED" if came else "VDPA_CLIENT_DISCONNECTED", device=name, pid=who.pid, uid=who.uid)
        if self._notifier.heard:
            self._notifier.send(self._state())

    def _state(self) -> str:
        clients = sum(server.peer is not None for server in self.servers)
        return f"STATUS={_count(len(self.servers), 'device')}, {_count(clients, 'client')}"

    def reload(self) -> None:
        """Let all models look anew at what is outside."""
        self._notifier.reloading()
        tasks = {device.spec.name: _Refreshing(device, self._resized) for device in self._devices}
        for name in _all_at_once(tasks, _RELOAD):
            event(logging.ERROR, "reload", f"the disk's file did not answer within {_RELOAD:g} s", device=name)
        event(logging.INFO, "reload", "sizes of disks were read again")
        self._notifier.send("READY=1", self._state())

    def _watch_code(self) -> None:
        while not self._stopping.wait(_LOOK):
            for device in self._devices:
                try:
                    if done := device.reload():
                        event(logging.WARNING, "reload", done, device=device.spec.name)
                except (OSError, ValueError) as error:  # of which TimeoutError is one
                    event(logging.ERROR, "reload", f"{reason(error)}; the model is what it was", device=device.spec.name)


class _Ending:
    """Stops a device's server, if it has one, and gives the device back."""

    def __init__(self, device: ServedDevice, server: ServiceServer | None) -> None:
        self._device, self._server = device, server

    def __call__(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server.listener.close()
        try:
            self._device.close()
        except (OSError, ProtocolError) as error:
            event(logging.WARNING, "close", reason(error))


class _Refreshing:
    """Reads the size of a device's disk again; *changed* hears of another one."""

    def __init__(self, device: ServedDevice, changed: Callable[[str, str], None]) -> None:
        self._device, self._changed = device, changed

    def __call__(self) -> None:
        try:
            if changed := self._device.refresh():
                self._changed(self._device.spec.name, changed)
        except (OSError, ValueError) as error:
            event(logging.ERROR, "reload", reason(error))


def _all_at_once(tasks: dict[str, _Ending] | dict[str, _Refreshing], patience: float) -> list[str]:
    """Carry out each task in a thread; the names of those that did not end within *patience* seconds."""

    def run(name: str) -> None:
        CONTEXT.device = name
        tasks[name]()

    threads = {name: threading.Thread(target=run, args=(name,), name=f"task for {name}", daemon=True) for name in tasks}
    left = []
    for name, thread in threads.items():
        try:
            thread.start()
        except RuntimeError:  # no thread can be had any more
            left.append(name)
    end = time.monotonic() + patience
    for name in threads.keys() - left:
        threads[name].join(max(0.0, end - time.monotonic()))
    return left + [name for name, thread in threads.items() if thread.is_alive()]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _use_all_descriptors() -> None:
    """Lift the soft limit of descriptors: a client may pass hundreds, and nothing here uses select."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
