# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Owner, features, status: the order in which a device lets itself be brought up, stopped and brought up again."""

from __future__ import annotations

import errno

import pytest

from tests.support.homes import DEVICE_IDS, Home
from tests.support.probe import NEGOTIATED, RING_IOVA, RUNNING, Probe
from vdpa_bridge import ops
from vdpa_bridge.device import Device, RingSetup
from vdpa_bridge.differences import documented
from vdpa_bridge.errors import FeatureError
from vdpa_bridge.flags import BackendFeature as B
from vdpa_bridge.flags import Feature, Status
from vdpa_bridge.memory import Region
from vdpa_bridge.wire import EMPTY, U8, U64, IotlbUpdate, Iova, VringAddr, VringState

MODERN = Feature.VERSION_1 | Feature.ACCESS_PLATFORM


def test_a_new_device(probe: Probe) -> None:
    assert probe.get(ops.GET_STATUS) == 0
    assert probe.get(ops.GET_DEVICE_ID) == DEVICE_IDS[probe.home.kind]
    assert probe.get(ops.GET_FEATURES) & MODERN == MODERN
    assert probe.offers(B.IOTLB_MSG_V2)
    assert probe.get(ops.GET_VQS_COUNT) >= 1
    assert probe.get(ops.GET_GROUP_NUM) >= 1
    assert probe.get(ops.GET_AS_NUM) >= 1
    limits = probe.ask(ops.GET_IOVA_RANGE, EMPTY)
    assert limits.first < limits.last
    size = probe.get(ops.GET_VRING_NUM)
    assert size >= 16
    assert size & (size - 1) == 0


def test_owner_once(probe: Probe) -> None:
    probe.expect(0, ops.SET_OWNER)
    probe.expect(errno.EBUSY, ops.SET_OWNER)


def test_owner_survives_a_reset(probe: Probe) -> None:
    probe.own()
    probe.status(0)
    probe.expect(errno.EBUSY, ops.SET_OWNER)
    probe.expect(0, ops.SET_VRING_NUM, VringState(0, 16))


def test_backend_features(probe: Probe) -> None:
    offered = probe.get(ops.GET_BACKEND_FEATURES)
    probe.expect(errno.EOPNOTSUPP, ops.SET_BACKEND_FEATURES, U64(offered | 1 << 40))
    probe.expect(errno.EOPNOTSUPP, ops.SET_BACKEND_FEATURES, U64(1))
    if not offered & B.DESC_ASID:
        probe.expect(errno.EOPNOTSUPP, ops.SET_BACKEND_FEATURES, U64(offered | B.DESC_ASID))
    probe.expect(0, ops.SET_BACKEND_FEATURES, U64(offered))
    assert probe.get(ops.GET_BACKEND_FEATURES) == offered
    assert probe.backend.capability(ops.SET_BACKEND_FEATURES).level != "absent"


def test_features_want_access_platform(probe: Probe) -> None:
    probe.status(Status.ACKNOWLEDGE | Status.DRIVER)
    probe.expect(errno.EINVAL, ops.SET_FEATURES, U64(Feature.VERSION_1), "without ACCESS_PLATFORM")


def test_features_are_settled_by_features_ok(probe: Probe) -> None:
    probe.negotiate()
    probe.expect(errno.EBUSY, ops.SET_FEATURES, U64(MODERN))
    probe.status(0)
    probe.expect(0, ops.SET_FEATURES, U64(MODERN))


def test_features_offered_do_not_change_by_accepting(probe: Probe) -> None:
    before = probe.get(ops.GET_FEATURES)
    probe.negotiate()
    assert probe.get(ops.GET_FEATURES) == before


def test_features_not_offered_are_dropped(probe: Probe) -> None:
    """Nobody checks for the driver: it must not accept what is not offered."""
    unheard = 1 << 41
    assert not probe.get(ops.GET_FEATURES) & unheard
    probe.status(Status.ACKNOWLEDGE | Status.DRIVER)
    probe.expect(0, ops.SET_FEATURES, U64(MODERN | unheard))


def test_status_bits_are_only_added(probe: Probe) -> None:
    probe.status(Status.ACKNOWLEDGE | Status.DRIVER)
    probe.expect(errno.EINVAL, ops.SET_STATUS, U8(Status.ACKNOWLEDGE))
    probe.expect(errno.EINVAL, ops.SET_STATUS, U8(Status.FEATURES_OK))
    assert probe.get(ops.GET_STATUS) == Status.ACKNOWLEDGE | Status.DRIVER
    probe.expect(0, ops.SET_STATUS, U8(0))
    assert probe.get(ops.GET_STATUS) == 0


def test_status_failed_is_kept(probe: Probe) -> None:
    probe.status(Status.ACKNOWLEDGE | Status.FAILED)
    assert probe.get(ops.GET_STATUS) == Status.ACKNOWLEDGE | Status.FAILED
    probe.status(0)


def test_bring_up_twice(probe: Probe) -> None:
    probe.run()
    probe.status(0)
    probe.negotiate()
    probe.errno(ops.IOTLB_UPDATE, probe.region(iova=RING_IOVA).update())
    probe.ring()
    probe.status(RUNNING)
    assert probe.get(ops.GET_STATUS) == RUNNING


def test_reset_stops_everything(probe: Probe) -> None:
    """Addresses can be set again, a base is back to 0, features can be chosen again."""
    probe.run()
    probe.status(0)
    probe.expect(0, ops.SET_VRING_ADDR, VringAddr(0, 0, Iova(RING_IOVA), Iova(RING_IOVA + 2048), Iova(RING_IOVA + 1024), 0))
    probe.expect(0, ops.SET_FEATURES, U64(MODERN))
    probe.status(NEGOTIATED)


