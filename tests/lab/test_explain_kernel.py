# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Every way in which a kernel device does not work, made on a real kernel; and what is said to be typed cures it."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from vdpa_bridge import connect
from vdpa_bridge.system.vdpa_bus import bus_devices

from ..support.kernel import added, as_nobody, device_name, done, explain, fails, holding, in_lab, type_it

pytestmark = pytest.mark.lab


@pytest.fixture(autouse=True)
def lab() -> None:
    in_lab()


@pytest.mark.parametrize("name", ["SIM_BLK", "SIM_NET", "VP_BLK", "VP_NET"])
def test_a_good_device_is_good(name: str) -> None:
    cause, found = explain(os.environ[f"VDPA_{name}"])
    assert (cause, found["status"], found["type"]) == (None, 0, None)
    assert {check["verdict"] for check in found["checks"]} == {"ok"}
    says = {check["check"]: check["says"] for check in found["checks"]}
    assert says["device"].startswith(f"a {'block' if name.endswith('BLK') else 'net'} device")
    assert says["locked memory"].startswith("the device pins memory" if name.startswith("VP") else "the device does not pin")


def test_no_such_device() -> None:
    cause, found = explain("vdpa:nothing")
    assert cause == "no-such-device"
    assert device_name("SIM_NET") in found["checks"][-1]["says"]
    type_it(found["type"])
    assert explain("vdpa:nothing")[0] is None
    done("mgmt", "dev", "del", "nothing")
    assert explain("/dev/vhost-vdpa-99")[0] == "no-such-device"
    assert explain("/dev/null")[0] == "no-such-device"


def test_bound_to_the_kernels_own_driver() -> None:
    with added("xnet", "vdpasim_net") as target:
        done("mgmt", "bind", "xnet", "virtio_vdpa")
        assert explain("/dev/vhost-vdpa-99")[0] == "wrong-driver"
        cause, found = explain(target)
        assert (cause, found["type"]) == ("wrong-driver", "vdpa-bridge mgmt bind xnet vhost_vdpa")
        assert fails("show", target).endswith(f"vdpa-bridge explain {target} says more")
        type_it(found["type"])
        assert explain(target)[0] is None


def test_held_by_another_process() -> None:
    with holding(os.environ["VDPA_SIM_NET"]) as pid:
        cause, found = explain(os.environ["VDPA_SIM_NET"])
        assert cause == "busy"
        assert f"(pid {pid})" in found["type"]
    assert explain(os.environ["VDPA_SIM_NET"])[0] is None


def test_no_permission() -> None:
    def refused() -> bool:
        cause, found = explain(os.environ["VDPA_SIM_NET"])
        return cause == "permission" and "chgrp kvm" in found["type"] and "root:root, mode 600" in found["checks"][-1]["says"]

    explain(os.environ["VDPA_SIM_NET"])  # imports what the child needs
    assert as_nobody(refused) == 0


def test_too_little_memory_may_be_locked() -> None:
    node = os.environ["VDPA_VP_NET"]

    def refused() -> bool:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
        cause, found = explain(node, "--memory", "64M")
        assert "67108864 bytes are wanted, this process may lock 65536, and no more than 65536" in found["checks"][-1]["says"]
        return cause == "memlock" and found["type"].startswith("ulimit -l 65536 ") and explain(node, "--memory", "64K")[0] is None

    def allowed() -> bool:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 64 << 20))  # as a back-end raises the one to the other
        return explain(node, "--memory", "64M")[0] is None and resource.getrlimit(resource.RLIMIT_MEMLOCK) == (65536, 64 << 20)

    explain(node)  # imports what the children need
    os.chmod(node, 0o666)
    try:
        assert as_nobody(refused) == 0
        assert as_nobody(allowed) == 0
    finally:
        os.chmod(node, 0o600)


def test_more_memory_than_the_iommu_can_address() -> None:
    with connect(os.environ["VDPA_VP_BLK"]) as device:
        last = device.identify().iova_range.last
    cause, found = explain(os.environ["VDPA_VP_BLK"], "--memory", hex(last))
    assert (cause, found["type"]) == ("iova-range", f"give it at most {last + 1} bytes, within 0x0 to {last:#x}")
    assert explain(os.environ["VDPA_SIM_BLK"], "--memory", "512T")[0] is None


