# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A QEMU guest reads and writes a disk that we serve: firmware first, then Linux, data checked on both sides."""

from __future__ import annotations

import hashlib
import logging
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.support.guest import run_guest
from tests.support.seen import Seen
from tests.support.tally import tallied
from vdpa_bridge.vhost_user.server import Server

pytestmark = pytest.mark.peers

SECTORS = 16384
SCRIPT = """
until [ -b /dev/vda ]; do sleep 0.1; done
echo size $(cat /sys/block/vda/size) serial $(cat /sys/block/vda/serial)
for cpu in $(seq $(nproc)); do
    echo 3 > /proc/sys/vm/drop_caches
    echo read $cpu $(taskset $cpu dd if=/dev/vda bs=64k 2>/dev/null | md5sum)
done
dd if=/dev/zero bs=1M count=1 2>/dev/null | tr '\\000' 'G' | dd of=/dev/vda bs=4k seek=256 conv=fsync 2>/dev/null
echo 3 > /proc/sys/vm/drop_caches
echo back $(dd if=/dev/vda bs=1M skip=1 count=1 2>/dev/null | md5sum)
"""


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


@pytest.mark.parametrize(("queues", "packed"), [(1, "off"), (2, "off"), (2, "on")])
def test_guest_reads_and_writes_our_disk(short_dir: Path, caplog: pytest.LogCaptureFixture, heard: Counter[str], seen: Seen, queues: int, packed: str) -> None:
    disk = short_dir / "disk"
    before = bytearray(random.Random(queues).randbytes(SECTORS * 512))
    disk.write_bytes(before)
    path = str(short_dir / "s")
    with (
        caplog.at_level(logging.WARNING),
        tallied(f"model:blk?file={disk}&serial=guestdisk&queues={queues}") as (opener, chains),
        Server(opener, path) as server,
    ):
        result = run_guest(
            SCRIPT,
            modules=["virtio_blk"],
            qemu_args=["-chardev", f"socket,id=c0,path={path}", "-device", f"vhost-user-blk-pci,chardev=c0,num-queues={queues},packed={packed}"],
            cpus=queues,
            timeout=90,
        )
        assert result.status == 0, result.log
        assert f"size {SECTORS} serial guestdisk" in result.output
        for cpu in range(queues):
            assert f"read {cpu + 1} {_md5(before)}" in result.output
            assert chains[cpu] >= SECTORS * 512 >> 20, "each CPU has a queue of its own, and reads at most a MiB at once"
        written = b"G" * (1 << 20)
        assert f"back {_md5(written)}" in result.output
    before[1 << 20 : 2 << 20] = written
    assert disk.read_bytes() == before, "what the guest wrote is in the file, and nothing else changed"
    assert server.served == 1
    assert not [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert os.path.exists(disk)
    assert not os.path.exists(path)
    assert heard["ADD_MEM_REG"]
    assert heard["SET_FEATURES"] > 2, "twice for the firmware, twice for Linux"
    seen("clients", "QEMU", "blk", "model", "packed" if packed == "on" else "split", "memory slots", "restart", *["multi-queue"] * (queues > 1))
