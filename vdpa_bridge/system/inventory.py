# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""All that is, or could be made, a target on this machine.

Rule of this file: looking changes nothing. No device is opened and no socket connected to, but by ``probe``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import ops
from ..backends.base import Backend
from ..errors import ProtocolError, reason
from ..virtio.ids import DeviceId, device_name, parse_device_id
from ..wire import EMPTY
from .modules import can_load, is_loaded
from .processes import OpenFiles, named, open_files
from .unix_sockets import Listening, listening_sockets
from .vdpa_bus import SYSFS, BusDevice, bus_device, bus_devices, driver_of

_VIRTIO_VENDOR = 0x1AF4
_FIRST_MODERN = 0x1040
_KERNEL_VHOST = {"vhost-net": ("net", "vhost-net:TAP"), "vhost-vsock": ("vsock", "vhost-vsock:CID"), "vhost-scsi": ("scsi", "")}
"""Node, device and what is typed for one."""

BACKENDS: tuple[tuple[str, str, bool], ...] = (
    (r"qemu-storage-daemon$", "blk", False),
    (r"(dpdk-)?testpmd$|passt$|ovs-vswitchd$|vpp$", "net", False),
    (r"virtiofsd$", "fs", True),
    (r"vhost-user-gpu$", "gpu", True),
    (r"vhost-(?:user|device)-(?:vdpa-)?(\w+)", "", False),
    (r"vdpa[-_]bridge$|spdk_tgt$|vhost$", "", False),
)
"""Programs known to serve vhost-user: name, device type ("" when it varies), whether it ends when a client leaves."""
_TELLING = re.compile(r"vhost|vdpa|virtio")
"""In the name of a socket of an unknown program."""


@dataclass(frozen=True)
class Found:
    """Something that a user can point at, or the way to make it so."""

    kind: str
    """``vdpa``, ``pci``, ``vduse``, ``socket`` or ``vhost``."""
    name: str
    device: str
    """``net``, ``block``, ...; nothing when it is not known."""
    by: str
    """Who stands behind it: driver and management device, or processes."""
    state: str
    target: str = ""
    """What to type for it; nothing when it cannot be used as it is."""
    command: str = ""
    """What to type to make it usable, then."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The same in pieces."""


def inventory(everything: bool = False) -> list[Found]:
    """All of it. With *everything*, also sockets that do not look like a vhost-user back-end's."""
    files = open_files()
    return [*_vdpa(files), *_pci(), *_vduse(), *_sockets(files, everything), *_kernel_vhost()]


def target_names() -> list[str]:
    """Targets that can be typed right now, without a look at who has them; quick."""
    names = [name for device in bus_devices() if device.node for name in (f"vdpa:{device.name}", device.node)]
    return names + [f"vhost-user:{found.name}" for found in _sockets(OpenFiles(), False)]


# The vdpa bus ------------------------------------------------------------------------------------------------------------


def _vdpa(files: OpenFiles) -> Iterator[Found]:
    devices = bus_devices()
    told = _told() if devices else {}
    for device in devices:
        facts = told.get(device.name, {})
        kind = {"network": "net"}.get(facts.get("type", ""), facts.get("type", ""))
        by = " of ".join(filter(None, (device.driver or "no driver", facts.get("mgmtdev", ""))))
        target = f"vdpa:{device.name}" if device.node else ""
        command = "" if device.node else f"vdpa-bridge mgmt bind {device.name} vhost_vdpa"
        about = {"driver": device.driver, "node": device.node, "used_as": list(device.used_as), **facts}
        yield Found("vdpa", device.name, kind, by, _state(device, files), target, command, about)


def _told() -> dict[str, dict[str, Any]]:
    """What netlink says of the devices; nothing where it may not be asked (another network namespace)."""
    from .management import Management

    try:
        with Management() as management:
            return management.devices()
    except OSError:
        return {}


def _state(device: BusDevice, files: OpenFiles) -> str:
    if not device.node:
        return f"used as {', '.join(device.used_as)}" if device.used_as else "not for user space"
    state = node_state(device.node, files)
    return f"{device.node}, {state}"


def node_state(node: str, files: OpenFiles) -> str:
    """``free``, who has it open, or why we may not."""
    if holders := files.of(node):
        return f"open in {named(holders)}"
    if not os.access(node, os.R_OK | os.W_OK):
        return "not there" if not os.path.exists(node) else "no permission"
    return "free" if files.complete else "free as far as can be seen"


# PCI, VDUSE, vhost -------------------------------------------------------------------------------------------------------


