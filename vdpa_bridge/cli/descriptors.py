# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge descriptors``: the files by which management software finds the programs of the back-end conventions.

Rule of this file: a descriptor names the program where it is. Only after an installation is that known, so descriptors are
written then, and are no part of the package.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from .common import Command, Output, Trace, common_options


@click.command(
    cls=Command,
    short_help="Tell management software of the vhost-user-vdpa-* programs.",
    examples="""
vdpa-bridge descriptors --json                                   what would be written
sudo vdpa-bridge descriptors --install                           for /usr/bin/vdpa-bridge: into /usr/share/qemu/vhost-user
sudo vdpa-bridge descriptors --install /etc/qemu/vhost-user      for an installation elsewhere, such as a virtual environment
vdpa-bridge descriptors --install ~/.config/qemu/vhost-user      for the VMs of one user
vdpa-bridge descriptors --install $DESTDIR/usr/share/qemu/vhost-user --bin /usr/bin      for a distribution's package
""",
)
@click.option(
    "--install",
    is_flag=False,
    flag_value="",
    metavar="[DIR]",
    help="Write the files, into share/qemu/vhost-user beside the programs' directory unless told otherwise.",
)
@click.option("--bin", "place", metavar="DIR", help="Where the programs will be.  [default: where this one is]")
@common_options
def command(install: str | None, place: str | None, output: Output, trace: Trace) -> None:
    """Show, or install, a descriptor (QEMU's vhost-user.json) of each vhost-user-vdpa-* program.

    Management software reads /usr/share/qemu/vhost-user, /etc/qemu/vhost-user and ~/.config/qemu/vhost-user; a file in a later
    directory replaces one of the same name. Programs of types that the schema does not know have none.
    """
    from .programs import PROGRAMS

    programs = _directory_of_programs([program.name for program in PROGRAMS.values()]) if place is None else Path(place).absolute()
    found = {program.file: program.descriptor(programs) for program in PROGRAMS.values() if program.described}
    if install is None:
        output.emit(found, lambda: _show(found))
        return
    directory = Path(install).absolute() if install else programs.parent / "share/qemu/vhost-user"
    directory.mkdir(parents=True, exist_ok=True)
    for name, descriptor in found.items():
        (directory / name).write_text(json.dumps(descriptor, indent=2) + "\n")
    output.emit([str(directory / name) for name in found], lambda: click.echo("\n".join(str(directory / name) for name in found)))


def _directory_of_programs(names: list[str]) -> Path:
    """Where this program is, by its real path, as those are that were installed with it."""
    directory = Path(os.path.realpath(sys.argv[0])).parent
    for name in names:
        if not os.access(directory / name, os.X_OK):
            raise FileNotFoundError(f"{directory} has no {name}: start vdpa-bridge from where it is installed, or give --bin DIR")
    return directory


def _show(found: dict[str, dict[str, object]]) -> None:
    from .term import print_table

    print_table(["file", "type", "binary"], [[name, str(descriptor["type"]), str(descriptor["binary"])] for name, descriptor in found.items()])
