# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Netlink attributes beside the kernel's headers, and a vdpa bus of files. What the kernel does with them is in tests/lab."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click
import pytest

from vdpa_bridge import Target
from vdpa_bridge.system import management, vdpa_bus
from vdpa_bridge.system.management import ATTRIBUTES, Management
from vdpa_bridge.system.processes import program_name

HEADERS = [Path("/usr/include/linux/vdpa.h"), *Path(os.environ.get("VDPA_BRIDGE_KERNEL_DIR", "/nowhere")).glob("root/usr/src/*/include/uapi/linux/vdpa.h")]
COMMANDS = ("MGMTDEV_GET", "DEV_NEW", "DEV_DEL", "DEV_GET", "DEV_CONFIG_GET", "DEV_VSTATS_GET", "DEV_ATTR_SET")


def enumerated(text: str, name: str) -> list[str]:
    """The names of an enum that counts from 0, aliases left out."""
    found = re.search(rf"enum {name} {{(.*?)}};", text, re.DOTALL)
    assert found is not None
    body = re.sub(r"/\*.*?\*/", "", found[1], flags=re.DOTALL)
    return [word.strip() for word in body.split(",") if word.strip() and "=" not in word]


@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_numbers_are_the_kernels(header: Path) -> None:
    if not header.exists():
        pytest.skip("no such header: install linux-libc-dev")
    text = header.read_text()
    names = [name for name, _ in ATTRIBUTES]
    theirs = enumerated(text, "vdpa_attr")[:-1]
    common = [name for name in theirs if name in names]
    assert len(common) > 20
    assert {name: theirs.index(name) for name in common} == {name: names.index(name) for name in common}
    commands = enumerated(text, "vdpa_command")
    ours = {name: getattr(management, name) for name in COMMANDS if f"VDPA_CMD_{name}" in commands}
    assert len(ours) > 5
    assert ours == {name: commands.index(f"VDPA_CMD_{name}") for name in ours}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mac": "02:00"}, "mac: 02:00 is not an address"),
        ({"mtu": "70000"}, "mtu: 70000 does not fit 16 bits"),
        ({"device_features": "some"}, "device_features: some is not a number"),
        ({"colour": "red"}, "no option colour; there is: mac, mtu, max_vqp, device_features"),
    ],
)
def test_options_that_cannot_be(options: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        management._attributes(options, tuple(management.OPTIONS))


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bus with a device that nothing drives, one for user space and one that the kernel uses as a disk."""
    monkeypatch.setattr(vdpa_bus, "SYSFS", tmp_path)
    drivers, devices = tmp_path / "bus/vdpa/drivers", tmp_path / "bus/vdpa/devices"
    for path in ("vhost_vdpa", "virtio_vdpa"):
        (drivers / path).mkdir(parents=True)
    for path in ("idle", "user/vhost-vdpa-7", "disk/virtio3/block/vdx"):
        (devices / path).mkdir(parents=True)
    (devices / "user/driver").symlink_to(drivers / "vhost_vdpa")
    (devices / "disk/driver").symlink_to(drivers / "virtio_vdpa")
    return tmp_path


def test_the_bus_is_read(sysfs: Path) -> None:
    found = {device.name: device for device in vdpa_bus.bus_devices()}
    assert {name: (device.driver, device.node, device.used_as) for name, device in found.items()} == {
        "idle": ("", "", ()),
        "user": ("vhost_vdpa", "/dev/vhost-vdpa-7", ()),
        "disk": ("virtio_vdpa", "", ("vdx",)),
    }
    assert vdpa_bus.bus_device("../devices/user") is None
    assert vdpa_bus.bus_device("..") is None
    for name, says in (("idle", "bound to no driver"), ("disk", "bound to virtio_vdpa"), ("none", "there is: disk, idle, user")):
        with pytest.raises(FileNotFoundError, match=says) as refused:
            Target.parse(f"vdpa:{name}").open()
        assert refused.value.__notes__ == [f"vdpa-bridge explain vdpa:{name} says more"]


def test_shells_complete_names(sysfs: Path) -> None:
    from vdpa_bridge.cli.mgmt import dev

    delete = dev.get_command(click.Context(dev), "del")
    assert delete is not None
    assert [item.value for item in delete.params[0].shell_complete(click.Context(delete), "u")] == ["user"]


def test_names_that_lead_elsewhere_are_refused(sysfs: Path) -> None:
    for handle in ("../../x", "pci/..", "a b", "", "usb/1"):
        with pytest.raises(OSError, match="No such device"):
            vdpa_bus.bind(handle, "vhost_vdpa")
    for driver in ("../vhost_vdpa", "nothing", ""):
        with pytest.raises(OSError, match="no such driver"):
            vdpa_bus.bind("user", driver)


def test_without_the_module_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vdpa_bus, "SYSFS", tmp_path)
    with pytest.raises(OSError, match="modprobe vdpa"):
        Management()


def test_programs_are_called_what_users_call_them() -> None:
    assert program_name(os.getpid()) in ("pytest", "__main__.py")
    assert program_name(1 << 22) == "?"
