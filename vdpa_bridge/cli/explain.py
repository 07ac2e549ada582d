# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge explain``: why a device does not work, and what to type; the exit status is the cause's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .common import SIZE, Command, Output, Trace, common_options, target_argument

if TYPE_CHECKING:
    from ..explain import Explanation

_COLOURS = {"ok": "green", "problem": "red", "unknown": "yellow"}


@click.command(
    cls=Command,
    short_help="Say why a device does not work, and what to type.",
    examples="""
vdpa-bridge explain /dev/vhost-vdpa-0
vdpa-bridge explain vdpa:net0 --want CTRL_VQ --memory 4G
vdpa-bridge explain 'vhost-user:/run/disk.sock?type=blk'
vdpa-bridge explain vdpa:net0 --json | jq -r '.type'
""",
)
@target_argument
@click.option("--want", multiple=True, metavar="FEATURE", help="A feature that the device must offer; can be given again.")
@click.option("--memory", type=SIZE, default="8M", show_default=True, help="How much will be mapped for the device, as of a guest's memory.")
@common_options
def command(target: str, want: tuple[str, ...], memory: int, output: Output, trace: Trace) -> int:
    """Look at TARGET step by step until something is wrong, and say what to do about it.

    Opens the device, which resets it, if nobody else has it. The exit status tells the cause (docs/troubleshooting.md); 0 means that
    nothing is wrong.
    """
    from ..explain import Wishes
    from ..targets import Target

    parsed = Target.parse(target)
    try:
        with parsed.examination(Wishes(want, memory), trace.wrap) as examination:
            explanation = examination.run()
    finally:
        parsed.close()
    first = explanation.first
    checks = [
        {"check": f.check, "verdict": f.verdict, "says": f.says, "cause": f.cause.name if f.cause else None, "type": f.cure or None}
        for f in explanation.findings
    ]
    summary = {"target": target, "status": explanation.status, "cause": first.cause.name if first and first.cause else None, "type": first.cure if first else None}
    output.emit(summary | {"checks": checks}, lambda: _print(explanation))
    return explanation.status


def _print(explanation: Explanation) -> None:
    wide = max(len(found.check) for found in explanation.findings)
    for found in explanation.findings:
        click.echo(f"{click.style(f'{found.verdict:7}', fg=_COLOURS[found.verdict])}  {found.check:{wide}}  {found.says}")
    click.echo()
    first = explanation.first
    if first is not None and first.cause is not None:
        click.echo(f"{first.cause.name} (status {first.cause.status}): {first.cause.means}\nto type: {first.cure}")
        return
    for found in explanation.findings:
        if found.cure:
            click.echo(f"{found.check}: {found.cure}")
    click.echo("nothing is wrong with it")
