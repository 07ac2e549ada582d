# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The block driver on good devices: data, limits, errors, many requests at once."""

from __future__ import annotations

import errno
import os
import random
import struct
from typing import Any

import pytest

from tests.support.driven import MIB, blk
from vdpa_bridge import ops
from vdpa_bridge.drivers import BlkRequest
from vdpa_bridge.flags import Feature
from vdpa_bridge.models import BlkModel, make_model
from vdpa_bridge.models.image import Image
from vdpa_bridge.virtio.features import BlockFeature
from vdpa_bridge.wire import VringState

# Block: data ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"ring_features": 0}, {"queue_size": 4}, {"pool_size": 8192}, {"queue_size": 8, "ring_features": 0}]
)
def test_bytes_come_back_as_written(options: dict[str, Any]) -> None:
    rng = random.Random(7)
    truth = bytearray(16 * MIB)
    with blk(**options) as disk:
        for _ in range(12):
            offset = rng.randrange(16 * MIB // 512) * 512
            length = min(rng.choice([512, 4096, 131072, 200 * 512, 3 * MIB]), 16 * MIB - offset)
            data = rng.randbytes(length)
            disk.write(offset, data)
            truth[offset : offset + length] = data
        disk.flush()
        assert disk.read(0, 16 * MIB) == truth
        half = bytearray(8 * MIB)
        disk.read_into(8 * MIB, half)
        assert half == truth[8 * MIB :]


def test_info_and_id() -> None:
    with blk(make_model("blk", {"size": "16M", "serial": "a serial"})) as disk:
        assert (disk.info.size, disk.info.capacity, disk.info.block_size) == (16 * MIB, 32768, 512)
        assert (disk.info.physical_block_size, disk.info.opt_io_size, disk.info.readonly) == (4096, 131072, False)
        assert (disk.info.size_max, disk.info.seg_max, disk.info.queues) == (0, 254, 1)
        assert {"WRITE_ZEROES", "VERSION_1"} <= set(disk.info.features)
        assert disk.get_id() == "a serial"
        assert repr(disk) == "<BlkDriver model:test: block, queues [0]>"


def test_write_zeroes_and_discard() -> None:
    with blk() as disk:
        disk.write(0, b"x" * MIB)
        disk.write_zeroes(4096, 8192)
        disk.write_zeroes(512 * 1024, 4096, unmap=True)
        disk.discard(0, 4096)
        data = disk.read(0, MIB)
        expected = bytearray(b"x" * MIB)
        expected[4096:12288] = bytes(8192)
        expected[512 * 1024 : 516 * 1024] = bytes(4096)
        assert data[4096:] == expected[4096:]


def test_long_zeroes_are_cut_to_the_limit() -> None:
    """The model takes 64 MiB in a request; asked for more in one, it would refuse."""
    with blk(make_model("blk", {"size": "200M"})) as disk:
        disk.write(199 * MIB, b"x" * MIB)
        disk.write_zeroes(512, 200 * MIB - 1024)
        assert disk.read(199 * MIB, MIB) == bytes(MIB - 512) + b"x" * 512


@pytest.mark.parametrize("call", ["read", "write", "discard", "write_zeroes"])
@pytest.mark.parametrize(("offset", "length"), [(1, 512), (0, 511), (16 * MIB, 512), (16 * MIB - 512, 1024), (-512, 512), (0, 17 * MIB)])
def test_wrong_ranges_are_the_callers_mistake(call: str, offset: int, length: int) -> None:
    with blk() as disk, pytest.raises(ValueError, match=r"multiples of 512|leaves the disk, which has 16777216 bytes"):
        getattr(disk, call)(offset, bytes(length) if call == "write" else length)


def test_errors_of_the_device_name_the_sector() -> None:
    with blk() as disk:
        for call, verb in ((disk.read, "read"), (disk.write, "write"), (disk.discard, "discard"), (disk.write_zeroes, "write_zeroes")):
            argument: Any = bytes(1024) if verb == "write" else 1024
            with pytest.raises(OSError, match=f"{verb} of 2 sectors at sector 32767 on model:test: .*status 1") as caught:
                call(16 * MIB - 512, argument, unchecked=True)
            assert caught.value.errno == errno.EIO
        batch = disk.submit([BlkRequest(99)])
        (request,) = disk.complete(batch)
        with pytest.raises(OSError, match=r"request of type 99 on model:test: .*status 2") as unsupported:
            request.check(disk.name)
        assert unsupported.value.errno == errno.EOPNOTSUPP
        assert disk.read(0, 512) == bytes(512)


def test_readonly_disk(tmp_path: Any) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"r" * 4096)
    with blk(make_model("blk", {"file": str(image), "readonly": "on"})) as disk:
        assert disk.info.readonly
        assert disk.read(0, 4096) == b"r" * 4096
        with pytest.raises(OSError, match="write of 1 sectors at sector 0"):
            disk.write(0, bytes(512))
        for call in (disk.discard, disk.write_zeroes):
            with pytest.raises(OSError, match="not among the features agreed on") as caught:
                call(0, 512)
            assert caught.value.errno == errno.EOPNOTSUPP


