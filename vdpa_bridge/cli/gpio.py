# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge gpio``: lines of a GPIO device."""

from __future__ import annotations

import click

from .common import Group, Output, Trace, common_options, opened, target_argument, target_of


@click.group(
    name="gpio",
    short_help="Read and set GPIO lines.",
    cls=Group,
    examples="""
vdpa-bridge gpio 'vhost-user:/run/gpio.sock?type=gpio' info
vdpa-bridge gpio 'vhost-user:/run/gpio.sock?type=gpio' set 3 high
""",
)
@target_argument
def command(target: str) -> None:
    """Read and set the lines of the GPIO device TARGET."""


@command.command()
@common_options
@click.pass_context
def info(ctx: click.Context, output: Output, trace: Trace) -> None:
    """List the lines: name, direction, and the value of those that have a direction."""
    from ..drivers import GpioDriver
    from ..virtio.gpio import Direction

    with opened(target_of(ctx), trace) as device, GpioDriver(device) as gpio:
        names = gpio.names() or [""] * gpio.lines
        directions = [gpio.direction(line) for line in range(gpio.lines)]
        values = [None if direction == Direction.NONE else int(gpio.value(line)) for line, direction in enumerate(directions)]
    lines = [
        {"line": line, "name": name, "direction": direction.name.lower(), "value": value}
        for line, (name, direction, value) in enumerate(zip(names, directions, values, strict=True))
    ]

    def text() -> None:
        for each in lines:
            value = "" if each["value"] is None else each["value"]
            click.echo(f"{each['line']:<5} {each['direction']:5} {value:<2} {each['name']}".rstrip())

    output.emit({"lines": lines}, text)


@command.command(name="set")
@click.argument("line", type=click.IntRange(0))
@click.argument("level", type=click.Choice(["low", "high"]))
@common_options
@click.pass_context
def set_line(ctx: click.Context, line: int, level: str, output: Output, trace: Trace) -> None:
    """Make LINE an output and set it."""
    from ..drivers import GpioDriver
    from ..virtio.gpio import Direction

    with opened(target_of(ctx), trace) as device, GpioDriver(device) as gpio:
        gpio.set_value(line, level == "high")
        gpio.set_direction(line, Direction.OUT)
    output.emit({"line": line, "value": int(level == "high")}, lambda: click.echo(f"line {line} is {level}"))