def test_a_feature_left_out_when_the_device_was_made() -> None:
    with added("xnet", "vdpasim_net", "device_features", "0x300000020") as target:
        assert explain(target)[0] is None
        cause, found = explain(target, "--want", "CTRL_VQ")
        assert cause == "feature-withheld"
        assert "left out when the device was added" in found["checks"][-3]["says"]
        type_it(found["type"])
        assert explain(target, "--want", "CTRL_VQ")[0] is None
        cause, found = explain(target, "--want", "CTRL_VQ", "--want", "MQ")
        assert (cause, found["type"]) == ("feature-withheld", "do without")


def test_modules_that_are_not_loaded() -> None:
    """The kernel's own driver keeps the devices while vhost_vdpa is away."""
    subprocess.run(["modprobe", "-r", "vduse"], check=True, timeout=60)
    cause, found = explain("/dev/vduse/control")
    assert (cause, found["type"]) == ("no-vduse", "modprobe vduse")
    type_it(found["type"])
    assert explain("/dev/vduse/control")[0] == "no-such-device"
    nodes = {device.name: device.node for device in bus_devices()}
    for name in nodes:
        done("mgmt", "bind", name, "virtio_vdpa")
    subprocess.run(["modprobe", "-r", "vhost_vdpa"], check=True, timeout=60)
    try:
        for target in (f"vdpa:{min(nodes)}", "/dev/vhost-vdpa-0"):
            cause, found = explain(target)
            assert (cause, found["type"]) == ("module-missing", "modprobe vhost_vdpa")
        type_it(found["type"])
        assert explain(target)[0] == "wrong-driver"
    finally:
        subprocess.run(["modprobe", "vhost_vdpa"], check=True, timeout=60)
        for name in sorted(nodes, key=lambda name: nodes[name]):
            done("mgmt", "bind", name, "vhost_vdpa")
        subprocess.run(["modprobe", "-r", "virtio_vdpa"], check=True, timeout=60)
        subprocess.run(["modprobe", "virtio_vdpa"], check=True, timeout=60)  # later than vhost_vdpa, which gets new devices then
    assert {device.name: device.node for device in bus_devices()} == nodes


@pytest.mark.skipif(not shutil.which("qemu-storage-daemon"), reason="needs qemu-storage-daemon: run tools/setup peers")
def test_vduse_devices_and_their_daemon() -> None:
    """Not on the bus yet; good; its daemon stuck."""
    with tempfile.TemporaryDirectory(prefix="vb") as directory:
        image = Path(directory, "image")
        with image.open("wb") as file:
            file.truncate(1 << 20)
        command = ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f0,filename={image}"]
        command += ["--export", "type=vduse-blk,id=e0,name=xqsd,node-name=f0,writable=on,num-queues=1"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, env=os.environ | {"TMPDIR": directory}) as daemon:
            try:
                end = time.monotonic() + 20
                while not Path("/dev/vduse/xqsd").exists():
                    assert time.monotonic() < end
                    time.sleep(0.02)
                for target in ("vdpa:xqsd", "/dev/vduse/xqsd"):
                    cause, found = explain(target)
                    assert (cause, found["type"]) == ("no-such-device", "vdpa-bridge mgmt dev add name xqsd mgmtdev vduse")
                type_it(found["type"])
                assert explain("vdpa:xqsd")[0] is None
                with connect("vdpa:xqsd") as disk:
                    assert disk.identify().device_id == 2
                assert explain("/dev/vduse/xqsd")[1]["type"] == "vdpa-bridge explain vdpa:xqsd"
                Path("/sys/class/vduse/xqsd/msg_timeout").write_text("1")
                daemon.send_signal(signal.SIGSTOP)
                cause, found = explain("vdpa:xqsd")
                assert cause == "not-answering"
                assert "vdpa-bridge mgmt dev del xqsd" in found["type"]
            finally:
                daemon.kill()
                daemon.wait(20)
                if Path("/sys/bus/vdpa/devices/xqsd").exists():
                    done("mgmt", "dev", "del", "xqsd")
