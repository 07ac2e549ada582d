# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge fs``: files of a shared directory, without mounting it.

Rule of this file: names come from the device and are printed as text that a terminal takes as nothing else.
"""

from __future__ import annotations

import stat as modes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, BinaryIO

import click

from .common import Group, Output, Trace, common_options, opened, place_option, show_facts, target_argument, target_of

if TYPE_CHECKING:
    from ..drivers import FsDriver

_KINDS = {modes.S_IFDIR: "/", modes.S_IFLNK: "@", modes.S_IFIFO: "|", modes.S_IFSOCK: "="}
_INLINE = 1 << 20


@click.group(
    name="fs",
    short_help="Read files of a shared directory.",
    cls=Group,
    examples="""
vdpa-bridge fs 'vhost-user:/run/fs.sock?type=fs' ls
vdpa-bridge fs 'vhost-user:/run/fs.sock?type=fs' cat etc/hostname
vdpa-bridge fs 'vhost-user:/run/fs.sock?type=fs' stat etc --json
""",
)
@target_argument
def command(target: str) -> None:
    """Read files of the directory that TARGET shares, without mounting it."""


@contextmanager
def _files(ctx: click.Context, trace: Trace) -> Iterator[FsDriver]:
    from ..drivers import FsDriver

    with opened(target_of(ctx), trace) as device, FsDriver(device) as fs:
        yield fs


def _shown(name: str) -> str:
    return name if name.isprintable() else repr(name)


@command.command()
@click.argument("path", default="/")
@common_options
@click.pass_context
def ls(ctx: click.Context, path: str, output: Output, trace: Trace) -> None:
    """List the directory PATH."""
    with _files(ctx, trace) as fs:
        found = sorted(fs.list(path).items())

    def text() -> None:
        for name, kind in found:
            click.echo(_shown(name) + _KINDS.get(kind << 12, ""))

    output.emit({"path": path, "names": [name for name, _ in found]}, text)


@command.command()
@click.argument("path")
@common_options
@click.pass_context
def stat(ctx: click.Context, path: str, output: Output, trace: Trace) -> None:
    """Show what PATH is, and where it leads if it is a symbolic link."""
    with _files(ctx, trace) as fs:
        facts = {"path": path, **asdict(found := fs.stat(path))}
        if modes.S_ISLNK(found.mode):
            facts["link"] = fs.readlink(path)
    facts["mode"] = modes.filemode(found.mode)
    output.emit(facts, lambda: show_facts({key: _shown(str(value)) for key, value in facts.items()}))


@command.command()
@click.argument("path")
@place_option
@common_options
@click.pass_context
def cat(ctx: click.Context, path: str, place: BinaryIO, output: Output, trace: Trace) -> None:
    """Copy the file PATH to a file or to stdout (as hex within --json without --output)."""
    kept, inline, length = bytearray(), output.inline(place), 0
    with _files(ctx, trace) as fs:
        for piece in fs.read(path):
            length += len(piece)
            if not inline:
                place.write(piece)
            elif length > _INLINE:
                raise click.UsageError(f"more than {_INLINE} bytes are too many for JSON; use --output")
            else:
                kept += piece
    output.emit({"path": path, "length": length} | ({"data": kept.hex()} if inline else {}))
