# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The command ``vdpa-bridge``: one module per command.

Rules of this package: a command knows Device, drivers and Target, no transport; what costs time to import is imported
where it is used; an error that a user can meet is one line on stderr, ``error: what: why; what to do``, and a status:

    0    done
    1    the device or its peer said no, or a comparison found a difference
    2    wrong usage
    10.. what `explain` found (explain/causes.py)
    130  interrupted
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from ..errors import FeatureError, ProtocolError, reason

COMMANDS = ("list", "show", "explain", "mgmt", "ops", "call", "blk", "net", "rng", "console", "scsi", "fs", "vsock", "input", "gpio", "i2c", "drive", "serve", "vduse", "compare", "bench", "descriptors")
"""The modules of this package that hold a ``command``, in the order of --help."""

FAILED, USAGE, INTERRUPTED = 1, 2, 130


def describe_error(error: BaseException) -> tuple[str, int]:
    """What to print for an error that is no defect of ours, and the exit status; ("", 1) for one that is."""
    text, status = _described(error)
    return "; ".join([text, *getattr(error, "__notes__", ())]) if text else "", status


def _described(error: BaseException) -> tuple[str, int]:
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "vdpa-bridge"
        return f"{error.format_message().rstrip('.')}; see {path} --help", USAGE
    if isinstance(error, click.ClickException):
        return error.format_message(), USAGE
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return "interrupted", INTERRUPTED
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}", FAILED
    if isinstance(error, (OSError, ProtocolError, FeatureError, MemoryError)):
        return reason(error), FAILED
    if isinstance(error, ValueError):
        return reason(error), USAGE
    return "", FAILED


class Program(click.Command):
    """What a user starts: turns errors into lines and statuses."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> NoReturn:
        """Run the command line and leave the process with its status."""
        extra["standalone_mode"] = False
        extra["prog_name"] = self.name
        try:
            status = super().main(args, *rest, **extra)
            sys.stdout.flush()
        except BrokenPipeError as error:
            if error.errno != errno.EPIPE or error.strerror != os.strerror(errno.EPIPE):
                self._leave(error)  # a device's own words
            with open(os.devnull, "wb") as nothing:  # whoever read our output has enough of it
                os.dup2(nothing.fileno(), sys.stdout.fileno())
            sys.exit(FAILED)
        except (Exception, KeyboardInterrupt) as error:
            self._leave(error)
        sys.exit(status if isinstance(status, int) else 0)

    def _leave(self, error: BaseException) -> NoReturn:
        text, status = describe_error(error)
        if not text or os.environ.get("VDPA_BRIDGE_DEBUG"):
            raise error
        click.echo(text if status == INTERRUPTED else f"error: {text}", err=True)
        sys.exit(status)


class Commands(Program, click.Group):
    """Imports a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, without an import."""
        return [*COMMANDS]  # the module of the command `list` hides the builtin here

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one."""
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = import_module(f".{cmd_name}", __name__).command
        return found


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        click.echo(f"vdpa-bridge {version('vdpa-bridge')}")
    except PackageNotFoundError:
        click.echo("vdpa-bridge from a source tree, not installed")
    ctx.exit()


@click.command(
    "vdpa-bridge",
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
A TARGET names a device, wherever it lives:
  /dev/vhost-vdpa-0                  a kernel device by its node
  vdpa:NAME                          a kernel device by its name (vdpa-bridge list)
  vhost-user:PATH[?type=blk]         whoever serves that socket; vDPA mode if it offers it
  vhost-user:PATH?vdpa=off&type=blk  the same by stock vhost-user messages
  vhost-net:TAP, vhost-vsock:CID     a NIC on a tap, a socket device, served by the kernel itself
  model:blk?size=256M, model:net     a device in this process
  child:blk?size=256M, child:net     the same in a sandboxed process of its own

\b
Every command takes --json[=FILE] and --trace[=FILE]. VDPA_BRIDGE_DEBUG=1 adds Python's traceback to errors.""",
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version and exit.")
def main() -> None:
    """vDPA devices by one set of operations, whether they live in the kernel, behind a vhost-user socket or in a process."""
