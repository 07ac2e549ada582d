# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What can be said about a ring, and what not, before it works and while it does."""

from __future__ import annotations

import errno
import os

import pytest

from tests.support.probe import RING_IOVA, RUNNING, Probe
from vdpa_bridge import ops
from vdpa_bridge.backends.base import ABSENT
from vdpa_bridge.differences import documented
from vdpa_bridge.flags import BackendFeature as B
from vdpa_bridge.flags import Status
from vdpa_bridge.wire import Iova, VringAddr, VringFile, VringState

EVENTS = (ops.SET_VRING_KICK, ops.SET_VRING_CALL, ops.SET_VRING_ERR)


def address(desc: int = RING_IOVA, used: int = RING_IOVA + 2048, avail: int = RING_IOVA + 1024, flags: int = 0, log: int = 0) -> VringAddr:
    """Addresses of ring 0."""
    return VringAddr(0, flags, Iova(desc), Iova(used), Iova(avail), log)


@pytest.mark.parametrize(("num", "number"), [(0, errno.EINVAL), (3, errno.EINVAL), (65536, errno.EINVAL), (0x80000000, errno.EINVAL), (1, 0), (16, 0)])
def test_ring_size(probe: Probe, num: int, number: int) -> None:
    probe.own()
    probe.expect(number, ops.SET_VRING_NUM, VringState(0, num))


def test_largest_ring(probe: Probe) -> None:
    """Checked since Linux 6.12.117 (and its contemporaries); before, it was for the driver to heed."""
    probe.own()
    largest = probe.get(ops.GET_VRING_NUM)
    probe.expect(0, ops.SET_VRING_NUM, VringState(0, largest))
    probe.expect(errno.EINVAL, ops.SET_VRING_NUM, VringState(0, 2 * largest))


def test_size_of_a_queue(probe: Probe) -> None:
    """Its largest size, and its size once it runs; where the operation is there."""
    probe.own()
    largest = probe.get(ops.GET_VRING_NUM)
    number = probe.errno(ops.GET_VRING_SIZE, VringState(0, 0))
    if number:
        assert number == errno.EOPNOTSUPP
        assert probe.backend.capability(ops.GET_VRING_SIZE).level == ABSENT
        return
    assert probe.ask(ops.GET_VRING_SIZE, VringState(0, 0)).num == largest
    probe.negotiate()
    probe.ask(ops.IOTLB_UPDATE, probe.region().update())
    probe.ring(num=16)
    probe.status(RUNNING)
    assert probe.ask(ops.GET_VRING_SIZE, VringState(0, 0)).num == 16


@pytest.mark.parametrize(
    ("request_", "number"),
    [
        (address(), 0),
        (address(desc=RING_IOVA + 1), 0),
        (address(avail=RING_IOVA + 1025), errno.EINVAL),
        (address(used=RING_IOVA + 2050), errno.EINVAL),
        (address(log=2), errno.EINVAL),
        (address(flags=2), errno.EOPNOTSUPP),
        (address(flags=2, avail=1), errno.EOPNOTSUPP),
        (address(desc=1 << 63, used=1 << 63, avail=1 << 63), 0),
    ],
)
def test_ring_address(probe: Probe, request_: VringAddr, number: int) -> None:
    """Alignment is checked, of avail and used; mappings are not."""
    probe.own()
    probe.expect(number, ops.SET_VRING_ADDR, request_)
    assert probe.backend.capability(ops.SET_VRING_ADDR).level != ABSENT


def test_ring_base_before_negotiation(probe: Probe) -> None:
    probe.own()
    probe.expect(0, ops.SET_VRING_BASE, VringState(0, 0), "before FEATURES_OK")


def test_ring_base(probe: Probe) -> None:
    probe.own()
    probe.negotiate()
    probe.expect(0, ops.SET_VRING_BASE, VringState(0, 0))
    probe.expect(errno.EINVAL, ops.SET_VRING_BASE, VringState(0, 0x10000))
    probe.expect(0, ops.SET_VRING_BASE, VringState(0, 0xFFFF), "not 0")
    if documented(probe.home.traits, "GET_VRING_BASE", "before the device runs"):
        assert probe.ask(ops.GET_VRING_BASE, VringState(0, 99)).num != 0xFFFF
    elif probe.backend.capability(ops.GET_VRING_BASE).level != ABSENT and not probe.errno(ops.GET_VRING_BASE, VringState(0, 0)):
        assert probe.ask(ops.GET_VRING_BASE, VringState(0, 99)) == VringState(0, 0xFFFF)


