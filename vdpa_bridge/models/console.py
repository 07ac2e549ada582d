# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A console (virtio 1.2, 5.3) with ports that lead to pseudoterminals, UNIX sockets, standard input and output, or files.

Rule of this file: control messages are said when there is a buffer for them, as things are then; of each kind and port one waits
at most.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Self

from ..virtio.config import Field
from ..virtio.console import CONTROL, CONTROL_RX, CONTROL_TX, EMERGENCY_AT, SIZE, Event, port_queues
from ..virtio.features import ConsoleFeature as F
from ..virtio.ids import DeviceId
from .base import Model, Queue
from .console_port import Port
from .console_ways import PtyWay, make_way
from .needs import Needs
from .options import check_options, parse_switch
from .sources import Sources

_log = logging.getLogger(__name__)

MOST_PORTS = 31
LONGEST_NAME = 128
DEFAULT_PORTS = "pty"


class ConsoleModel(Model):
    """A device with *ports*, whose own they are from now on. With several, or a name, it offers MULTIPORT; without that, drivers use the first one."""

    device_id = DeviceId.CONSOLE
    layout = (Field("cols", "H"), Field("rows", "H"), Field("max_nr_ports", "I"), Field("emerg_wr", "I"))
    emerg_wr = 0

    def __init__(self, ports: Sequence[Port]) -> None:
        self._ports = list(ports)
        several = len(ports) > 1 or any(port.name for port in ports)
        self.max_nr_ports = len(ports)
        self.queue_count = port_queues(len(ports))[0] if several else 2
        self.features = F.EMERG_WRITE | F.MULTIPORT * several | F.SIZE * (ports[0].way.size is not None)
        needs = [port.way.needs for port in ports]
        self.needs = Needs(connect=sum((need.connect for need in needs), ()), controls=sum((need.controls for need in needs), ()))
        self._multiport = False
        self._due: dict[tuple[int, Event], None] = {}
        self.sources = Sources(idle=True)
        for port in ports:
            port.attach(self.sources, self._changed)

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """``ports=KIND[:OPTION=VALUE;...],...``, where each has ``name=TEXT`` and ``console=on``, and the options of its kind (``make_way``)."""
        check_options("console", options, ("ports",))
        texts = options.get("ports", DEFAULT_PORTS).split(",")
        if len(texts) > MOST_PORTS:
            raise ValueError(f"{len(texts)} ports; there are {MOST_PORTS} at most")
        with contextlib.ExitStack() as made:
            ports = []
            for number, text in enumerate(texts):
                ports.append(port := _port(number, text))
                made.callback(port.way.close)
            model = cls(ports)
            made.pop_all()
        return model

    @property
    def cols(self) -> int:
        """Of the first port, where it is a terminal."""
        return (self._ports[0].way.size or (0, 0))[0]

    @property
    def rows(self) -> int:
        """The same."""
        return (self._ports[0].way.size or (0, 0))[1]

    def write_config(self, offset: int, data: bytes) -> None:
        """A byte for the first port, at any time (EMERG_WRITE)."""
        if offset == EMERGENCY_AT:
            self._ports[0].write(data[:1])

    def start(self, features: int) -> None:
        """Without MULTIPORT, there is one port, and it is open."""
        for port in self._ports:
            if isinstance(port.way, PtyWay):
                _log.info("console: port %d is %s", port.number, port.way.path)
        self._multiport = bool(features & F.MULTIPORT)
        if not self._multiport:
            self._ports[0].open(True)

    def reset(self) -> None:
        """Streams stay, and what the driver sent is sent still."""
        self._multiport = False
        self._due.clear()
        for port in self._ports:
            port.reset()

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        """A queue of a port's, or one of control messages."""
        if index == CONTROL_TX:
            messages = queues[CONTROL_TX].pop()
            for chain in messages:
                self._hear(chain.read(0, CONTROL.size))
            queues[CONTROL_TX].push([(chain, 0) for chain in messages])
        elif index != CONTROL_RX:
            self._ports[max(index // 2 - 1, 0)].process(queues, index)
        self._speak(queues)

    # Control messages ------------------------------------------------------------------------------------------------------

    def _hear(self, message: bytes) -> None:
        if len(message) < CONTROL.size or not self._multiport:
            return
        number, event, value = CONTROL.unpack(message)
        if event == Event.DEVICE_READY:
            if value:
                self._due.update(dict.fromkeys((port.number, Event.DEVICE_ADD) for port in self._ports))
            else:
                _log.warning("console: the driver is not up to this device")
        elif number < len(self._ports):
            port = self._ports[number]
            if event == Event.PORT_READY:
                port.ready = bool(value)
                self._introduce(port)
            elif event == Event.PORT_OPEN:
                port.open(bool(value))

    def _introduce(self, port: Port) -> None:
        """What the driver has to know of a port that it knows."""
        said = {
            Event.CONSOLE_PORT: port.console,
            Event.RESIZE: port.console and port.way.size is not None,
            Event.PORT_NAME: bool(port.name),
            Event.PORT_OPEN: port.connected or port.console,
        }
        if port.ready:
            self._due.update({(port.number, event): None for event, holds in said.items() if holds})

    def _changed(self, queues: Mapping[int, Queue], port: Port, size: bool) -> None:
        if size and port.number == 0:
            self.config_changed()
        if port.ready and port.console == size:
            self._due[port.number, Event.RESIZE if size else Event.PORT_OPEN] = None
            self._speak(queues)

    def _speak(self, queues: Mapping[int, Queue]) -> None:
        """Say what is due, as far as there are buffers; those too small for it go back empty."""
        if (rx := queues.get(CONTROL_RX)) is None or not self._multiport:
            return
        left = self.queue_size  # a driver may give buffers as fast as they are filled
        while left and self._due and (chains := rx.pop(1)):
            left -= 1
            number, event = next(iter(self._due))
            message = self._message(self._ports[number], event)
            fits = chains[0].writable >= len(message)
            if fits:
                del self._due[number, event]
            rx.push([(chains[0], chains[0].write(message) if fits else 0)])

    def _message(self, port: Port, event: Event) -> bytes:
        """A console is open whoever listens: what it says is kept."""
        value = int(port.connected or port.console) if event is Event.PORT_OPEN else int(event is Event.CONSOLE_PORT)
        more = b""
        if event is Event.PORT_NAME:
            more = port.name.encode()
        elif event is Event.RESIZE:
            more = SIZE.pack(*(port.way.size or (0, 0)))
        return CONTROL.pack(port.number, event, value) + more

    def close(self) -> None:
        """All streams end."""
        for port in self._ports:
            port.close()
        super().close()


def _port(number: int, text: str) -> Port:
    kind, _, rest = text.partition(":")
    options = {}
    for option in filter(None, rest.split(";")):
        name, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"{text}: {option!r}; a port is written KIND:OPTION=VALUE;OPTION=VALUE")
        options[name] = value
    name = options.pop("name", "")
    if len(name.encode()) > LONGEST_NAME:
        raise ValueError(f"port name {name!r} is longer than {LONGEST_NAME} bytes")
    console = parse_switch("console", options.pop("console", "off" if number or name else "on"))
    return Port(number, make_way(kind, options), name, console)
