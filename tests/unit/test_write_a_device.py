# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""docs/write-a-device.md, typed along from its first line to its last; its guest is in tests/peers/test_guest_dice.py."""

from __future__ import annotations

from pathlib import Path

from tests.support.homes import socket_path
from tests.support.tutorial import FILES, REPO, Reader, blocks_of

PAGE = REPO / "docs" / "write-a-device.md"
GUEST = {"sh", "qemu", "guest"}
"""Kinds that the test with a guest uses."""


def test_every_block_is_run() -> None:
    blocks = blocks_of(PAGE)
    assert PAGE.read_text().count("```") == 2 * len(blocks)
    assert {block.kind for block in blocks} == {*FILES, "console", *GUEST}


def test_typed_along() -> None:
    with socket_path() as path, Reader(PAGE, Path(path).parent) as reader:
        for block in reader.blocks:
            if block.kind in FILES:
                reader.write(block)
            elif block.kind == "console":
                reader.type(block)
