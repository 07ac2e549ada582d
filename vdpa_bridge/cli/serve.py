# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge serve``: devices, wherever they live, for vhost-user clients of both kinds.

Rule of this file: words become a Service, and what becomes of it a status. SIGTERM and SIGINT stop it at once with
status 0 and without a socket file; a target that cannot be opened is an error before anybody is told that a socket is
there.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .common import Command, IntType, Output, Trace, common_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..service.server import ServiceServer
    from ..service.spec import DeviceSpec

F = TypeVar("F", bound="Callable[..., Any]")


class _Parsed(IntType):
    """A number that *parse* makes of text."""

    def __init__(self, name: str, parse: str) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Text to the number."""
        if isinstance(value, int):
            return value
        from ..service import spec

        parse: Callable[[str], int] = getattr(spec, self._parse)
        try:
            return parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def sandbox_option(default: str) -> Callable[[F], F]:
    """``--sandbox``, for programs that close it by default, and for those that do not."""
    return click.option(
        "--sandbox",
        type=click.Choice(["on", "off", "degrade", "show"]),
        default=default,
        show_default=True,
        help="Close the process in (docs/sandbox.md): or fail, not at all, as far as the kernel can; or print what would stay open.",
    )


def service_options(function: F) -> F:
    """What can be said of every service."""
    for option in reversed((
        click.option(
            "--vdpa",
            type=click.Choice(["require", "prefer", "off"]),
            default="prefer",
            show_default=True,
            help="vDPA mode: only, besides stock vhost-user, or never.",
        ),
        click.option(
            "--socket-mode", type=_Parsed("octal", "parse_mode"), default=0o600, metavar="OCTAL", help="Permissions of the sockets.  [default: 600]"
        ),
        click.option("--socket-group", type=_Parsed("group", "parse_group"), metavar="NAME|GID", help="Group of the sockets."),
        click.option(
            "--timeout", type=click.FloatRange(0.1, 3600), default=5.0, show_default=True, help="Seconds that a client may stall within a message."
        ),
        click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Of the log on stderr."),
        click.option("--qmp", metavar="PATH", help="A socket for monitors, which speak QMP as qmp-shell does.  [default: none]"),
        click.option("-v", "--verbose", is_flag=True, help="Log clients that come and go, too."),
    )):
        function = option(function)
    return function


@click.command(
    cls=Command,
    short_help="Serve a device to vhost-user clients.",
    examples="""