def test_failed_write_stops_what_was_not_sent() -> None:
    with blk(pool_size=64 << 10) as disk:
        with pytest.raises(OSError, match="write of"):
            disk.write(12 * MIB, bytes(8 * MIB), unchecked=True)
        assert disk.read(0, 4096) == bytes(4096)


# Block: many requests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ring", [0, Feature.RING_INDIRECT_DESC, Feature.RING_EVENT_IDX, Feature.RING_INDIRECT_DESC | Feature.RING_EVENT_IDX]
)
def test_batches(ring: int) -> None:
    with blk(ring_features=ring) as disk:
        writes = [BlkRequest(1, sector, bytes([sector % 251]) * 512) for sector in range(3000)]
        done = disk.complete(disk.submit(writes))
        assert {id(r) for r in done} == {id(r) for r in writes}
        assert {r.status for r in writes} == {0}
        reads = [BlkRequest(0, sector, length=512) for sector in range(3000)]
        batch, seen = disk.submit(reads), 0
        while seen < 3000:
            some = disk.complete(batch, count=min(700, 3000 - seen))
            assert len(some) >= min(700, 3000 - seen)
            seen += len(some)
        assert all(request.data == bytes([request.sector % 251]) * 512 for request in reads)
        assert disk.complete(batch) == []


def test_batch_mixes_good_and_bad() -> None:
    with blk() as disk:
        requests = [BlkRequest(0, 0, length=512), BlkRequest(0, 1 << 40, length=512), BlkRequest(77), BlkRequest(4)]
        disk.complete(disk.submit(requests))
        assert [request.status for request in requests] == [0, 1, 2, 0]


def test_request_that_can_never_fit_is_refused() -> None:
    with blk(pool_size=8192) as disk, pytest.raises(ValueError, match="fits neither"):
        disk.submit([BlkRequest(0, 0, length=9000)])


class Picky(BlkModel):
    """Takes 3 segments of 1536 bytes, says so, and refuses what is longer."""

    def __init__(self, image: Image, **options: Any) -> None:
        super().__init__(image, **options)
        self.features |= BlockFeature.SIZE_MAX
        self.longest = 0

    def config(self) -> bytes:
        config = bytearray(super().config())
        struct.pack_into("<II", config, 8, 1536, 3)
        return bytes(config)

    def _serve(self, chain: Any) -> Any:
        self.longest = max(self.longest, chain.readable - 16, chain.writable - 1)
        return super()._serve(chain)


@pytest.mark.parametrize("ring", [0, Feature.RING_INDIRECT_DESC])
def test_requests_keep_to_what_the_device_takes(ring: int) -> None:
    model = Picky.from_options({"size": "1M"})
    assert isinstance(model, Picky)
    with blk(model, ring_features=ring, queue_size=16) as disk:
        data = os.urandom(100 * 512)
        disk.write(512, data)
        assert disk.read(512, len(data)) == data
        assert model.longest == 3 * 1536
        assert disk._cut(0x1000, 4000) == [(0x1000, 1536), (0x1600, 1536), (0x1C00, 928)]


def test_several_queues_work_at_once() -> None:
    with blk(make_model("blk", {"size": "16M", "queues": "3"}), queues=(0, 1, 2), queue_size=8) as disk:
        requests = [BlkRequest(1, sector, bytes([sector % 256]) * 512) for sector in range(500)]
        disk.complete(disk.submit(requests))
        assert disk.read(0, 500 * 512) == b"".join(r.payload for r in requests)
        assert all(disk.device.backend.call(ops.GET_VRING_BASE, VringState(i, 0)).num for i in range(3))