def _pci() -> Iterator[Found]:
    """Virtio functions that vp_vdpa could take, or has taken, and that have no vDPA device yet."""
    if not (is_loaded("vp_vdpa") or can_load("vp_vdpa")):
        return
    for path in sorted((SYSFS / "bus/pci/devices").glob("*")):
        vendor, number = (int(_read(path / name) or "0", 16) for name in ("vendor", "device"))
        if vendor != _VIRTIO_VENDOR or not 0x1000 <= number <= 0x107F or any(bus_device(child.name) for child in path.iterdir() if child.is_dir()):
            continue
        device_id = number - _FIRST_MODERN if number >= _FIRST_MODERN else int(_read(path / "subsystem_device") or "0", 16)
        driver = driver_of(path)
        taken = driver == "vp-vdpa"
        if driver and not taken and device_id not in (DeviceId.NET, DeviceId.BLOCK):
            continue  # consoles and the like, that the kernel uses
        command = f"vdpa-bridge mgmt {f'dev add name NAME mgmtdev pci/{path.name}' if taken else f'bind pci/{path.name} vp-vdpa'}"
        used_as = sorted(found.name for kind in ("block", "net") for found in path.glob(f"virtio*/{kind}/*"))
        state = f"used as {', '.join(used_as)}, which binding ends" if used_as else "no vDPA device yet" if taken else "in use" if driver else "free"
        yield Found("pci", f"pci/{path.name}", device_name(device_id), driver or "no driver", state, "", command, {"used_as": used_as})


def _vduse() -> Iterator[Found]:
    """Devices that a daemon made and nobody put on the bus."""
    for path in sorted((SYSFS / "class/vduse").glob("*")):
        if path.name != "control" and bus_device(path.name) is None:
            command = f"vdpa-bridge mgmt dev add name {path.name} mgmtdev vduse"
            yield Found("vduse", path.name, "", "vduse", "not on the vdpa bus", "", command)


def _kernel_vhost() -> Iterator[Found]:
    """The kernel's own back-ends, which anybody may open any number of times: each opening is a device."""
    for name, (kind, target) in _KERNEL_VHOST.items():
        if os.path.exists(node := f"/dev/{name}"):
            allowed = os.access(node, os.R_OK | os.W_OK)
            command = f"vdpa-bridge show {target}" if allowed and target else ""
            yield Found("vhost", node, kind, "kernel", "for VMMs" if allowed else "no permission", command=command)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


# Sockets -----------------------------------------------------------------------------------------------------------------


def _sockets(files: OpenFiles, everything: bool) -> Iterator[Found]:
    for listening in listening_sockets(files):
        known, kind, fragile = _backend(listening)
        if everything or known:
            by = named(list(listening.owners)) or "hidden from us"
            clients = f"{listening.clients} client{'s' * (listening.clients != 1)}"
            if not os.access(listening.path, os.W_OK):
                clients += ", no permission" if os.path.exists(listening.path) else ", its file is gone"
            target = f"vhost-user:{listening.path}" + (f"?type={kind}" if kind else "")
            device = device_name(parse_device_id(kind)) if kind else ""
            yield Found("socket", listening.path, device, by, clients, target, "", {"clients": listening.clients, "ends_with_client": fragile})


def _backend(listening: Listening) -> tuple[bool, str, bool]:
    """Whether this is likely a back-end's socket, of which type, and whether asking would end it."""
    for owner in listening.owners:
        for pattern, kind, fragile in BACKENDS:
            if match := re.match(pattern, owner.program):
                return True, kind or _type_of(*match.groups("")), fragile
    return bool(_TELLING.search(listening.path)), "", False


def _type_of(word: str = "", *_: str) -> str:
    try:
        parse_device_id(word)
    except ValueError:
        return ""
    return word


def probe(found: Found, open_target: Callable[[], Backend]) -> Found:
    """*found* with what a socket's owner answers to whoever connects."""
    if found.facts.get("ends_with_client"):
        return replace(found, state=f"{found.state}; not asked, as it ends when a client leaves")
    try:
        with open_target() as backend:
            facts = backend.facts()
            (number,) = backend.call_many([(ops.GET_DEVICE_ID, EMPTY)])
            device = found.device if isinstance(number, OSError) else device_name(number.value)
    except (OSError, ProtocolError) as error:
        return replace(found, state=f"{found.state}; {reason(error)}")
    return replace(found, state=f"{found.state}; {facts.get('transport', 'answers')}", device=device, facts=found.facts | facts)
