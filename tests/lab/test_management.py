# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Making, changing and binding devices on a real kernel, beside iproute2's own tool."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator

import pytest

from vdpa_bridge import connect
from vdpa_bridge.system.management import Management
from vdpa_bridge.system.vdpa_bus import bus_device

from ..support.kernel import added, as_nobody, bridge, device_name, done, fails, holding, in_lab, iproute, told

pytestmark = pytest.mark.lab
MAC = "02:00:00:00:00:77"


@pytest.fixture(autouse=True)
def lab() -> None:
    in_lab()


@pytest.fixture
def net() -> Iterator[str]:
    """A NIC of our own: its name."""
    with added("mnet", "vdpasim_net", "mac", MAC, "mtu", "1400"):
        yield "mnet"


def test_it_says_what_vdpa_says(net: str) -> None:
    """Same devices, keys and values; iproute2 6.1 knows types and features of NICs, types of disks, and nothing else by name."""
    ours, theirs = told("mgmt", "dev", "show")["dev"], iproute("dev", "show")["dev"]
    types = {name: (facts.pop("type"), theirs[name].pop("type")) for name, facts in ours.items()}
    assert ours == theirs
    assert all(our == their or "unknown" in their for our, their in types.values())
    assert {our for our, _ in types.values()} >= {"network", "block", "rng", "scsi", "console", "input"}
    assert told("mgmt", "dev", "show", net) == iproute("dev", "show", net)
    ours, theirs = told("mgmt", "dev", "config", "show")["config"], iproute("dev", "config", "show")["config"]
    theirs |= iproute("dev", "config", "show", net)["config"]  # their list ends at the first device of another type
    assert ours[net] == theirs[net] == {"mac": MAC, "link": "up", "link_announce": False, "mtu": 1400}
    assert {name: {key: ours[name][key] for key in facts} for name, facts in theirs.items()} == theirs
    assert set(ours) == set(types)
    assert "Operation not supported" in fails("mgmt", "dev", "config", "show", next(name for name, (our, _) in types.items() if our == "rng"))
    assert ours[device_name("SIM_BLK")]["capacity"] == 262144
    ours, theirs = told("mgmt", "mgmtdev", "show")["mgmtdev"], iproute("mgmtdev", "show")["mgmtdev"]
    for handle, facts in theirs.items():
        for key in ("supported_classes", "dev_features"):
            names, others = ours[handle].pop(key), facts.pop(key)
            assert len(names) == len(others)
            assert all(name == other for name, other in zip(names, others, strict=True) if isinstance(other, str) and "unknown" not in other)
    assert ours == theirs
    handle = iproute("dev", "show")["dev"][device_name("VP_BLK")]["mgmtdev"]
    assert list(told("mgmt", "mgmtdev", "show", handle)["mgmtdev"]) == [handle]
    assert f"{net}: type network mgmtdev vdpasim_net " in done("mgmt", "dev", "show")


def test_a_device_comes_changes_and_goes(net: str) -> None:
    with connect(f"vdpa:{net}") as device:
        assert device.get_config(0, 6) == bytes.fromhex(MAC.replace(":", ""))
    with added("mblk", "vdpasim_blk") as target, connect(target) as disk:
        assert disk.identify().device_id == 2
    assert bus_device("mblk") is None
    changed = told("mgmt", "dev", "set", "name", net, "mac", "02:00:00:00:00:78")
    assert changed["config"][net]["mac"] == iproute("dev", "config", "show", net)["config"][net]["mac"] == "02:00:00:00:00:78"
    features = told("mgmt", "dev", "add", "name", "mless", "mgmtdev", "vdpasim_net", "device_features", "0x300000020")
    assert list(features["dev"]) == ["mless"]
    with connect("vdpa:mless") as device:
        assert device.get_features() == 0x300000020
    done("mgmt", "dev", "del", "mless")
    trace = bridge("mgmt", "dev", "show", net, "--trace")
    assert "dev show dev_name=mnet = 1 messages" in trace.stderr


