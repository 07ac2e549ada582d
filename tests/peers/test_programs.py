# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A QEMU guest whose devices are programs by the back-end conventions, each started in another way."""

from __future__ import annotations

import random
from hashlib import md5
from pathlib import Path

import pytest

from tests.support.guest import Guest
from tests.support.programs import program
from tests.support.service import PATIENCE, listening

pytestmark = pytest.mark.peers

SCRIPT = """
until [ -b /dev/vda ]; do sleep 0.1; done
echo disk $(md5sum < /dev/vda)
echo hello from the guest | dd of=/dev/vda bs=512 seek=9 conv=sync,fsync 2>/dev/null
dd if=/dev/hwrng of=/random bs=4096 count=4 iflag=fullblock 2>/dev/null
echo random $(wc -c < /random) packed $(gzip -c /random | wc -c)
ip link set eth0 up
for i in 1 2 3 4 5; do [ "$(cat /sys/class/net/eth0/carrier)" = 1 ] && break; sleep 0.2; done
/packets eth0 100
"""


def test_a_guest_by_path_by_listening_and_by_connected_descriptor(short_dir: Path, packet_program: bytes) -> None:
    image = short_dir / "disk.img"
    image.write_bytes(random.Random(7).randbytes(1 << 20))
    before = md5(image.read_bytes()).hexdigest()
    disk, entropy, network = (short_dir / name for name in ("blk", "rng", "net"))
    arguments = [
        *("-chardev", f"socket,id=c0,path={disk}", "-device", "vhost-user-blk-pci,chardev=c0,num-queues=1"),
        *("-chardev", f"socket,id=c1,path={entropy}", "-device", "vhost-user-rng-pci,chardev=c1"),
        *("-chardev", f"socket,id=c2,path={network}", "-netdev", "vhost-user,id=n0,chardev=c2"),
        # without MSI-X: QEMU 7.2 under TCG crashes in msix_set_vector_notifiers with vhost-user networks
        *("-device", "virtio-net-pci,netdev=n0,romfile=,vectors=0"),
    ]
    modules = ["virtio_blk", "virtio-rng", "virtio_net", "af_packet"]
    with (
        listening(entropy, network) as (listener, meets),
        program("blk", "--socket-path", str(disk), "--blk-file", str(image), "-v") as blk,
        program("rng", "--fd", str(listener.fileno()), "-v", fds=[listener.fileno()]) as rng,
    ):
        blk.logs("ready")
        with Guest(SCRIPT, modules=modules, files={"packets": packet_program}, qemu_args=arguments) as guest:
            meets.settimeout(PATIENCE)
            client = meets.accept()[0]
            with client, program("net", "--fd", str(client.fileno()), "-v", fds=[client.fileno()]) as net:
                client.close()
                result = guest.wait(timeout=90)
                assert result.status == 0, result.output + result.errors + result.log
                assert net.wait() == 0, "its only client is gone"
        blk.end()
        rng.end()
    assert f"disk {before}" in result.output
    assert image.read_bytes()[9 * 512 :][:20] == b"hello from the guest"
    size, packed = map(int, result.output.split("random ")[1].replace("packed", "").split()[:2])
    assert packed > size == 16384, "random bytes do not compress"
    assert "100 frames came back as sent" in result.output
    for log in (blk.log, rng.log, net.log):
        assert "mode=legacy" in log
        assert "drop" not in log
