# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the monitor can be asked and what it tells: one table of commands, one of events.

Rule of this file: a command is a row, and what ``query-commands``, the schema and docs/qmp.md say follows from it. Names are
QEMU's where its command does the same.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..virtio.features import feature_names
from ..virtio.ids import device_name

if TYPE_CHECKING:
    from ..backends.model import ModelDevice
    from .server import ServiceServer
    from .service import Service

Arguments = Mapping[str, Any]


class QmpError(Exception):
    """The answer to a command that failed: *kind* is QMP's class of the error."""

    def __init__(self, desc: str, kind: str = "GenericError") -> None:
        super().__init__(desc)
        self.kind = kind


@dataclass(frozen=True)
class Parameter:
    """Of a command; *type* is str, int, bool or list."""

    name: str
    type: type
    doc: str
    optional: bool = False


@dataclass(frozen=True)
class Command:
    """*run* is called with the service and arguments that ``check`` has found good; it is missing where the session answers."""

    name: str
    doc: str
    parameters: tuple[Parameter, ...] = ()
    returns: str = ""
    run: Callable[[Service, Arguments], object] | None = None

    def check(self, arguments: Arguments) -> None:
        """QmpError unless *arguments* are the command's."""
        known = {parameter.name: parameter for parameter in self.parameters}
        if unexpected := set(arguments) - set(known):
            raise QmpError(f"Parameter '{min(unexpected)}' is unexpected")
        for name, parameter in known.items():
            if name not in arguments:
                if not parameter.optional:
                    raise QmpError(f"Parameter '{name}' is missing")
            elif type(arguments[name]) is not parameter.type:
                raise QmpError(f"Invalid parameter type for '{name}', expected: {_TYPES[parameter.type][1]}")

    def carry_out(self, service: Service, arguments: Arguments) -> object:
        """What ``run`` returns."""
        assert self.run is not None, self.name
        return self.run(service, arguments)


@dataclass(frozen=True)
class Event:
    """*data* are its members."""

    name: str
    doc: str
    data: tuple[str, ...] = ()


_TYPES = {str: ("str", "string"), int: ("int", "integer"), bool: ("bool", "boolean"), list: ("list", "array")}
"""Names in the schema, and in JSON."""


def version() -> dict[str, object]:
    """Of this package, in the form that QMP has for QEMU's; zeroes for a source tree that is not installed."""
    try:
        text = importlib.metadata.version("vdpa-bridge")
    except importlib.metadata.PackageNotFoundError:
        text = "0.0.0"
    numbers = [int(part) for part in re.findall(r"\d+", text)[:3]]
    return {"qemu": dict(zip(("major", "minor", "micro"), numbers, strict=False)), "package": f"vdpa-bridge {text}"}


_VERSION = version()


def greeting() -> dict[str, object]:
    """What a client hears first."""
    return {"QMP": {"version": _VERSION, "capabilities": []}}


# What they do ----------------------------------------------------------------------------------------------------------


def _server(service: Service, name: str) -> ServiceServer:
    for server in service.servers:
        if server.device.spec.name == name:
            return server
    raise QmpError(f"Device '{name}' not found; there is: {', '.join(server.device.spec.name for server in service.servers)}", "DeviceNotFound")


def _model(service: Service, name: str) -> ModelDevice:
    device = _server(service, name).device
    if (model := device.model) is None:
        raise QmpError(f"'{name}' is no model in this process: {device.spec.target}")
    return model


def _devices(service: Service, arguments: Arguments) -> object:
    found = []
    for server in service.servers:
        spec, model = server.device.spec, server.device.model
        facts: dict[str, object] = {"name": spec.name, "target": spec.target, "socket": server.listener.place, "client": server.peer is not None}
        if model is not None:
            state = model.state()
            facts |= {
                "type": device_name(model.model.device_id),
                "queues": model.model.queue_count,
                "status": state.status,
                "features": feature_names(model.model.device_id, state.features),
                "needs-reset": state.broken,
                "stopped": model.runner.held,
            }
        found.append(facts)
    return found


def _queues(service: Service, arguments: Arguments) -> object:
    model = _model(service, arguments["device"])
    return [
        {
            "index": queue.index,
            "size": queue.size,
            "base": queue.base,
            "used": queue.used,
            "enabled": queue.enabled,
            "in-flight": queue.in_flight,
        }
        for queue in model.queues()
    ]


def _clients(service: Service, arguments: Arguments) -> object:
    return [
        {
            "device": server.device.spec.name,
            "pid": peer.pid,
            "uid": peer.uid,
            "gid": peer.gid,
            "mode": session.mode if (session := server.session) is not None else "",
            "relayed": server.relayed,
        }
        for server in service.servers
        if (peer := server.peer) is not None
    ]


def _resize(service: Service, arguments: Arguments) -> object:
    _model(service, arguments["device"])
    service.resize(arguments["device"], arguments["size"])
    return {}


def _set_link(service: Service, arguments: Arguments) -> object:
    model, up = _model(service, arguments["name"]), arguments["up"]
    model.change(lambda: model.model.plug(up))
    return {}


def _stop(service: Service, arguments: Arguments) -> object:
    foreign = [server.device.spec.name for server in service.servers if server.device.model is None]
    if foreign:
        raise QmpError(f"nothing is stopped: {', '.join(foreign)} cannot be, as it is no model in this process")
    service.hold(True)
    return {}


