# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge show``: what a device is and what can be done with it."""

from __future__ import annotations

from textwrap import wrap
from typing import Any

import click

from .common import Command, Output, Trace, common_options, human_size, opened, target_argument

_LABEL = 14
_WIDTH = 100


@click.command(
    cls=Command,
    short_help="Show what a device is and can do.",
    examples="""
vdpa-bridge show /dev/vhost-vdpa-0
vdpa-bridge show model:net
vdpa-bridge show 'vhost-user:/run/disk.sock?type=blk' --json | jq .features.names
""",
)
@target_argument
@common_options
def command(target: str, output: Output, trace: Trace) -> None:
    """Show identity, features, queues, configuration space and operations of TARGET.

    Opens the device, which resets it, and changes nothing else.
    """
    from .report import report

    with opened(target, trace) as device:
        facts = report(device.backend)
    output.emit(facts, lambda: click.echo("\n".join(_lines(facts))))


def _lines(r: dict[str, Any]) -> list[str]:
    unknown = "not told by the device"
    device, offered, config = r["device"], r["backend_features"], r["config"]
    lines = _entry("target", r["target"])
    for label, value in r["facts"].items():
        lines += _entry(label, *_fact(label, str(value)))
    lines += _entry("device", unknown if device["id"] is None else f"{device['name']} (id {device['id']})")
    lines += _entry("status", f"{r['status']['value']:#x} {' '.join(r['status']['names'])}".rstrip())
    lines += _entry("features", r["features"]["value"], " ".join(r["features"]["names"]))
    lines += _entry("back-end", unknown) if offered is None else _entry("back-end", offered["value"], " ".join(offered["names"]))
    lines += _entry("queues", unknown if r["queues"] is None else _queues(r["queues"], r["queue_size"]))
    if config is None:
        lines += _entry("config", unknown)
    else:
        lines += _entry("config", f"{config['size']} bytes" + (f"; {config['error']}" if "error" in config else ""))
        for name, value in config["fields"].items():
            lines.append(f"{'':{_LABEL}}{name} = {value}{f' ({human_size(value * 512)})' if name == 'capacity' else ''}")
    limits = r["iova_range"]
    lines += _entry("IOVAs", unknown if limits is None else f"{limits['first']} to {limits['last']}")
    lines += _entry("groups", f"{_told(r['groups'])}, address spaces: {_told(r['address_spaces'])}")
    levels = [entry["level"] for entry in r["operations"].values()]
    lines += _entry("operations", ", ".join(f"{levels.count(level)} {level}" for level in ("native", "emulated", "absent")))
    for name, entry in r["operations"].items():
        if entry["level"] != "native":
            lines.append(f"{'':{_LABEL}}{name} is {entry['level']}: {entry['note']}")
    return lines


def _fact(label: str, value: str) -> list[str]:
    """A fact, and what its bits are called if it is a word of protocol features."""
    from ..flags import ProtocolFeature, bit_names

    return [value, " ".join(bit_names(ProtocolFeature, int(value, 16)))] if label.startswith("protocol features") else [value]


def _told(value: int | None) -> str:
    return "not told" if value is None else str(value)


def _queues(queues: list[dict[str, int | None]], largest: int | None) -> str:
    text = f"{len(queues)}, of at most {_told(largest)} entries"
    groups = {queue["group"] for queue in queues}
    if len(groups) > 1:
        text += "; groups " + " ".join(f"{queue['index']}:{_told(queue['group'])}" for queue in queues)
    return text


def _entry(label: str, *texts: str) -> list[str]:
    """A label and its text, with further lines below."""
    lines = [part for text in texts for part in wrap(text, _WIDTH - _LABEL, break_on_hyphens=False) or [""]]
    if len(label) >= _LABEL:
        return [label + ":", *[f"{'':{_LABEL}}{line}" for line in lines]]
    return [f"{label if not at else '':{_LABEL}}{line}" for at, line in enumerate(lines)]
