# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The block and net models, over real rings: what each request does, what it says it wrote, and what no request may do.

Chains are posted by the plain Driver, cut as the test wants, so that wrong ones reach the model as well.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdpa_bridge import ops
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.device import Device
from vdpa_bridge.drivers import Driver
from vdpa_bridge.drivers.base import RING_FEATURES
from vdpa_bridge.flags import BackendFeature, Feature
from vdpa_bridge.memory import Region
from vdpa_bridge.models import BlkModel, Model, make_model
from vdpa_bridge.models.blk import BlkStatus, BlkType
from vdpa_bridge.models.options import parse_size
from vdpa_bridge.virtio.config import config_layout, config_size, min_queues, parse_config, parse_mac
from vdpa_bridge.virtio.features import BlockFeature, NetFeature, feature_mask, feature_names
from vdpa_bridge.virtio.ids import DeviceId
from vdpa_bridge.wire import Iova, VringState

SECTORS = 2048
ALL_BLK = int(sum(BlockFeature))
ALL_NET = int(sum(NetFeature))


@contextmanager
def driven(model: Model, wanted: int = 0, ring_features: int = RING_FEATURES) -> Iterator[Driver]:
    """A plain driver on *model*, which is closed afterwards."""
    home = ModelDevice(model, "model:test")
    try:
        with Device(home.open()) as device, Driver(device, wanted=wanted, ring_features=ring_features) as driver:
            yield driver
    finally:
        home.close()


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def memory_disk(**options: str) -> Model:
    return make_model("blk", {"size": str(SECTORS * 512), **options})


@pytest.fixture
def disk() -> Iterator[Driver]:
    with driven(memory_disk(serial="unit-7"), ALL_BLK) as driver:
        yield driver


def write(driver: Driver, sector: int, data: bytes) -> None:
    assert driver.transact(0, [header(BlkType.OUT, sector), data], [1]) == (1, [b"\0"])


def read(driver: Driver, sector: int, length: int) -> bytes:
    written, (data, status) = driver.transact(0, [header(BlkType.IN, sector)], [length, 1])
    assert (written, status) == (length + 1, b"\0")
    return data


# Options ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("disk", {}, "unknown model 'disk'; there is: blk, "),
        ("blk", {"sise": "1M"}, "no option sise; there is: alignment-offset, blk-size, direct, discard, engine, file, io_uring, min-io-size, nbd, "),
        ("blk", {"size": "1X"}, "'1X' is not a size"),
        ("blk", {"size": "511"}, "size=511"),
        ("blk", {"file": "a", "size": "1M"}, "not both"),
        ("blk", {"readonly": "maybe"}, "on or off"),
        ("blk", {"queues": "0"}, "from 1 to 64"),
        ("blk", {"size": "1M", "serial": "x" * 21}, "longer than 20"),
        ("blk", {"file": "/dev/null"}, "neither a file nor a block device"),
        ("net", {"size": "1M"}, "no option size; there is: dgram, link, mac, mtu, pairs"),
        ("net", {"mac": "52:54:00"}, "not a MAC address"),
        ("net", {"mac": "ff:ff:ff:ff:ff:ff"}, "group address"),
        ("net", {"mtu": "67"}, "from 68"),
    ],
)
def test_wrong_options_are_named(kind: str, options: dict[str, str], text: str) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match=text):
        make_model(kind, options)
    assert len(os.listdir("/proc/self/fd")) == fds


def test_sizes() -> None:
    assert [parse_size(text) for text in ("4096", "64K", "256M", "1g", "2MiB")] == [4096, 1 << 16, 1 << 28, 1 << 30, 2 << 20]


# Configuration and features ----------------------------------------------------------------------------------------------