def _cont(service: Service, arguments: Arguments) -> object:
    service.hold(False)
    return {}


def _quit(service: Service, arguments: Arguments) -> object:
    service.quit()
    return {}


def _reload(service: Service, arguments: Arguments) -> object:
    service.reload()
    return {}


def _status(service: Service, arguments: Arguments) -> object:
    return {"running": not service.held, "status": "paused" if service.held else "running"}


def _names(service: Service, arguments: Arguments) -> object:
    return [{"name": name} for name in COMMANDS]


def _schema(service: Service, arguments: Arguments) -> object:
    return [*_schema_entries()]


def _schema_entries() -> Iterator[dict[str, object]]:
    """QAPI's SchemaInfo of every command and event; answers are of any type."""
    yield {"name": "any", "meta-type": "builtin", "json-type": "value"}
    for name, json_type in _TYPES.values():
        if name == "list":
            yield {"name": name, "meta-type": "array", "element-type": "any"}
        else:
            yield {"name": name, "meta-type": "builtin", "json-type": "int" if name == "int" else json_type}
    for command in COMMANDS.values():
        members: list[dict[str, object]] = [
            {"name": parameter.name, "type": _TYPES[parameter.type][0]} | ({"default": None} if parameter.optional else {})
            for parameter in command.parameters
        ]
        yield {"name": f"{command.name}-arg", "meta-type": "object", "members": members}
        yield {"name": command.name, "meta-type": "command", "arg-type": f"{command.name}-arg", "ret-type": "any"}
    for event in EVENTS.values():
        yield {"name": f"{event.name}-data", "meta-type": "object", "members": [{"name": name, "type": "any"} for name in event.data]}
        yield {"name": event.name, "meta-type": "event", "arg-type": f"{event.name}-data"}


# The tables ---------------------------------------------------------------------------------------------------------------

_DEVICE = Parameter("device", str, "the device's name")

COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command("qmp_capabilities", "Begin: before it, nothing else is answered. No capability is offered.", (Parameter("enable", list, "capabilities to enable", True),)),
        Command("query-version", "The version of this package.", returns="`qemu` (`major`, `minor`, `micro`), `package`", run=lambda service, arguments: _VERSION),
        Command("query-commands", "All commands.", returns="a list of `name`", run=_names),
        Command("query-qmp-schema", "Commands, their parameters and events, as QAPI's introspection has them.", returns="a list of SchemaInfo", run=_schema),
        Command("query-status", "Whether devices are served.", returns="`running`, `status` (`running` or `paused`)", run=_status),
        Command(
            "query-vdpa-devices",
            "What is served where.",
            returns="a list of `name`, `target`, `socket`, `client` (whether there is one); of models also `type`, `queues`, `status` (the status byte), "
            "`features` (those that the driver accepted), `needs-reset`, `stopped`",
            run=_devices,
        ),
        Command(
            "query-vdpa-queues",
            "The queues of a model.",
            (_DEVICE,),
            "a list of `index`, `size`, `base` and `used` (where the next chain is taken and given back, as GET_VRING_BASE has it), `enabled`, `in-flight` (chains that the model has)",
            _queues,
        ),
        Command(
            "query-vdpa-clients", "Who is served.", returns="a list of `device`, `pid`, `uid`, `gid`, `mode` (`vDPA`, `legacy`, or `undecided` as long as it is not known), `relayed` (why, empty if not)", run=_clients
        ),
        Command(
            "block_resize",
            "Make a disk larger or smaller, its file or memory too, and tell the driver.",
            (_DEVICE, Parameter("size", int, "bytes, a multiple of 512")),
            run=_resize,
        ),
        Command("set_link", "Plug a network interface in or out.", (Parameter("name", str, "the device's name"), Parameter("up", bool, "whether it is in")), run=_set_link),
        Command("stop", "Stop serving requests: they wait, as do clients' rings that come meanwhile. Clients go on to be answered.", run=_stop),
        Command("cont", "Go on after `stop`.", run=_cont),
        Command("reload", "Look anew at what is outside (the sizes of files), as SIGHUP does.", run=_reload),
        Command("quit", "End the service, as SIGTERM does.", run=_quit),
    )
}
"""By their names."""

EVENTS: dict[str, Event] = {
    event.name: event
    for event in (
        Event("STOP", "`stop` was carried out."),
        Event("RESUME", "`cont` was carried out."),
        Event("SHUTDOWN", "The service ends. `reason`: `host-qmp-quit`, or `host-signal` for anything else.", ("guest", "reason")),
        Event("VDPA_CLIENT_CONNECTED", "A client came to a device.", ("device", "pid", "uid")),
        Event("VDPA_CLIENT_DISCONNECTED", "It went.", ("device", "pid", "uid")),
        Event("VDPA_DEVICE_BROKEN", "A ring of a model broke: its driver has to reset the device. `reason` says what it did.", ("device", "queue", "reason")),
        Event("VDPA_DEVICE_RESIZED", "A disk has another size, or whatever else a model found changed, and its driver was told. `change` is for people.", ("device", "change")),
    )
}
"""By their names."""
