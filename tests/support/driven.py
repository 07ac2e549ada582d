# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Models with drivers on them, for the tests of drivers; and a disk that does not answer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.homes import socket_path
from vdpa_bridge import Target
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.device import Device
from vdpa_bridge.drivers import BlkDriver, NetDriver
from vdpa_bridge.models import BlkModel, Model, make_model
from vdpa_bridge.models.base import Queue
from vdpa_bridge.vhost_user.server import Server
from vdpa_bridge.virtio.ids import device_name

MIB = 1 << 20


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No log records from a model's ring thread: for each thread that is not of ``threading``'s making, CPython before 3.13 keeps
    a stand-in that never goes away, and these tests break many devices on purpose."""
    log = logging.getLogger("vdpa_bridge")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    yield
    log.setLevel(before)


@contextmanager
def opened(model: Model) -> Iterator[Device]:
    home = ModelDevice(model, "model:test")
    try:
        with Device(home.open()) as device:
            yield device
    finally:
        home.close()


WAYS = ["here", "vDPA mode", "legacy"]


@contextmanager
def in_way(way: str, model: Model) -> Iterator[Device]:
    """A model where it is, or behind a server and a socket: one of WAYS."""
    if way == "here":
        with opened(model) as device:
            yield device
        return
    mode = "require" if way == "vDPA mode" else "off"
    there = ModelDevice(model, "served")
    try:
        with socket_path() as path, Server(there.open, path):
            target = Target.parse(f"vhost-user:{path}?type={device_name(model.device_id)}&vdpa={mode}")
            with Device(target.open()) as device:
                yield device
    finally:
        there.close()


@contextmanager
def blk(model: Model | None = None, **options: Any) -> Iterator[BlkDriver]:
    with opened(model or make_model("blk", {"size": "16M"})) as device, BlkDriver(device, **options) as disk:
        yield disk


@contextmanager
def net(model: Model | None = None, **options: Any) -> Iterator[NetDriver]:
    with opened(model or make_model("net", {"mac": "52:54:00:00:00:07"})) as device, NetDriver(device, **options) as nic:
        yield nic


class Silent(BlkModel):
    """A disk that takes no request as long as ``deaf`` is set."""

    deaf = True

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        if not self.deaf:
            super().process(queues, index)


def silent() -> Silent:
    model = Silent.from_options({"size": "16M"})
    assert isinstance(model, Silent)
    return model


def frame(number: int = 0, length: int = 60) -> bytes:
    return (b"\xff" * 6 + bytes(6) + b"\x08\x00" + number.to_bytes(4, "big")).ljust(length, b"\x33")