def test_reset_takes_the_base_back(probe: Probe) -> None:
    probe.own()
    probe.negotiate()
    probe.expect(0, ops.SET_VRING_BASE, VringState(0, 7), "not 0")
    if probe.errno(ops.GET_VRING_BASE, VringState(0, 0)) == errno.EOPNOTSUPP:
        assert "vp_vdpa" in probe.home.traits
        return
    assert (probe.ask(ops.GET_VRING_BASE, VringState(0, 0)).num == 7) != bool(documented(probe.home.traits, "GET_VRING_BASE", "before the device runs"))
    probe.status(0)
    assert probe.ask(ops.GET_VRING_BASE, VringState(0, 0)).num == 0


def test_suspend_before_driver_ok_does_nothing(probe: Probe) -> None:
    """It succeeds even where it is not offered, in either direction."""
    probe.expect(0, ops.SUSPEND)
    probe.expect(0, ops.RESUME)
    probe.own()
    probe.negotiate()
    probe.expect(0, ops.SUSPEND)
    probe.expect(0, ops.RESUME)
    assert probe.get(ops.GET_STATUS) == NEGOTIATED


def test_suspend_and_resume(probe: Probe) -> None:
    """The status byte stays; rings can be set up meanwhile, and stand where they stood."""
    probe.run(B.SUSPEND, B.RESUME)
    if not probe.offers(B.SUSPEND):
        probe.expect(errno.EOPNOTSUPP, ops.SUSPEND)
        probe.expect(errno.EOPNOTSUPP, ops.RESUME)
        return
    probe.expect(0, ops.SUSPEND)
    probe.expect(0, ops.SUSPEND)
    assert probe.get(ops.GET_STATUS) == RUNNING
    assert probe.ask(ops.GET_VRING_BASE, VringState(0, 0)).num == 0
    probe.expect(0, ops.SET_VRING_BASE, VringState(0, 0))
    probe.expect(0, ops.SET_VRING_ADDR, VringAddr(0, 0, Iova(RING_IOVA), Iova(RING_IOVA + 2048), Iova(RING_IOVA + 1024), 0))
    probe.expect(0, ops.RESUME)
    probe.expect(0, ops.RESUME)
    probe.expect(errno.EINVAL, ops.SET_VRING_BASE, VringState(0, 0))
    assert probe.get(ops.GET_STATUS) == RUNNING


def test_reset_while_suspended(probe: Probe) -> None:
    probe.run(B.SUSPEND)
    if not probe.offers(B.SUSPEND):
        probe.expect(errno.EOPNOTSUPP, ops.SUSPEND)
        return
    probe.expect(0, ops.SUSPEND)
    probe.status(0)
    assert probe.get(ops.GET_STATUS) == 0
    probe.negotiate()


# Through Device ---------------------------------------------------------------------------------------------------------


def test_identify(device: Device, home: Home) -> None:
    identity = device.identify()
    assert identity.device_id == DEVICE_IDS[home.kind]
    assert identity.device_id == device.get_device_id()
    assert identity.features == device.get_features()
    assert identity.queues >= 1
    assert identity.config_size >= 8
    assert device.identify() is identity


def test_negotiate(device: Device) -> None:
    agreed = device.negotiate(0)
    assert agreed == device.features == MODERN
    assert device.get_status() == NEGOTIATED
    assert device.negotiate(0) == agreed


def test_negotiate_what_is_not_offered(device: Device) -> None:
    with pytest.raises(FeatureError, match="bit 41"):
        device.negotiate(0, required=1 << 41)
    assert device.get_status() == 0


def test_map_is_all_or_nothing(device: Device) -> None:
    device.negotiate(0)
    with Region(Iova(RING_IOVA), 8192) as memory:
        first = IotlbUpdate(Iova(RING_IOVA), 4096, memory.fd)
        second = IotlbUpdate(Iova(RING_IOVA + 4096), 4096, memory.fd, 4096)
        with pytest.raises(OSError) as refused:
            device.map([first, second, first])
        assert refused.value.errno == errno.EEXIST
        device.map([first, second])
        device.unmap([first, second])
        device.map([memory.update()])
        device.unmap([memory.update()])


def test_rings_that_cannot_be_are_not_sent(device: Device) -> None:
    device.negotiate(0)
    limits = device.identify()
    with pytest.raises(ValueError, match="no queue"):
        device.start([RingSetup(limits.queues, 16, 0, 0, 0)])
    for num in (0, 3, 2 * limits.queue_size):
        with pytest.raises(ValueError, match=r"2\^n"):
            device.start([RingSetup(0, num, 0, 0, 0)])
    assert device.get_status() == NEGOTIATED


def test_start_that_is_refused_leaves_a_device_at_rest(device: Device) -> None:
    """Reset, and without the mappings that were to be made."""
    device.negotiate(0)
    with Region(Iova(RING_IOVA), 4096) as memory:
        with pytest.raises(OSError) as refused:
            device.start([RingSetup(0, 16, RING_IOVA, RING_IOVA + 1025, RING_IOVA + 2048)], [memory.update()])
        assert refused.value.errno == errno.EINVAL
        assert device.get_status() == 0
        device.negotiate(0)
        device.map([memory.update()])
        device.unmap([memory.update()])
