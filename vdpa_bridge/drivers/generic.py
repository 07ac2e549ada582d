# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A driver for any device type: queues and configuration by what the device says of itself.

Rule of this file: nothing about a type is known here but the names that virtio/ has for it.
"""

from __future__ import annotations

from typing import Unpack

from ..device import Device
from ..virtio.config import Value, config_size, parse_config
from ..virtio.features import feature_names
from ..virtio.ids import device_name
from .base import Driver, Options

_CONFIG_BYTES = 256
"""As much of the configuration space is read. Devices may say that they have more than they do (vp_vdpa: a page)."""


class GenericDriver(Driver):
    """All queues of any device; chains go out by ``post``, ``transact`` and ``ask`` (see ``Driver``)."""

    table_entries = 64
    overstated = True  # of an unknown type nothing is expected

    def __init__(self, device: Device, *, wanted: int = 0, **options: Unpack[Options]) -> None:
        """See ``Driver``; *wanted* are feature bits of the device type."""
        super().__init__(device, wanted=wanted, **options)

    def config(self) -> dict[str, Value]:
        """The configuration space by the names that the type's layout has for it, and in hex what it has no name for."""
        device_id, data = self.device.identify().device_id, self.read_config(_CONFIG_BYTES)
        fields = parse_config(device_id, self.features, data)
        return fields if config_size(device_id) is not None or not data else {"bytes": data.hex()}

    @property
    def info(self) -> dict[str, object]:
        """Type, queues, features agreed on, configuration space."""
        limits = self.device.identify()
        return {
            "device": device_name(limits.device_id),
            "id": limits.device_id,
            "queues": limits.queues,
            "entries": self._num,
            "features": feature_names(limits.device_id, self.features),
            "config": self.config(),
        }
