# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What only a kernel device can show: its table of mappings under ours, its owner, its driver on the other side."""

from __future__ import annotations

import errno
import os
import re
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vdpa_bridge import Target, connect, ops
from vdpa_bridge.backends.memlock import pinned
from vdpa_bridge.backends.vhost_vdpa import VhostVdpa
from vdpa_bridge.drivers import BlkDriver, NetDriver
from vdpa_bridge.flags import BackendFeature as B
from vdpa_bridge.memory import Region
from vdpa_bridge.wire import EMPTY, U64, IotlbInvalidate, IotlbUpdate, Iova, VringState

from ..support.bridge import limited, node

pytestmark = pytest.mark.lab
HERE = Iova(0x100000)


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


@pytest.fixture
def memlock() -> Iterator[Callable[[int], None]]:
    """Sets the soft limit of memory that this process may pin; as it was afterwards."""
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


def test_limit_of_pinned_memory_is_raised(vp: VhostVdpa, memory: Region, memlock: Callable[[int], None]) -> None:
    """By as much as is needed for what this process pins, other devices counted, and for devices that pin alone."""
    vp.call(ops.SET_OWNER, EMPTY)
    memlock(65536)
    with connect(node("SIM_BLK")) as device, BlkDriver(device) as disk:
        assert disk.read(0, 512)
        assert resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == 65536
    vp.call(ops.IOTLB_UPDATE, memory.update())
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == memory.size
    assert pinned() == memory.size
    with connect(node("VP_NET")) as device, NetDriver(device) as nic:
        assert nic.link_up
        assert resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == pinned() > memory.size
    assert pinned() == memory.size


def test_limit_of_pinned_memory_that_we_may_not_raise() -> None:
    """EFAULT becomes ENOMEM: what is needed, what is allowed, and what to type; which then works."""
    size = 1 << 20
    command = [*limited(65536), sys.executable, "-m", "vdpa_bridge", "blk", node("VP_BLK"), "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said = process.communicate(timeout=60)[1]
    assert process.returncode
    assert "Cannot allocate memory" in said
    assert "RLIMIT_MEMLOCK allows 65536 and up to 65536" in said
    advice = re.search(r"prlimit --pid (\d+) --memlock=(\d+):", said)
    assert advice, said
    assert (int(advice[1]), int(advice[2]) > size) == (process.pid, True)
    command = [*limited(int(advice[2])), *command[command.index(sys.executable) :]]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


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
