# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The ring core under libFuzzer: what is kept in userspace/fuzz/corpus, and what comes of it in bounded time (tools/fuzz goes on longer)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CORE = Path(__file__).parents[2] / "userspace"
SECONDS = int(os.environ.get("VDPA_BRIDGE_FUZZ_SECONDS", "20"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with the targets."""
    if not shutil.which("clang"):
        pytest.skip("needs clang: run tools/setup base")
    out = tmp_path_factory.mktemp("fuzz")
    done = subprocess.run(["make", "-C", str(CORE), f"OUT={out}", "-j2", "fuzz"], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "fuzz"


@pytest.mark.parametrize("target", sorted(path.stem.removeprefix("fuzz_") for path in (CORE / "fuzz").glob("fuzz_*.c")))
def test_nothing_is_found(built: Path, tmp_path: Path, target: str) -> None:
    corpus = CORE / "fuzz" / "corpus" / target
    limits = [f"-max_total_time={SECONDS}", "-max_len=200", f"-artifact_prefix={tmp_path}/crash-"]
    (tmp_path / "fresh").mkdir()
    command = [str(built / f"fuzz_{target}"), *limits, str(tmp_path / "fresh"), str(corpus)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 60, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{len(list(corpus.iterdir()))} files found in {corpus}" in done.stderr
