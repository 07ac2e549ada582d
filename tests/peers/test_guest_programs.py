# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""One guest on several of the vhost-user-vdpa-* programs at once, each in its sandbox; the others' guests are with their models."""

from __future__ import annotations

import contextlib
import hashlib
import random
from pathlib import Path

import pytest

from tests.support.guest import QEMU, newer_qemu, run_guest
from tests.support.programs import program
from tests.support.seen import Seen

pytestmark = pytest.mark.peers

SCRIPT = """
until [ -b /dev/vda ] && [ -b /dev/sda ]; do sleep 0.1; done
for disk in vda sda; do
    echo $disk $(dd if=/dev/$disk bs=64k 2>/dev/null | md5sum)
    dd if=/dev/zero bs=1M count=1 2>/dev/null | tr '\\000' G | dd of=/dev/$disk bs=4k seek=64 conv=fsync 2>/dev/null
done
ip link set eth0 up; until [ "$(cat /sys/class/net/eth0/carrier)" = 1 ]; do sleep 0.1; done
/packets eth0 200
cat /sys/class/misc/hw_random/rng_current; dd if=/dev/hwrng bs=1024 count=16 iflag=fullblock 2>/dev/null | gzip | wc -c
"""
BETWEEN = slice(1 << 18, (1 << 18) + (1 << 20))
"""Where the guest writes."""


@pytest.mark.parametrize("which", ["QEMU", "QEMU, newer"])
def test_disks_network_and_entropy(short_dir: Path, packet_program: bytes, seen: Seen, which: str) -> None:
    images = {kind: short_dir / f"{kind}.img" for kind in ("blk", "scsi")}
    before = {kind: random.Random(kind).randbytes(4 << 20) for kind in images}
    for kind, image in images.items():
        image.write_bytes(before[kind])
    options = {"blk": ["--blk-file", str(images["blk"])], "scsi": ["--file", str(images["scsi"])], "net": ["--mac", "52:54:00:aa:bb:cc"], "rng": []}
    arguments = [word for kind in options for word in ("-chardev", f"socket,id={kind},path={short_dir}/{kind}")]
    arguments += ["-device", "vhost-user-blk-pci,chardev=blk", "-device", "vhost-user-scsi-pci,chardev=scsi", "-device", "vhost-user-rng-pci,chardev=rng"]
    # QEMU 7.2 dies of MSI-X with vhost-user networks under TCG
    arguments += ["-netdev", "vhost-user,id=n0,chardev=net", "-device", "virtio-net-pci,netdev=n0,mac=52:54:00:aa:bb:cc,vectors=0"]
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(program(kind, "--socket-path", f"{short_dir}/{kind}", *more, "-v")) for kind, more in options.items()]
        for server in servers:
            server.logs("ready")
        result = run_guest(
            SCRIPT,
            modules=["virtio_blk", "virtio_scsi", "sd_mod", "virtio_net", "af_packet", "virtio-rng"],
            files={"packets": packet_program},
            qemu_args=arguments,
            qemu=QEMU if which == "QEMU" else newer_qemu(),
        )
        for server in servers:
            server.end()
            assert "drop" not in server.log
    assert result.status == 0, result.output + result.errors + result.log
    for kind, disk in (("blk", "vda"), ("scsi", "sda")):
        assert f"{disk} {hashlib.md5(before[kind], usedforsecurity=False).hexdigest()}" in result.output, result.output
        after = bytearray(before[kind])
        after[BETWEEN] = b"G" * (1 << 20)
        assert images[kind].read_bytes() == after
        seen("clients", which, kind, "model", "split")
    assert "200 frames came back as sent" in result.output
    *_, source, size = result.output.splitlines()
    assert source.startswith("virtio_rng")
    assert int(size) > 16 << 10, "random bytes do not compress"
    seen("clients", which, "net", "model", "split")
    seen("clients", which, "rng", "model", "split")
