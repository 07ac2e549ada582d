# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vhost-user-vdpa-blk`` and its kind: one program per device type, by vhost-user's "back-end program conventions".

Rules of this file: a program is a row of PROGRAMS, and what it claims to support follows from the options in that row;
options of devices are those of the model, under the name that the conventions have for them if they have one; stdout
belongs to ``--print-capabilities``.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import click

from . import Program
from .common import Command, Trace, trace_option
from .serve import run, sandbox_option, service_options


@dataclass(frozen=True)
class BackEnd:
    """A program that serves the model *kind*, for management software that looks for a *type* (``VHostUserBackendType``)."""

    kind: str
    type: str
    what: str
    examples: str
    conventional: tuple[click.Option, ...] = ()
    """Options that the conventions define for the type, and whose presence is a feature."""
    own: tuple[click.Option, ...] = ()
    """Options beyond the conventions."""
    described: bool = True
    """Whether there is a descriptor: not for a *type* that the schema does not know, at which its readers (libvirt) give up on all of them."""

    @property
    def name(self) -> str:
        """Of the executable."""
        return f"vhost-user-vdpa-{self.kind}"

    @property
    def file(self) -> str:
        """Of the descriptor."""
        return f"50-vdpa-bridge-{self.kind}.json"

    def capabilities(self) -> dict[str, object]:
        """A ``VHostUserBackendCapabilities``: features only where the schema knows some for the type."""
        features = [option.opts[0].removeprefix("--") for option in self.conventional]
        return {"type": self.type} | ({"features": features} if features else {})

    def descriptor(self, directory: Path) -> dict[str, object]:
        """A ``VhostUserBackend`` for the program in *directory*, which is absolute."""
        return {"description": f"vdpa-bridge {self.what}", "type": self.type, "binary": str(directory / self.name)}


