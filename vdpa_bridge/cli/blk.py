# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge blk``: bytes of a disk in and out.

Rule of this file: data goes through in pieces of bounded size, whatever the length; what is printed on stdout by
``read`` is the data and nothing else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from .common import SIZE, Group, Output, Trace, common_options, human_size, opened, place_option, target_argument, target_of

if TYPE_CHECKING:
    from ..drivers import BlkDriver

_PIECE = 1 << 20
"""Bytes under way between a file and the driver."""
_LONG = 16 << 20
"""Bytes from which on a progress bar is shown."""


@click.group(
    name="blk",
    short_help="Read and write a block device.",
    cls=Group,
    examples="""
vdpa-bridge blk /dev/vhost-vdpa-0 info
vdpa-bridge blk 'vhost-user:/run/disk.sock?type=blk' read --length 64M --output image
vdpa-bridge blk model:blk write --offset 1M --input data.bin --flush
echo hello | vdpa-bridge blk 'model:blk?file=disk.img' write
vdpa-bridge blk /dev/vhost-vdpa-0 zero --length 1G --unmap
""",
)
@target_argument
def command(target: str) -> None:
    """Read and write the block device TARGET.

    Offsets and lengths are multiples of 512 bytes and may be written 4096, 0x1000, 64K, 1M or 1G.
    """


@contextmanager
def _disk(ctx: click.Context, trace: Trace) -> Iterator[BlkDriver]:
    from ..drivers import BlkDriver

    with opened(target_of(ctx), trace) as device, BlkDriver(device) as disk:
        yield disk


_offset = click.option("--offset", type=SIZE, default=0, metavar="BYTES", help="Where to begin.  [default: 0]")
_length = click.option("--length", type=SIZE, metavar="BYTES", help="How much.  [default: to the end of the disk]")


def _extent(disk: BlkDriver, offset: int, length: int | None) -> int:
    """The length, which must end on the disk."""
    size = disk.info.size
    wanted = size - offset if length is None else length
    if wanted < 0 or offset + wanted > size:
        raise ValueError(f"{disk.name}: {wanted if length is not None else 'no'} bytes at offset {offset} leave the disk, which has {size}")
    return wanted


@contextmanager
def _progress(total: int, what: str) -> Iterator[Any]:
    if total < _LONG or not sys.stderr.isatty():
        yield lambda done: None
        return
    from .term import progress

    with progress(total, what) as advance:
        yield advance


@command.command()
@common_options
@click.pass_context
def info(ctx: click.Context, output: Output, trace: Trace) -> None:
    """Show size, limits, features and serial."""
    with _disk(ctx, trace) as disk:
        facts: dict[str, Any] = {"target": disk.name, "size": disk.info.size, **asdict(disk.info)}
        try:
            facts["serial"] = disk.get_id()
        except OSError:
            facts["serial"] = None  # not every device has one
    facts["features"] = list(facts["features"])

    def text() -> None:
        for key, value in facts.items():
            note = f" ({human_size(value)})" if key == "size" else ""
            shown = " ".join(value) if isinstance(value, list) else "none" if value is None else value
            click.echo(f"{key.replace('_', ' '):26}{shown}{note}")

    output.emit(facts, text)


@command.command()
@_offset
@_length
@place_option
@common_options
@click.pass_context
def read(ctx: click.Context, offset: int, length: int | None, place: BinaryIO, output: Output, trace: Trace) -> None:
    """Copy data from the disk to a file or to stdout (as hex within --json without --output)."""
    inline = output.inline(place)
    kept = bytearray()
    with _disk(ctx, trace) as disk:
        total = _extent(disk, offset, length)
        if inline and total > _PIECE:
            raise click.UsageError(f"{total} bytes are too many for JSON; use --output")
        with _progress(total, "read") as advance:
            for at in range(0, total, _PIECE):
                data = disk.read(offset + at, min(_PIECE, total - at))
                if inline:
                    kept += data
                else:
                    place.write(data)
                advance(len(data))
        if not inline:
            place.flush()
    result = {"offset": offset, "length": total} | ({"data": kept.hex()} if inline else {})
    output.emit(result)


