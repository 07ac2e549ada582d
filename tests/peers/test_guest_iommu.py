# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""QEMU guests with an IOMMU, each request mapped and unmapped: models whose device IOTLB QEMU fills and invalidates."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.support.guest import GuestResult, run_guest
from tests.support.seen import Seen
from vdpa_bridge import Target
from vdpa_bridge.vhost_user.server import Server

pytestmark = pytest.mark.peers

STRICT = "intel_iommu=on iommu.strict=1"
"""An unmapped buffer is invalidated at once, and not with many others later."""
SIZE = 4 << 20


def run(target: str, directory: Path, device: str, module: str, script: str, files: dict[str, bytes] | None = None, modules: tuple[str, ...] = ()) -> GuestResult:
    """*device* gets ``chardev=c0``, but for a network device, whose netdev has it."""
    home = Target.parse(target)
    path = directory / "s"
    arguments = ["-device", "intel-iommu,device-iotlb=on,aw-bits=48", "-chardev", f"socket,id=c0,path={path}"]
    network = device.startswith("virtio-net")
    names, behind = ("netdev=n0", ["-netdev", "vhost-user,id=n0,chardev=c0"]) if network else ("chardev=c0", [])
    with Server(home.open, str(path)):
        group = "for g in /sys/kernel/iommu_groups/*; do for d in $g/devices/*; do echo $(cat $d/vendor) type $(cat $g/type); done; done\n"
        result = run_guest(
            group + script,
            modules=[module, *modules],
            files=files or {},
            qemu_args=[*arguments, *behind, "-device", f"{device},{names},iommu_platform=on,ats=on"],
            append=STRICT,
            timeout=90,
        )
    home.close()
    assert result.status == 0, result.output + result.errors + result.log
    assert re.search(r"^0x1af4 type DMA$", result.output, re.MULTILINE), f"no virtio device in a strict domain: {result.output}"
    return result


def test_entropy(short_dir: Path, heard: Counter[str], seen: Seen) -> None:
    script = "dd if=/dev/hwrng of=/a bs=4096 count=4 iflag=fullblock 2>/dev/null; echo sizes $(wc -c < /a) $(gzip -c /a | wc -c)"
    result = run("model:rng", short_dir, "vhost-user-rng-pci", "virtio-rng", script)
    size, packed = map(int, result.output.split("sizes ")[1].split())
    assert size == 16384
    assert packed > size, "random bytes do not compress"
    assert heard["IOTLB_MSG"] > 200, f"requests of 64 bytes are mapped one by one: {heard}"
    seen("clients", "QEMU", "rng", "model", "split", "IOMMU")


@pytest.mark.parametrize("packed", ["off", "on"])
def test_disk(short_dir: Path, heard: Counter[str], seen: Seen, packed: str) -> None:
    """The guest reads all of a disk and copies its first half onto the second."""
    disk = short_dir / "disk"
    data = random.Random(4).randbytes(SIZE)
    disk.write_bytes(data)
    script = f"""
        until [ -b /dev/vda ]; do sleep 0.1; done
        echo packed $(cut -c 35 /sys/block/vda/device/features)
        md5sum < /dev/vda
        dd if=/dev/vda of=/dev/vda bs=256k count={SIZE // 2 >> 18} seek={SIZE // 2 >> 18} conv=fsync 2>/dev/null
    """
    device = f"vhost-user-blk-pci,num-queues=1,disable-legacy=on,packed={packed}"
    result = run(f"model:blk?file={disk}", short_dir, device, "virtio_blk", script)
    assert f"packed {int(packed == 'on')}" in result.output
    assert hashlib.md5(data).hexdigest() in result.output
    half = data[: SIZE // 2]
    assert disk.read_bytes() == half + half
    assert heard["IOTLB_MSG"] > 200, f"each request is mapped and unmapped: {heard}"
    seen("clients", "QEMU", "blk", "model", "packed" if packed == "on" else "split", "IOMMU")


def test_frames(short_dir: Path, packet_program: bytes, heard: Counter[str], seen: Seen) -> None:
    """No frame is lost for want of a translation: it waits for the one of its receive buffer."""
    script = """
        ip link set eth0 up
        for i in 1 2 3 4 5; do [ "$(cat /sys/class/net/eth0/carrier)" = 1 ] && break; sleep 0.2; done
        /packets eth0 300
    """
    device = "virtio-net-pci,romfile=,disable-legacy=on,vectors=0"  # QEMU 7.2 under TCG crashes with MSI-X and vhost-user networks
    result = run("model:net", short_dir, device, "virtio_net", script, {"packets": packet_program}, ("af_packet",))
    assert "300 frames came back as sent" in result.output
    assert heard["IOTLB_MSG"] > 200, f"buffers are mapped and unmapped: {heard}"
    seen("clients", "QEMU", "net", "model", "split", "IOMMU")
