# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Devices that a process can be. ``make_model`` turns a kind and its options, as a user writes them, into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..virtio.config import Field
from ..virtio.ids import DeviceId
from .base import Model, Queue
from .blk import BlkModel
from .code import ModelCode
from .console import ConsoleModel
from .gpio import GpioModel
from .i2c import I2cModel
from .input import InputModel
from .needs import Needs
from .net import NetModel
from .rng import RngModel
from .scsi import ScsiModel
from .sources import Sources
from .vsock import VsockModel

__all__ = [
    "KINDS",
    "BlkModel",
    "ConsoleModel",
    "DeviceId",
    "Field",
    "GpioModel",
    "I2cModel",
    "InputModel",
    "Model",
    "ModelCode",
    "Needs",
    "NetModel",
    "Queue",
    "RngModel",
    "ScsiModel",
    "Sources",
    "VsockModel",
    "make_model",
]

KINDS: dict[str, Callable[[Mapping[str, str]], Model]] = {
    "blk": BlkModel.from_options,
    "console": ConsoleModel.from_options,
    "gpio": GpioModel.from_options,
    "i2c": I2cModel.from_options,
    "input": InputModel.from_options,
    "net": NetModel.from_options,
    "rng": RngModel.from_options,
    "scsi": ScsiModel.from_options,
    "vsock": VsockModel.from_options,
}
"""What there is, by the name it has in targets. Each takes options as text and raises ValueError for a wrong one."""


def make_model(kind: str, options: Mapping[str, str]) -> Model:
    """The model of *kind*; ValueError that names a wrong kind or option and the choices, OSError when a file cannot be opened."""
    if kind not in KINDS:
        raise ValueError(f"unknown model {kind!r}; there is: {', '.join(sorted(KINDS))}, or FILE.py with a model of your own")
    return KINDS[kind](options)