@command.command()
@_offset
@click.option("--input", "-i", "place", type=click.File("rb"), default="-", metavar="FILE", help="What to write.  [default: stdin]")
@click.option("--pad", is_flag=True, help="Fill the last sector with zeroes if the data ends within it.")
@click.option("--flush", "also_flush", is_flag=True, help="Make it stable at the end.")
@common_options
@click.pass_context
def write(ctx: click.Context, offset: int, place: BinaryIO, pad: bool, also_flush: bool, output: Output, trace: Trace) -> None:
    """Copy data from a file or from stdin to the disk."""
    total = _size_of(place)
    done = 0
    with _disk(ctx, trace) as disk:
        if total is not None:
            _whole(0 if pad else total)
            _extent(disk, offset, total if not pad else total + -total % 512)
        with _progress(total or 0, "write") as advance:
            while data := _read_full(place):
                if pad:
                    data += bytes(-len(data) % 512)
                _whole(len(data))
                disk.write(offset + done, data)
                done += len(data)
                advance(len(data))
        if also_flush:
            disk.flush()
    output.emit({"offset": offset, "length": done}, lambda: click.echo(f"{done} bytes written at offset {offset}"))


def _whole(length: int) -> None:
    if length % 512:
        raise ValueError(f"the data ends within a sector ({length % 512} of 512 bytes); --pad fills it with zeroes")


def _size_of(file: BinaryIO) -> int | None:
    """Bytes of a file that has a size."""
    try:
        return os.fstat(file.fileno()).st_size or None
    except (OSError, ValueError):
        return None


def _read_full(file: BinaryIO) -> bytes:
    """A whole piece, shorter only at the end, as pipes give less than one asks for."""
    data = b""
    while len(data) < _PIECE and (more := file.read(_PIECE - len(data))):
        data += more
    return data


@command.command()
@common_options
@click.pass_context
def flush(ctx: click.Context, output: Output, trace: Trace) -> None:
    """Make all completed writes stable."""
    with _disk(ctx, trace) as disk:
        disk.flush()
    output.emit({"flushed": True}, lambda: click.echo("flushed"))


@command.command(name="id")
@common_options
@click.pass_context
def show_id(ctx: click.Context, output: Output, trace: Trace) -> None:
    """Print the serial."""
    with _disk(ctx, trace) as disk:
        serial = disk.get_id()
    output.emit({"id": serial}, lambda: click.echo(serial))


@command.command()
@click.option("--offset", type=SIZE, required=True, metavar="BYTES", help="Where to begin.")
@click.option("--length", type=SIZE, required=True, metavar="BYTES", help="How much.")
@common_options
@click.pass_context
def discard(ctx: click.Context, offset: int, length: int, output: Output, trace: Trace) -> None:
    """Tell the device that a range is not needed any more; its content is undefined then."""
    with _disk(ctx, trace) as disk:
        disk.discard(offset, _extent(disk, offset, length))
    output.emit({"offset": offset, "length": length}, lambda: click.echo(f"{length} bytes discarded at offset {offset}"))


@command.command()
@click.option("--offset", type=SIZE, default=0, metavar="BYTES", help="Where to begin.  [default: 0]")
@click.option("--length", type=SIZE, required=True, metavar="BYTES", help="How much.")
@click.option("--unmap", is_flag=True, help="The device may give the space back.")
@common_options
@click.pass_context
def zero(ctx: click.Context, offset: int, length: int, unmap: bool, output: Output, trace: Trace) -> None:
    """Let zeroes be read in a range."""
    with _disk(ctx, trace) as disk:
        disk.write_zeroes(offset, _extent(disk, offset, length), unmap)
    output.emit({"offset": offset, "length": length}, lambda: click.echo(f"{length} bytes zeroed at offset {offset}"))
