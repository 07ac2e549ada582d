# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""vDPA devices by one set of operations, wherever they live.

>>> import vdpa_bridge
>>> with vdpa_bridge.connect("model:blk?size=1M") as device:
...     device.identify().device_id
2

Rule of this file: a name is imported when it is used, for a program that prints its capabilities needs no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

_MODULES = {
    "backends.base": ("Backend", "Capability"),
    "device": ("Device", "Identity", "RingSetup"),
    "errors": ("DeviceBroken", "FeatureError", "LocalProtocolError", "PeerClosed", "PeerTimeout", "ProtocolError", "RemoteProtocolError"),
    "flags": ("BackendFeature", "Feature", "ProtocolFeature", "Status"),
    "targets": ("Target", "connect"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _MODULE_OF:
        return importlib.import_module(f".{name}", __name__)
    value = globals()[name] = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