PROGRAMS = {
    program.kind: program
    for program in (
        BackEnd(
            "blk",
            "block",
            "disk",
            """
vhost-user-vdpa-blk --socket-path /run/disk.sock --blk-file disk.img
vhost-user-vdpa-blk --fd 3 --blk-file /dev/vg0/guest --read-only
vhost-user-vdpa-blk --socket-path /run/scratch.sock --size 1G --queues 4 -v
vhost-user-vdpa-blk --socket-path /run/remote.sock --nbd 'nbd+unix:///?socket=/run/nbd.sock' --blk-size 4K
""",
            (
                click.Option(["--blk-file", "file"], metavar="PATH", help="The file or block device that holds the disk.  [default: memory]"),
                click.Option(["--read-only", "readonly"], flag_value="on", default=None, help="Offer the disk for reading alone."),
            ),
            (
                click.Option(["--size"], metavar="SIZE", help="Of a disk in memory: 64M, 1G.  [default: 256M]"),
                click.Option(["--nbd"], metavar="URI", help="The export of an NBD server: nbd://HOST/NAME, nbd+unix:///NAME?socket=PATH."),
                click.Option(["--nbd-timeout"], metavar="SECONDS", help="That a request to it may take.  [default: 30]"),
                click.Option(["--blk-size"], metavar="SIZE", help="Of a logical block.  [default: the image's: 512, or more]"),
                click.Option(["--physical-size"], metavar="SIZE", help="Of a block of the medium."),
                click.Option(["--min-io-size"], metavar="SIZE", help="Requests that are no multiple of it are slow."),
                click.Option(["--opt-io-size"], metavar="SIZE", help="Requests of this size are fastest."),
                click.Option(["--alignment-offset"], metavar="SIZE", help="Where the first whole block of the medium begins."),
                click.Option(["--discard"], metavar="on|off", help="Whether the driver may discard blocks.  [default: on, where the image can]"),
                click.Option(["--serial"], metavar="TEXT", help="What the disk calls itself, at most 20 bytes."),
                click.Option(["--queues"], metavar="N", help="Request queues.  [default: 1]"),
            ),
        ),
        BackEnd(
            "console",
            "console",
            "console with ports to terminals, sockets and files",
            """
vhost-user-vdpa-console --socket-path /run/console.sock --ports pty:link=/run/vm.tty
vhost-user-vdpa-console --socket-path /run/console.sock --ports 'stdio,listen:path=/run/agent.sock;name=org.example.agent'
""",
            (),
            (
                click.Option(
                    ["--ports"],
                    metavar="KIND[:OPTION=VALUE;...],...",
                    help="pty (link=), listen (path=), connect (path=), stdio, file (path=); each with name= and console=on|off.  [default: pty]",
                ),
            ),
        ),
        BackEnd(
            "gpio",
            "gpio",
            "GPIO controller with simulated lines",
            """
vhost-user-vdpa-gpio --socket-path /run/gpio.sock --names led,button --loop led:button
vhost-user-vdpa-gpio --socket-path /run/gpio.sock --lines 16 --control /run/lines.sock
echo set 3 1 | nc -UN /run/lines.sock
""",
            (),
            (
                click.Option(["--lines"], metavar="N", help="How many there are.  [default: 8, or one for each name]"),
                click.Option(["--names"], metavar="NAME,NAME", help="Of the lines, from the first on; empty for one without."),
                click.Option(["--loop"], metavar="LINE:LINE,...", help="Wires: an output at one end is what the other end senses."),
                click.Option(["--high"], metavar="LINE,LINE", help="Inputs that are high at first."),
                click.Option(["--control"], metavar="PATH", help="A socket for lines of text that get, set and watch lines."),
            ),
            described=False,
        ),
        BackEnd(
            "i2c",
            "i2c",
            "I2C bus with simulated devices",
            """
vhost-user-vdpa-i2c --socket-path /run/i2c.sock --devices 'eeprom@50:file=board.bin,thermometer@48:temperature=23.5'
vhost-user-vdpa-i2c --fd 3 --devices 'ram@20:size=16,eeprom@50:size=32K;page=64'
""",
            (),
            (
                click.Option(
                    ["--devices"],
                    metavar="KIND@ADDRESS[:OPTION=VALUE;...],...",
                    help="eeprom (file=, size=, page=, readonly=on), ram (size=), thermometer (temperature=, file=).  [default: eeprom@50]",
                ),
            ),
            described=False,
        ),
        BackEnd(
            "input",
            "input",
            "keyboard, mouse or tablet",
            """
vhost-user-vdpa-input --socket-path /run/input.sock --evdev-path /dev/input/event3
vhost-user-vdpa-input --socket-path /run/input.sock --kind tablet --control /run/tablet.sock
echo abs x 100, abs y 200 | nc -UN /run/tablet.sock
""",
            (
                click.Option(["--evdev-path", "evdev"], metavar="PATH", help="The device of this machine whose events are passed on."),
                click.Option(["--no-grab", "grab"], flag_value="off", default=None, help="Leave that device to others as well."),
            ),
            (
                click.Option(["--kind"], metavar="KIND", help="Without such a device: keyboard, mouse or tablet.  [default: keyboard]"),
                click.Option(["--name"], metavar="TEXT", help="What it calls itself."),
                click.Option(["--serial"], metavar="TEXT", help="Its serial number."),
                click.Option(["--script"], metavar="PATH", help="A file of events to play whenever a driver is ready."),
                click.Option(["--control"], metavar="PATH", help="A socket for events as lines of text: key a, rel x 5, abs x 9."),
            ),
        ),
        BackEnd(
            "net",
            "net",
            "network interface",
            """
vhost-user-vdpa-net --socket-path /run/net.sock --tap tap0 --pairs 4
vhost-user-vdpa-net --socket-path /run/net.sock --user --tcp-ports 2222:22
vhost-user-vdpa-net --socket-path /run/net.sock --stream /run/switch.sock --pcap-out net.pcapng
vhost-user-vdpa-net --fd 3 --mac 52:54:00:12:34:56 --mtu 9000 --log-format json -v
""",
            (),
            (
                click.Option(["--mac"], metavar="ADDRESS", help="Of the interface.  [default: 02:00:00:00:00:01]"),
                click.Option(["--mtu"], metavar="BYTES", help="Of the interface.  [default: that of the tap, 1500]"),
                click.Option(["--pairs"], metavar="N", help="Queue pairs, of a tap or a loop.  [default: 1]"),
                click.Option(["--tap"], metavar="NAME", help="Frames go to this tap, made if it is not there.  [default: frames come back]"),
                click.Option(["--dgram"], metavar="LOCAL[,REMOTE]", help="Frames go over a UNIX datagram socket, as QEMU's -netdev dgram."),
                click.Option(["--stream"], metavar="PATH", help="Frames go over a UNIX stream socket, as QEMU's -netdev stream."),
                click.Option(["--server"], flag_value="on", default=None, help="Listen at the stream's PATH instead of connecting."),
                click.Option(["--user"], flag_value="on", default=None, help="User networking by passt, which is started and ended."),
                click.Option(["--tcp-ports"], metavar="PORTS", help="Ports that passt forwards to the guest: 2222:22 (passt(1))."),
                click.Option(["--udp-ports"], metavar="PORTS", help="The same for UDP."),
                click.Option(["--pcap-in"], metavar="FILE", help="Frames come from this capture; what is sent goes nowhere."),
                click.Option(["--pcap-out"], metavar="FILE", help="Write all frames there, as pcapng."),
                click.Option(["--link"], metavar="up|down", help="Whether the cable is in.  [default: up]"),
                click.Option(["--speed"], metavar="MBITS", help="What the interface says its speed is."),
            ),
        ),
        BackEnd(
            "rng",
            "rng",
            "entropy source",
            """
vhost-user-vdpa-rng --socket-path /run/rng.sock
vhost-user-vdpa-rng --fd 3
""",
        ),
        BackEnd(
            "scsi",
            "scsi",
            "SCSI host with disks",
            """
vhost-user-vdpa-scsi --socket-path /run/disks.sock --file system.img,data.img
vhost-user-vdpa-scsi --fd 3 --size 1G,64M --queues 4
""",
            (),
            (
                click.Option(["--file"], metavar="PATH,PATH", help="The files or block devices that hold the disks.  [default: memory]"),
                click.Option(["--size"], metavar="SIZE,SIZE", help="Of disks in memory: 64M, 1G.  [default: 256M]"),
                click.Option(["--read-only", "readonly"], flag_value="on", default=None, help="Offer the disks for reading alone."),
                click.Option(["--serial"], metavar="TEXT", help="What the disks call themselves, before their number."),
                click.Option(["--queues"], metavar="N", help="Request queues.  [default: 1]"),
            ),
        ),
        BackEnd(
            "vsock",
            "vsock",
            "socket device with UNIX sockets on the host",
            """
vhost-user-vdpa-vsock --socket-path /run/vm3.sock --guest-cid 3 --uds-path /run/vm3.vsock
vhost-user-vdpa-vsock --fd 3 --guest-cid 4 --uds-path /run/vm4.vsock --peers 3:/run/vm3.vsock
""",
            (),
            (
                click.Option(["--guest-cid", "cid"], metavar="CID", help="The guest's context id.  [default: 3]"),
                click.Option(["--uds-path", "uds"], metavar="PATH", help="Where clients of the host connect; the guest's connections to port P go to PATH_P."),
                click.Option(["--peers"], metavar="CID:PATH,...", help="Other guests that this one may connect to, by the --uds-path of their devices."),
            ),
        ),
    )
}
"""By the name of the model."""


