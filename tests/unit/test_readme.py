# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What README tells people to type works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.homes import socket_path
from tests.support.tutorial import Block, Reader

README = Path(__file__).parents[2] / "README.md"


def test_python_example(capsys: pytest.CaptureFixture[str]) -> None:
    block = re.search(r"```python\n(.*?)```", README.read_text(), re.S)
    assert block is not None
    code = block[1].replace("vhost-user:/run/disk.sock", "model:blk?size=1M")
    assert code != block[1], "the example names a target that the test can replace"
    exec(compile(code, str(README), "exec"), {})
    said = capsys.readouterr().out
    assert "device_id=2" in said
    assert "U8(value=0)" in said
    assert "b'hello'" in said


def test_a_device_on_a_page() -> None:
    """The entropy source is served as the page says, and fills what it is given."""
    found = re.search(r"```python\n# entropy\.py\n(.*?)```.*?```\n(\$ vdpa-bridge serve model:entropy.*?)```", README.read_text(), re.S)
    assert found is not None
    code, shown = found.groups()
    with socket_path() as path, Reader(README, directory := Path(path).parent) as reader:
        (directory / "entropy.py").write_text(code)
        reader.type(Block("console", "", shown))


def test_no_mark_is_left() -> None:
    assert not re.findall(r"@[A-Z]+@", README.read_text())
