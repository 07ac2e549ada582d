# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Load generators: what is counted, what is found wrong, and how they end. Their loops have tests in C as well."""

from __future__ import annotations

import errno
import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.driven import blk, net, opened, quiet, silent
from tests.support.liars import Liar
from vdpa_bridge._virtqueue import Histogram, check_pattern, fill_pattern
from vdpa_bridge.drivers import BlkDriver, NetDriver
from vdpa_bridge.drivers.base import RING_FEATURES
from vdpa_bridge.errors import DataError, DeviceBroken
from vdpa_bridge.flags import Feature
from vdpa_bridge.load import BlkWork, Mode, NetWork, Timing, blk_memory, load_blk, load_net
from vdpa_bridge.models import BlkModel, NetModel, make_model
from vdpa_bridge.models.base import Queue
from vdpa_bridge.models.image import Transfer
from vdpa_bridge.virtqueue import Chain

__all__ = ["quiet"]  # an autouse fixture

COUNT = Timing(duration=0, count=3000)

# Histograms ----------------------------------------------------------------------------------------------------------------

values = st.lists(st.integers(0, 63) | st.integers(0, 10**9) | st.integers(0, (1 << 64) - 1), min_size=1, max_size=200)


def filled(numbers: list[int]) -> Histogram:
    histogram = Histogram()
    for number in numbers:
        histogram.add(number)
    return histogram


