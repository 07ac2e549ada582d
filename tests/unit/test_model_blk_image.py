# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What stands behind a disk: its sizes, its cache, what it gives back; and disks on block devices."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.driven import MIB, opened
from vdpa_bridge.drivers import BlkDriver
from vdpa_bridge.drivers.base import Driver
from vdpa_bridge.models import BlkModel, make_model
from vdpa_bridge.models.blk_image import sized
from vdpa_bridge.models.image import FileImage, Limits, device_limits
from vdpa_bridge.virtio.features import BlockFeature as F

WRITEBACK = 32


def made(**options: str) -> BlkModel:
    model = make_model("blk", {name.replace("_", "-"): value for name, value in options.items()})
    assert isinstance(model, BlkModel)
    return model


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"blk_size": "600"}, "blk-size=600; it is a power of 2 from 512 to 65536"),
        ({"blk_size": "128K"}, "from 512 to 65536"),
        ({"physical_size": "512", "blk_size": "4K"}, "a logical block has 4096 bytes"),
        ({"min_io_size": "6000", "blk_size": "4K"}, "min-io-size=6000; it is a multiple of the 4096"),
        ({"min_io_size": "64M"}, "at most 33553920"),
        ({"opt_io_size": "2G"}, "opt-io-size=2G; it is at most"),
        ({"alignment_offset": "256K"}, "alignment-offset=262144; .* at most 130560"),
        ({"discard": "perhaps"}, "on or off"),
        ({"nbd_timeout": "5"}, "nbd-timeout= is for nbd="),
        ({"nbd": "nbd://x", "size": "1M"}, "size= or nbd=, not both: an export brings its size"),
    ],
)
def test_wrong_sizes_are_named(options: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        made(**options)


def test_sizes_reach_the_driver() -> None:
    model = made(size="1M", blk_size="4K", physical_size="16K", min_io_size="16K", opt_io_size="64K", alignment_offset="8K")
    with opened(model) as device, BlkDriver(device) as disk:
        info = disk.info
    assert (info.block_size, info.physical_block_size, info.alignment_offset, info.min_io_size, info.opt_io_size) == (4096, 16384, 2, 16384, 65536)
    assert info.discard_sector_alignment == 8


def test_what_an_image_says_and_a_driver_cannot_be_told_is_dropped() -> None:
    raid = Limits(block=512, physical=4096, smallest=512 * MIB, best=3 * MIB, granule=0, discard=(1 << 30) + 512, longest=5000)
    found = sized(raid, {"blk-size": 4096}, discards=True)
    assert (found.smallest, found.best, found.granule, found.discard, found.longest) == (0, 3 * MIB, 4096, 1 << 30, 4096)
    assert sized(raid, {}, discards=False).discard == 0
    with pytest.raises(ValueError, match="blocks of 4096 bytes"):
        sized(Limits(block=4096), {"blk-size": 512}, discards=True)
    with pytest.raises(ValueError, match="no driver takes more"):
        sized(Limits(block=1 << 20), {}, discards=True)


@pytest.mark.parametrize("engine", ["native", "python"])
def test_a_request_that_cuts_a_block_is_refused(engine: str) -> None:
    with opened(made(size="1M", blk_size="4K", engine=engine)) as device, BlkDriver(device) as disk:
        disk.write(4096, b"b" * 8192)
        for offset, length in ((512, 4096), (4096, 512), (4096, 6144)):
            with pytest.raises(OSError, match="I/O error"):
                disk.read(offset, length, unchecked=True)
            with pytest.raises(OSError, match="I/O error"):
                disk.write(offset, bytes(length), unchecked=True)
        with pytest.raises(OSError, match="I/O error"):
            disk.discard(4096, 512, unchecked=True)
        assert disk.read(4096, 8192) == b"b" * 8192


def test_a_file_has_whole_blocks(tmp_path: Path) -> None:
    file = tmp_path / "disk"
    file.write_bytes(bytes(10000))
    with opened(made(file=str(file), blk_size="4K")) as device, BlkDriver(device) as disk:
        assert disk.info.size == 8192


def test_no_discard() -> None:
    with opened(made(size="1M", discard="off")) as device, Driver(device, wanted=F.DISCARD | F.WRITE_ZEROES) as driver:
        assert driver.features & (F.DISCARD | F.WRITE_ZEROES) == F.WRITE_ZEROES
        payload = struct.pack("<IIQ", 11, 0, 0) + struct.pack("<QII", 0, 8, 0)
        assert driver.transact(0, [payload], [1]) == (1, [b"\2"])
        assert struct.unpack_from("<III", driver.read_config(60), 36) == (0, 0, 0)


class Flushes(FileImage):
    """Counts."""

    count = 0

    def _flushed(self, really: bool) -> int:
        self.count += really
        return super()._flushed(really)


@pytest.fixture
def flushes(tmp_path: Path) -> Flushes:
    file = tmp_path / "disk"
    file.write_bytes(bytes(MIB))
    return Flushes(os.open(file, os.O_RDWR))


def test_the_driver_chooses_the_cache(flushes: Flushes) -> None:
    """Writes are stable when they end as long as it wants no cache (virtio 1.2, 5.2.5); the next driver begins with one."""
    model = BlkModel(flushes, engine="python")
    out = struct.pack("<IIQ", 1, 0, 0) + bytes(512)
    with opened(model) as device:
        with Driver(device, wanted=F.FLUSH | F.CONFIG_WCE) as driver:
            assert driver.read_config(60)[WRITEBACK] == 1
            driver.transact(0, [out], [1])
            assert flushes.count == 0
            device.set_config(WRITEBACK, b"\0")
            assert (driver.read_config(60)[WRITEBACK], flushes.count) == (0, 1)
            driver.transact(0, [out], [1])
            assert flushes.count == 2
            successor = made(size="1M")
            successor.restore(model.snapshot())
            assert not successor.writeback
            successor.close()
            device.set_config(WRITEBACK, b"\1")
            driver.transact(0, [out], [1])
            assert flushes.count == 2
            device.set_config(WRITEBACK, b"\0")
        with Driver(device, wanted=F.FLUSH | F.CONFIG_WCE) as driver:
            assert driver.read_config(60)[WRITEBACK] == 1


def test_the_engine_hears_of_the_cache() -> None:
    model = made(size="1M")
    with opened(model) as device, Driver(device, wanted=F.FLUSH | F.CONFIG_WCE):
        assert not model._engines[0].stable_writes
        device.set_config(WRITEBACK, b"\0")
        assert model._engines[0].stable_writes


def test_a_driver_that_cannot_flush_has_no_cache(flushes: Flushes) -> None:
    """Nor can it ask for one (virtio 1.2, 5.2.5.2)."""
    with opened(BlkModel(flushes, engine="python")) as device, Driver(device, wanted=F.CONFIG_WCE) as driver:
        device.set_config(WRITEBACK, b"\1")
        assert driver.read_config(60)[WRITEBACK] == 0
        before = flushes.count
        driver.transact(0, [struct.pack("<IIQ", 1, 0, 0) + bytes(512)], [1])
        assert flushes.count == before + 1


# Block devices ---------------------------------------------------------------------------------------------------------


def _losetup(*arguments: str) -> str:
    return subprocess.run(["losetup", *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A file, and a block device of 4096-byte blocks on it."""
    if os.geteuid() or not shutil.which("losetup"):
        pytest.skip("needs root and losetup: apt install mount")
    file = tmp_path / "backing"
    file.write_bytes(os.urandom(4 * MIB))
    try:
        device = _losetup("--find", "--show", "--sector-size", "4096", str(file))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"needs a loop device: {error.stderr.strip()}")
    try:
        yield file, device
    finally:
        _losetup("--detach", device)


def test_a_block_device(loop: tuple[Path, str]) -> None:
    """Its sizes are its own, and what is written and given back reaches it."""
    file, place = loop
    before = file.read_bytes()
    fd = os.open(place, os.O_RDONLY)
    try:
        limits = device_limits(fd)
    finally:
        os.close(fd)
    assert (limits.block, limits.physical) == (4096, 4096)
    assert limits.discard >= MIB
    with pytest.raises(ValueError, match="the image has blocks of 4096 bytes"):
        made(file=place, blk_size="512")
    with opened(made(file=place)) as device, BlkDriver(device) as disk:
        assert (disk.info.block_size, disk.info.size) == (4096, 4 * MIB)
        assert disk.read(0, 4 * MIB) == before
        disk.write(8192, b"w" * 4096)
        disk.write_zeroes(MIB, 65536)
        disk.discard(2 * MIB, MIB)
        disk.flush()
        assert disk.read(MIB - 4096, 4096 + 65536) == before[MIB - 4096 : MIB] + bytes(65536)
    after = file.read_bytes()
    assert after[8192:12288] == b"w" * 4096
    assert after[2 * MIB : 3 * MIB] == bytes(MIB)
    assert after[3 * MIB :] == before[3 * MIB :]
    assert file.stat().st_blocks * 512 < 4 * MIB
