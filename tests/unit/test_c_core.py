# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The C core by itself, under the sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def test_c_core_under_sanitizers(tmp_path: Path) -> None:
    """`make check tsan` of userspace/, out of tree."""
    for tool in ("make", "gcc"):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}: apt install build-essential")
    source = Path(__file__).parents[2] / "userspace"
    command = ["make", "-C", str(source), f"OUT={tmp_path}", "-j2", "check", "tsan"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("*/*.passed"))) >= 11
