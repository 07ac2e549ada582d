# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge vsock``: one connection through a socket device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

import click

from .common import Group, Output, Trace, common_options, opened, place_option, source_option, target_argument, target_of, timeout_option

if TYPE_CHECKING:
    from ..drivers import VsockDriver
    from ..drivers.vsock import VsockStream

_PIECE = 64 << 10


@click.group(
    name="vsock",
    short_help="Connect through a socket device.",
    cls=Group,
    examples="""
vdpa-bridge vsock 'vhost-user:/run/vsock.sock?type=vsock' info
echo hello | vdpa-bridge vsock 'vhost-user:/run/vsock.sock?type=vsock' connect 1234
vdpa-bridge vsock 'vhost-user:/run/vsock.sock?type=vsock' listen 1234 --timeout 60 --output received
""",
)
@target_argument
def command(target: str) -> None:
    """Connect to ports of the host, or be connected to, through the socket device TARGET."""


@contextmanager
def _sockets(ctx: click.Context, trace: Trace) -> Iterator[VsockDriver]:
    from ..drivers import VsockDriver

    with opened(target_of(ctx), trace) as device, VsockDriver(device) as sockets:
        yield sockets


@command.command()
@common_options
@click.pass_context
def info(ctx: click.Context, output: Output, trace: Trace) -> None:
    """Show our context id."""
    with _sockets(ctx, trace) as sockets:
        cid = sockets.cid
    output.emit({"cid": cid}, lambda: click.echo(f"context id {cid}"))


def _exchange(stream: VsockStream, source: BinaryIO, place: BinaryIO, timeout: float, output: Output) -> None:
    """Send all of *source*, say so, and keep what comes until the other end has sent all."""
    kept, inline, sent, came = bytearray(), output.inline(place), 0, 0
    while data := source.read(_PIECE):
        stream.send(data, timeout)
        sent += len(data)
    stream.shutdown(timeout)
    while data := stream.receive(_PIECE, timeout):
        came += len(data)
        if inline:
            kept += data
        else:
            place.write(data)
            place.flush()
    output.emit({"sent": sent, "received": came} | ({"data": kept.hex()} if inline else {}))


@command.command()
@click.argument("port", type=click.IntRange(0, (1 << 32) - 1))
@click.option("--cid", type=click.IntRange(0), default=2, show_default=True, help="Context id of the other end; 2 is the host.")
@source_option
@place_option
@timeout_option
@common_options
@click.pass_context
def connect(
    ctx: click.Context, port: int, cid: int, source: BinaryIO, place: BinaryIO, timeout: float, output: Output, trace: Trace
) -> None:
    """Connect to PORT, send a file or stdin, and copy what comes back to a file or to stdout."""
    with _sockets(ctx, trace) as sockets, sockets.connect(port, cid, timeout) as stream:
        _exchange(stream, source, place, timeout, output)


@command.command()
@click.argument("port", type=click.IntRange(0, (1 << 32) - 1))
@source_option
@place_option
@timeout_option
@common_options
@click.pass_context
def listen(ctx: click.Context, port: int, source: BinaryIO, place: BinaryIO, timeout: float, output: Output, trace: Trace) -> None:
    """Wait for a connection to PORT, send a file or stdin, and copy what comes to a file or to stdout."""
    with _sockets(ctx, trace) as sockets:
        sockets.listen(port)
        with sockets.accept(port, timeout) as stream:
            _exchange(stream, source, place, timeout, output)
