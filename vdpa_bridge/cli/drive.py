# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge drive``: a device of any type, by its queues."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from .common import HEX, SIZE, Group, Output, Trace, common_options, opened, show_facts, target_argument, target_of, timeout_option

if TYPE_CHECKING:
    from ..drivers import GenericDriver


@click.group(
    name="drive",
    short_help="Drive a device of any type by hand.",
    cls=Group,
    examples="""
vdpa-bridge drive /dev/vhost-vdpa-0 info
vdpa-bridge drive model:rng send 0 --expect 32
vdpa-bridge drive 'vhost-user:/run/gpu.sock?type=gpu' send 0 000100000000000000000000000000000000000000000000 --expect 408
vdpa-bridge drive /dev/vhost-vdpa-0 send 0 00000000000000000000000000000000 --expect 512 --expect 1 --json
""",
)
@target_argument
def command(target: str) -> None:
    """Bring TARGET up, whatever it is, and put chains of buffers on its queues."""


@contextmanager
def _driver(ctx: click.Context, trace: Trace) -> Iterator[GenericDriver]:
    from ..drivers import GenericDriver

    with opened(target_of(ctx), trace) as device, GenericDriver(device) as driver:
        yield driver


@command.command()
@common_options
@click.pass_context
def info(ctx: click.Context, output: Output, trace: Trace) -> None:
    """Show type, queues, the features agreed on and the configuration space."""
    with _driver(ctx, trace) as driver:
        facts = {"target": driver.name, **driver.info}
    output.emit(facts, lambda: show_facts(facts))


@command.command()
@click.argument("queue", type=click.IntRange(0))
@click.argument("readable", nargs=-1, type=HEX, metavar="[HEX]...")
@click.option("--expect", "writable", type=SIZE, multiple=True, metavar="BYTES", help="A buffer of that size for the answer; may be repeated.")
@timeout_option
@common_options
@click.pass_context
def send(
    ctx: click.Context, queue: int, readable: tuple[bytes, ...], writable: tuple[int, ...], timeout: float, output: Output, trace: Trace
) -> None:
    """Put one chain on QUEUE, buffers of HEX for the device to read and buffers for it to write, and print what it wrote."""
    if not readable and not writable:
        raise click.UsageError("a chain has a buffer at least: HEX, --expect BYTES, or both")
    with _driver(ctx, trace) as driver:
        written, data = driver.transact(queue, readable, writable, timeout)
    answer = b"".join(data)[:written]
    output.emit({"queue": queue, "written": written, "data": [part.hex() for part in data]}, lambda: click.echo(answer.hex()))
