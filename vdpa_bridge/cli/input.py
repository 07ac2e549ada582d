# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge input``: what an input device is, and its events."""

from __future__ import annotations

from dataclasses import asdict

import click

from .common import Group, Output, Trace, common_options, opened, show_facts, target_argument, target_of, timeout_option


@click.group(
    name="input",
    short_help="Show what an input device is and does.",
    cls=Group,
    examples="""
vdpa-bridge input /dev/vhost-vdpa-0 info
vdpa-bridge input 'vhost-user:/run/keyboard.sock?type=input' events --count 10 --timeout 60
""",
)
@target_argument
def command(target: str) -> None:
    """Show what the keyboard, mouse or tablet TARGET is and does."""


@command.command()
@common_options
@click.pass_context
def info(ctx: click.Context, output: Output, trace: Trace) -> None:
    """Show name, ids, event codes by event type, and axes."""
    from ..drivers import InputDriver

    with opened(target_of(ctx), trace) as device, InputDriver(device) as source:
        facts = {"target": source.name, **asdict(source.info)}
    output.emit(facts, lambda: show_facts(facts))


@command.command()
@click.option("--count", type=click.IntRange(1), default=1, show_default=True, help="How many to wait for.")
@timeout_option
@common_options
@click.pass_context
def events(ctx: click.Context, count: int, timeout: float, output: Output, trace: Trace) -> None:
    """Print events as they come: type, code and value as linux/input.h has them."""
    from ..drivers import InputDriver

    with opened(target_of(ctx), trace) as device, InputDriver(device) as source:
        for _ in range(count):
            kind, code, value = source.read(timeout)
            output.event(f"{kind} {code} {value}", type=kind, code=code, value=value)