@given(values, st.floats(0, 1))
def test_quantiles_are_those_of_the_sorted_list(numbers: list[int], part: float) -> None:
    histogram = filled(numbers)
    exact = sorted(numbers)[max(math.ceil(part * len(numbers)), 1) - 1]
    got = histogram.quantile(part)
    assert exact <= got <= max(exact + exact // 32, exact)
    assert (histogram.count, histogram.least, histogram.most) == (len(numbers), min(numbers), max(numbers))
    assert histogram.total == sum(numbers) % (1 << 64)
    assert sum(histogram.buckets()) == len(numbers)


@given(values, values)
def test_merged_histograms_are_that_of_all(first: list[int], second: list[int]) -> None:
    one, other, both = filled(first), filled(second), filled(first + second)
    one.merge(other)
    assert one.buckets() == both.buckets()
    assert (one.count, one.total, one.least, one.most) == (both.count, both.total, both.least, both.most)


def test_an_empty_histogram() -> None:
    empty = Histogram()
    assert (empty.count, empty.least, empty.most, empty.quantile(0.5)) == (0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"a share of 1\.5"):
        empty.quantile(1.5)


# Patterns ------------------------------------------------------------------------------------------------------------------

numbers = st.integers(0, (1 << 64) - 1)


def pattern(sectors: int, sector: int, generation: int, seed: int) -> bytearray:
    data = bytearray(512 * sectors)
    fill_pattern(data, sector, generation, seed)
    return data


@given(st.integers(1, 8), st.integers(0, 1 << 60), st.integers(1, 1 << 60), numbers, st.data())
def test_whatever_is_changed_is_found(sectors: int, sector: int, generation: int, seed: int, data: st.DataObject) -> None:
    whole = pattern(sectors, sector, generation, seed)
    assert check_pattern(whole, sector, generation, seed) is None
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    assert f"sector {sector + at // 512} " in str(check_pattern(whole, sector, generation, seed))


@given(st.integers(2, 8), st.integers(0, 1 << 60), st.integers(2, 1 << 60), st.integers(0, (1 << 64) - 2), st.data())
def test_what_was_done_is_said(sectors: int, sector: int, generation: int, seed: int, data: st.DataObject) -> None:
    def said(found: bytes | bytearray) -> str:
        return str(check_pattern(bytearray(found), sector, generation, seed))

    old = pattern(sectors, sector, generation - 1, seed)
    assert said(old) == f"sector {sector} has write {generation - 1}, the last one was {generation}: a write was lost"
    new = pattern(sectors, sector, generation, seed)
    cut = data.draw(st.integers(1, sectors - 1))
    assert said(new[: 512 * cut] + old[512 * cut :]) == f"from sector {sector + cut} on there is another write than {generation}: it is torn"
    assert said(old[: 512 * cut] + new[512 * cut :]) == f"from sector {sector} on there is another write than {generation}: it is torn"
    away = data.draw(st.integers(1, 1 << 20))
    assert said(pattern(sectors, sector + away, generation, seed)) == f"sector {sector} has what was written to sector {sector + away}"
    assert "of another run" in said(pattern(sectors, sector, generation, seed + 1))
    assert "not what any write left there, from byte 0 on" in said(bytes(512 * sectors))


def test_patterns_are_of_whole_sectors() -> None:
    for call in (fill_pattern, check_pattern):
        with pytest.raises(ValueError, match="no whole sectors"):
            call(bytearray(513), 0, 1, 1)


# Timing --------------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 1 << 40), st.integers(1, 64))
def test_queues_share_a_count(count: int, queues: int) -> None:
    shares = [Timing(count=count).share(queues, queue)[1] for queue in range(queues)]
    assert sum(shares) == count
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize(
    ("options", "why"),
    [({"duration": 0}, "never ends"), ({"count": 5, "warmup": 1}, "no warm-up"), ({"rate": -1}, "negative"), ({"count": -1}, "negative")],
)
def test_times_that_cannot_be(options: dict[str, Any], why: str) -> None:
    with blk() as disk, pytest.raises(ValueError, match=why):
        load_blk(disk, BlkWork(Timing(**options)))


def test_a_rate_is_kept() -> None:
    with blk() as disk:
        result = load_blk(disk, BlkWork(Timing(duration=0, count=400, rate=1000)))
        assert result.reads.count == 400
        assert 0.39 < result.spent.seconds < 3
        result = load_blk(disk, BlkWork(Timing(duration=0.4, warmup=0.1, rate=500)))
        assert 100 < result.reads.count <= 220


# Disks ---------------------------------------------------------------------------------------------------------------------

RINGS = [
    {},
    {"ring_features": 0},
    {"ring_features": Feature.RING_INDIRECT_DESC},
    {"ring_features": RING_FEATURES | Feature.RING_PACKED, "required": Feature.RING_PACKED},
    {"ring_features": Feature.RING_PACKED, "required": Feature.RING_PACKED},
]


@pytest.mark.parametrize("poll", [False, True])
@pytest.mark.parametrize("ring", RINGS)
def test_a_good_disk_bears_it(ring: dict[str, Any], poll: bool) -> None:
    with blk(make_model("blk", {"size": "2M", "queues": "2"}), queues=(0, 1), **ring) as disk:
        free = disk.pool.free
        for random in (False, True):
            result = load_blk(disk, BlkWork(Timing(duration=0, count=2001, poll=poll), reads=40, random=random, verify=True, block=8192, depth=8))
            facts = result.facts()
            assert facts["requests"] == 2001 == facts["reads"]["requests"] + facts["writes"]["requests"]
            assert 0 < result.compared <= result.reads.count
            assert 0 < result.read_back <= 256
            assert facts["reads"]["latency_us"]["min"] <= facts["reads"]["latency_us"]["p50"] <= facts["reads"]["latency_us"]["max"]
        assert disk.pool.free == free
        assert disk.read(0, 512)  # the driver goes on


def test_a_range_is_kept_to() -> None:
    with blk() as disk:
        disk.write(0, b"x" * (1 << 20))
        load_blk(disk, BlkWork(COUNT, reads=0, offset=64 << 10, length=128 << 10))
        assert disk.read(0, 64 << 10) == b"x" * (64 << 10)
        assert disk.read(192 << 10, 64 << 10) == b"x" * (64 << 10)
        assert b"xxxx" not in disk.read(64 << 10, 128 << 10)


@pytest.mark.parametrize(
    ("work", "why"),
    [
        ({"block": 1000}, "multiples of 512"),
        ({"offset": 15 << 20, "length": 2 << 20}, "leave the disk"),
        ({"length": 512}, "no room for a block"),
        ({"reads": 101}, "101 reads"),
        ({"verify": True}, "fewer than 100 reads"),
        ({"depth": 257}, "no room for 257 requests"),
    ],
)
def test_work_that_does_not_fit(work: dict[str, Any], why: str) -> None:
    with blk() as disk, pytest.raises(ValueError, match=why):
        load_blk(disk, BlkWork(COUNT, **work))


def test_a_readonly_disk_is_not_written_to(tmp_path: Any) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with blk(make_model("blk", {"file": str(image), "readonly": "on"})) as disk:
        assert load_blk(disk, BlkWork(COUNT)).reads.count == 3000
        with pytest.raises(ValueError, match="is read-only"):
            load_blk(disk, BlkWork(COUNT, reads=50))


class Faulty(BlkModel):
    """Does one write in ten its own way, and says that all is well."""

    way = ""
    seen = 0

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        super().process(queues, index)  # here, and so not by the native engine

    def _request(self, chain: Chain) -> Transfer:
        self.seen += 1
        kind, sector = chain.read(0, 1)[0], int.from_bytes(chain.read(8, 8), "little")
        if self.seen > 500 and self.seen % 10 == 0:
            data = chain.readable - 16
            if kind == 1 and self.way == "drop":
                return 0
            if kind == 1 and self.way == "tear":
                chain.pwritev(self.image.fd, sector * 512, 16, data // 2)
                return 0
            if kind == 1 and self.way == "stray":
                chain.pwritev(self.image.fd, (sector ^ 8) * 512, 16, data)
            if kind == 0 and self.way == "empty":
                return chain.writable - 1
            if self.way == "refuse":
                raise OSError(errno.EIO, "refused")
        return super()._request(chain)


@pytest.mark.parametrize(
    ("way", "error", "why"),
    [
        ("drop", DataError, r"has write \d+, the last one was \d+: a write was lost|is not what any write left"),
        ("tear", DataError, r"another write than \d+: it is torn|is not what any write left"),
        ("stray", DataError, r"sector \d+ has what was written to sector \d+"),
        ("empty", DataError, "is not what any write left"),
        ("refuse", OSError, "the device reports an I/O error"),
    ],
)
def test_planted_faults_are_found_and_named(way: str, error: type[OSError], why: str) -> None:
    model = Faulty.from_options({"size": "256K"})
    assert isinstance(model, Faulty)
    model.way = way
    with blk(model) as disk:
        with pytest.raises(error, match=f"model:test.*({why})|({why}).*") as caught:
            load_blk(disk, BlkWork(Timing(duration=20), reads=30, verify=True, depth=4))
        assert caught.value.errno == (errno.EIO if way == "refuse" else errno.EILSEQ)
        assert "model:test" in str(caught.value)
        disk.restart()
        disk.read(0, 512)


@pytest.mark.parametrize("poll", [False, True])
def test_a_silent_disk_ends_it(poll: bool) -> None:
    with blk(silent(), timeout=0.3) as disk:
        with pytest.raises(TimeoutError, match=r"model:test: nothing came back for 0.3 s, the device holds 32"):
            load_blk(disk, BlkWork(Timing(poll=poll)))
        disk.restart()


def test_a_device_that_is_reset_ends_it() -> None:
    with opened(silent()) as device, BlkDriver(device) as disk:
        device.reset()
        with pytest.raises(DeviceBroken, match="was reset by somebody else"):
            load_blk(disk, BlkWork())


def test_a_queue_in_use_is_refused() -> None:
    with blk(silent()) as disk:
        disk.post(0, [bytes(16)], [1])
        with pytest.raises(ValueError, match="queue 0 is in use: 1 chains are in flight"):
            load_blk(disk, BlkWork(COUNT))


def test_memory_is_what_was_said() -> None:
    work = BlkWork(COUNT, block=65536, depth=16)
    with blk(make_model("blk", {"size": "8M", "queues": "2"}), queues=(0, 1), pool_size=blk_memory(work, 2)) as disk:
        assert load_blk(disk, work).reads.count == 3000


class Deaf(NetModel):
    """Takes no frame and gives none."""

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        pass


# Networks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poll", [False, True])
@pytest.mark.parametrize("ring", RINGS)
def test_all_frames_come_back(ring: dict[str, Any], poll: bool) -> None:
    with net(make_model("net", {"pairs": "2"}), pairs=2, **ring) as nic:
        result = load_net(nic, NetWork(Timing(duration=0, count=5001, poll=poll), Mode.ECHO, frame=100))
        assert (result.sent, result.ours, result.lost, result.reordered, result.foreign) == (5001, 5001, 0, 0, 0)
        assert result.received_bytes == 5001 * 100
        assert result.latency.count == 5001
        nic.send(b"\xff" * 60)
        assert nic.receive() == b"\xff" * 60  # the driver goes on


def test_frames_are_sent_and_received() -> None:
    with net() as nic:
        sent = load_net(nic, NetWork(COUNT, Mode.SEND, batch=3))
        assert (sent.sent, sent.latency.count) == (3000, 0)
        nic.receive_many(10000, timeout=0)
        received = load_net(nic, NetWork(Timing(duration=0.1), Mode.RECEIVE))
        assert (received.sent, received.received) == (0, 0)


@pytest.mark.parametrize(
    ("work", "why"),
    [({"frame": 37}, "they have 38 to 1518"), ({"frame": 1519}, "they have 38 to 1518"), ({"batch": 257}, "at most 256"), ({"to": "x"}, "not a MAC"), ({"linger": 0}, "waited for")],
)
def test_frames_that_cannot_be(work: dict[str, Any], why: str) -> None:
    with net() as nic, pytest.raises(ValueError, match=why):
        load_net(nic, NetWork(COUNT, **work))


def test_queues_in_use_are_refused() -> None:
    for queue in (0, 1):
        with net(Deaf(bytes(6)), pool_size=1 << 16) as nic:
            nic.post(queue, [bytes(16)] * queue, [16] * (1 - queue))
            with pytest.raises(ValueError, match=r"in use: \d+ chains are in flight, \d+ of them slots"):
                load_net(nic, NetWork(COUNT))


class Lossy(NetModel):
    """Loses each tenth frame."""

    seen = 0

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        if index != 1:
            return
        sent = queues[1].pop()
        kept = [frame for at, frame in enumerate(sent, self.seen) if at % 10]
        self.seen += len(sent)
        room = queues[0].pop(len(kept)) if kept else []
        queues[0].push([(buffer, buffer.copy_from(frame)) for buffer, frame in zip(room, kept, strict=True)])
        queues[1].push([(frame, 0) for frame in sent])


def test_lost_frames_are_counted() -> None:
    with net(Lossy(bytes(6))) as nic:
        result = load_net(nic, NetWork(Timing(duration=0, count=500), Mode.ECHO, window=64, linger=0.05))
        assert (result.sent, result.ours, result.lost) == (500, 450, 50)


def test_a_received_buffer_without_a_header_ends_it() -> None:
    class Headless(NetModel):
        def process(self, queues: Mapping[int, Queue], index: int) -> None:
            if index == 1:
                queues[1].push([(chain, 0) for chain in queues[1].pop()])
                queues[0].push([(chain, 11) for chain in queues[0].pop(1)])

    with net(Headless(bytes(6))) as nic, pytest.raises(DeviceBroken, match="with 11 bytes"):
        load_net(nic, NetWork(COUNT, Mode.ECHO))


def test_a_silent_nic_ends_it() -> None:
    with net(Deaf(bytes(6)), timeout=0.3) as nic, pytest.raises(TimeoutError, match=r"nothing came back for 0\.3 s, the device holds 128"):
        load_net(nic, NetWork(Timing(), Mode.SEND))


def test_an_echo_of_which_nothing_comes_back_ends() -> None:
    class Sink(NetModel):
        def process(self, queues: Mapping[int, Queue], index: int) -> None:
            if index == 1:
                queues[1].push([(frame, 0) for frame in queues[1].pop()])

    with net(Sink(bytes(6)), timeout=0.3) as nic, pytest.raises(TimeoutError, match=r"nothing came back for 0\.3 s"):
        load_net(nic, NetWork(Timing(duration=30), Mode.ECHO, linger=0.01))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", ["blk", "net"])
def test_devices_that_talk_nonsense_end_it(kind: str, seed: int) -> None:
    """By an error that names them, or not at all where the nonsense does no harm."""
    honest, said = make_model(kind, {}), "model:test"
    try:
        with opened(Liar(honest, seed)) as device:
            if kind == "blk":
                with BlkDriver(device, timeout=0.1) as disk:
                    load_blk(disk, BlkWork(Timing(duration=0.3, poll=bool(seed & 1)), reads=50, verify=True))
            else:
                with NetDriver(device, timeout=0.1) as nic:
                    load_net(nic, NetWork(Timing(duration=0.3, poll=bool(seed & 1)), Mode.ECHO, linger=0.02))
    except (OSError, ValueError) as error:  # the configuration may be a lie, too
        said = str(error)
    finally:
        honest.close()
    assert "model:test" in said


def test_progress_is_told() -> None:
    told: list[tuple[float, int]] = []
    with net() as nic:
        assert isinstance(nic, NetDriver)
        load_net(nic, NetWork(Timing(duration=0.4), Mode.ECHO), lambda seconds, done: told.append((seconds, done)))
    assert len(told) >= 2
    assert told == sorted(told)
    assert told[-1][1] > 0
