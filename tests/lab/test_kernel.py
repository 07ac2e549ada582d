# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What only a kernel device can show: its table of mappings under ours, its owner, its driver on the other side."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdpa_bridge import Target, connect, ops
from vdpa_bridge.backends.vhost_vdpa import VhostVdpa
from vdpa_bridge.drivers import BlkDriver
from vdpa_bridge.flags import BackendFeature as B
from vdpa_bridge.memory import Region
from vdpa_bridge.wire import EMPTY, U64, IotlbInvalidate, IotlbUpdate, Iova, VringState

pytestmark = pytest.mark.lab
HERE = Iova(0x100000)


def node(name: str) -> str:
    """The device node of *name*."""
    variable = f"VDPA_{name}"
    if variable not in os.environ:
        pytest.skip(f"no ${variable}: run it in the lab, tools/lab pytest -m lab tests/lab")
    return os.environ[variable]


@pytest.fixture
def sim() -> Iterator[VhostVdpa]:
    with VhostVdpa(node("SIM_BLK")) as backend:
        yield backend


@pytest.fixture
def vp() -> Iterator[VhostVdpa]:
    with VhostVdpa(node("VP_BLK")) as backend:
        yield backend


@pytest.fixture
def memory() -> Iterator[Region]:
    with Region(HERE, 1 << 20) as region:
        yield region


def test_nodes() -> None:
    for name in ("SIM_BLK", "SIM_NET", "VP_BLK", "VP_NET"):
        assert stat.S_ISCHR(os.stat(node(name)).st_mode)


def test_target_by_the_name_on_the_bus() -> None:
    """``vdpa:NAME`` finds the node that the lab names."""
    name = next(p.parent.name for p in Path("/sys/bus/vdpa/devices").glob(f"*/{Path(node('SIM_BLK')).name}"))
    with connect(f"vdpa:{name}") as device:
        assert device.identify().device_id == 2
    with pytest.raises(FileNotFoundError, match=name):
        Target.parse("vdpa:nothing-of-the-kind").open()


def test_owner_is_the_process(sim: VhostVdpa) -> None:
    """A forked child shares the descriptor but not the memory: rings and mappings are refused to it, questions are not."""
    sim.call(ops.SET_OWNER, EMPTY)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sim.call(ops.GET_STATUS, EMPTY)
            sim.call(ops.SET_VRING_NUM, VringState(0, 16))
        except OSError as error:
            code = 0 if error.errno == errno.EPERM and "SET_OWNER" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_kernel_agrees_with_our_table(sim: VhostVdpa, memory: Region) -> None:
    """What our table calls mapped, the kernel calls mapped: it refuses the same range, given to it directly."""
    sim.call(ops.SET_OWNER, EMPTY)
    sim.call(ops.IOTLB_UPDATE, memory.update())
    with pytest.raises(OSError) as refused:
        os.write(sim._fd, memory.update().message(memory.mapping.address))
    assert refused.value.errno == errno.EFAULT
    sim.call(ops.IOTLB_INVALIDATE, IotlbInvalidate(HERE, memory.size))
    os.write(sim._fd, memory.update().message(memory.mapping.address))
    os.write(sim._fd, IotlbInvalidate(HERE, memory.size).message())


def test_kernel_agrees_after_a_reset(sim: VhostVdpa, memory: Region) -> None:
    """Without IOTLB_PERSIST vhost-vdpa remembers ranges that vdpa_sim forgot: after our reset both have forgotten."""
    sim.call(ops.SET_OWNER, EMPTY)
    sim.call(ops.IOTLB_UPDATE, memory.update())
    sim.call(ops.SET_STATUS, ops.SET_STATUS.request(0))
    os.write(sim._fd, memory.update().message(memory.mapping.address))
    os.write(sim._fd, IotlbInvalidate(HERE, memory.size).message())


def test_pinned_memory_has_a_limit(vp: VhostVdpa, memory: Region) -> None:
    """EFAULT becomes ENOMEM, with the limit named, when the device pins and RLIMIT_MEMLOCK is too small."""
    vp.call(ops.SET_OWNER, EMPTY)
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, before[1]))
    try:
        with pytest.raises(OSError, match="RLIMIT_MEMLOCK allows 65536") as refused:
            vp.call(ops.IOTLB_UPDATE, memory.update())
        assert refused.value.errno == errno.ENOMEM
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)
    vp.call(ops.IOTLB_UPDATE, memory.update())


def test_iova_range_of_an_iommu(vp: VhostVdpa, memory: Region) -> None:
    limits = vp.call(ops.GET_IOVA_RANGE, EMPTY)
    assert limits.last < (1 << 64) - 1
    vp.call(ops.SET_OWNER, EMPTY)
    with pytest.raises(OSError, match="leaves the IOVA range") as refused:
        vp.call(ops.IOTLB_UPDATE, IotlbUpdate(Iova(limits.last + 1), 4096, memory.fd))
    assert refused.value.errno == errno.EINVAL
    vp.call(ops.IOTLB_UPDATE, IotlbUpdate(Iova(limits.last - 4095), 4096, memory.fd))


def test_features_that_devices_offer(sim: VhostVdpa, vp: VhostVdpa) -> None:
    both = B.IOTLB_MSG_V2 | B.IOTLB_BATCH | B.IOTLB_ASID | B.IOTLB_PERSIST
    assert sim.call(ops.GET_BACKEND_FEATURES, EMPTY).value == both | B.SUSPEND | B.RESUME | B.ENABLE_AFTER_DRIVER_OK
    assert vp.call(ops.GET_BACKEND_FEATURES, EMPTY).value == both
    assert sim.capability(ops.SUSPEND).level == "native"
    assert "SUSPEND" in vp.capability(ops.SUSPEND).note
    sim.call(ops.SET_BACKEND_FEATURES, U64(both))


def test_two_devices_at_once() -> None:
    """Copy from one disk to another, each with its own driver."""
    data = bytes(range(256)) * 64
    with connect(node("SIM_BLK")) as first, connect(node("VP_BLK")) as second, BlkDriver(first) as source, BlkDriver(second) as sink:
        source.write(0, data)
        sink.write(0, source.read(0, len(data)))
        sink.flush()
        assert sink.read(0, len(data)) == data
