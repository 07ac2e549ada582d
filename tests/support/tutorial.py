# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A page of the documentation that its reader types along: its blocks become files, and commands whose output is the page's.

Kinds of blocks: ``python FILE``, ``c FILE``, ``make FILE`` are files (``FILE +`` is added at its end); in ``console`` each line that
begins with ``$`` is typed and the others are what came; other kinds are for the test that knows them.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, Self

from tests.support.service import Serve
from vdpa_bridge.cli.programs import PROGRAMS

REPO = Path(__file__).parents[2]
FILES = ("python", "c", "make")


class Block(NamedTuple):
    """*what* stands behind the kind in the fence."""

    kind: str
    what: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks, in order."""
    return [Block(*match) for match in re.findall(r"^```(\w+)(?: ([^\n]*))?\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)]


class Reader:
    """Types a page along in *directory*, with our commands and this interpreter in the path. Servers that it starts end with it."""

    def __init__(self, page: Path, directory: Path) -> None:
        self.blocks = blocks_of(page)
        self.directory = directory
        self._servers: list[Serve] = []
        programs = directory / ".bin"
        programs.mkdir()
        commands = {"vdpa-bridge": "-m vdpa_bridge", "pytest": "-m pytest -p no:cacheprovider"}
        commands |= {row.name: f"-c 'from vdpa_bridge.cli import programs; programs.{kind}()'" for kind, row in PROGRAMS.items()}
        for name, words in commands.items():
            (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
            (programs / name).chmod(0o755)
        self.environment = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(REPO), "COLUMNS": "160", "VDPA_BRIDGE_REQUIRE": ""}

    def write(self, block: Block) -> None:
        """A file of the page."""
        name, _, more = block.what.partition(" ")
        with (self.directory / name).open("a" if more == "+" else "w") as file:
            file.write(("\n\n" if more == "+" else "") + block.text)

    def type(self, block: Block) -> None:
        """A console block; AssertionError when something else comes than the page says."""
        said = ""
        for command in re.findall(r"^\$ (.*)$", block.text, re.MULTILINE):
            said += f"$ {command}\n"
            if command.endswith(" &"):
                self._servers.append(self.start(command.removesuffix(" &")))
                said += self._servers[-1].ready()[0]
            else:
                said += self.run(command)
        assert said == block.text, f"{said}--- the page says:\n{block.text}"

    def run(self, script: str, **environment: str) -> str:
        """What a command prints, errors as well."""
        done = subprocess.run(
            ["bash", "-c", script], cwd=self.directory, env=os.environ | self.environment | environment, capture_output=True, text=True, timeout=100, check=False
        )
        return done.stdout + done.stderr

    def start(self, script: str) -> Serve:
        """A command that goes on, in the page's directory."""
        return Serve(command=["bash", "-c", f"cd {shlex.quote(str(self.directory))}; exec {script}"], **self.environment)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for server in self._servers:
            server.close()