def test_block_config_says_what_the_model_does(disk: Driver) -> None:
    size = disk.device.identify().config_size
    assert size == config_size(DeviceId.BLOCK) == 60
    values = parse_config(DeviceId.BLOCK, disk.features, disk.device.get_config(0, size))
    assert (values["capacity"], values["blk_size"], values["seg_max"]) == (SECTORS, 512, 254)
    assert not {"num_queues", "size_max", "cylinders"} & set(values)
    assert "BLK_SIZE" in feature_names(DeviceId.BLOCK, disk.features)
    with pytest.raises(OSError, match="GET_CONFIG"):
        disk.device.get_config(0, size + 1)


def test_config_is_read_as_far_as_it_goes_and_as_features_allow() -> None:
    space = bytes.fromhex("525400123456 0100 0400 dc05") + b"\xff" * 12
    every = NetFeature.MAC | NetFeature.STATUS | NetFeature.MQ | NetFeature.MTU
    assert parse_config(1, every, space) == {"mac": "52:54:00:12:34:56", "status": 1, "max_virtqueue_pairs": 4, "mtu": 1500}
    assert parse_config(1, every, space[:9]) == {"mac": "52:54:00:12:34:56", "status": 1}
    assert parse_config(1, NetFeature.MTU, space) == {"mtu": 1500}
    assert parse_config(77, every, space) == {} == parse_config(None, every, space)
    assert parse_config(26, 0, b"tag".ljust(36, b"\0") + b"\1\0\0\0") == {"tag": "tag", "num_request_queues": 1}


def test_layouts_agree_with_the_c_structs() -> None:
    sizes = {1: 12, 2: 60, 3: 12, 4: 0, 8: 36, 18: 136, 19: 8, 20: 56, 23: 40, 24: 56, 25: 12, 26: 44, 34: 0, 41: 8}
    assert {number: config_size(number) for number in sizes} == sizes
    assert [config_size(number) for number in (77, DeviceId.P9, None)] == [None] * 3
    assert [min_queues(n) for n in (1, 2, 8, 19, 77, None)] == [2, 1, 3, 3, 1, 1]
    at = {field.name: offset for offset, field in config_layout(2)}
    assert (at["blk_size"], at["num_queues"], at["max_write_zeroes_sectors"], at["max_secure_erase_sectors"]) == (20, 34, 48, 60)


def test_feature_names_and_back() -> None:
    value = NetFeature.MAC | NetFeature.SPEED_DUPLEX | Feature.VERSION_1 | 1 << 45
    assert feature_names(1, value) == ["MAC", "VERSION_1", "bit 45", "SPEED_DUPLEX"]
    assert feature_mask(1, feature_names(1, value)) == value
    assert feature_names(None, 0x21) == ["bit 0", "bit 5"]
    with pytest.raises(ValueError, match="unknown feature 'WRONG'"):
        feature_mask(1, ["WRONG"])


# Block: requests -----------------------------------------------------------------------------------------------------------


