# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What can be wrong with a kernel device: modules, the vdpa bus, its driver, its node, who has it open."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..backends.base import Backend
from ..backends.vhost_vdpa import ENOTSUPP
from ..errors import reason
from ..system.management import Management
from ..system.modules import can_load, is_loaded
from ..system.permission import how_to_grant, who_may
from ..system.processes import HIDDEN, named, open_files
from ..system.vdpa_bus import SYSFS, BusDevice, bus_device, bus_devices
from .causes import (
    BUSY,
    FEATURE_WITHHELD,
    MODULE_MISSING,
    MODULE_UNAVAILABLE,
    NO_IOMMU,
    NO_SUCH_DEVICE,
    NO_VDUSE,
    PERMISSION,
    STUCK,
    WRONG_DRIVER,
)
from .examination import Check, Examination, Problem, Wishes

_CONFIG = {"vdpa": "CONFIG_VDPA", "vhost_vdpa": "CONFIG_VHOST_VDPA", "vduse": "CONFIG_VDPA_USER"}
_VDUSE = "/dev/vduse/"


class NodeExamination(Examination):
    """Of a device by its *name* on the vdpa bus, or by its node's *path*."""

    def __init__(self, opener: Callable[[], Backend], wishes: Wishes, name: str = "", path: str = "") -> None:
        super().__init__(opener, wishes)
        self._name = name
        self._path = path

    def checks(self) -> Sequence[Check]:
        """From the kernel to the device."""
        return [
            Check("modules", self.modules),
            Check("exists", self.exists),
            Check("driver", self.driver),
            Check("permission", self.permission),
            Check("open", self.opens),
            *self.device_checks(),
        ]

    def _on_bus(self) -> BusDevice | None:
        if self._name:
            return bus_device(self._name)
        return next((device for device in bus_devices() if device.node == self._path), None)

    def _node(self) -> str:
        device = self._on_bus()
        return self._path or (device.node if device is not None else "")

    def modules(self) -> str:
        """Whether the kernel can have such devices."""
        wanted = ["vduse"] if self._path.startswith(_VDUSE) else ["vdpa", "vhost_vdpa"]
        missing = [name for name in wanted if not is_loaded(name)]
        if not missing:
            return f"{' and '.join(wanted)} loaded"
        loadable = [can_load(name) for name in missing]
        if False in loadable:
            name = missing[loadable.index(False)]
            raise Problem(MODULE_UNAVAILABLE, f"this kernel, {os.uname().release}, has no module {name}", config=_CONFIG[name])
        says = f"{' and '.join(missing)} not loaded" + (", and there are no modules here; in a container, load them outside" if None in loadable else "")
        raise Problem(NO_VDUSE if missing == ["vduse"] else MODULE_MISSING, says, modules=" ".join(["-a", *missing] if len(missing) > 1 else missing))

    def exists(self) -> str:
        """Whether there is such a device."""
        if self._path.startswith(_VDUSE):
            raise self._daemons_end(os.path.basename(self._path))
        if self._path and os.path.exists(self._path):
            status = os.stat(self._path)
            if not stat.S_ISCHR(status.st_mode) or os.major(status.st_rdev) != _major("vhost-vdpa"):
                raise Problem(NO_SUCH_DEVICE, f"{self._path} is no node of vhost-vdpa", "vdpa-bridge list")
            return f"{self._path} is there"
        devices = bus_devices()
        if self._name and any(device.name == self._name for device in devices):
            return f"{self._name} is on the vdpa bus"
        if self._name and (SYSFS / "class/vduse" / self._name).exists():
            raise self._daemons_end(self._name)
        hidden = next((device for device in devices if not device.node), None)
        if self._path and hidden is not None:
            raise Problem(WRONG_DRIVER, f"there is no {self._path}, but {_bound(hidden)}", name=hidden.name)
        there = ", ".join(device.name for device in devices) or "none"
        raise Problem(NO_SUCH_DEVICE, f"there is no {self._name or self._path}; on the vdpa bus: {there}", self._how_to_make())

    def _daemons_end(self, name: str) -> Problem:
        """/dev/vduse/NAME is where a device comes from; users get at it by the vdpa bus."""
        if name == "control":
            return Problem(NO_SUCH_DEVICE, "here programs offer devices, it is none itself", "vdpa-bridge list")
        make = f"vdpa-bridge explain vdpa:{name}" if bus_device(name) else f"vdpa-bridge mgmt dev add name {name} mgmtdev vduse"
        return Problem(NO_SUCH_DEVICE, f"{name} is a VDUSE device's end for its daemon; its users find it on the vdpa bus", make)

    def _how_to_make(self) -> str:
        try:
            with Management() as management:
                makers = [handle for handle in management.mgmtdevs() if handle != "vduse"]
        except OSError:
            makers = []
        return f"vdpa-bridge mgmt dev add name {self._name or 'NAME'} mgmtdev {makers[0]}" if makers else "vdpa-bridge list"

    def driver(self) -> str:
        """Whether user space can have it."""
        device = self._on_bus()
        if device is None:
            return "its node is all that can be seen of it here"
        if device.driver != "vhost_vdpa":
            raise Problem(WRONG_DRIVER, _bound(device), name=device.name)
        return f"{device.name} is bound to vhost_vdpa, {device.node}"

    def permission(self) -> str:
        """Whether this user may open the node."""
        node = self._node()
        if not os.path.exists(node):
            make = f"give it to this container: --device {node}"
            raise Problem(NO_SUCH_DEVICE, f"the kernel has {node}, this /dev has not", make)
        if not os.access(node, os.R_OK | os.W_OK):
            raise Problem(PERMISSION, f"{node} belongs to {who_may(node)}", how_to_grant(node))
        return "read and write"

    def opens(self) -> str:
        """Whether nobody else has it, and it answers."""
        node = self._node()
        try:
            self.open()
        except OSError as error:
            if error.errno == errno.EBUSY:
                holders = named(open_files().of(node) or [HIDDEN])
                raise Problem(BUSY, f"{node} is open in {holders}", holder=holders) from None
            if error.errno in (errno.EACCES, errno.EPERM):
                raise Problem(PERMISSION, reason(error), f"allow the device in this container: --device {node}") from None
            if error.errno == ENOTSUPP:
                raise Problem(NO_IOMMU, reason(error)) from None
            if error.errno == errno.EIO:
                device = self._on_bus()
                raise Problem(STUCK, reason(error), name=device.name if device is not None else "NAME") from None
            raise
        return "nobody else has it open"

    def withheld(self, names: list[str], missing: int, offered: int) -> Problem:
        """Tells what was left out when the device was made from what its hardware does not have."""
        device = self._on_bus()
        facts = _management_facts(device.name) if device is not None else None
        if device is None or facts is None:
            return super().withheld(names, missing, offered)
        handle, able = facts
        says = f"{', '.join(names)} not offered"
        if lacking := [name for name in names if name not in able]:
            return Problem(FEATURE_WITHHELD, f"{says}; {handle} does not have {', '.join(lacking)}", "do without")
        says += f", though {handle} has it: left out when the device was added"
        return Problem(FEATURE_WITHHELD, says, name=device.name, mgmtdev=handle, bits=f"{offered | missing:#x}")


def _major(driver: str) -> int | None:
    """The number of a driver's character devices."""
    for line in Path("/proc/devices").read_text().splitlines():
        if line.split()[1:] == [driver]:
            return int(line.split()[0])
    return None


def _management_facts(name: str) -> tuple[str, list[str]] | None:
    """The management device of a device, and the features it can give."""
    try:
        with Management() as management:
            handle: str = management.devices(name)[name]["mgmtdev"]
            able: Any = management.mgmtdevs()[handle]["dev_features"]
    except (OSError, KeyError):
        return None
    return handle, able


def _bound(device: BusDevice) -> str:
    if not device.driver:
        return f"{device.name} is bound to no driver"
    use = f", which makes {', '.join(device.used_as)} of it" if device.used_as else ""
    return f"{device.name} is bound to {device.driver}{use}, and has no node"
