# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Tables and progress bars on a terminal; the only module that imports rich."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDE = 160
"""Columns of output that is no terminal, unless COLUMNS says otherwise."""


def console() -> Console:
    """Standard output; plain and of a fixed width when it is no terminal."""
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else WIDE
    return Console(file=sys.stdout, highlight=False, width=width)


def print_table(
    head: Sequence[str],
    body: Sequence[Sequence[str]],
    wrap: Collection[int] = (),
    style: Callable[[int, str], str] = lambda column, cell: "",
    right: Collection[int] = (),
    gap: int = 2,
) -> None:
    """Print aligned columns. Those in *wrap* may break lines, those in *right* are aligned there;
    *gap* blanks stand between columns; *style* gives a cell its colour."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, gap, 0, 0))
    for at, name in enumerate(head):
        table.add_column(name, no_wrap=at not in wrap, overflow="fold", justify="right" if at in right else "left")
    for cells in body:
        table.add_row(*[Text(cell, style=style(at, cell)) for at, cell in enumerate(cells)])
    out = console()
    if out.is_terminal:
        out.print(table)
        return
    with out.capture() as text:
        out.print(table)
    print("\n".join(line.rstrip() for line in text.get().splitlines()))


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A bar for *total* bytes on stderr, if that is a terminal; call what it yields with the bytes that are done more."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


@contextmanager
def ticker() -> Iterator[Callable[[str], None]]:
    """A line on the terminal that stderr is, for as long as it lasts; call what it yields with its text."""
    from rich.status import Status

    with Status("", console=Console(stderr=True, highlight=False)) as status:
        yield lambda text: status.update(Text(text))
