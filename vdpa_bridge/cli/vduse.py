# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge vduse``: a device, wherever it lives, as a device of this kernel.

Rule of this file: the kernel device comes and goes with this process; what cannot be taken back because somebody uses
it is an error that names who.
"""

from __future__ import annotations

import signal
import threading
import time
from typing import TYPE_CHECKING

import click

from .common import Command, Output, Trace, common_options

if TYPE_CHECKING:
    from ..backends.base import Backend


_PROBING = 2.0
"""Seconds for a virtio driver to take the device."""


@click.command(
    cls=Command,
    short_help="Give a device to the kernel, as a disk or interface.",
    examples="""
vdpa-bridge vduse disk0 'model:blk?file=disk.img'
vdpa-bridge vduse disk1 'vhost-user:/run/storage.sock?type=blk' --json
vdpa-bridge vduse nic0 model:net --driver vhost_vdpa
""",
)
@click.argument("name")
@click.argument("target")
@click.option(
    "--driver",
    type=click.Choice(["virtio_vdpa", "vhost_vdpa", "none"]),
    default="virtio_vdpa",
    show_default=True,
    help="Who gets it: the kernel's own virtio drivers, /dev/vhost-vdpa-N, or nobody yet (vdpa-bridge mgmt dev add).",
)
@common_options
def command(name: str, target: str, driver: str, output: Output, trace: Trace) -> None:
    """Make TARGET a device of this kernel with the name NAME, by VDUSE, until SIGTERM or SIGINT.

    With virtio_vdpa it is a disk (/dev/vdX) or a network interface, with vhost_vdpa a node for VMMs and user-space
    drivers. Needs root and the modules vduse and virtio_vdpa or vhost_vdpa. Disks and network devices only; a control
    queue and CONFIG_WCE are left out, as the kernel does not take them this way.
    """
    from ..targets import Target
    from ..vduse.exporter import Exporter

    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    opened = Target.parse(target)
    try:
        backend: Backend = trace.wrap(opened.open())
        with Exporter(backend, name, over.set) as exporter:
            exporter.start()
            _serve(exporter.name, target, driver, over, output)
            if exporter.failed:
                raise click.ClickException(f"{name}: {exporter.failed}")
    finally:
        opened.close()


def _serve(name: str, target: str, driver: str, over: threading.Event, output: Output) -> None:
    """Put the device on the bus, and take it away when it is time."""
    if driver == "none":
        output.event(f"{target} is VDUSE device {name}", event="ready", name=name, target=target, driver=None, used_as=[])
        over.wait()
        return
    from ..system.management import Management
    from ..system.vdpa_bus import bind

    with Management() as management:
        management.add(name, "vduse", {})
        try:
            bind(name, driver)
            used_as = _used_as(name)
            what = ", ".join(used_as) or "on the vdpa bus, where no driver has taken it (modprobe virtio_blk, virtio_net)"
            output.event(f"{target} is {what} ({name}, {driver})", event="ready", name=name, target=target, driver=driver, used_as=used_as)
            over.wait()
        finally:
            management.delete(name)


def _used_as(name: str) -> list[str]:
    """What the device became: its node, or the disk or interface that a virtio driver makes of it soon after."""
    from ..system.vdpa_bus import bus_device

    end = time.monotonic() + _PROBING
    while (device := bus_device(name)) is not None:
        if found := [device.node] if device.node else list(device.used_as):
            return found
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    return []