class _Launcher(Command, Program):
    """The command of a back-end."""

    def __init__(self, *args: Any, capabilities: dict[str, object], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._capabilities = capabilities

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Whoever asks for capabilities gets nothing else, whatever the other words are."""
        if "--print-capabilities" in args:
            click.echo(json.dumps(self._capabilities, indent=2))
            ctx.exit()
        return super().parse_args(ctx, args)


def _command(back_end: BackEnd) -> click.Command:
    def serve(
        socket_path: str | None,
        fd: int | None,
        vdpa: str,
        socket_mode: int,
        socket_group: int | None,
        timeout: float,
        qmp: str | None,
        log_format: str,
        verbose: bool,
        sandbox: str,
        trace: Trace,
        **device: str | None,
    ) -> int:
        from ..service.journal import event as log
        from ..service.spec import DeviceSpec, checked

        if (socket_path is None) == (fd is None):
            raise click.UsageError("give either --socket-path or --fd")
        options = urlencode({name.replace("_", "-"): value for name, value in device.items() if value is not None})
        target = f"model:{back_end.kind}{'?' if options else ''}{options}"
        spec = DeviceSpec(target, socket_path, back_end.kind, socket_mode, socket_group, vdpa, timeout)

        def tell(text: str, *, event: str, **facts: object) -> None:
            log(logging.INFO, event, text, back_end.kind)

        return run(checked([spec]), [(spec.name, fd)] if fd is not None else [], tell, trace, log_format, verbose, sandbox, qmp)

    params: list[click.Parameter] = [
        click.Option(["--socket-path"], metavar="PATH", help="Where to listen, for client after client; a stale socket there is replaced."),
        click.Option(["--fd"], type=click.IntRange(0), metavar="FDNUM", help="A socket to take over instead: one that listens, or is connected to the only client."),
        click.Option(["--print-capabilities"], is_flag=True, expose_value=False, help="Print what this program supports as JSON, and do nothing else."),
        *back_end.conventional,
        *back_end.own,
    ]
    text = f"""Serve a {back_end.what} on a vhost-user socket, in the foreground, until SIGTERM or SIGINT.

    The program follows vhost-user's back-end program conventions. Its log goes to stderr.
    """
    build = click.command(
        back_end.name,
        cls=_Launcher,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        params=params,
        help=text,
        examples=back_end.examples,
        capabilities=back_end.capabilities(),
    )
    command: click.Command = build(sandbox_option("on")(service_options(trace_option(serve))))
    return command


blk, console, gpio, i2c, net, rng, scsi, vsock = (_command(PROGRAMS[kind]) for kind in ("blk", "console", "gpio", "i2c", "net", "rng", "scsi", "vsock"))
input = _command(PROGRAMS["input"])  # noqa: A001 - the program's name
