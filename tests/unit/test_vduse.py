# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge vduse`` where it cannot work; tests/lab/test_vduse_export.py has where it does."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from vdpa_bridge.cli import main
from vdpa_bridge.vduse import uapi


def refused(*words: str) -> str:
    """The one line of error."""
    result = CliRunner().invoke(main, ["vduse", *words])
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    return line


def test_a_kernel_without_vduse(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(uapi, "_CONTROL", f"{tmp_path}/control")
    assert "modprobe vduse" in refused("disk0", "model:blk?size=1M")


def test_a_device_that_the_kernel_does_not_take() -> None:
    assert "disks and network devices" in refused("entropy", "model:rng")


def test_a_name_that_is_none() -> None:
    assert "not a name" in refused("a/b", "model:blk?size=1M")
    assert "not a name" in refused("x" * 256, "model:blk?size=1M")
