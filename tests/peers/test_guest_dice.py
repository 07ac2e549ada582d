# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The end of docs/write-a-device.md: a guest whose kernel has a driver for the page's device, built from the page."""

from __future__ import annotations

import os
import re
import shlex
import socket
from pathlib import Path

import pytest

from tests.support.guest import Guest, kernel_kit, newer_qemu
from tests.support.tutorial import FILES, REPO, Reader

pytestmark = pytest.mark.peers


def test_a_guest_rolls_the_dice(short_dir: Path) -> None:
    kit = kernel_kit()
    headers = kit / "root/usr/src" / f"linux-headers-{(kit / 'release').read_text().strip()}"
    with Reader(REPO / "docs" / "write-a-device.md", short_dir) as reader:
        for block in reader.blocks:
            if block.kind in FILES:
                reader.write(block)
        shell = {block.what: block.text for block in reader.blocks if block.kind == "sh"}
        (arguments,) = (block.text for block in reader.blocks if block.kind == "qemu")
        (typed,) = (block.text for block in reader.blocks if block.kind == "guest")
        built = reader.run(shell["build"], KERNEL_HEADERS=str(headers), MAKEFLAGS="CC=gcc CONFIG_DEBUG_INFO_BTF_MODULES=")
        assert (short_dir / "dice.ko").exists(), built
        server = reader.start(shell["serve"])
        try:
            server.ready()
            script = f"{typed}\necho ROLLED\nuntil dmesg | grep -q 'dice with 2 sides'; do sleep 0.1; done\n{typed.splitlines()[1]}"
            words = [word.replace("path=dice.sock", f"path={short_dir}/dice.sock") for word in shlex.split(arguments)]
            with Guest(script, qemu_args=words[words.index("-chardev") :], files={"dice.ko": (short_dir / "dice.ko").read_bytes()}, qemu=newer_qemu()) as guest:
                guest.wait_output("ROLLED")
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as control:
                    control.sendto(b"2", f"{short_dir}/sides.sock")
                result = guest.wait()
            server.end()
        finally:
            server.close()
    assert result.status == 0, result.output + result.errors + result.log
    first, second = (list(map(int, re.findall(r"\d+", part))) for part in result.output.split("ROLLED"))
    assert (len(first), len(second)) == (32, 32), result.output
    assert set(first) <= set(range(1, 7))
    assert len(set(first)) > 2, "32 rolls of six sides"
    assert set(second) == {1, 2}
    assert os.path.exists(short_dir / "sides.sock") is False, "the model was closed"
