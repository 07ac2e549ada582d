# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Clients that cannot be run here, replayed on kernel devices behind a bridge."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest

from ..support.bridge import Bridge
from ..support.replay import Script, live, words_of
from ..support.seen import Seen

pytestmark = pytest.mark.lab


def alive(script: Script, bridge: Bridge, seen: Seen) -> None:
    before = len(bridge.said())
    for _ in range(2):  # the first of them leaves the second a device that was at work
        with closing(script.guest()) as guest:
            live(script, guest, bridge.path)
    assert bridge.said()[before:] == ""
    bridge.release()
    seen("clients", f"{script.name}, replayed", script.device, bridge.kind, "split", *words_of(script) - {"reconnect"})
    seen.version(f"{script.name}, replayed", script.version)


@pytest.mark.parametrize("script", [s for s in Script.all() if s.device == "blk"], ids=str)
def test_disk(disk_bridge: Bridge, script: Script, seen: Seen) -> None:
    """They have one queue."""
    if disk_bridge.kind == "vp_vdpa" and script.phases["pause"]:
        script = replace(script, phases=script.phases | {"pause": []})  # it enables no ring late and starts none but at 0
    alive(replace(script, rings=1), disk_bridge, seen)


@pytest.mark.parametrize("script", [s for s in Script.all() if s.device == "net"], ids=str)
def test_frames_loop_back(sim_net: Bridge, script: Script, seen: Seen) -> None:
    alive(script, sim_net, seen)
