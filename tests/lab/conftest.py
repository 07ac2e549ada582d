# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Bridges: the lab's nodes served by another process, started once (seconds of the guest's time)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..support.bridge import Bridge, bridging_all, node


@pytest.fixture(scope="session")
def bridges() -> Iterator[dict[str, Bridge]]:
    names = ("SIM_BLK", "VP_BLK", "SIM_NET", "VP_NET")
    with bridging_all([node(name) for name in names]) as started:
        yield dict(zip(names, started, strict=True))


@pytest.fixture(scope="session")
def sim_blk(bridges: dict[str, Bridge]) -> Bridge:
    return bridges["SIM_BLK"]


@pytest.fixture(scope="session")
def vp_blk(bridges: dict[str, Bridge]) -> Bridge:
    return bridges["VP_BLK"]


@pytest.fixture(scope="session")
def sim_net(bridges: dict[str, Bridge]) -> Bridge:
    return bridges["SIM_NET"]


@pytest.fixture(scope="session")
def vp_net(bridges: dict[str, Bridge]) -> Bridge:
    return bridges["VP_NET"]


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
