# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge console``: bytes to and from a port of a console device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

import click

from .common import (
    Group,
    Output,
    Trace,
    common_options,
    opened,
    place_option,
    show_facts,
    source_option,
    target_argument,
    target_of,
    timeout_option,
)

if TYPE_CHECKING:
    from ..drivers import ConsoleDriver


@click.group(
    name="console",
    short_help="Write to and read from a console.",
    cls=Group,
    examples="""
vdpa-bridge console /dev/vhost-vdpa-0 info
echo hello | vdpa-bridge console /dev/vhost-vdpa-0 write
vdpa-bridge console --port org.qemu.guest_agent.0 /dev/vhost-vdpa-0 read --timeout 60
""",
)
@click.option("--port", metavar="PORT", help="One of several ports, by number or name.")
@target_argument
def command(target: str, port: str | None) -> None:
    """Write to and read from the console TARGET."""


@contextmanager
def _console(ctx: click.Context, trace: Trace) -> Iterator[ConsoleDriver]:
    from ..drivers import ConsoleDriver

    assert ctx.parent is not None
    port = ctx.parent.params["port"]
    with opened(target_of(ctx), trace) as device:
        try:
            console = ConsoleDriver(device, port=int(port) if port is not None and port.isdecimal() else port)
        except LookupError as error:
            raise ValueError(str(error)) from None
        with console:
            yield console


@command.command()
@common_options
@click.pass_context
def info(ctx: click.Context, output: Output, trace: Trace) -> None:
    """Show size and ports, as far as the device tells; the names of ports with --port."""
    with _console(ctx, trace) as console:
        facts = {"target": console.name, **console.info, "ports": {str(number): name for number, name in console.ports.items()}}
    output.emit(facts, lambda: show_facts(facts))


@command.command()
@source_option
@timeout_option
@common_options
@click.pass_context
def write(ctx: click.Context, source: BinaryIO, timeout: float, output: Output, trace: Trace) -> None:
    """Copy a file or stdin to the console."""
    done = 0
    with _console(ctx, trace) as console:
        while data := source.read(1 << 16):
            console.write(data, timeout)
            done += len(data)
    output.emit({"length": done}, lambda: click.echo(f"{done} bytes written"))


@command.command()
@place_option
@timeout_option
@common_options
@click.pass_context
def read(ctx: click.Context, place: BinaryIO, timeout: float, output: Output, trace: Trace) -> None:
    """Copy what comes to a file or to stdout, until nothing has come for --timeout seconds (as hex within --json without --output)."""
    kept, inline, length = bytearray(), output.inline(place), 0
    with _console(ctx, trace) as console:
        while True:
            try:
                data = console.read(timeout)
            except TimeoutError:
                break
            length += len(data)
            if inline:
                kept += data
            else:
                place.write(data)
                place.flush()
    output.emit({"length": length} | ({"data": kept.hex()} if inline else {}))
