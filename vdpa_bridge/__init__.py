# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""vDPA devices by one set of operations, wherever they live.

>>> import vdpa_bridge
>>> with vdpa_bridge.connect("model:blk?size=1M") as device:
...     device.identify().device_id
2
"""

from __future__ import annotations

from . import ops
from .backends.base import Backend, Capability
from .device import Device, Identity, RingSetup
from .errors import DeviceBroken, FeatureError, LocalProtocolError, PeerClosed, PeerTimeout, ProtocolError, RemoteProtocolError
from .flags import BackendFeature, Feature, ProtocolFeature, Status
from .targets import Target, connect

__all__ = [
    "Backend",
    "BackendFeature",
    "Capability",
    "Device",
    "DeviceBroken",
    "Feature",
    "FeatureError",
    "Identity",
    "LocalProtocolError",
    "PeerClosed",
    "PeerTimeout",
    "ProtocolError",
    "ProtocolFeature",
    "RemoteProtocolError",
    "RingSetup",
    "Status",
    "Target",
    "connect",
    "ops",
]
