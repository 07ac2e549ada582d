# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge list``: what there is on this machine, and what to type for it."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from .common import Command, Output, Trace, common_options

if TYPE_CHECKING:
    from ..system.inventory import Found


@click.command(
    cls=Command,
    short_help="List devices and sockets, and what to type for each.",
    examples="""
vdpa-bridge list                 devices on the vdpa bus, PCI functions, VDUSE devices, sockets of back-ends
sudo vdpa-bridge list            the same, with who has them open
vdpa-bridge list --probe         ask the back-ends what they are
vdpa-bridge list --json | jq -r '.[] | select(.kind == "vdpa") | .target'
""",
)
@click.option("--probe", is_flag=True, help="Connect to the sockets and ask; a back-end serves nobody else meanwhile.")
@click.option("--all", "everything", is_flag=True, help="Also sockets that do not look like a vhost-user back-end's.")
@common_options
def command(probe: bool, everything: bool, output: Output, trace: Trace) -> None:
    """List all that is, or can be made, a TARGET on this machine.

    A socket counts as a back-end's when its program is known to serve vhost-user, or when its name says so. Nothing is opened or
    changed, but with --probe.
    """
    from ..system.inventory import inventory

    found = inventory(everything)
    if probe:
        found = [_probed(entry, trace) for entry in found]
    output.emit([asdict(entry) for entry in found], lambda: _print(found))


def _probed(found: Found, trace: Trace) -> Found:
    from ..system.inventory import probe
    from ..targets import Target

    if found.kind != "socket":
        return found
    mark = "&" if "?" in found.target else "?"
    return probe(found, lambda: trace.wrap(Target.parse(f"{found.target}{mark}timeout=2").open(), found.name))


def _print(found: list[Found]) -> None:
    from ..system.processes import printable
    from .term import print_table

    if not found:
        click.echo("no vDPA device, no virtio PCI function, no VDUSE device, no back-end's socket; a model needs none: vdpa-bridge show model:net")
        return
    rows = [[e.kind, e.name, e.device or "?", e.by, e.state, shlex.quote(e.target) if e.target else e.command or "-"] for e in found]
    print_table(["kind", "name", "device", "by", "state", "type"], [[printable(cell) for cell in row] for row in rows], wrap=(3, 4, 5))