def test_running_ring_keeps_its_place(probe: Probe) -> None:
    probe.run()
    probe.expect(errno.EINVAL, ops.SET_VRING_ADDR, address())
    probe.expect(errno.EINVAL, ops.SET_VRING_BASE, VringState(0, 0))
    if "vp_vdpa" not in probe.home.traits:
        probe.expect(0, ops.GET_VRING_BASE, VringState(0, 0), "while the ring runs")


@pytest.mark.parametrize("op", EVENTS, ids=lambda op: op.name)
def test_eventfds(probe: Probe, op: ops.Op[VringFile, object]) -> None:
    probe.own()
    probe.expect(0, op, VringFile(0, probe.eventfd()))
    probe.expect(0, op, VringFile(0, probe.eventfd()))
    probe.expect(0, op, VringFile(0, -1))
    probe.expect(0, op, VringFile(0, -1))
    probe.expect(errno.EBADF, op, VringFile(0, 1 << 20))
    probe.expect(errno.EINVAL, op, VringFile(0, probe.region().fd))


def test_refused_eventfd_leaves_the_old_one(probe: Probe) -> None:
    """A closed descriptor or a file in its place is an error, and nothing else."""
    probe.run()
    read, write = os.pipe2(os.O_CLOEXEC)
    probe.own_fd(read)
    probe.own_fd(write)
    for op in EVENTS:
        probe.expect(errno.EINVAL, op, VringFile(0, read))
        probe.expect(0, op, VringFile(0, probe.eventfd()))


@pytest.mark.parametrize("op", [ops.SET_VRING_KICK, ops.SET_VRING_CALL], ids=lambda op: op.name)
def test_eventfds_of_a_running_ring(probe: Probe, op: ops.Op[VringFile, object]) -> None:
    probe.run()
    probe.expect(0, op, VringFile(0, probe.eventfd()))
    probe.expect(0, op, VringFile(0, -1))
    probe.expect(0, op, VringFile(0, probe.eventfd()))


def test_eventfd_is_shared_not_taken(probe: Probe) -> None:
    """The caller's descriptor stays the caller's."""
    probe.own()
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    probe.expect(0, ops.SET_VRING_CALL, VringFile(0, fd))
    os.eventfd_write(fd, 1)
    assert os.eventfd_read(fd) == 1
    os.close(fd)


def test_enable_before_driver_ok(probe: Probe) -> None:
    """Off and on again as one likes, as nothing works yet."""
    probe.own()
    probe.negotiate()
    probe.ask(ops.IOTLB_UPDATE, probe.region().update())
    probe.ring(enable=False)
    probe.expect(0, ops.SET_VRING_ENABLE, VringState(0, 1))
    probe.expect(0, ops.SET_VRING_ENABLE, VringState(0, 0), "off")
    if documented(probe.home.traits, "SET_VRING_ENABLE", "off"):
        assert probe.get(ops.GET_STATUS) & Status.NEEDS_RESET
        return
    probe.expect(0, ops.SET_VRING_ENABLE, VringState(0, 1))
    probe.status(RUNNING)
    assert probe.get(ops.GET_STATUS) == RUNNING


def test_groups(probe: Probe) -> None:
    probe.own(B.IOTLB_ASID)
    groups, spaces = probe.get(ops.GET_GROUP_NUM), probe.get(ops.GET_AS_NUM)
    queues = probe.get(ops.GET_VQS_COUNT)
    if probe.errno(ops.GET_VRING_GROUP, VringState(0, 0)) == errno.EOPNOTSUPP:
        assert probe.backend.capability(ops.GET_VRING_GROUP).level == ABSENT
        assert {"vp_vdpa", "VDUSE"} & set(probe.home.traits)
        return
    assert {probe.ask(ops.GET_VRING_GROUP, VringState(index, 0)).num for index in range(queues)} == set(range(groups))
    probe.expect(0, ops.SET_GROUP_ASID, VringState(0, 0))
    probe.expect(errno.EINVAL, ops.SET_GROUP_ASID, VringState(0, spaces))
    if groups < queues:
        probe.expect(errno.EINVAL, ops.SET_GROUP_ASID, VringState(groups, 0))
    if groups > 1 and spaces > 1:
        probe.expect(0, ops.SET_GROUP_ASID, VringState(1, 1))