def cut(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    """*data* in pieces of *sizes*, the rest in one; none of them empty."""
    pieces = []
    for size in [*sizes, len(data)]:
        pieces.append(data[:size])
        data = data[size:]
    return [piece for piece in pieces if piece]


@settings(max_examples=60, deadline=None)
@given(
    operations=st.lists(
        st.tuples(
            st.sampled_from([BlkType.IN, BlkType.OUT]),
            st.integers(0, SECTORS - 8),
            st.integers(0, 8),
            st.lists(st.integers(1, 1500), max_size=3),
            st.lists(st.integers(1, 1500), max_size=3),
        ),
        max_size=12,
    ),
    indirect=st.booleans(),
)
def test_any_framing_reads_and_writes_the_same(operations: list[tuple[int, int, int, list[int], list[int]]], indirect: bool) -> None:
    """virtio 1.2, 2.7.4.1: how a request is cut into descriptors means nothing."""
    truth = bytearray(SECTORS * 512)
    ring = Feature.RING_INDIRECT_DESC if indirect else 0
    with driven(memory_disk(), ALL_BLK, ring_features=ring) as driver:
        for kind, sector, count, reads, writes in operations:
            area = slice(sector * 512, (sector + count) * 512)
            payload = os.urandom(count * 512) if kind == BlkType.OUT else b""
            length = 1 if kind == BlkType.OUT else count * 512 + 1
            cuts = [len(piece) for piece in cut(bytes(length), writes)]
            written, pieces = driver.transact(0, cut(header(kind, sector) + payload, reads), cuts)
            answer = b"".join(pieces)
            assert (written, answer[-1]) == (length, BlkStatus.OK)
            if kind == BlkType.OUT:
                truth[area] = payload
            else:
                assert answer[:-1] == truth[area]


@pytest.mark.parametrize(
    ("kind", "sector", "length", "status"),
    [
        (BlkType.IN, SECTORS - 1, 512, BlkStatus.OK),
        (BlkType.IN, SECTORS - 1, 1024, BlkStatus.IOERR),
        (BlkType.IN, SECTORS, 0, BlkStatus.OK),
        (BlkType.IN, SECTORS, 512, BlkStatus.IOERR),
        (BlkType.IN, SECTORS + 1, 0, BlkStatus.IOERR),
        (BlkType.IN, (1 << 64) - 1, 512, BlkStatus.IOERR),
        (BlkType.IN, 1 << 55, 512, BlkStatus.IOERR),
        (BlkType.IN, 0, 700, BlkStatus.IOERR),
        (BlkType.OUT, SECTORS - 1, 512, BlkStatus.OK),
        (BlkType.OUT, SECTORS, 512, BlkStatus.IOERR),
        (BlkType.OUT, (1 << 64) - 1, 1024, BlkStatus.IOERR),
        (BlkType.OUT, 0, 100, BlkStatus.IOERR),
        (BlkType.FLUSH, 0, 0, BlkStatus.OK),
        (2, 0, 512, BlkStatus.UNSUPP),
        (BlkType.SECURE_ERASE, 0, 16, BlkStatus.UNSUPP),
        (0xFFFFFFFF, 0, 0, BlkStatus.UNSUPP),
    ],
)
def test_ranges_and_types(disk: Driver, kind: int, sector: int, length: int, status: int) -> None:
    sent = [bytes(length)] if length and kind != BlkType.IN else []
    room = [length, 1] if length and kind == BlkType.IN else [1]
    written, pieces = disk.transact(0, [header(kind, sector), *sent], room)
    assert pieces[-1] == bytes([status])
    assert written == (sum(room) if status == BlkStatus.OK else 1)


@pytest.mark.parametrize("room", [1, 5, 20, 33])
def test_get_id_fills_what_there_is(disk: Driver, room: int) -> None:
    serial = b"unit-7".ljust(20, b"\0")
    written, pieces = disk.transact(0, [header(BlkType.GET_ID)], [room, 1])
    assert pieces == [serial[:room].ljust(room, b"\0"), b"\0"]
    assert written == min(room, 20) + 1


def test_chain_without_a_status_comes_back_empty_and_the_queue_goes_on(disk: Driver) -> None:
    assert disk.transact(0, [header(BlkType.OUT) + bytes(512)], []) == (0, [])
    assert disk.transact(0, [header(BlkType.IN)[:15]], [512, 1]) == (1, [bytes(512), bytes([BlkStatus.IOERR])])
    assert disk.transact(0, [], [1]) == (1, [bytes([BlkStatus.IOERR])])
    write(disk, 0, b"a" * 512)
    assert read(disk, 0, 512) == b"a" * 512


def ranges(*triples: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<QII", *triple) for triple in triples)


@pytest.mark.parametrize(
    ("kind", "payload", "status"),
    [
        (BlkType.DISCARD, ranges((0, 8, 0)), BlkStatus.OK),
        (BlkType.DISCARD, ranges((0, 8, 0), (16, 8, 0)), BlkStatus.OK),
        (BlkType.DISCARD, ranges((0, 8, 1)), BlkStatus.UNSUPP),
        (BlkType.DISCARD, ranges((0, 8, 2)), BlkStatus.UNSUPP),
        (BlkType.DISCARD, ranges(*[(0, 1, 0)] * 65), BlkStatus.IOERR),
        (BlkType.DISCARD, ranges((SECTORS - 1, 2, 0)), BlkStatus.IOERR),
        (BlkType.DISCARD, ranges(((1 << 64) - 1, 2, 0)), BlkStatus.IOERR),
        (BlkType.DISCARD, ranges((0, 0xFFFFFFFF, 0)), BlkStatus.IOERR),
        (BlkType.DISCARD, b"", BlkStatus.IOERR),
        (BlkType.DISCARD, bytes(15), BlkStatus.IOERR),
        (BlkType.WRITE_ZEROES, ranges((0, 8, 0)), BlkStatus.OK),
        (BlkType.WRITE_ZEROES, ranges((0, 8, 1)), BlkStatus.OK),
        (BlkType.WRITE_ZEROES, ranges((0, 0, 0)), BlkStatus.OK),
        (BlkType.WRITE_ZEROES, ranges((0, 8, 4)), BlkStatus.UNSUPP),
        (BlkType.WRITE_ZEROES, ranges((0, 1, 0), (1, 1, 0)), BlkStatus.IOERR),
        (BlkType.WRITE_ZEROES, ranges((SECTORS, 1, 0)), BlkStatus.IOERR),
    ],
)
def test_discard_and_write_zeroes(disk: Driver, kind: int, payload: bytes, status: int) -> None:
    write(disk, 0, b"x" * 8192)
    sent = [header(kind), payload] if payload else [header(kind)]
    assert disk.transact(0, sent, [1]) == (1, [bytes([status])])
    if status != BlkStatus.OK:
        assert read(disk, 0, 8192) == b"x" * 8192
    elif kind == BlkType.WRITE_ZEROES:
        count = struct.unpack_from("<QI", payload)[1] * 512
        assert read(disk, 0, 8192) == bytes(count) + b"x" * (8192 - count)


def test_memory_is_given_back_by_discard_and_write_zeroes() -> None:
    model = memory_disk()
    assert isinstance(model, BlkModel)
    with driven(model, ALL_BLK) as driver:
        write(driver, 0, b"y" * 65536)
        before = os.fstat(model.image.fd).st_blocks
        driver.transact(0, [header(BlkType.DISCARD), ranges((0, 64, 0))], [1])
        driver.transact(0, [header(BlkType.WRITE_ZEROES), ranges((64, 64, 0))], [1])
        assert before >= 128
        assert os.fstat(model.image.fd).st_blocks == 0


# Block: files --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SECTORS * 512) + b"not a whole sector")
    return path


def test_file_keeps_what_was_written_over_drivers(image: Path) -> None:
    before = image.read_bytes()
    home = ModelDevice(make_model("blk", {"file": str(image)}), "model:file")
    for turn in range(2):
        with Device(home.open()) as device, Driver(device, wanted=ALL_BLK) as driver:
            assert read(driver, 0, 512) == (before[:512] if not turn else b"z" * 512)
            write(driver, 0, b"z" * 512)
            assert driver.transact(0, [header(BlkType.FLUSH)], [1]) == (1, [b"\0"])
            assert driver.transact(0, [header(BlkType.WRITE_ZEROES), ranges((8, 8, turn))], [1]) == (1, [b"\0"])
            assert driver.transact(0, [header(BlkType.IN, SECTORS)], [512, 1])[1][1] == bytes([BlkStatus.IOERR])
    home.close()
    after = image.read_bytes()
    assert after == b"z" * 512 + before[512:4096] + bytes(4096) + before[8192:]


@pytest.mark.parametrize("kind", [BlkType.OUT, BlkType.DISCARD, BlkType.WRITE_ZEROES])
def test_readonly_refuses_changes(image: Path, kind: int) -> None:
    image.chmod(0o400)
    before = image.read_bytes()
    with driven(make_model("blk", {"file": str(image), "readonly": "on"}), ALL_BLK) as driver:
        changing = BlockFeature.RO | BlockFeature.DISCARD | BlockFeature.WRITE_ZEROES
        assert driver.features & changing == BlockFeature.RO
        payload = bytes(512) if kind == BlkType.OUT else ranges((0, 1, 0))
        assert driver.transact(0, [header(kind), payload], [1]) == (1, [bytes([BlkStatus.IOERR])])
        assert read(driver, 0, 512) == before[:512]
    assert image.read_bytes() == before


def test_file_that_shrinks_is_an_io_error(image: Path) -> None:
    with driven(make_model("blk", {"file": str(image)}), ALL_BLK) as driver:
        os.truncate(image, 512)
        written, pieces = driver.transact(0, [header(BlkType.IN)], [1024, 1])
        assert (written, pieces[1]) == (1, bytes([BlkStatus.IOERR]))
        assert len(read(driver, 0, 512)) == 512


@pytest.mark.parametrize(("wanted", "syncs"), [(0, 2), (BlockFeature.FLUSH, 0)])
def test_writes_are_stable_without_flush(image: Path, monkeypatch: pytest.MonkeyPatch, wanted: int, syncs: int) -> None:
    """virtio 1.2, 5.2.6.2: a driver that cannot flush has a disk that writes through."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    with driven(make_model("blk", {"file": str(image), "engine": "python"}), wanted) as driver:
        write(driver, 0, bytes(512))
        write(driver, 8, bytes(512))
    assert len(synced) == syncs


def test_queues_share_the_disk() -> None:
    with driven(memory_disk(queues="4"), ALL_BLK) as driver:
        assert driver.features & BlockFeature.MQ
        config = driver.device.get_config(0, 60)
        assert parse_config(DeviceId.BLOCK, driver.features, config)["num_queues"] == driver.device.identify().queues == 4
        for queue in range(4):
            assert driver.transact(queue, [header(BlkType.OUT, queue), bytes([queue]) * 512], [1]) == (1, [b"\0"])
        assert read(driver, 0, 2048) == b"".join(bytes([queue]) * 512 for queue in range(4))


# Net -----------------------------------------------------------------------------------------------------------------------

OWN = parse_mac("52:54:00:00:00:07")
HEADER = bytes(range(12))
RX, TX, CTRL = 0, 1, 2


@pytest.fixture
def nic() -> Iterator[Driver]:
    with driven(make_model("net", {"mac": "52:54:00:00:00:07", "mtu": "1400"}), ALL_NET) as driver:
        yield driver


def frame(to: bytes, length: int = 60) -> bytes:
    return (to + OWN + b"\x08\x00").ljust(length, b"\x55")


@pytest.mark.parametrize("to", [OWN, b"\xff" * 6, bytes.fromhex("01005e000001"), bytes.fromhex("333300000001")])
def test_frames_to_us_and_to_groups_come_back_verbatim(nic: Driver, to: bytes) -> None:
    waiting = nic.post(RX, [], [2048])
    assert nic.transact(TX, [HEADER, frame(to)]) == (0, [])
    nic.wait(lambda: waiting.written >= 0, "the frame")
    assert waiting.written == 72
    assert waiting.data[0][:72] == HEADER + frame(to)


@pytest.mark.parametrize("sent", [HEADER + frame(b"\x52" + OWN[1:5] + b"\x08"), HEADER + b"\xff" * 5, HEADER, b"\1"])
def test_other_frames_are_dropped(nic: Driver, sent: bytes) -> None:
    waiting = nic.post(RX, [], [2048])
    assert nic.transact(TX, [sent]) == (0, [])
    nic.poll()
    assert waiting.written == -1
    nic.transact(TX, [HEADER + frame(OWN)])
    nic.wait(lambda: waiting.written >= 0, "the next frame")
    assert waiting.data[0][:72] == HEADER + frame(OWN)


def test_frame_without_a_buffer_is_lost(nic: Driver) -> None:
    assert nic.transact(TX, [HEADER + frame(OWN)]) == (0, [])
    waiting = nic.post(RX, [], [2048])
    nic.transact(TX, [HEADER + frame(OWN, 100)])
    nic.wait(lambda: waiting.written >= 0, "the second frame")
    assert waiting.written == 112


@pytest.mark.parametrize(
    ("length", "room", "written"), [(9000, [8192], 4096), (4084, [4096], 4096), (200, [100], 100), (200, [10, 90, 900], 212)]
)
def test_long_frames_are_cut(nic: Driver, length: int, room: list[int], written: int) -> None:
    waiting = nic.post(RX, [], room)
    nic.transact(TX, [HEADER + frame(OWN, length)])
    nic.wait(lambda: waiting.written >= 0, "the frame")
    assert waiting.written == written
    assert b"".join(waiting.data)[:written] == (HEADER + frame(OWN, length))[:written]


def test_set_mac_changes_the_config_and_the_filter(nic: Driver) -> None:
    new = parse_mac("52:54:00:00:00:99")
    assert nic.transact(CTRL, [b"\1\1", new], [1]) == (1, [b"\0"])
    assert parse_config(1, nic.features, nic.device.get_config(0, 12)) == {"mac": "52:54:00:00:00:99", "status": 1, "mtu": 1400}
    waiting = nic.post(RX, [], [2048])
    nic.transact(TX, [HEADER + frame(OWN)])
    nic.poll()
    assert waiting.written == -1
    nic.transact(TX, [HEADER + frame(new)])
    nic.wait(lambda: waiting.written >= 0, "a frame to the new address")


@pytest.mark.parametrize("command", [b"\0\0\1", b"\1\1" + OWN[:5], b"\1\1" + OWN + b"x", b"\1", b"\4\0\1\0"])
def test_other_commands_are_refused(nic: Driver, command: bytes) -> None:
    before = nic.device.get_config(0, 12)
    assert nic.transact(CTRL, [command], [1]) == (1, [b"\1"])
    assert nic.transact(CTRL, [command], []) == (0, [])
    assert nic.device.get_config(0, 12) == before


def test_control_queue_can_live_in_an_address_space_of_its_own() -> None:
    home = ModelDevice(make_model("net", {}), "model:net")
    with Device(home.open()) as device:
        limits = device.identify()
        assert (limits.groups, limits.address_spaces, limits.queues) == (2, 2, 3)
        device.own()
        assert [device.backend.call(ops.GET_VRING_GROUP, VringState(i, 0)).num for i in range(3)] == [0, 0, 1]
        assert device.backend_features & BackendFeature.IOTLB_ASID
        device.negotiate(ALL_NET)
        device.backend.call(ops.SET_GROUP_ASID, VringState(1, 1))
        with Region(Iova(0x10000), 0x4000) as region:
            device.map([region.update(asid=1)])
            with pytest.raises(OSError) as other:
                device.backend.call(ops.SET_GROUP_ASID, VringState(1, 2))
            assert other.value.errno == errno.EINVAL
    home.close()


def test_waiting_receive_buffers_cost_no_time(nic: Driver) -> None:
    for _ in range(32):
        nic.post(RX, [], [2048])
    nic.transact(TX, [HEADER + frame(b"\2" * 6)])
    before = time.process_time()
    time.sleep(0.4)
    assert time.process_time() - before < 0.1


def test_sent_frames_wait_for_a_receive_queue() -> None:
    """As in the kernel: while the receive queue is not enabled, the transmit queue is left alone."""
    with driven(make_model("net", {}), ALL_NET) as driver:
        enable = driver.device.backend
        enable.call(ops.SET_VRING_ENABLE, VringState(RX, 0))
        sent = driver.post(TX, [HEADER + frame(b"\xff" * 6)])
        time.sleep(0.05)
        driver.poll()
        assert sent.written == -1
        waiting = driver.post(RX, [], [2048])
        enable.call(ops.SET_VRING_ENABLE, VringState(RX, 1))
        driver.wait(lambda: waiting.written >= 0 and sent.written >= 0, "the frame")
