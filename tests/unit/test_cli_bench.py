# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge bench``: tables, JSON, statuses; what it measures is tested with the generators."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from vdpa_bridge.cli import main

DISK = "model:blk?size=1M&queues=2"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments])


def facts(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_blk_as_json() -> None:
    found = facts("blk", DISK, "--count", "1000", "--queues", "2", "--reads", "50", "--verify", "--seed", "5", "--block", "1K", "--depth", "4")
    assert found["target"] == DISK
    assert (found["block"], found["depth"], found["queues"], found["seed"], found["requests"]) == (1024, 4, 2, 5, 1000)
    assert found["reads"]["requests"] + found["writes"]["requests"] == 1000
    assert set(found["reads"]["latency_us"]) == {"min", "mean", "p50", "p90", "p99", "p99.9", "max"}
    assert found["iops"] == pytest.approx(1000 / found["seconds"], rel=0.01)
    assert found["read_back"] > 0
    assert 0 < found["cpu"] < 64


def test_blk_as_a_table(tmp_path: Path) -> None:
    place = tmp_path / "facts"
    result = run("blk", DISK, "--duration", "0.2", "--warmup", "0.05", "--reads", "70", "--verify", f"--json={place}")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["requests", "reads", "writes", "microseconds", "reads", "writes"]
    assert lines[3].split()[1:] == ["min", "mean", "p50", "p90", "p99", "p99.9", "max"]
    assert all(len(line) <= 80 for line in lines[:6])
    assert "1 queue of 32 in flight, 4096 bytes at random, woken by calls" in lines[6]
    assert re.fullmatch(r"[\d,]+ reads compared, [\d,]+ blocks read back: all as they were written", lines[7])
    assert json.loads(place.read_text())["reads"]["requests"] == int(lines[1].split()[1].replace(",", ""))


@pytest.mark.parametrize("packed", [(), ("--packed",)])
def test_net_as_json(packed: tuple[str, ...]) -> None:
    found = facts("net", "model:net?pairs=2", "--mode", "echo", "--count", "2000", "--pairs", "2", "--frame", "200", "--poll", *packed)
    assert (found["sent"], found["ours"], found["lost"], found["pairs"], found["poll"]) == (2000, 2000, 0, 2, True)
    assert found["latency_us"]["p50"] > 0


@pytest.mark.parametrize("kind", [("blk", DISK), ("net", "model:net", "--mode", "echo")])
def test_polling_for_a_while(kind: tuple[str, ...]) -> None:
    found = facts(*kind, "--count", "2000", "--poll-for", "50us")
    assert (found["poll"], found["poll_for"]) == (False, 50e-6)
    assert "polled for 50 us, then woken by calls" in run(*kind, "--count", "100", "--poll-for", "50us").output
    refused = run(*kind, "--count", "1", "--poll-for", "1s")
    assert refused.exit_code == 2
    assert "--poll-for=1s; it is off, or a time up to 10ms" in refused.output


def test_net_as_a_table() -> None:
    result = run("net", "model:net", "--count", "100", "--mode", "echo")
    assert result.exit_code == 0, result.output
    assert [line.split()[:2] for line in result.stdout.splitlines()[1:3]] == [["sent", "100"], ["received", "100"]]
    assert result.stdout.endswith("0 lost (0.0000%), 0 out of order, 0 others'\n")
    assert "microseconds" not in run("net", "model:net", "--count", "100").stdout


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (("blk", "model:net"), 1, "is a net device"),
        (("net", DISK), 1, "is a block device"),
        (("blk", DISK, "--verify"), 2, "fewer than 100 reads"),
        (("blk", DISK, "--depth", "300"), 2, "no room for 300 requests"),
        (("blk", DISK, "--queues", "3"), 2, "has 2 queues"),
        (("blk", DISK, "--count", "9", "--warmup", "1"), 2, "no warm-up"),
        (("blk", DISK, "--duration", "0"), 2, "never ends"),
        (("net", "model:net", "--frame", "20"), 2, "they have 38 to"),
        (("net", "model:net", "--pairs", "3"), 2, "1 queue pair"),
    ],
)
def test_refusals(arguments: tuple[str, ...], status: int, why: str) -> None:
    result = run(*arguments)
    assert result.exit_code == status, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert why in line
