# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge scsi``: the units behind a SCSI host, and bytes of its disks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from .common import (
    HEX,
    SIZE,
    Group,
    Output,
    Trace,
    common_options,
    human_size,
    opened,
    place_option,
    source_option,
    target_argument,
    target_of,
    timeout_option,
)

if TYPE_CHECKING:
    from ..drivers import ScsiDriver

_PIECE = 1 << 20


@click.group(
    name="scsi",
    short_help="Use the units behind a SCSI host.",
    cls=Group,
    examples="""
vdpa-bridge scsi /dev/vhost-vdpa-0 info
vdpa-bridge scsi --unit 0:1 /dev/vhost-vdpa-0 read --length 64K --output image
vdpa-bridge scsi 'vhost-user:/run/scsi.sock?type=scsi' command 120000006000 --expect 96
""",
)
@click.option("--unit", default="0:0", show_default=True, metavar="TARGET:LUN", help="Which one.")
@target_argument
def command(target: str, unit: str) -> None:
    """Use the units behind the SCSI host TARGET.

    Offsets and lengths are multiples of the disk's blocks and may be written 4096, 0x1000, 64K, 1M or 1G.
    """


@contextmanager
def _host(ctx: click.Context, trace: Trace) -> Iterator[tuple[ScsiDriver, tuple[int, int]]]:
    from ..drivers import ScsiDriver

    assert ctx.parent is not None
    text: str = ctx.parent.params["unit"]
    target, _, lun = text.partition(":")
    if not target.isdecimal() or not lun.isdecimal():
        raise click.UsageError(f"--unit {text}: it is written TARGET:LUN, two numbers")
    with opened(target_of(ctx), trace) as device, ScsiDriver(device) as host:
        yield host, (int(target), int(lun))


@command.command()
@common_options
@click.pass_context
def info(ctx: click.Context, output: Output, trace: Trace) -> None:
    """List the units there are, disks with their size."""
    found: list[dict[str, Any]] = []
    with _host(ctx, trace) as (host, _):
        for target, lun, unit in host.units():
            found.append({"target": target, "lun": lun, **asdict(unit)})
            if unit.type == 0:
                blocks, size = host.capacity(target, lun)
                found[-1] |= {"size": blocks * size, "block_size": size}

    def text() -> None:
        for unit in found:
            size = f"{human_size(unit['size'])}, blocks of {unit['block_size']}" if "size" in unit else f"type {unit['type']}"
            click.echo(f"{unit['target']}:{unit['lun']}  {unit['vendor']} {unit['product']} {unit['revision']}  {size}")

    output.emit({"units": found}, text)


@command.command()
@click.option("--offset", type=SIZE, default=0, metavar="BYTES", help="Where to begin.  [default: 0]")
@click.option("--length", type=SIZE, metavar="BYTES", help="How much.  [default: to the end of the disk]")
@place_option
@common_options
@click.pass_context
def read(ctx: click.Context, offset: int, length: int | None, place: BinaryIO, output: Output, trace: Trace) -> None:
    """Copy data from a disk to a file or to stdout (as hex within --json without --output)."""
    kept, inline = bytearray(), output.inline(place)
    with _host(ctx, trace) as (host, unit):
        blocks, size = host.capacity(*unit)
        total = max(blocks * size - offset, 0) if length is None else length
        if inline and total > _PIECE:
            raise click.UsageError(f"{total} bytes are too many for JSON; use --output")
        for at in range(offset, offset + total, _PIECE):
            data = host.read(at, min(_PIECE, offset + total - at), *unit)
            if inline:
                kept += data
            else:
                place.write(data)
    output.emit({"offset": offset, "length": total} | ({"data": kept.hex()} if inline else {}))


@command.command()
@click.option("--offset", type=SIZE, default=0, metavar="BYTES", help="Where to begin.  [default: 0]")
@source_option
@common_options
@click.pass_context
def write(ctx: click.Context, offset: int, source: BinaryIO, output: Output, trace: Trace) -> None:
    """Copy data from a file or from stdin to a disk, and make it stable."""
    done = 0
    with _host(ctx, trace) as (host, unit):
        while data := source.read(_PIECE):
            host.write(offset + done, data, *unit)
            done += len(data)
        host.flush(*unit)
    output.emit({"offset": offset, "length": done}, lambda: click.echo(f"{done} bytes written at offset {offset}"))


@command.command(name="command")
@click.argument("cdb", type=HEX)
@click.option("--data", type=HEX, default=b"", metavar="HEX", help="What goes with it.")
@click.option("--expect", type=SIZE, default=0, metavar="BYTES", help="Room for what comes back.")
@timeout_option
@common_options
@click.pass_context
def any_command(ctx: click.Context, cdb: bytes, data: bytes, expect: int, timeout: float, output: Output, trace: Trace) -> None:
    """Carry out any command, given in hex, and print what came back."""
    with _host(ctx, trace) as (host, unit):
        answer = host.command(cdb, data, expect, *unit, timeout=timeout)
    output.emit({"data": answer.hex()}, lambda: click.echo(answer.hex()))
