# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Devices on the kernel's vdpa bus, by name: their driver, their node, and the way from one driver to another.

Rule of this file: never let the kernel wait. Unbinding vhost_vdpa, or deleting its device, waits in the kernel until the
node is closed, and no signal ends that; so an open node is an error here, which says who has it.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import device_error
from .processes import HIDDEN, named, open_files

SYSFS = Path("/sys")
_NAME = re.compile(r"\w[\w.:-]*")
"""Of a device; nothing that leads elsewhere."""


@dataclass(frozen=True)
class BusDevice:
    """A device on the vdpa bus."""

    name: str
    driver: str
    """vhost_vdpa, virtio_vdpa, or nothing."""
    node: str
    """/dev/vhost-vdpa-N while vhost_vdpa has it, else nothing."""
    used_as: tuple[str, ...]
    """What virtio_vdpa made of it: ``vda``, ``eth1``."""


def has_bus() -> bool:
    """Whether the module vdpa is there."""
    return (SYSFS / "bus/vdpa").is_dir()


def bus_devices() -> list[BusDevice]:
    """All of them, by name."""
    try:
        names = sorted(os.listdir(SYSFS / "bus/vdpa/devices"))
    except OSError:
        return []
    return [device for name in names if (device := _look(name)) is not None]


def bus_device(name: str) -> BusDevice | None:
    """The one of that name."""
    return _look(name) if _NAME.fullmatch(name) else None


def _look(name: str) -> BusDevice | None:
    path = SYSFS / "bus/vdpa/devices" / name
    try:
        entries = sorted(os.listdir(path))
    except OSError:
        return None
    node = next((f"/dev/{entry}" for entry in entries if entry.startswith("vhost-vdpa-")), "")
    used_as = tuple(sorted(found.name for kind in ("block", "net") for found in path.glob(f"virtio*/{kind}/*")))
    return BusDevice(name, driver_of(path), node, used_as)


def driver_of(path: Path) -> str:
    """The driver that a device of any bus is bound to; nothing if to none."""
    try:
        return os.path.basename(os.readlink(path / "driver"))
    except OSError:
        return ""


def refuse_if_open(device: BusDevice, what: str) -> None:
    """EBUSY that says who has the device's node open. Opening is what finds out; it resets a device that nobody uses."""
    if not device.node:
        return
    try:
        os.close(os.open(device.node, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        if error.errno == errno.EBUSY:
            who = named(open_files().of(device.node) or [HIDDEN])
            why = f"{who} has it open; end it first, as the kernel would wait for it"
            raise device_error(errno.EBUSY, what, f"{device.name} ({device.node})", why) from None


def bind(handle: str, driver: str) -> str:
    """Give a device, NAME on the vdpa bus or pci/ADDRESS, to *driver*; returns the driver that had it.

    OSError when there is no such device or driver, when the device is open, or when the driver does not take it: then the
    driver before has it again.
    """
    bus, _, name = handle.rpartition("/")
    bus = bus or "vdpa"
    what = f"bind to {driver}"
    path, drivers = SYSFS / "bus" / bus / "devices" / name, SYSFS / "bus" / bus / "drivers"
    if not re.fullmatch(r"\w+", bus) or not _NAME.fullmatch(name) or not path.is_dir():
        raise device_error(errno.ENODEV, what, handle, "vdpa-bridge list shows the devices there are")
    if not re.fullmatch(r"[\w-]+", driver) or not (drivers / driver).is_dir():
        there = ", ".join(sorted(p.name for p in drivers.iterdir() if p.name.endswith(("vdpa", "virtio-pci"))))
        raise device_error(errno.ENOENT, what, handle, f"no such driver is loaded: modprobe {driver.replace('-', '_')}; there is: {there or 'none'}")
    before = driver_of(path)
    if before == driver:
        return before
    for device in filter(None, map(bus_device, [name] if bus == "vdpa" else os.listdir(path))):
        refuse_if_open(device, what)  # a function's devices go with it
    try:
        if (path / "driver_override").exists():
            (path / "driver_override").write_text(driver)
        if before:
            (path / "driver/unbind").write_text(name)
        try:
            (drivers / driver / "bind").write_text(name)
        except OSError:
            if before:
                if (path / "driver_override").exists():
                    (path / "driver_override").write_text(before)
                (drivers / before / "bind").write_text(name)
            raise
    except PermissionError:
        raise device_error(errno.EACCES, what, handle, "only root may: sudo") from None
    except OSError as error:
        raise device_error(error.errno or errno.EIO, what, handle, "the driver does not take it") from None
    return before
