# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Kicks by a store into a page of the device: on a PCI function that offers it, and what happens where none does."""

from __future__ import annotations

import errno
import os
import random
import struct

import pytest

from vdpa_bridge import connect
from vdpa_bridge.backends.vhost_vdpa import VhostVdpa
from vdpa_bridge.drivers import BlkDriver, BlkRequest, NetDriver
from vdpa_bridge.virtio.config import parse_mac

from ..support.bridge import node
from ..support.seen import Seen

pytestmark = pytest.mark.lab


def kicks(fd: int) -> int:
    """How often the eventfd was written to: the kernel looks, and leaves the count."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def work(disk: BlkDriver) -> list[tuple[int, bytes]]:
    """Requests of all kinds and sizes, alone and together; their outcomes."""
    rng = random.Random(11)
    data = rng.randbytes(1 << 16)
    disk.write(0, data)
    disk.flush()
    outcomes = [(0, disk.read(0, len(data)))]
    batch = disk.submit([BlkRequest(0, at * 8, length=4096) for at in range(40)])
    outcomes += [(done.status, done.data) for done in sorted(disk.complete(batch), key=lambda request: request.sector)]
    outcomes += [(done.status, b"") for done in disk.complete(disk.submit([BlkRequest(0, disk.info.capacity, length=512)]))]
    return outcomes


def test_disk_by_doorbell(seen: Seen) -> None:
    """The eventfd stays untouched, and everything ends as it does by eventfd; also after a restart."""
    outcomes, counts = {}, {}
    for doorbells in (True, False):
        with connect(node("VP_BLK")) as device, BlkDriver(device, doorbells=doorbells) as disk:
            assert (disk.ring(0).doorbell is not None) == doorbells
            outcomes[doorbells] = work(disk)
            disk.restart()
            assert work(disk) == outcomes[doorbells]
            counts[doorbells] = kicks(disk.ring(0).kick)
    assert outcomes[True] == outcomes[False]
    assert counts[True] == 0
    assert counts[False] > 0
    seen("devices", "blk", "blk", "vp_vdpa", "split", "restart", "doorbell")


def test_network_by_doorbell(seen: Seen) -> None:
    """Three queues, each with a page of its own."""
    with connect(node("VP_NET")) as device, NetDriver(device) as nic:
        me = parse_mac(nic.mac)
        question = struct.pack("!HHBBH6s4s6s4s", 1, 0x800, 6, 4, 1, me, bytes([10, 0, 2, 15]), bytes(6), bytes([10, 0, 2, 2]))
        nic.send(b"\xff" * 6 + me + b"\x08\x06" + question)
        answer = nic.receive()
        assert (answer[:6], answer[12:14], answer[28:32]) == (me, b"\x08\x06", bytes([10, 0, 2, 2]))
        nic.set_mac(nic.mac)
        assert [kicks(nic.ring(index).kick) for index in range(3)] == [0, 0, 0]
    seen("devices", "net", "net", "vp_vdpa", "split", "control queue", "doorbell")


def test_device_without_doorbells() -> None:
    """vdpa_sim has none: eventfds are used, unasked."""
    with VhostVdpa(node("SIM_BLK")) as backend:
        assert backend.doorbell(0) is None
        assert backend.facts()["kicks"] == "by eventfd"
    with connect(node("SIM_BLK")) as device, BlkDriver(device) as disk:
        disk.read(0, 512)
        assert kicks(disk.ring(0).kick) > 0


@pytest.mark.parametrize("index", [-1, 1, 65535, 1 << 20])
def test_doorbell_of_a_queue_that_is_not_there(index: int) -> None:
    """The kernel hands the number to the device's driver unchecked: it does not get there."""
    with VhostVdpa(node("VP_BLK")) as backend:
        with pytest.raises(OSError, match="no such queue") as refused:
            backend.doorbell(index)
        assert refused.value.errno == errno.ENOBUFS
