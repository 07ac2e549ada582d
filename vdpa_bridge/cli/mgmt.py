# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge mgmt``: make, change, ask and bind vDPA devices, in the words of iproute2's ``vdpa``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from .common import Command, Group, Output, Trace, common_options

if TYPE_CHECKING:
    from ..system.management import Management

Section = dict[str, dict[str, Any]]


def _complete_device(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """For the shell: devices on the bus."""
    from ..system.vdpa_bus import bus_devices

    return [device.name for device in bus_devices() if device.name.startswith(incomplete)]


@click.group(
    cls=Group,
    short_help="Make, change, ask and bind kernel devices.",
    examples="""
vdpa-bridge mgmt mgmtdev show
sudo vdpa-bridge mgmt dev add name net0 mgmtdev vdpasim_net mac 02:00:00:00:00:01
sudo vdpa-bridge mgmt bind net0 vhost_vdpa
sudo vdpa-bridge mgmt bind pci/0000:00:10.0 vp-vdpa
vdpa-bridge mgmt dev config show net0 --json
sudo vdpa-bridge mgmt dev del net0
""",
)
def command() -> None:
    """Manage vDPA devices by the kernel's netlink family, as iproute2's vdpa does, and their drivers.

    --json prints what vdpa -j does.
    """


@command.group(cls=Group, short_help="What can make devices.")
def mgmtdev() -> None:
    """What can make devices: simulators, PCI functions that a vDPA driver has, VDUSE."""


@command.group(cls=Group, short_help="Devices.")
def dev() -> None:
    """Devices on the vdpa bus."""


@dev.group(cls=Group, short_help="Configuration space.")
def config() -> None:
    """What devices hold in their configuration space."""


@dev.group(cls=Group, short_help="Statistics of queues.")
def vstats() -> None:
    """What a device's own driver counts."""


@contextmanager
def _managing(trace: Trace) -> Iterator[Management]:
    from ..system.management import Management

    with Management(trace.line) as management:
        yield management


@mgmtdev.command("show", cls=Command)
@click.argument("handle", default="")
@common_options
def mgmtdev_show(handle: str, output: Output, trace: Trace) -> None:
    """Show all that can make devices, or HANDLE (vdpasim_net, pci/0000:00:10.0)."""
    with _managing(trace) as management:
        _emit(output, "mgmtdev", management.mgmtdevs(handle), "\n  ")


@dev.command("show", cls=Command)
@click.argument("name", default="", shell_complete=_complete_device)
@common_options
def dev_show(name: str, output: Output, trace: Trace) -> None:
    """Show all devices, or NAME."""
    with _managing(trace) as management:
        _emit(output, "dev", management.devices(name))


@dev.command("add", cls=Command, examples="sudo vdpa-bridge mgmt dev add name net0 mgmtdev vdpasim_net mac 02:00:00:00:00:01 mtu 1500")
@click.argument("words", nargs=-1, metavar="name NAME mgmtdev HANDLE [mac MAC] [mtu MTU] [max_vqp PAIRS] [device_features BITS]")
@common_options
def dev_add(words: tuple[str, ...], output: Output, trace: Trace) -> None:
    """Make a device. BITS are the features it shall have, of those that the management device has."""
    options = _pairs(words, "name", "mgmtdev")
    name, handle = options.pop("name"), options.pop("mgmtdev")
    with _managing(trace) as management:
        management.add(name, handle, options)
        _emit(output, "dev", management.devices(name))


@dev.command("del", cls=Command)
@click.argument("name", shell_complete=_complete_device)
@common_options
def dev_del(name: str, output: Output, trace: Trace) -> None:
    """Delete device NAME; refused while somebody has it open."""
    with _managing(trace) as management:
        management.delete(name)
    output.emit({"deleted": name})


@dev.command("set", cls=Command)
@click.argument("words", nargs=-1, metavar="name NAME [mac MAC] [mtu MTU]")
@common_options
def dev_set(words: tuple[str, ...], output: Output, trace: Trace) -> None:
    """Change what a device holds, where kernel (since Linux 6.12) and driver can."""
    options = _pairs(words, "name")
    name = options.pop("name")
    with _managing(trace) as management:
        management.change(name, options)
        _emit(output, "config", management.config(name))


@config.command("show", cls=Command)
@click.argument("name", default="", shell_complete=_complete_device)
@common_options
def config_show(name: str, output: Output, trace: Trace) -> None:
    """Show the configuration space of all devices, or of NAME."""
    with _managing(trace) as management:
        _emit(output, "config", management.config(name))


@vstats.command("show", cls=Command)
@click.argument("name", shell_complete=_complete_device)
@click.argument("words", nargs=-1, metavar="qidx INDEX")
@common_options
def vstats_show(name: str, words: tuple[str, ...], output: Output, trace: Trace) -> None:
    """Show what the driver of NAME counts for a queue."""
    index = _pairs(words, "qidx")["qidx"]
    if not index.isdecimal():
        raise click.UsageError(f"qidx {index}: it is a queue's number")
    with _managing(trace) as management:
        _emit(output, "vstats", {name: management.vstats(name, int(index))})


@command.command("bind", cls=Command, examples="sudo vdpa-bridge mgmt bind net0 virtio_vdpa\nsudo vdpa-bridge mgmt bind pci/0000:00:10.0 vp-vdpa")
@click.argument("handle", metavar="NAME|pci/ADDRESS", shell_complete=_complete_device)
@click.argument("driver")
@common_options
def bind(handle: str, driver: str, output: Output, trace: Trace) -> None:
    """Give a device to another driver: vhost_vdpa (for user space) or virtio_vdpa (for the kernel); vp-vdpa or virtio-pci on PCI.

    Whatever uses it through the driver before, a file system or an interface, loses it.
    """
    from ..system import vdpa_bus

    before = vdpa_bus.bind(handle, driver)
    device = vdpa_bus.bus_device(handle)
    node = device.node if device is not None else ""
    text = f"{handle}: {before or 'no driver'} -> {driver}" + (f", {node}" if node else "")
    output.emit({"device": handle, "before": before, "driver": driver, "node": node}, lambda: click.echo(text))


def _pairs(words: tuple[str, ...], *needed: str) -> dict[str, str]:
    """``key value key value`` as iproute2 takes it."""
    if len(words) % 2:
        raise click.UsageError(f"{words[-1]}: every word needs its value")
    found = dict(zip(words[::2], words[1::2], strict=True))
    if missing := [key for key in needed if key not in found]:
        raise click.UsageError(f"{missing[0]} is missing")
    return found


def _emit(output: Output, section: str, found: Section, separator: str = " ") -> None:
    text = "\n".join(_line(name, facts, separator) for name, facts in found.items())
    output.emit({section: found}, lambda: click.echo(text) if text else None)


def _line(name: str, facts: dict[str, Any], separator: str) -> str:
    return separator.join([f"{name}:", *(f"{key} {_word(value)}".rstrip() for key, value in facts.items())])


def _word(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
