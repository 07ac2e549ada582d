# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A disk grows while it is used: the driver is told, in every home that can tell, and a QEMU guest sees it."""

from __future__ import annotations

import os
import select
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guest import Guest
from tests.support.seen import Seen
from vdpa_bridge import Device
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.backends.vhost_user import open_vhost_user
from vdpa_bridge.models.blk import BlkModel
from vdpa_bridge.models.image import FileImage
from vdpa_bridge.vhost_user.server import Server

BEFORE, AFTER = 4 << 20, 12 << 20


class Growing:
    """A disk in a file, and how to make it larger."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "disk"
        self.file.touch()
        os.truncate(self.file, BEFORE)
        self.model = BlkModel(FileImage(os.open(self.file, os.O_RDWR)))
        self.device = ModelDevice(self.model, "growing disk")
        self.path = str(directory / "s")

    def grow(self) -> None:
        os.truncate(self.file, AFTER)
        self.device.refresh()


@pytest.fixture
def growing() -> Iterator[Growing]:
    with tempfile.TemporaryDirectory(prefix="vb") as name:
        disk = Growing(Path(name))
        yield disk
        disk.device.close()


def capacity(device: Device) -> int:
    return int.from_bytes(device.get_config(0, 8), "little") * 512


@pytest.mark.parametrize("vdpa", ["require", "off"])
def test_driver_is_told(growing: Growing, seen: Seen, vdpa: str) -> None:
    event = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        with Server(growing.device.open, growing.path), Device(open_vhost_user(growing.path, device_id=2, vdpa=vdpa)) as device:
            device.set_config_call(event)
            assert capacity(device) == BEFORE
            assert not select.select([event], [], [], 0.1)[0], "nothing has changed yet"
            growing.grow()
            assert select.select([event], [], [], 5)[0], "no event came"
            os.eventfd_read(event)
            assert capacity(device) == AFTER
            device.set_config_call(-1)
            growing.grow()
            assert capacity(device) == AFTER
            assert not select.select([event], [], [], 0.1)[0], "the eventfd was taken back"
    finally:
        os.close(event)
    seen("clients", "vdpa_bridge", "blk", "model", "config change", "legacy" if vdpa == "off" else "vDPA mode")


@pytest.mark.peers
def test_guest_sees_it(growing: Growing, seen: Seen) -> None:
    script = f"""
        until [ -b /dev/vda ]; do sleep 0.1; done
        echo READY $(cat /sys/block/vda/size)
        until [ $(cat /sys/block/vda/size) = {AFTER // 512} ]; do sleep 0.1; done
        echo GROWN; dd if=/dev/zero of=/dev/vda bs=1M seek=10 count=1 conv=fsync 2>/dev/null && echo WRITTEN
    """
    arguments = ["-chardev", f"socket,id=c0,path={growing.path}", "-device", "vhost-user-blk-pci,chardev=c0,num-queues=1"]
    with (
        Server(growing.device.open, growing.path),
        Guest(script, modules=["virtio_blk"], qemu_args=arguments) as guest,
    ):
        guest.wait_output(f"READY {BEFORE // 512}", timeout=60)
        growing.grow()
        result = guest.wait(timeout=30)
    assert result.status == 0, result.log
    assert "WRITTEN" in result.output
    seen("clients", "QEMU", "blk", "model", "config change")