def test_the_kernels_own_words_come_through(net: str) -> None:
    assert "vdpa: Some provided attributes are not supported" in fails("mgmt", "dev", "add", "name", "x", "mgmtdev", "vdpasim_blk", "mac", MAC)
    assert "Fail to find the specified management device" in fails("mgmt", "dev", "add", "name", "x", "mgmtdev", "nothing")
    assert "there is a device of that name" in fails("mgmt", "dev", "add", "name", net, "mgmtdev", "vdpasim_net")
    assert "Operation not supported" in fails("mgmt", "dev", "set", "name", net, "mtu", "900")
    assert "vdpa: feature negotiation not complete" in fails("mgmt", "dev", "vstats", "show", net, "qidx", "0")
    assert "vdpa: device not found" in fails("mgmt", "dev", "del", "nothing")
    with connect(f"vdpa:{net}") as device:
        device.negotiate(0)
        ours = told("mgmt", "dev", "vstats", "show", net, "qidx", "0")
        assert ours == iproute("dev", "vstats", "show", net, "qidx", "0")
        assert ours["vstats"][net]["rx packets"] == 0
        assert "negotiated_features" in told("mgmt", "dev", "config", "show", net)["config"][net]
    disk = device_name("SIM_BLK")
    with connect(f"vdpa:{disk}") as device:
        device.negotiate(0)
        assert "no statistics" in fails("mgmt", "dev", "vstats", "show", disk, "qidx", "0")


def test_dumps_are_for_all_and_changes_for_root() -> None:
    def unprivileged() -> bool:
        with Management() as management:
            assert management.devices()
            with pytest.raises(PermissionError, match="CAP_NET_ADMIN"):
                management.add("x", "vdpasim_net", {})
            return True

    assert as_nobody(unprivileged) == 0


def test_drivers_change_hands_and_back(net: str) -> None:
    before = bus_device(net)
    assert before is not None
    assert before.driver == "vhost_vdpa"
    assert told("mgmt", "bind", net, "virtio_vdpa") == {"device": net, "before": "vhost_vdpa", "driver": "virtio_vdpa", "node": ""}
    with pytest.raises(FileNotFoundError, match="bound to virtio_vdpa"):
        connect(f"vdpa:{net}")
    entry = next(entry for entry in told("list") if entry["name"] == net)
    assert (entry["device"], entry["target"], entry["command"]) == ("net", "", f"vdpa-bridge mgmt bind {net} vhost_vdpa")
    assert done("mgmt", "bind", net, "vhost_vdpa") == f"{net}: virtio_vdpa -> vhost_vdpa, {before.node}\n"
    with connect(f"vdpa:{net}") as device:
        assert device.identify().device_id == 1
    assert "modprobe nothing" in fails("mgmt", "bind", net, "nothing")
    assert "vdpa-bridge list" in fails("mgmt", "bind", "nothing", "virtio_vdpa")


def test_a_function_goes_to_vp_vdpa_and_back() -> None:
    name, node = device_name("VP_BLK"), os.environ["VDPA_VP_BLK"]
    handle = iproute("dev", "show", name)["dev"][name]["mgmtdev"]
    with holding(node) as pid:
        assert f"(pid {pid})" in fails("mgmt", "bind", handle, "virtio-pci")
    done("mgmt", "dev", "del", name)
    assert "does not take it" in fails("mgmt", "bind", handle, "pcieport")  # and vp-vdpa has it again
    assert next(entry for entry in told("list") if entry["name"] == handle)["command"] == f"vdpa-bridge mgmt dev add name NAME mgmtdev {handle}"
    assert told("mgmt", "bind", handle, "virtio-pci")["before"] == "vp-vdpa"
    assert next(entry for entry in told("list") if entry["name"] == handle)["command"] == f"vdpa-bridge mgmt bind {handle} vp-vdpa"
    done("mgmt", "bind", handle, "vp-vdpa")
    done("mgmt", "dev", "add", "name", name, "mgmtdev", handle)
    device = bus_device(name)
    assert device is not None
    assert device.node == node


def test_what_is_open_is_not_waited_for(net: str) -> None:
    """The kernel would wait for the one who has it open, and no signal would end that."""
    device = bus_device(net)
    assert device is not None
    with holding(device.node) as pid:
        start = time.monotonic()
        for words in (("dev", "del", net), ("bind", net, "virtio_vdpa")):
            line = fails("mgmt", *words)
            assert os.strerror(errno.EBUSY) in line
            assert f"(pid {pid})" in line
        assert time.monotonic() - start < 10
        entry = next(entry for entry in told("list") if entry["name"] == net)
        assert f"(pid {pid})" in entry["state"]


def test_list_tells_what_to_type() -> None:
    entries = {entry["name"]: entry for entry in told("list")}
    sim, vp = entries[device_name("SIM_BLK")], entries[device_name("VP_NET")]
    assert (sim["kind"], sim["device"], sim["by"]) == ("vdpa", "block", "vhost_vdpa of vdpasim_blk")
    assert vp["by"].startswith("vhost_vdpa of pci/")
    assert vp["state"] == f"{os.environ['VDPA_VP_NET']}, free"
    with connect(vp["target"]) as device:
        assert device.identify().device_id == 1
    assert sim["name"] in done("list")
