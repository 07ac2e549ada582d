# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge compare``: the same steps on several devices, in one table."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import Command, Output, Trace, common_options

if TYPE_CHECKING:
    from ..compare import Comparison, Judged, Outcome

_LONGEST = 24
"""Characters of an outcome that a cell shows; reasons tell the rest."""


@click.command(
    cls=Command,
    short_help="Run the same steps on several devices and compare.",
    examples="""
vdpa-bridge compare /dev/vhost-vdpa-0 model:blk
vdpa-bridge compare sim=/dev/vhost-vdpa-0 sock='vhost-user:/run/s?type=blk' model=model:blk
vdpa-bridge compare a=model:net 'b=vhost-user:s?type=net&vdpa=off' --scenario io --repeat 5
vdpa-bridge compare /dev/vhost-vdpa-0 model:blk --json=result.json
vdpa-bridge compare sim=/dev/vhost-vdpa-1 nic=/dev/vhost-vdpa-2 --no-loopback
vdpa-bridge compare --from result.json
""",
)
@click.argument("targets", nargs=-1, metavar="[LABEL=]TARGET ...")
@click.option(
    "--scenario",
    "scenarios",
    multiple=True,
    metavar="NAME",
    help="Only this one; may be given again.  [bringup, config, status, io, wrong, restart]",
)
@click.option("--repeat", type=click.IntRange(1, 1000), default=3, show_default=True, help="Runs of each scenario; times are the median.")
@click.option(
    "--no-loopback",
    is_flag=True,
    help="Only send frames: the network of a NIC does not give back what is sent to all, as the simulators do.",
)
@click.option(
    "--from",
    "source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Show a result that --json=FILE wrote.",
)
@common_options
def command(targets: tuple[str, ...], scenarios: tuple[str, ...], repeat: int, no_loopback: bool, source: Path | None, output: Output, trace: Trace) -> int:
    """Run scenarios on each TARGET and compare every answer with that of the first one.

    Devices of one type can be compared, also different models of it: capacities, feature words and the like are facts
    of a device and are not compared. Writes to the first MiB of a disk and puts back what was there; expects of a
    network device that it loops broadcasts back, as vdpa_sim_net and model:net do, unless --no-loopback is given. The label
    qemu-storage-daemon says that the target is one, which may answer as the table of differences has it; kernel devices and
    sockets say themselves what they are.
    Exit status 1: a difference that is not documented.
    """
    if (source is None) == (not targets):
        raise click.UsageError("give targets, or --from with a result")
    result = _read(source) if source is not None else _run(targets, scenarios, repeat, not no_loopback, trace)
    output.emit(result.to_json(), lambda: _print(result))
    return int(result.count("different") > 0)


def _read(source: Path) -> Comparison:
    from ..compare.judge import Comparison

    return Comparison.from_json(json.loads(source.read_text()))


def _run(targets: Sequence[str], scenarios: Sequence[str], repeat: int, loops: bool, trace: Trace) -> Comparison:
    from ..compare import SCENARIOS, Place, run_all

    if len(targets) < 2:
        raise click.UsageError("a comparison needs two targets or more")
    if unknown := [name for name in scenarios if name not in SCENARIOS]:
        raise click.UsageError(f"no scenario {unknown[0]!r}; there is: {', '.join(SCENARIOS)}")
    places = [Place.parse(text) for text in targets]
    for place in places:
        place.wrap = trace.wrap
        place.loops = loops
    return run_all(places, scenarios or tuple(SCENARIOS), repeat, lambda line: click.echo(line, err=True))


# The table ---------------------------------------------------------------------------------------------------------------


def _print(result: Comparison) -> None:
    from .term import print_table

    for label, target, home in zip(result.labels, result.targets, result.homes, strict=True):
        click.echo(f"{label}: {target} ({home})" if target != label else f"{label} ({home})")
    click.echo()
    notes: dict[tuple[str, ...], int] = {}
    body, scenario = [], ""
    for step in result.steps:
        if step.scenario != scenario:
            scenario = step.scenario
            body.append([scenario.upper()])
        body.append(_row(step, notes))
    head = ["step"]
    for label in result.labels:
        head += [(" " if len(head) > 1 else "") + label if len(label) <= _LONGEST else "..." + label[3 - _LONGEST :], "time"]
    times = {2 + 2 * at for at in range(len(result.labels))}
    print_table([*head, ""], body, wrap=(0,), right=times, gap=1, style=_style)
    for reasons, number in notes.items():
        for at, reason in enumerate(reasons):
            first = f"[{number}] " if not at else " " * len(f"[{number}] ")
            click.echo(textwrap.fill(reason, 158, initial_indent=first, subsequent_indent=" " * len(first)))
    click.echo(f"\n{result.summary}; " + ("times of one run" if result.repeat == 1 else f"times are the median of {result.repeat} runs"))


def _row(step: Judged, notes: dict[tuple[str, ...], int]) -> list[str]:
    cells = [f"  {step.operation} {step.case}".rstrip()]
    for outcome in step.outcomes:
        value = outcome.value if len(outcome.value) <= _LONGEST else outcome.value[: _LONGEST - 3] + "..."
        cells += [value if len(cells) == 1 else f" {value}", _time(outcome)]
    note = f" [{notes.setdefault(step.reasons, len(notes) + 1)}]" if step.reasons else ""
    return [*cells, {"same": "same", "allowed": "allowed", "different": "DIFFERENT"}[step.verdict] + note]


def _time(outcome: Outcome) -> str:
    """Three digits and a unit; nothing for a step that was not taken."""
    micros = outcome.micros
    if not micros:
        return ""
    for unit, scale in (("us", 1.0), ("ms", 1e3)):
        if micros < 1000 * scale:
            number = micros / scale
            return f"{number:.{0 if number >= 100 else 1}f} {unit}"
    return f"{micros / 1e6:.2f} s"


def _style(column: int, cell: str) -> str:
    if cell.startswith("DIFFERENT"):
        return "bold red"
    if cell.startswith("allowed"):
        return "yellow"
    if cell.endswith((" us", " ms", " s")):
        return "dim"
    return "bold" if column == 0 and cell.isupper() and not cell.startswith(" ") else ""
