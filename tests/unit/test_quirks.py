# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The table of quirks, and what a back-end that is known by one offers to those above."""

from __future__ import annotations

import pytest

from vdpa_bridge.flags import ProtocolFeature as P
from vdpa_bridge.quirks import CONTROL_QUEUE, QUIRKS, STALE_RINGS, Offer, quirks_of
from vdpa_bridge.virtio.features import NetFeature as F
from vdpa_bridge.virtio.ids import DeviceId


def test_rows_are_whole() -> None:
    assert len({quirk.name for quirk in QUIRKS}) == len(QUIRKS)
    assert all(quirk.peer and quirk.version and quirk.what and quirk.answer for quirk in QUIRKS)


@pytest.mark.parametrize(
    ("device_id", "features", "protocol", "known"),
    [
        (DeviceId.NET, F.CTRL_VQ, P.MQ, {CONTROL_QUEUE, STALE_RINGS}),
        (DeviceId.NET, F.CTRL_VQ, P.MQ | P.CONFIG, {STALE_RINGS}),
        (DeviceId.NET, F.MAC, P.GPA_ADDRESSES, set()),
        (DeviceId.BLOCK, F.CTRL_VQ, P.VDPA, set()),
        (None, F.CTRL_VQ, P.VDPA, set()),
    ],
)
def test_what_a_back_end_is_known_by(device_id: int | None, features: int, protocol: int, known: set[object]) -> None:
    assert quirks_of(Offer(device_id, features, protocol)) == known
