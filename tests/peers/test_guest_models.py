# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""QEMU guests whose kernels drive the models of other types than disks and networks."""

from __future__ import annotations

import hashlib
import logging
import random
from pathlib import Path

import pytest

from tests.support.guest import run_guest
from tests.support.seen import Seen
from tests.support.tally import tallied
from vdpa_bridge.vhost_user.server import Server

pytestmark = pytest.mark.peers


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


@pytest.mark.parametrize("queues", [1, 2])
def test_scsi_disks(short_dir: Path, caplog: pytest.LogCaptureFixture, seen: Seen, queues: int) -> None:
    """Each unit is a disk of the guest's, with the contents of its file; with two queues, each CPU uses its own."""
    script = """
        for disk in sda sdb sdc; do until [ -b /dev/$disk ]; do sleep 0.1; done; done
        for lun in 0 1 2; do
            disk=$(ls /sys/bus/scsi/devices/*:0:$lun/block); letter=$(echo abc | cut -c $((lun + 1)))
            echo $lun size $(cat /sys/block/$disk/size) cache $(cat /sys/class/scsi_disk/*:0:$lun/cache_type)
            for cpu in $(seq $(nproc)); do
                echo 3 > /proc/sys/vm/drop_caches
                echo $lun read $(taskset $cpu dd if=/dev/$disk bs=64k 2>/dev/null | md5sum)
            done
            dd if=/dev/zero bs=1M count=1 2>/dev/null | tr '\\000' $letter | dd of=/dev/$disk bs=4k seek=64 conv=fsync 2>/dev/null
            echo 3 > /proc/sys/vm/drop_caches
            echo $lun back $(dd if=/dev/$disk bs=64k skip=4 count=16 2>/dev/null | md5sum)
        done
    """
    disks = [short_dir / f"disk{number}" for number in range(3)]
    before = [random.Random(number).randbytes((2 << 20) * (number + 1)) for number in range(3)]
    for disk, data in zip(disks, before, strict=True):
        disk.write_bytes(data)
    path = short_dir / "s"
    with (
        caplog.at_level(logging.WARNING),
        tallied(f"model:scsi?file={','.join(map(str, disks))}&queues={queues}") as (opener, chains),
        Server(opener, str(path)),
    ):
        result = run_guest(
            script,
            modules=["virtio_scsi", "sd_mod"],
            qemu_args=["-chardev", f"socket,id=c0,path={path}", "-device", f"vhost-user-scsi-pci,chardev=c0,num_queues={queues}"],
            cpus=queues,
            timeout=90,
        )
    assert result.status == 0, result.output + result.errors + result.log
    for lun, (disk, old) in enumerate(zip(disks, before, strict=True)):
        assert f"{lun} size {len(old) // 512} cache write back" in result.output, result.output + result.log
        assert result.output.count(f"{lun} read {_md5(old)}") == queues
        new = b"abc"[lun : lun + 1] * (1 << 20)
        assert f"{lun} back {_md5(new)}" in result.output
        assert disk.read_bytes() == old[: 1 << 18] + new + old[(1 << 18) + (1 << 20) :]
    assert all(chains[2 + queue] > 50 for queue in range(queues)), chains
    assert not [record.getMessage() for record in caplog.records]
    seen("clients", "QEMU", "scsi", "model", "split", *["multi-queue"] * (queues > 1))
