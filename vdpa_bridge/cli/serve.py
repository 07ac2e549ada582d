# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge serve``: a device, wherever it lives, for vhost-user clients of both kinds.

Rule of this file: it ends as it should. SIGTERM and SIGINT stop it at once with status 0 and without a socket file; a
target that cannot be opened is an error before anybody is told that the socket is there.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING

import click

from .common import Command, IntType, Output, Trace, common_options

if TYPE_CHECKING:
    from ..backends.base import Backend

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Mode(IntType):
    """Permission bits in octal."""

    name = "octal"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """``660`` to 0o660."""
        if isinstance(value, int):
            return value
        try:
            mode = int(str(value), 8)
        except ValueError:
            mode = -1
        if not 0 <= mode <= 0o777:
            self.fail(f"{value} is not an octal mode up to 777", param, ctx)
        return mode


@click.command(
    cls=Command,
    short_help="Serve a device to vhost-user clients.",
    examples="""
vdpa-bridge serve 'model:blk?file=disk.img' --socket-path /run/disk.sock
vdpa-bridge serve /dev/vhost-vdpa-0 --socket-path /run/hw.sock --socket-mode 660
vdpa-bridge serve 'vhost-user:/run/legacy.sock?type=net' --socket-path /run/vdpa.sock --vdpa require
vdpa-bridge serve model:net --socket-path net.sock --json | while read event; do ...; done
""",
)
@click.argument("target")
@click.option("--socket-path", metavar="PATH", help="Where to listen; a stale socket there is replaced.")
@click.option("--fd", type=int, help="A listening socket to take over instead.")
@click.option(
    "--vdpa",
    type=click.Choice(["require", "prefer", "off"]),
    default="prefer",
    show_default=True,
    help="vDPA mode: only, besides stock vhost-user, or never.",
)
@click.option("--socket-mode", type=Mode(), default=0o600, metavar="OCTAL", help="Permissions of the socket.  [default: 600]")
@click.option(
    "--timeout", type=click.FloatRange(0.1, 3600), default=5.0, show_default=True, help="Seconds that a client may stall within a message."
)
@click.option("-v", "--verbose", is_flag=True, help="Log clients that come and go.")
@common_options
def command(
    target: str,
    socket_path: str | None,
    fd: int | None,
    vdpa: str,
    socket_mode: int,
    timeout: float,
    verbose: bool,
    output: Output,
    trace: Trace,
) -> int:
    """Serve TARGET on a vhost-user socket, to client after client, until SIGTERM or SIGINT.

    One line on stdout says that clients can come ({"event": "ready", ...} with --json); the log goes to stderr.
    """
    from ..targets import Target
    from ..vhost_user.server import Server

    if (socket_path is None) == (fd is None):
        raise click.UsageError("either --socket-path or --fd is needed")
    _log_to_stderr(verbose)
    parsed = Target.parse(target)
    # Before any thread starts, so that only sigwait below gets them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    waiting: list[Backend] = []
    try:
        waiting.append(trace.wrap(parsed.open()))  # for the first client; what cannot be opened shows now

        def open_device() -> Backend:
            return waiting.pop() if waiting else trace.wrap(parsed.open())

        mask = os.umask(0o777 & ~socket_mode)
        try:
            server = Server(open_device, socket_path or "", sock=None if fd is None else _listening(fd), vdpa=vdpa, timeout=timeout)
        finally:
            os.umask(mask)
        place = socket_path or f"fd {fd}"
        with server:
            output.event(f"serving {target} on {place} (vdpa={vdpa})", event="ready", target=target, socket=place, vdpa=vdpa)
            got = signal.sigwait(_SIGNALS)
        output.event(f"stopped by {signal.Signals(got).name} after {server.served} connections", event="stopped", connections=server.served)
    finally:
        for backend in waiting:
            backend.close()
        parsed.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return 0


def _listening(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ValueError(f"--fd {fd}: {error.strerror}; it must be a listening Unix socket") from None
    if sock.family != socket.AF_UNIX or not listens:
        sock.detach()
        raise ValueError(f"--fd {fd} is no listening Unix socket")
    return sock


def _log_to_stderr(verbose: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("vdpa_bridge")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
