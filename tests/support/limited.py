# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A device with the limits of vp_vdpa behind an IOMMU of 39 bits, in this process: where hardware is and the lab is not."""

from __future__ import annotations

import errno

from vdpa_bridge.backends.model import ModelBackend, ModelDevice
from vdpa_bridge.backends.rules import refuse
from vdpa_bridge.flags import BackendFeature as B
from vdpa_bridge.flags import Status
from vdpa_bridge.memory import IotlbTable
from vdpa_bridge.virtqueue import PACKED_BEGIN
from vdpa_bridge.wire import VringState

LAST = (1 << 39) - 1


class LimitedBackend(ModelBackend):
    """One address space of 39 bits, rings that start at their beginning and do not say where they are, no SUSPEND, no ring off."""

    offered_backend_features = B.IOTLB_MSG_V2 | B.IOTLB_BATCH | B.IOTLB_ASID | B.IOTLB_PERSIST
    _suspend = _resume = _get_vring_base = None  # type: ignore[assignment]

    def __init__(self, device: ModelDevice) -> None:
        super().__init__(device, device._ended)
        self._table = IotlbTable(1, 0, LAST)
        self._misplaced = False

    def _set_vring_base(self, request: VringState) -> None:
        self._ring(request.index)
        if request.num != (PACKED_BEGIN if self._packed else 0):
            self._misplaced = True
            raise refuse(errno.EOPNOTSUPP)
        super()._set_vring_base(request)

    def _on_status(self, new: int, starts: bool) -> None:
        assert not (starts and self._misplaced), "started at 0 although a ring stands elsewhere: what was done is done again"
        super()._on_status(new, starts)

    def _on_reset(self, keep_mappings: bool) -> None:
        self._misplaced = False
        super()._on_reset(keep_mappings)

    def _set_vring_enable(self, request: VringState) -> None:
        super()._set_vring_enable(request)
        if not request.num and self._running:
            self._status |= int(Status.NEEDS_RESET)


class LimitedDevice(ModelDevice):
    """A model with those limits."""

    def open(self) -> LimitedBackend:
        if not self._busy.acquire(blocking=False):
            raise OSError(errno.EBUSY, "somebody else has it open")
        session = LimitedBackend(self)
        self._session = session
        return session
