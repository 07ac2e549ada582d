# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Clients that cannot be run here, replayed from what their sources say (tests/support/replays.toml), with data on their rings."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.support.replay import Replayed, Script, live, words_of
from tests.support.seen import Seen
from vdpa_bridge import Target
from vdpa_bridge.vhost_user.server import Server

MODELS = {"blk": "model:blk?size=1M&queues=2", "net": "model:net", "rng": "model:rng"}


@pytest.fixture
def path() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="vb") as directory:
        yield f"{directory}/s"


@pytest.mark.parametrize("script", Script.all(), ids=str)
def test_replayed(path: str, script: Script, caplog: pytest.LogCaptureFixture, seen: Seen) -> None:
    """All that the client does in its life. The server goes and comes, the client with it if that is its way; then others follow."""
    target, words = Target.parse(MODELS[script.device]), {"split", *words_of(script)}
    with closing(target), closing(script.guest()) as guest, caplog.at_level(logging.WARNING):
        with Server(target.open, path):
            live(script, guest, path)
        with Server(target.open, path):
            if script.phases["reconnect"]:
                with Replayed(script, guest, path) as client:
                    client.play("reconnect")
                    for where in ("ram", "more"):
                        guest.work(script.device, where)
            for _ in range(2):  # the first of them leaves the second a device that was at work
                with closing(script.guest()) as other:
                    live(script, other, path, turns=1)
    assert not caplog.records
    seen("clients", f"{script.name}, replayed", script.device, "model", *words)
    seen.version(f"{script.name}, replayed", script.version)
