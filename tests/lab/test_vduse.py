# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A disk of another process by way of the kernel (VDUSE, qemu-storage-daemon): found by name, and what a death on either side costs."""

from __future__ import annotations

import errno
import random
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from vdpa_bridge import connect
from vdpa_bridge.drivers import BlkDriver, BlkRequest

from ..support.seen import Seen
from ..support.vduse import VduseDisk, missing

pytestmark = pytest.mark.lab

SIZE = 8 << 20
PATIENCE = 1
"""Seconds that the kernel waits for the daemon, instead of 30."""


@pytest.fixture
def disk() -> Iterator[VduseDisk]:
    if why := missing():
        pytest.skip(why)
    with VduseDisk(SIZE) as disk:
        disk.patience(PATIENCE)
        yield disk


def command(*words: str) -> str:
    """``vdpa-bridge WORDS``, which has to succeed."""
    done = subprocess.run([sys.executable, "-m", "vdpa_bridge", *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_by_name(disk: VduseDisk, seen: Seen) -> None:
    """The command line finds it on the bus; what a driver writes is in the daemon's file, and the other way round."""
    assert str(SIZE) in command("blk", disk.target, "info", "--json")
    data = random.Random(3).randbytes(300 << 10)
    with connect(disk.target) as device, BlkDriver(device) as driver:
        driver.write(4096, data)
        driver.flush()
        assert disk.image.read_bytes()[4096 : 4096 + len(data)] == data
        driver.restart()
        assert driver.read(4096, len(data)) == data
        assert device.backend.traits == ("VDUSE",)
    with disk.image.open("r+b") as file:
        file.write(data[::-1][:4096])
    with connect(disk.target) as device, BlkDriver(device) as driver:
        assert driver.read(0, 4096) == data[::-1][:4096]
    seen("devices", "blk", "blk", "VDUSE", "split", "restart")


def test_daemon_dies_at_work(disk: VduseDisk) -> None:
    """The driver says within its time that nothing came, and of whom; its end, and the next opening, take the kernel's time once."""
    start = time.monotonic()
    with connect(disk.target) as device, BlkDriver(device, timeout=1) as driver:
        driver.write(0, bytes(512))
        disk.kill()
        batch = driver.submit([BlkRequest(1, at, bytes(512)) for at in range(100)])
        with pytest.raises(TimeoutError, match=f"{device.name}: no end of"):
            driver.complete(batch)
    with pytest.raises(OSError, match="for VDUSE: its daemon is stuck or gone") as refused:
        connect(disk.target)
    assert refused.value.errno == errno.EIO
    assert time.monotonic() - start < 1 + PATIENCE + 10


def test_daemon_dies_between_drivers(disk: VduseDisk) -> None:
    """Another one takes the device over, which nobody has to make anew."""
    for turn in range(3):
        with connect(disk.target) as device, BlkDriver(device) as driver:
            assert driver.read(0, 512) == bytes([turn]) * 512
            driver.write(0, bytes([turn + 1]) * 512)
        disk.kill()
        disk.serve()


DRIVER = """
import sys
from vdpa_bridge import connect
from vdpa_bridge.drivers import BlkDriver
with connect(sys.argv[1]) as device, BlkDriver(device) as disk:
    disk.write(0, sys.argv[2].encode() * 512)
    print("written", flush=True)
    sys.stdin.read()
"""


def test_driver_dies(disk: VduseDisk) -> None:
    """Its rings and mappings are the kernel's to take back: the daemon serves the next one."""
    for letter in "ab":
        with subprocess.Popen([sys.executable, "-c", DRIVER, disk.target, letter], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "written\n"
            process.kill()
        with connect(disk.target) as device, BlkDriver(device) as driver:
            assert driver.read(0, 512) == letter.encode() * 512
    assert disk.process is not None
    assert disk.process.poll() is None


def test_driver_dies_after_the_daemon(disk: VduseDisk) -> None:
    """Nothing is left that would be in the way of the device's removal."""
    with subprocess.Popen([sys.executable, "-c", DRIVER, disk.target, "c"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        disk.kill()
        process.kill()
    name = disk.name
    disk.close()
    with pytest.raises(FileNotFoundError, match=name):
        connect(f"vdpa:{name}")
