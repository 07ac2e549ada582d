# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Bridges: the lab's nodes served by processes of their own, each started once (a second of the guest's time)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..support.bridge import Bridge, bridging, node


@pytest.fixture(scope="session")
def sim_blk() -> Iterator[Bridge]:
    with bridging(node("SIM_BLK")) as bridge:
        yield bridge


@pytest.fixture(scope="session")
def vp_blk() -> Iterator[Bridge]:
    with bridging(node("VP_BLK")) as bridge:
        yield bridge


@pytest.fixture(scope="session")
def sim_net() -> Iterator[Bridge]:
    with bridging(node("SIM_NET")) as bridge:
        yield bridge


@pytest.fixture(scope="session")
def vp_net() -> Iterator[Bridge]:
    with bridging(node("VP_NET")) as bridge:
        yield bridge


@pytest.fixture(params=["sim", "vp"])
def disk_bridge(request: pytest.FixtureRequest) -> Iterator[Bridge]:
    """A kernel disk behind a bridge: the simulator, and a PCI function behind an IOMMU. Its node is free afterwards."""
    bridge: Bridge = request.getfixturevalue(f"{request.param}_blk")
    before = len(bridge.said())
    yield bridge
    print(bridge.said()[before:])
    bridge.release()


@pytest.fixture(params=["sim", "vp"])
def net_bridge(request: pytest.FixtureRequest) -> Iterator[Bridge]:
    """A kernel NIC behind a bridge. Its node is free afterwards."""
    bridge: Bridge = request.getfixturevalue(f"{request.param}_net")
    before = len(bridge.said())
    yield bridge
    print(bridge.said()[before:])
    bridge.release()
