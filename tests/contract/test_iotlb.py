# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Mappings. The kernel answers every mistake with one EFAULT; ``vdpa_bridge`` says which it was, in every home alike."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import pytest

from tests.support.homes import Home, Opener
from tests.support.probe import RING_IOVA, Probe, probing
from vdpa_bridge import ops
from vdpa_bridge.flags import BackendFeature as B
from vdpa_bridge.wire import EMPTY, RO, RW, WO, IotlbBatchBegin, IotlbBatchEnd, IotlbInvalidate, IotlbUpdate, Iova

PAGE = 4096
HERE = Iova(RING_IOVA)


def mapped(probe: Probe, size: int = 4 * PAGE, *features: B) -> IotlbUpdate:
    """An owner with one mapping at HERE."""
    probe.own(*features)
    update = probe.region(size, HERE).update()
    probe.ask(ops.IOTLB_UPDATE, update)
    return update


def test_update_and_invalidate(probe: Probe) -> None:
    update = mapped(probe)
    probe.expect(0, ops.IOTLB_INVALIDATE, IotlbInvalidate(HERE, update.size))
    probe.expect(0, ops.IOTLB_UPDATE, update)


@pytest.mark.parametrize("perm", [RO, WO, RW])
def test_permissions(probe: Probe, perm: int) -> None:
    probe.own()
    probe.expect(0, ops.IOTLB_UPDATE, probe.region(iova=HERE).update(perm))


@pytest.mark.parametrize("shift", [0, PAGE, -PAGE, 3 * PAGE])
def test_overlap(probe: Probe, shift: int) -> None:
    update = mapped(probe)
    probe.expect(errno.EEXIST, ops.IOTLB_UPDATE, replace(update, iova=Iova(HERE + shift)))
    probe.expect(0, ops.IOTLB_INVALIDATE, IotlbInvalidate(HERE, update.size))
    probe.expect(0, ops.IOTLB_UPDATE, replace(update, iova=Iova(HERE + shift)))


def test_neighbours(probe: Probe) -> None:
    update = mapped(probe)
    for at in (HERE - update.size, HERE + update.size):
        probe.expect(0, ops.IOTLB_UPDATE, replace(update, iova=Iova(at)))
    probe.expect(0, ops.IOTLB_INVALIDATE, IotlbInvalidate(Iova(HERE - update.size), 3 * update.size))
    probe.expect(0, ops.IOTLB_UPDATE, replace(update, iova=Iova(HERE - update.size)))


