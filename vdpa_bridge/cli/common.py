# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What all commands share: --json, --trace, opening a target, sizes, examples in --help.

Rule of this file: light imports only, as every command and every --help comes through here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO, TypeVar

import click

from ..errors import FeatureError, ProtocolError

if TYPE_CHECKING:
    from ..backends.base import Backend
    from ..device import Device

    IntType = click.ParamType[int]
    BytesType = click.ParamType[bytes]
else:
    IntType = BytesType = click.ParamType  # generic for type checkers only, before click 8.4

F = TypeVar("F", bound=Callable[..., Any])

_BARE = {"--json": "--json=-", "--trace": "--trace=-"}
"""Options whose value comes after ``=`` or not at all: a word that follows is never theirs."""


class Command(click.Command):
    """A command with optional option values and verbatim examples."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._examples = examples

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give a bare --json or --trace its default value."""
        end = args.index("--") if "--" in args else len(args)
        return super().parse_args(ctx, [_BARE.get(word, word) for word in args[:end]] + args[end:])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, as they are to be typed."""
        _write_examples(self._examples, formatter)


class Group(click.Group):
    """``COMMAND [TARGET] VERB ...``"""

    command_class = Command

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, as they are to be typed."""
        _write_examples(self._examples, formatter)


def _write_examples(examples: str, formatter: click.HelpFormatter) -> None:
    if examples:
        formatter.write("\nExamples:\n")
        for line in examples.strip().splitlines():
            formatter.write(f"  {line}\n")


def _complete_target(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """For the shell: what could be meant by the beginning of a target."""
    from ..models import KINDS
    from ..system.inventory import target_names

    return [name for name in (*target_names(), *(f"{scheme}:{kind}" for scheme in ("model", "child") for kind in KINDS)) if name.startswith(incomplete)]


target_argument = click.argument("target", shell_complete=_complete_target)
"""The argument TARGET, which shells can complete."""


def target_of(ctx: click.Context) -> str:
    """The target that was given before the verb."""
    assert ctx.parent is not None
    return str(ctx.parent.params["target"])


# Output ----------------------------------------------------------------------------------------------------------------


class Output:
    """Where results go. *place* is None (text), ``-`` (JSON instead of text) or a file (JSON besides the text)."""

    def __init__(self, place: str | None) -> None:
        self._place = place

    @property
    def json(self) -> bool:
        """Whether stdout belongs to JSON."""
        return self._place == "-"

    def inline(self, place: BinaryIO) -> bool:
        """Whether data for *place* goes into the JSON as hex, as both are on stdout."""
        return self.json and getattr(place, "name", "-") in ("-", "<stdout>")

    def emit(self, data: object, text: Callable[[], object] = lambda: None) -> None:
        """One result: *data* as JSON, or what *text* prints."""
        if self._place == "-":
            click.echo(json.dumps(data, indent=2))
            return
        if self._place is not None:
            Path(self._place).write_text(json.dumps(data, indent=2) + "\n")
        text()

    def event(self, text: str, **data: object) -> None:
        """One of several results: a line of text, or of JSON."""
        click.echo(json.dumps(data) if self._place is not None else text)
        sys.stdout.flush()


def output_option(function: F) -> F:
    """``--json[=FILE]``; the command gets an Output as *output*."""
    return click.option(
        "--json",
        "output",
        metavar="[=FILE]",
        callback=lambda ctx, param, value: Output(value),
        help="Print JSON; with a file, write it there besides the text.",
    )(function)


# Traces ----------------------------------------------------------------------------------------------------------------


class Trace:
    """Where traces go. *place* is None (nowhere), ``-`` (stderr) or a file."""

    def __init__(self, place: str | None) -> None:
        self._file: TextIO | None = None
        self._stderr = place == "-"
        if place is not None and not self._stderr:
            self._file = open(place, "w", buffering=1)  # noqa: SIM115 - closed with the command

    def wrap(self, backend: Backend, label: str = "") -> Backend:
        """*backend*, traced if that was asked for."""
        if self._file is None and not self._stderr:
            return backend
        from ..backends.trace import TraceBackend

        return TraceBackend(backend, self._write, label)

    def _write(self, line: str) -> None:
        print(line, file=self._file if self._file is not None else sys.stderr)

    def line(self, text: str) -> None:
        """A line that is not an operation's, if traces are wanted."""
        if self._file is not None or self._stderr:
            self._write(text)

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            self._file.close()


def _make_trace(ctx: click.Context, param: click.Parameter, value: str | None) -> Trace:
    trace = Trace(value)
    ctx.call_on_close(trace.close)
    return trace


def trace_option(function: F) -> F:
    """``--trace[=FILE]``; the command gets a Trace as *trace*."""
    return click.option(
        "--trace",
        metavar="[=FILE]",
        callback=_make_trace,
        help="Write a line for each operation to stderr, or to a file.",
    )(function)


def common_options(function: F) -> F:
    """Both."""
    return output_option(trace_option(function))


@contextmanager
def opened(text: str, trace: Trace) -> Iterator[Device]:
    """The device behind a target, closed at the end, and its model with it."""
    from ..device import Device
    from ..targets import Target

    target = Target.parse(text)
    try:
        with Device(trace.wrap(target.open())) as device:
            yield device
    except (ProtocolError, FeatureError) as error:
        target.advise(error)
        raise
    finally:
        target.close()


# Values ----------------------------------------------------------------------------------------------------------------


class Size(IntType):
    """Bytes: ``4096``, ``0x1000``, ``64K``, ``256M``, ``1G``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Text to bytes."""
        if isinstance(value, int):
            return value
        from ..models.options import parse_size

        try:
            return int(value, 16) if value.lower().startswith("0x") else parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


SIZE = Size()


class Hex(BytesType):
    """Bytes as hex digits, with or without colons."""

    name = "hex"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        """Text to bytes."""
        try:
            return value if isinstance(value, bytes) else bytes.fromhex(value.replace(":", ""))
        except ValueError:
            self.fail(f"{value!r} is not hex digits", param, ctx)


HEX = Hex()


def timeout_option(function: F) -> F:
    """``--timeout``; the command gets it as *timeout*."""
    help_text = "Seconds to wait for the device."
    return click.option("--timeout", type=click.FloatRange(0), default=5.0, show_default=True, help=help_text)(function)


def place_option(function: F) -> F:
    """``--output``; the command gets a file as *place*."""
    help_text = "Where to write the data.  [default: stdout]"
    return click.option("--output", "-o", "place", type=click.File("wb", lazy=True), default="-", metavar="FILE", help=help_text)(function)


def source_option(function: F) -> F:
    """``--input``; the command gets a file as *source*."""
    help_text = "What to write.  [default: stdin]"
    return click.option("--input", "-i", "source", type=click.File("rb"), default="-", metavar="FILE", help=help_text)(function)


def show_facts(facts: Mapping[str, Any]) -> None:
    """Print *facts* as aligned lines, those within one below it."""
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        flat |= {f"  {inner}": each for inner, each in value.items()} if isinstance(value, Mapping) else {key: value}
    width = max(map(len, flat), default=0) + 2
    for key, value in flat.items():
        shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        click.echo(f"{key.replace('_', ' '):{width}}{shown}")


def human_size(count: int) -> str:
    """``1.5 MiB``; exact below 1 KiB."""
    value, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
