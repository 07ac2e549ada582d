# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge rng``: random bytes."""

from __future__ import annotations

from typing import BinaryIO

import click

from .common import SIZE, Group, Output, Trace, common_options, opened, place_option, target_argument, target_of, timeout_option

_PIECE = 64 << 10


@click.group(
    name="rng",
    short_help="Read random bytes.",
    cls=Group,
    examples="""
vdpa-bridge rng model:rng read 1M --output noise
vdpa-bridge rng /dev/vhost-vdpa-0 read 16 --json
""",
)
@target_argument
def command(target: str) -> None:
    """Read from the entropy source TARGET."""


@command.command()
@click.argument("length", type=SIZE)
@place_option
@timeout_option
@common_options
@click.pass_context
def read(ctx: click.Context, length: int, place: BinaryIO, timeout: float, output: Output, trace: Trace) -> None:
    """Copy LENGTH random bytes to a file or to stdout (as hex within --json without --output)."""
    from ..drivers import RngDriver

    kept = bytearray()
    inline = output.inline(place)
    with opened(target_of(ctx), trace) as device, RngDriver(device) as rng:
        for at in range(0, length, _PIECE):
            data = rng.read(min(_PIECE, length - at), timeout)
            if inline:
                kept += data
            else:
                place.write(data)
    output.emit({"length": length} | ({"data": kept.hex()} if inline else {}))