WRONG = {
    "wraps": {"iova": Iova((1 << 64) - PAGE)},
    "size 0": {"size": 0},
    "perm 0": {"perm": 0},
    "perm 4": {"perm": 4},
    "iova between pages": {"iova": Iova(HERE + 0x10000 + 8)},
    "size between pages": {"size": PAGE + 1},
    "offset between pages": {"offset": 2048, "size": PAGE},
    "beyond the end of the memory": {"size": 8 * PAGE},
    "offset at the end of the memory": {"offset": 4 * PAGE, "size": PAGE},
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_updates(probe: Probe, case: str) -> None:
    """Each is EINVAL and leaves nothing behind: the same place can be mapped afterwards."""
    probe.own()
    right = probe.region(4 * PAGE, HERE + 0x10000).update()
    probe.expect(errno.EINVAL, ops.IOTLB_UPDATE, replace(right, **WRONG[case]))  # type: ignore[arg-type]
    probe.expect(0, ops.IOTLB_UPDATE, right)


def test_descriptors_that_hold_no_memory(probe: Probe) -> None:
    probe.own()
    probe.expect(errno.EINVAL, ops.IOTLB_UPDATE, IotlbUpdate(HERE, PAGE, probe.eventfd()))
    read, write = os.pipe2(os.O_CLOEXEC)
    probe.own_fd(read)
    probe.own_fd(write)
    probe.expect(errno.EINVAL, ops.IOTLB_UPDATE, IotlbUpdate(HERE, PAGE, write))
    probe.expect(errno.EBADF, ops.IOTLB_UPDATE, IotlbUpdate(HERE, PAGE, 1 << 20))
    probe.expect(errno.EBADF, ops.IOTLB_UPDATE, IotlbUpdate(HERE, PAGE, -1))
    probe.expect(0, ops.IOTLB_UPDATE, probe.region(iova=HERE).update())


def test_memory_that_is_read_only(probe: Probe) -> None:
    """A descriptor open for reading alone serves RO mappings and no others."""
    probe.own()
    memory = probe.region(iova=HERE)
    read_only = probe.own_fd(os.open(f"/proc/self/fd/{memory.fd}", os.O_RDONLY | os.O_CLOEXEC))
    probe.expect(errno.EACCES, ops.IOTLB_UPDATE, IotlbUpdate(HERE, PAGE, read_only, 0, RW))
    probe.expect(errno.EACCES, ops.IOTLB_UPDATE, IotlbUpdate(HERE, PAGE, read_only, 0, WO))
    probe.expect(0, ops.IOTLB_UPDATE, IotlbUpdate(HERE, PAGE, read_only, 0, RO), "RO mapping of a read-only descriptor")


def test_wrong_invalidations(probe: Probe) -> None:
    """A mapping goes as a whole or not at all; nothing is not there to go."""
    update = mapped(probe)
    probe.expect(errno.EINVAL, ops.IOTLB_INVALIDATE, IotlbInvalidate(HERE, 0))
    probe.expect(errno.EINVAL, ops.IOTLB_INVALIDATE, IotlbInvalidate(HERE, PAGE))
    probe.expect(errno.EINVAL, ops.IOTLB_INVALIDATE, IotlbInvalidate(Iova(HERE + PAGE), update.size))
    probe.expect(errno.EINVAL, ops.IOTLB_INVALIDATE, IotlbInvalidate(Iova((1 << 64) - PAGE), 2 * PAGE))
    probe.expect(0, ops.IOTLB_INVALIDATE, IotlbInvalidate(Iova(0x40000000), PAGE))
    probe.expect(errno.EEXIST, ops.IOTLB_UPDATE, update)


def test_everything_at_once(probe: Probe) -> None:
    update = mapped(probe)
    probe.expect(0, ops.IOTLB_INVALIDATE, IotlbInvalidate(Iova(0), (1 << 64) - 1))
    probe.expect(0, ops.IOTLB_UPDATE, update)


def test_batch(probe: Probe) -> None:
    """BEGIN again and END without BEGIN do no harm; what is between them holds afterwards."""
    probe.own(B.IOTLB_BATCH)
    update = probe.region(4 * PAGE, HERE).update()
    probe.expect(0, ops.IOTLB_BATCH_END, IotlbBatchEnd())
    probe.expect(0, ops.IOTLB_BATCH_BEGIN, IotlbBatchBegin())
    probe.expect(0, ops.IOTLB_BATCH_BEGIN, IotlbBatchBegin())
    probe.expect(0, ops.IOTLB_UPDATE, update)
    probe.expect(errno.EEXIST, ops.IOTLB_UPDATE, update)
    probe.expect(0, ops.IOTLB_INVALIDATE, IotlbInvalidate(HERE, update.size))
    probe.expect(0, ops.IOTLB_UPDATE, update)
    probe.expect(0, ops.IOTLB_BATCH_END, IotlbBatchEnd())
    probe.expect(errno.EEXIST, ops.IOTLB_UPDATE, update)


@pytest.mark.parametrize("persist", [False, True])
def test_reset_within_a_batch(probe: Probe, persist: bool) -> None:
    """The reset ends the batch if it drops the mappings, and only then."""
    probe.own(B.IOTLB_BATCH, B.IOTLB_ASID, *[B.IOTLB_PERSIST] * persist)
    probe.expect(0, ops.IOTLB_BATCH_BEGIN, IotlbBatchBegin())
    probe.status(0)
    if probe.get(ops.GET_AS_NUM) > 1 and probe.offers(B.IOTLB_ASID):
        persists = persist and probe.offers(B.IOTLB_PERSIST)
        probe.expect(errno.EINVAL if persists else 0, ops.IOTLB_BATCH_BEGIN, IotlbBatchBegin(1))
        probe.expect(0, ops.IOTLB_BATCH_END, IotlbBatchEnd(0 if persists else 1))
    probe.expect(0, ops.IOTLB_UPDATE, probe.region(iova=HERE).update())


def test_address_spaces(probe: Probe) -> None:
    """They are apart; one that is not there is EINVAL; a batch is of one of them."""
    update = mapped(probe, PAGE, B.IOTLB_ASID, B.IOTLB_BATCH)
    spaces = probe.get(ops.GET_AS_NUM)
    if not probe.offers(B.IOTLB_ASID):
        assert spaces == 1
        return
    probe.expect(errno.EINVAL, ops.IOTLB_UPDATE, replace(update, asid=spaces))
    probe.expect(errno.EINVAL, ops.IOTLB_INVALIDATE, IotlbInvalidate(HERE, PAGE, spaces))
    probe.expect(errno.EINVAL, ops.IOTLB_BATCH_BEGIN, IotlbBatchBegin(spaces))
    if spaces > 1:
        probe.expect(0, ops.IOTLB_UPDATE, replace(update, asid=1))
        probe.expect(errno.EEXIST, ops.IOTLB_UPDATE, replace(update, asid=1))
        probe.expect(0, ops.IOTLB_BATCH_BEGIN, IotlbBatchBegin(1))
        probe.expect(errno.EINVAL, ops.IOTLB_INVALIDATE, IotlbInvalidate(HERE, PAGE, 0))
        probe.expect(0, ops.IOTLB_INVALIDATE, IotlbInvalidate(HERE, PAGE, 1))
        probe.expect(errno.EINVAL, ops.IOTLB_BATCH_END, IotlbBatchEnd(0))
        probe.expect(0, ops.IOTLB_BATCH_END, IotlbBatchEnd(1))
        probe.expect(errno.EEXIST, ops.IOTLB_UPDATE, update)


def test_address_space_is_ignored_unless_acknowledged(probe: Probe) -> None:
    """Without IOTLB_ASID the field is padding (drivers/vhost/vhost.c, vhost_chr_write_iter)."""
    update = mapped(probe, PAGE)
    probe.expect(errno.EEXIST, ops.IOTLB_UPDATE, replace(update, asid=1))
    probe.expect(errno.EEXIST, ops.IOTLB_UPDATE, replace(update, asid=77))
    probe.expect(0, ops.IOTLB_INVALIDATE, IotlbInvalidate(HERE, PAGE, 77))
    probe.expect(0, ops.IOTLB_UPDATE, update)


def test_reset_drops_mappings(probe: Probe) -> None:
    update = mapped(probe)
    probe.status(0)
    probe.expect(0, ops.IOTLB_UPDATE, update)


def test_reset_keeps_mappings_when_they_persist(probe: Probe) -> None:
    update = mapped(probe, 4 * PAGE, B.IOTLB_PERSIST)
    if not probe.offers(B.IOTLB_PERSIST):
        probe.status(0)
        probe.expect(0, ops.IOTLB_UPDATE, update)
        return
    probe.status(0)
    probe.expect(errno.EEXIST, ops.IOTLB_UPDATE, update)
    probe.expect(0, ops.IOTLB_INVALIDATE, IotlbInvalidate(HERE, update.size))
    probe.expect(0, ops.IOTLB_UPDATE, update)


def test_close_drops_mappings(home: Home, opener: Opener) -> None:
    """Also those of a batch that was never ended, with their memory gone already."""
    for _ in range(2):
        with probing(home, opener()) as probe:
            update = mapped(probe, 4 * PAGE, B.IOTLB_BATCH, B.IOTLB_PERSIST)
            probe.expect(0, ops.IOTLB_BATCH_BEGIN, IotlbBatchBegin())
            probe.expect(0, ops.IOTLB_UPDATE, replace(update, iova=Iova(0x50000000)))


def test_mapping_outlives_its_descriptor(probe: Probe) -> None:
    """The descriptor is lent for the call alone."""
    probe.own()
    fd = os.memfd_create("lent", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGE)
    probe.expect(0, ops.IOTLB_UPDATE, IotlbUpdate(HERE, PAGE, fd))
    os.close(fd)
    probe.expect(0, ops.IOTLB_INVALIDATE, IotlbInvalidate(HERE, PAGE))


def test_many_mappings_in_one_go(probe: Probe) -> None:
    """As many as any peer takes by one table."""
    probe.own(B.IOTLB_BATCH)
    memory = probe.region(8 * PAGE, HERE)
    calls: list[ops.Call] = [(ops.IOTLB_BATCH_BEGIN, IotlbBatchBegin())]
    calls += [(ops.IOTLB_UPDATE, IotlbUpdate(Iova(HERE + 2 * n * PAGE), PAGE, memory.fd, n * PAGE)) for n in range(8)]
    calls.append((ops.IOTLB_BATCH_END, IotlbBatchEnd()))
    assert probe.backend.call_many(calls) == [EMPTY] * 10
    probe.expect(0, ops.IOTLB_INVALIDATE, IotlbInvalidate(HERE, 16 * PAGE))
