# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Devices other than disks in a QEMU guest, and what guests and QEMU do over time: reboot, reconnect."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.support.guest import Guest, run_guest
from tests.support.seen import Seen
from tests.support.tally import tallied
from vdpa_bridge import Target
from vdpa_bridge.vhost_user.server import Server

pytestmark = pytest.mark.peers


def chardev(path: Path, more: str = "") -> list[str]:
    return ["-chardev", f"socket,id=c0,path={path}{more}"]


def test_entropy(short_dir: Path, seen: Seen) -> None:
    script = """
        cat /sys/class/misc/hw_random/rng_available
        dd if=/dev/hwrng of=/a bs=4096 count=16 iflag=fullblock 2>/dev/null; dd if=/dev/hwrng of=/b bs=4096 count=16 iflag=fullblock 2>/dev/null
        echo sizes $(wc -c < /a) $(wc -c < /b) packed $(gzip -c /a | wc -c)
        cmp -s /a /b || echo DIFFERENT
    """
    target = Target.parse("model:rng")
    path = short_dir / "s"
    with Server(target.open, str(path)):
        result = run_guest(
            script, modules=["virtio-rng"], qemu_args=[*chardev(path), "-device", "vhost-user-rng-pci,chardev=c0"], timeout=90
        )
    target.close()
    assert result.status == 0, result.log
    assert "virtio_rng" in result.output
    assert "sizes 65536 65536" in result.output
    assert "DIFFERENT" in result.output
    packed = int(result.output.split("packed ")[1].split()[0])
    assert packed > 65536, "random bytes do not compress"
    seen("clients", "QEMU", "rng", "model", "split")


def test_frames(short_dir: Path, packet_program: bytes, seen: Seen) -> None:
    script = """
        ip link set eth0 up
        for i in 1 2 3 4 5; do [ "$(cat /sys/class/net/eth0/carrier)" = 1 ] && break; sleep 0.2; done
        cat /sys/class/net/eth0/address
        /packets eth0 500
    """
    target = Target.parse("model:net?mac=52:54:00:aa:bb:cc")
    path = short_dir / "s"
    with Server(target.open, str(path)):
        result = run_guest(
            script,
            modules=["virtio_net", "af_packet"],
            files={"packets": packet_program},
            qemu_args=[
                *chardev(path),
                *("-netdev", "vhost-user,id=n0,chardev=c0"),
                # without MSI-X: QEMU 7.2 under TCG crashes in msix_set_vector_notifiers with vhost-user networks
                *("-device", "virtio-net-pci,netdev=n0,mac=52:54:00:aa:bb:cc,romfile=,vectors=0"),
            ],
            timeout=90,
        )
    target.close()
    assert result.status == 0, result.output + result.errors + result.log
    assert "500 frames came back as sent" in result.output
    seen("clients", "QEMU", "net", "model", "split")


def test_frames_on_two_queue_pairs(short_dir: Path, packet_program: bytes, heard: Counter[str], seen: Seen) -> None:
    """Each of two CPUs sends over a pair of its own; when the guest goes back to one pair, both send over that. The commands for
    it stay between the guest and QEMU, which enables and disables rings."""
    script = """
        ip link set eth0 up
        for i in 1 2 3 4 5; do [ "$(cat /sys/class/net/eth0/carrier)" = 1 ] && break; sleep 0.2; done
        for cpu in 1 2; do taskset $cpu /packets eth0 200 || exit 1; done
        /packets eth0 pairs 1 && taskset 2 /packets eth0 50 || exit 1
        echo SINGLE
        /packets eth0 pairs 2 && taskset 2 /packets eth0 100
    """
    path = short_dir / "s"
    arguments = [
        *chardev(path),
        *("-netdev", "vhost-user,id=n0,chardev=c0,queues=2"),
        *("-device", "virtio-net-pci,netdev=n0,romfile=,mq=on,vectors=0"),  # without MSI-X, as above
    ]
    with (
        tallied("model:net?pairs=3") as (opener, chains),
        Server(opener, str(path)),
        Guest(script, modules=["virtio_net", "af_packet"], files={"packets": packet_program}, qemu_args=arguments, cpus=2) as guest,
    ):
        guest.wait_output("SINGLE", timeout=90)
        single = dict(chains)
        result = guest.wait(timeout=60)
    assert result.status == 0, result.output + result.errors + result.log
    assert "2 of 2 queue pairs, 1 from now on" in result.output
    assert "1 of 2 queue pairs, 2 from now on" in result.output
    assert single[0] >= 250, single
    assert single[2] == single[3], "nothing but our frames goes over the second pair"
    assert 200 <= single[2] < 250, single
    assert chains[2] >= 300, chains
    assert set(chains) == {0, 1, 2, 3}, "the third pair, and the control queue, are not used"
    assert heard["SET_VRING_ENABLE"] > 4
    seen("clients", "QEMU", "net", "model", "split", "multi-queue", "control queue")


def test_reboot(short_dir: Path, seen: Seen) -> None:
    """The guest resets itself and finds what it wrote before; the connection stays."""
    disk = short_dir / "disk"
    disk.write_bytes(random.Random(4).randbytes(4 << 20))
    script = """
        until [ -b /dev/vda ]; do sleep 0.1; done
        if [ "$(dd if=/dev/vda bs=512 count=1 2>/dev/null | head -c 6)" = BOOTED ]; then
            echo SECOND; exit 0
        fi
        printf BOOTED | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null
        echo FIRST; sync; echo 1 > /proc/sys/kernel/sysrq; echo b > /proc/sysrq-trigger; sleep 30
    """
    target = Target.parse(f"model:blk?file={disk}")
    path = short_dir / "s"
    with (
        Server(target.open, str(path)) as server,
        Guest(
            script,
            modules=["virtio_blk"],
            qemu_args=[*chardev(path), "-device", "vhost-user-blk-pci,chardev=c0,num-queues=1", "-action", "reboot=reset"],
        ) as guest,
    ):
        result = guest.wait(timeout=90)
    assert server.served == 1, "one connection lasts over the reboot"
    target.close()
    assert result.status == 0, result.log
    assert result.output.index("FIRST") < result.output.index("SECOND")
    seen("clients", "QEMU", "blk", "model", "reboot")


def test_reconnect(short_dir: Path, seen: Seen) -> None:
    """Our server goes away and comes back; the guest's disk goes on where it was."""
    disk = short_dir / "disk"
    disk.write_bytes(bytes(4 << 20))
    script = """
        until [ -b /dev/vda ]; do sleep 0.1; done
        echo one | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null; echo ONE
        sleep 3
        echo two | dd of=/dev/vda bs=512 seek=1 conv=sync,fsync 2>/dev/null && echo TWO
        dd if=/dev/vda bs=512 count=2 2>/dev/null | tr -d '\\000'
    """
    target = Target.parse(f"model:blk?file={disk}")
    path = short_dir / "s"
    arguments = [*chardev(path, ",reconnect=1"), "-device", "vhost-user-blk-pci,chardev=c0,num-queues=1"]
    first = Server(target.open, str(path)).start()
    with Guest(script, modules=["virtio_blk"], qemu_args=arguments) as guest:
        guest.wait_output("ONE", timeout=60)
        first.stop()
        time.sleep(0.5)
        with Server(target.open, str(path)) as second:
            result = guest.wait(timeout=60)
            assert result.status == 0, result.log
        assert second.served == 1
    target.close()
    assert "TWO" in result.output
    assert disk.read_bytes()[:516].replace(b"\0", b"") == b"one\ntwo\n"
    seen("clients", "QEMU", "blk", "model", "reconnect")
