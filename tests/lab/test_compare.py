# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A PCI function behind an IOMMU against the simulator: they differ in what is documented, in all of it, and in nothing else."""

from __future__ import annotations

import pytest

from vdpa_bridge.backends.vhost_vdpa import VhostVdpa
from vdpa_bridge.compare import Comparison, Place, run_all
from vdpa_bridge.differences import ROWS

from ..support.bridge import node

pytestmark = pytest.mark.lab

WITHOUT_SUSPEND = {
    *(("restart", "and work 3 times"), ("SUSPEND", "while running"), ("GET_VRING_BASE", "while suspended"), ("GET_STATUS", "while suspended")),
    *(("RESUME", "while suspended"), ("resume", "and work"), ("resume", "with a request waiting")),
}
"""Steps of a device that offers SUSPEND and RESUME."""


def compared(kind: str, loops: bool) -> Comparison:
    places = [Place.parse(f"{label}={node(f'{label.upper()}_{kind}')}") for label in ("sim", "vp")]
    for place in places:
        place.loops = loops
    return run_all(places)


@pytest.mark.parametrize(("kind", "loops"), [("BLK", True), ("NET", False)])
def test_what_hardware_does_otherwise(kind: str, loops: bool) -> None:
    result = compared(kind, loops)
    assert [step for step in result.steps if step.verdict == "different"] == []
    allowed = {(step.operation, step.case): step for step in result.steps if step.verdict == "allowed"}
    with VhostVdpa(node(f"VP_{kind}")) as backend:
        assert backend.traits == ("vp_vdpa",)
    tried = {(step.operation, step.case) for step in result.steps}
    documented = {(row.operation, row.scenario) for row in ROWS if row.home == "vp_vdpa" and row.instead is not None}
    assert documented <= set(allowed), "a documented difference that was not seen"
    absent = {key for key, step in allowed.items() if step.reasons[0].startswith("vp: absent: ")}
    assert {operation for operation, _ in absent} == {"GET_VRING_GROUP", "GET_VRING_BASE"}
    assert set(allowed) - absent - documented == WITHOUT_SUSPEND & tried
