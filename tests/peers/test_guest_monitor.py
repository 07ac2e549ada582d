# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A QEMU guest whose disk is controlled by the monitor of the program that serves it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.support.guest import Guest
from tests.support.programs import program
from tests.support.qmp import Qmp
from tests.support.seen import Seen

pytestmark = pytest.mark.peers

MIB = 1 << 20


def test_a_disk_is_stopped_and_grows(short_dir: Path, seen: Seen) -> None:
    """What the guest writes waits while the disk is stopped, and comes after that; another size is seen, and used."""
    script = f"""
        until [ -b /dev/vda ]; do sleep 0.1; done
        echo READY $(cat /sys/block/vda/size)
        for block in $(seq 0 255); do
            printf %04d $block | dd of=/dev/vda bs=4k seek=$block conv=sync,fsync 2>/dev/null || exit 1
            echo wrote $block
        done
        until [ $(cat /sys/block/vda/size) = {8 * MIB // 512} ]; do sleep 0.1; done
        dd if=/dev/zero of=/dev/vda bs=1M seek=7 count=1 conv=fsync 2>/dev/null && echo GROWN
    """
    image = short_dir / "disk"
    image.write_bytes(bytes(2 * MIB))
    arguments = ["-chardev", f"socket,id=c0,path={short_dir}/s", "-device", "vhost-user-blk-pci,chardev=c0,num-queues=1"]
    with program("blk", "--socket-path", f"{short_dir}/s", "--blk-file", str(image), "--qmp", f"{short_dir}/qmp", "-v") as server:
        server.logs("ready")
        with Qmp(short_dir / "qmp") as monitor, Guest(script, modules=["virtio_blk"], qemu_args=arguments) as guest:
            guest.wait_output("wrote 3", 60)
            monitor.ask("stop")
            before, place = image.read_bytes(), monitor.ask("query-vdpa-queues", device="blk")[0]["base"]
            time.sleep(1)
            assert (image.read_bytes(), monitor.ask("query-vdpa-queues", device="blk")[0]["base"]) == (before, place)
            assert "wrote 255" not in guest.output
            monitor.ask("cont")
            guest.wait_output("wrote 255", 60)
            monitor.ask("block_resize", device="blk", size=8 * MIB)
            result = guest.wait(60)
            events = [monitor.event()["event"] for _ in range(5)]
        server.end()
    assert result.status == 0, result.output + result.errors + result.log
    assert "GROWN" in result.output
    assert events == ["VDPA_CLIENT_CONNECTED", "STOP", "RESUME", "VDPA_DEVICE_RESIZED", "VDPA_CLIENT_DISCONNECTED"]
    data = image.read_bytes()
    assert [data[4096 * block :][:4] for block in range(256)] == [b"%04d" % block for block in range(256)]
    assert len(data) == 8 * MIB
    seen("clients", "QEMU", "blk", "model", "split", "config change", "pause")
