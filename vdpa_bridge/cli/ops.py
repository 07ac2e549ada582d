# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge ops``: the table of operations, as text and as JSON; tools/render makes the documentation of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import click

from .common import Command, Output, common_options

if TYPE_CHECKING:
    from ..ops import Op
    from .common import Trace


@dataclass(frozen=True)
class Row:
    """One operation, for readers."""

    name: str
    doc: str
    number: str
    """The ioctl's number in hex; that of ``vhost_msg_v2`` on a socket for IOTLB operations."""
    request: str
    """``field=`` words, as ``vdpa-bridge call`` takes them."""
    reply: str
    since: str
    """Kernel version."""
    gate: str
    """Back-end feature that must be offered, if any."""
    legacy: str
    """A message, ``emulated`` or ``absent``: how stock vhost-user peers are brought to do it."""
    note: str


def row(op: Op[Any, Any]) -> Row:
    """An operation of the table in words."""
    from ..ops import Absent, Message
    from ..vhost_user.messages import message_name

    legacy = op.legacy
    if isinstance(legacy, Message):
        how, note = message_name(legacy.number), legacy.note
        if legacy.needs is not None:
            note = f"needs {legacy.needs.name}" + (f"; {note}" if note else "")
    elif isinstance(legacy, Absent):
        how, note = "absent", legacy.why
    else:
        how, note = "emulated", legacy.how
    number = f"0x{op.number:08x}" + (f" type {op.msgtype}" if op.msgtype is not None else "")
    gate = op.gate.name if op.gate is not None and op.gate.name else ""
    return Row(op.name, op.doc, number, _fields(op.request), _fields(op.reply), op.since, gate, how, note)


def _fields(payload: type[Any]) -> str:
    return " ".join(field.name for field in fields(payload))


def rows(pattern: str = "") -> list[Row]:
    """The table; only names that contain *pattern*."""
    from ..ops import TABLE

    return [row(op) for op in TABLE if pattern.upper() in op.name]


@click.command(
    cls=Command,
    short_help="List all operations and how each home does them.",
    examples="""
vdpa-bridge ops                every operation
vdpa-bridge ops vring          those with VRING in their name
vdpa-bridge ops --json | jq '.[] | select(.legacy == "absent") | .name'
""",
)
@click.argument("pattern", default="")
@common_options
def command(pattern: str, output: Output, trace: Trace) -> None:
    """List the operations: number, kernel version, and what a legacy vhost-user peer can do about each.

    The number is that of the ioctl and of the message in vhost-user's vDPA mode.
    """
    found = rows(pattern)
    if not found:
        raise click.UsageError(f"no operation has {pattern!r} in its name")
    output.emit([asdict(r) for r in found], lambda: _print(found))


def _print(found: list[Row]) -> None:
    from .term import print_table

    print_table(
        ["operation", "number", "since", "needs", "what it does", "legacy vhost-user"],
        [[r.name, r.number, r.since, r.gate, r.doc, f"{r.legacy}: {r.note}" if r.note else r.legacy] for r in found],
        wrap=(4, 5),
    )