vdpa-bridge serve 'model:blk?file=disk.img' --socket-path /run/disk.sock
vdpa-bridge serve /dev/vhost-vdpa-0 --socket-path /run/hw.sock --socket-mode 660 --socket-group kvm
vdpa-bridge serve /run/disk.sock='model:blk?file=disk.img' /run/hw.sock=/dev/vhost-vdpa-0 -v
vdpa-bridge serve --config /etc/vdpa-bridge.toml --log-format json
vdpa-bridge serve 'vhost-user:/run/legacy.sock?type=net' --socket-path /run/vdpa.sock --vdpa require
vdpa-bridge serve model:my_device.py --socket-path dev.sock --reload
vdpa-bridge serve 'model:blk?file=disk.img' --socket-path disk.sock --qmp qmp.sock      then: qmp-shell qmp.sock
vdpa-bridge serve model:net --socket-path net.sock --json | while read event; do ...; done
""",
)
@click.argument("words", nargs=-1, metavar="[TARGET | PATH=TARGET ...]")
@click.option("--socket-path", metavar="PATH", help="Where to listen for TARGET; a stale socket there is replaced.")
@click.option("--fd", type=int, help="A socket to take over instead: one that listens, or is connected to the only client.")
@click.option("--config", metavar="FILE.toml", help="Devices as [[device]] tables: target, name, socket-path, ...")
@click.option(
    "--relay",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Move requests between rings of our own and the client's: where the device needs it, always, never.",
)
@click.option("--keep-going", is_flag=True, help="Serve the others when one device or socket cannot be had; try the device again for each client.")
@click.option("--reload", "live", is_flag=True, help="Load models of your own (model:FILE.py) anew when their files change; drivers go on with them.")
@sandbox_option("off")
@service_options
@common_options
def command(
    words: tuple[str, ...],
    socket_path: str | None,
    fd: int | None,
    config: str | None,
    vdpa: str,
    relay: str,
    socket_mode: int,
    socket_group: int | None,
    timeout: float,
    qmp: str | None,
    keep_going: bool,
    live: bool,
    sandbox: str,
    log_format: str,
    verbose: bool,
    output: Output,
    trace: Trace,
) -> int:
    """Serve each TARGET on a vhost-user socket, to client after client, until SIGTERM or SIGINT.

    Sockets can also come from a service manager (LISTEN_FDS), which is told when clients can come (NOTIFY_SOCKET). SIGHUP
    reads the sizes of disks again, SIGUSR1 logs who is served. One line per device on stdout says that clients can come, or
    one {"event": "ready", ...} for all with --json; the log goes to stderr.
    """
    from ..service.manager import passed_fds
    from ..service.spec import DeviceSpec, checked, read_config

    defaults = DeviceSpec("", mode=socket_mode, group=socket_group, vdpa=vdpa, timeout=timeout, relay=relay)
    specs = _from_words(words, socket_path, fd, defaults)
    if config is not None:
        more, place = read_config(config, defaults)
        specs, qmp = [*specs, *more], qmp or place
    if not specs:
        raise click.UsageError("nothing to serve: give a TARGET, PATH=TARGET words or --config")
    specs = checked(specs)
    passed = passed_fds() + ([(specs[0].name, fd)] if fd is not None else [])
    if sandbox != "off" and (keep_going or live):
        raise click.UsageError(f"--{'keep-going' if keep_going else 'reload'} opens files later, which --sandbox forbids")
    return run(specs, passed, output.event, trace, log_format, verbose, sandbox, qmp, keep_going=keep_going, live=live)


def run(
    specs: list[DeviceSpec],
    passed: list[tuple[str, int]],
    tell: Callable[..., None],
    trace: Trace,
    log_format: str,
    verbose: bool,
    sandbox: str,
    qmp: str | None,
    *,
    keep_going: bool = False,
    live: bool = False,
) -> int:
    """Serve *specs*, which are ``checked``, with the sockets *passed* (name, descriptor); the exit status.

    *tell* hears, as a text and as facts, that clients can come, and what ended it. *sandbox*: on, off, degrade or show. *qmp*: where monitors come to.
    """
    from ..service import sandboxed
    from ..service.journal import Journal, event
    from ..service.manager import Notifier, assign
    from ..service.service import Interrupted, Service, Signals

    inherited = assign(passed, specs)
    traced = len(specs) > 1  # lines then say whose they are
    notifier = Notifier()
    journal = Journal(sys.stderr, log_format, verbose)
    service = Service(
        specs,
        inherited,
        notifier,
        wrap=lambda backend, name: trace.wrap(backend, name if traced else ""),
        keep_going=keep_going,
        live=live,
        qmp=qmp or "",
    )
    if sandbox == "show":
        click.echo(json.dumps(sandboxed.show(service), indent=2))
        return 0
    try:
        lacks = sandboxed.enter(service, notifier, journal, sandbox) if sandbox != "off" else []
    except Interrupted as interrupted:
        with journal:
            tell(f"stopped by {interrupted.signal.name}", event="stopped", connections=0)
        return 0
    if isinstance(lacks, int):  # this is the process outside, and all is over
        return lacks
    with journal, Signals() as signals:
        for lack in lacks:
            event(logging.WARNING, "degraded", str(lack))
        try:
            service.start(signals)
            _announce(service.servers, tell)
            why, well = service.run(signals)
        except Interrupted as interrupted:
            why, well = f"stopped by {interrupted.signal.name}", True
        finally:
            ended = service.stop()
            notifier.close()
        tell(f"{why} after {service.served} connections", event="stopped", connections=service.served)
    return 0 if well and ended else 1


def _from_words(words: tuple[str, ...], socket_path: str | None, fd: int | None, defaults: DeviceSpec) -> list[DeviceSpec]:
    from ..service.spec import split_word

    if socket_path is not None and fd is not None:
        raise click.UsageError("either --socket-path or --fd, not both")
    pairs = [(None, word) if socket_path is not None or fd is not None else split_word(word) for word in words]
    if (socket_path is not None or fd is not None) and len(pairs) != 1:
        raise click.UsageError(f"--{'fd' if fd is not None else 'socket-path'} goes with exactly one TARGET")
    return [replace(defaults, target=target, socket_path=path or socket_path) for path, target in pairs]


def _announce(servers: list[ServiceServer], tell: Callable[..., None]) -> None:
    facts = [
        {"name": spec.name, "target": spec.target, "socket": server.listener.place, "vdpa": spec.vdpa}
        for server in servers
        for spec in [server.device.spec]
    ]
    only = {key: facts[0][key] for key in ("target", "socket", "vdpa")} if len(facts) == 1 else {}
    text = "\n".join(f"serving {fact['target']} on {fact['socket']} (vdpa={fact['vdpa']})" for fact in facts)
    tell(text, event="ready", **only, devices=facts)
