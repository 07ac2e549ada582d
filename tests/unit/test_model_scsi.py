# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The SCSI model: our driver on it in three homes, what each command answers, and what no request may do."""

from __future__ import annotations

import errno
import os
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.driven import WAYS, in_way, opened, quiet
from tests.support.seen import Seen
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.device import Device
from vdpa_bridge.drivers import ScsiDriver
from vdpa_bridge.drivers.base import RING_FEATURES
from vdpa_bridge.drivers.scsi import Inquiry, ScsiError
from vdpa_bridge.flags import Feature
from vdpa_bridge.models import ScsiModel, make_model
from vdpa_bridge.models.scsi import Response

__all__ = ["quiet"]  # an autouse fixture

BLOCKS = 256
CONTROL, REQUESTS = 0, 2
UNIT = b"\1\0\x40\0" + bytes(4)
SENSE = {
    "opcode": (5, 0x2000),
    "range": (5, 0x2100),
    "field": (5, 0x2400),
    "unit": (5, 0x2500),
    "saving": (5, 0x3900),
    "protected": (7, 0x2700),
    "reset": (6, 0x2900),
    "bus reset": (6, 0x2903),
    "unreadable": (3, 0x1100),
}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"unit{number}" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(random.Random(number).randbytes((BLOCKS << number) * 512))
    return paths


def host(files: list[Path], **options: str) -> ScsiModel:
    model = make_model("scsi", {"file": ",".join(map(str, files)), **options})
    assert isinstance(model, ScsiModel)
    return model


@contextmanager
def driving(model: ScsiModel) -> Iterator[ScsiDriver]:
    with opened(model) as device, ScsiDriver(device) as driver:
        yield driver


def request(driver: ScsiDriver, cdb: bytes, sent: bytes = b"", room: int = 0, lun: bytes = UNIT) -> tuple[int, int, int, bytes, bytes]:
    """Response, status, residual, sense data, data of a command put on the ring as it is."""
    head = lun + bytes(11) + cdb.ljust(32, b"\0")
    written, answer = driver.transact(REQUESTS, [head, sent] if sent else [head], [108, room] if room else [108])
    sensed, residual, _, status, response = struct.unpack_from("<IIHBB", answer[0])
    came = answer[1][: room - residual] if room else b""
    assert written == 108 + len(came)
    return response, status, residual, answer[0][12 : 12 + sensed], came


def sense(data: bytes) -> tuple[int, int]:
    assert (data[0], data[7], len(data)) == (0x70, 10, 18)
    return data[2], int.from_bytes(data[12:14], "big")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rings", ["split", "packed"])
def test_disks(files: list[Path], way: str, rings: str, seen: Seen) -> None:
    """Every unit is a disk of its own, whose file has what was written to it and nothing else."""
    before = [path.read_bytes() for path in files]
    features = RING_FEATURES | (Feature.RING_PACKED if rings == "packed" else 0)
    with in_way(way, host(files, serial="tower")) as device, ScsiDriver(device, ring_features=features) as driver:
        assert driver.features & features == features
        assert list(driver.units()) == [(0, lun, Inquiry(0, "VDPA-BR", "DISK", "1.0")) for lun in range(3)]
        for lun, old in enumerate(before):
            assert driver.serial(lun=lun) == f"tower-{lun}"
            assert driver.capacity(lun=lun) == (BLOCKS << lun, 512)
            assert driver.read(0, len(old), lun=lun) == old
            driver.write(512 * (lun + 1), bytes([lun + 1]) * 70_144, lun=lun)
            driver.flush(lun=lun)
        driver.restart()
        assert driver.read(512, 512, lun=0) == b"\1" * 512
    for lun, old in enumerate(before):
        at = 512 * (lun + 1)
        assert files[lun].read_bytes() == old[:at] + bytes([lun + 1]) * 70_144 + old[at + 70_144 :]
    seen("devices", "scsi", "scsi", "model", rings, "restart", *{way} & set(WAYS[1:]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"file": "a", "size": "1M"}, "not both"),
        ({"size": "1M,0"}, "a disk of 0 bytes"),
        ({"size": "1M,9999999T"}, r"a disk of \d+ bytes"),
        ({"size": ",".join(["1M"] * 256)}, "256 disks"),
        ({"size": "1M", "serial": "é"}, "printable ASCII"),
        ({"file": "/dev/null"}, "neither a file nor a block device"),
        ({"sise": "1M"}, "no option sise; there is: file, queues, readonly, serial, size"),
    ],
)
def test_wrong_options_are_named(options: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_model("scsi", options)


def test_a_file_that_is_missing_leaves_none_open(files: list[Path]) -> None:
    with pytest.raises(FileNotFoundError):
        host([files[0], files[1].parent / "missing"])


READ_10, WRITE_10 = b"\x28", b"\x2a"


def ten(code: bytes, block: int, count: int, flags: int = 0) -> bytes:
    return code + struct.pack(">BIBHB", flags, block, 0, count, 0)


def sixteen(code: int, block: int, count: int) -> bytes:
    return struct.pack(">BBQIBB", code, 0, block, count, 0, 0)


@pytest.mark.parametrize(
    ("cdb", "error"),
    [
        (bytes(6), ""),
        (ten(READ_10, BLOCKS - 2, 2), ""),
        (ten(READ_10, BLOCKS - 1, 2), "range"),
        (ten(READ_10, BLOCKS, 0), ""),
        (ten(READ_10, 0xFFFFFFFF, 1), "range"),
        (ten(READ_10, 0, 1, 0x20), "field"),
        (sixteen(0x88, BLOCKS - 1, 1), ""),
        (sixteen(0x88, (1 << 64) - 1, 1), "range"),
        (sixteen(0x88, 0, 0xFFFFFFFF), "range"),
        (bytes((8, 0, 0, 0, 1, 0)), ""),
        (bytes((8, 0, 0, 0, 0, 0)), ""),
        (bytes((8, 0, 0, 1, 0, 0)), "range"),
        (ten(b"\x35", 0, 0), ""),
        (ten(b"\x35", BLOCKS + 1, 0), "range"),
        (sixteen(0x91, 0, BLOCKS), ""),
        (bytes((0x9E, 0x10, *bytes(8), 0, 0, 0, 32, 0, 0)), ""),
        (bytes((0x9E, 0x12, *bytes(8), 0, 0, 0, 32, 0, 0)), "field"),
        (bytes((0x12, 0, 0, 0, 36, 0)), ""),
        (bytes((0x12, 0, 1, 0, 36, 0)), "field"),
        (bytes((0x12, 1, 0xB0, 0, 36, 0)), "field"),
        (bytes((0x1A, 0, 0x3F, 0, 255, 0)), ""),
        (bytes((0x1A, 0, 0xFF, 0, 255, 0)), "saving"),
        (bytes((0x1A, 0, 0x1C, 0, 255, 0)), "field"),
        (bytes((0x1A, 0, 0x08, 3, 255, 0)), "field"),
        (bytes((0xA0, 0, 3, 0, 0, 0, 0, 0, 0, 16, 0, 0)), "field"),
        (bytes((0xA0, 0, 0, 0, 0, 0, 0, 0, 0, 15, 0, 0)), "field"),
        (bytes((3, 1, 0, 0, 18, 0)), "field"),
        (b"\xf7" + bytes(9), "opcode"),
    ],
)
def test_commands_and_their_sense_data(files: list[Path], cdb: bytes, error: str) -> None:
    with driving(host(files)) as driver:
        assert sense(request(driver, bytes(6))[3]) == SENSE["reset"]
        response, status, _, data, _ = request(driver, cdb, room=1 << 17)
        assert (response, status) == (0, 2 if error else 0)
        assert (sense(data) if data else "") == SENSE.get(error, "")
        assert driver.read(0, 512) == files[0].read_bytes()[:512]


def test_what_pages_say(files: list[Path]) -> None:
    with driving(host(files, serial="S", readonly="on")) as driver:

        def answer(*cdb: int) -> bytes:
            return driver.command(bytes(cdb), room=512)

        assert answer(0x12, 1, 0, 0, 255, 0) == b"\0\0\0\3\0\x80\x83"
        assert answer(0x12, 1, 0x80, 0, 255, 0) == b"\0\x80\0\3S-0"
        assert answer(0x12, 1, 0x83, 0, 255, 0) == b"\0\x83\0\x0f\2\1\0\x0bVDPA-BR S-0"
        assert answer(0x12, 1, 0x83, 0, 5, 0) == b"\0\x83\0\x0f\2", "as much as was asked for"
        six, ten = answer(0x1A, 0, 0x3F, 0, 255, 0), answer(0x5A, 0, 0x3F, 0, 0, 0, 0, 1, 0, 0)
        assert (six[0] + 1, six[2] & 0x80, six[3]) == (len(six), 0x80, 0)
        assert (int.from_bytes(ten[:2], "big") + 2, ten[3] & 0x80) == (len(ten), 0x80)
        assert six[4:7] == ten[8:11] == b"\x08\x12\x04", "there is a write cache"
        assert answer(0x9E, 0x10, *bytes(8), 0, 0, 0, 32, 0, 0) == struct.pack(">QI20x", BLOCKS - 1, 512)
        assert driver.luns() == [0, 1, 2]
        assert sense(answer(3, 0, 0, 0, 18, 0)) == (0, 0)
        with pytest.raises(ScsiError, match="DATA PROTECT") as refused:
            driver.write(0, bytes(512))
        assert sense(refused.value.sense) == SENSE["protected"]


def test_units_and_targets_that_are_not_there(files: list[Path]) -> None:
    with driving(host(files)) as driver:
        with pytest.raises(OSError, match="no such target") as refused:
            driver.inquiry(1)
        assert refused.value.errno == errno.ENODEV
        with pytest.raises(OSError, match="has no unit 3"):
            driver.inquiry(0, 3)
        with pytest.raises(ScsiError) as failed:
            driver.read(0, 512, lun=3)
        assert sense(failed.value.sense) == SENSE["unit"]
        for lun in (b"\1\0\x80\0\0\0\0\0", b"\1\0\x40\0\0\0\0\1"):
            assert sense(request(driver, bytes(6), lun=lun)[3]) == SENSE["unit"]
            assert sense(request(driver, bytes((3, 0, 0, 0, 18, 0)), room=18, lun=lun)[4]) == SENSE["unit"]
        known = b"\xc1\1" + bytes(6)
        assert request(driver, bytes((0xA0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0)), room=256, lun=known)[4][:4] == bytes((0, 0, 0, 24))
        assert request(driver, bytes((0x12, 0, 0, 0, 36, 0)), room=36, lun=known)[4][0] == 0x1E
        assert request(driver, bytes(6), lun=bytes(8))[0] == Response.BAD_TARGET


def test_room_that_is_not_what_the_command_says(files: list[Path]) -> None:
    before = files[0].read_bytes()
    with driving(host(files)) as driver:
        request(driver, bytes(6))
        assert request(driver, ten(READ_10, 0, 2), room=1023)[0] == Response.OVERRUN
        assert request(driver, ten(READ_10, 0, 2))[0] == Response.OVERRUN
        assert request(driver, ten(WRITE_10, 0, 2), sent=bytes(1023))[0] == Response.OVERRUN
        assert request(driver, ten(READ_10, 0, 2), room=1500) == (0, 0, 476, b"", before[:1024])
        assert request(driver, ten(WRITE_10, 0, 1), sent=b"w" * 700) == (0, 0, 188, b"", b"")
        assert request(driver, bytes(6), sent=b"x", room=1)[0] == Response.FAILURE, "transfers both ways are not offered"
        assert driver.transact(REQUESTS, [UNIT + bytes(43)], [107]) == (0, [bytes(107)]), "no place for an answer"
        assert driver.transact(REQUESTS, [UNIT], [108])[1][0][11] == Response.FAILURE
        assert driver.transact(REQUESTS, [], [108])[1][0][11] == Response.FAILURE
        assert driver.read(0, 1024) == b"w" * 512 + before[512:1024]
    assert files[0].read_bytes() == b"w" * 512 + before[512:]


def test_file_that_shrinks_is_a_medium_error(files: list[Path]) -> None:
    with driving(host(files)) as driver:
        assert driver.capacity() == (BLOCKS, 512)
        os.truncate(files[0], 512)
        with pytest.raises(ScsiError, match="MEDIUM ERROR") as failed:
            driver.read(0, 1024)
        assert sense(failed.value.sense) == SENSE["unreadable"]
        assert len(driver.read(0, 512)) == 512


def test_task_management(files: list[Path]) -> None:
    """Resets are told by the unit; a function is answered after the commands that came before it."""

    def function(number: int, lun: bytes = UNIT) -> int:
        written, (answer,) = driver.transact(CONTROL, [struct.pack("<II8sQ", 0, number, lun, 7)], [1])
        assert written == 1
        return answer[0]

    with driving(host(files)) as driver:
        assert driver.capacity() == (BLOCKS, 512)
        assert [function(number) for number in range(9)] == [0, 0, 11, 0, 0, 0, 0, 0, 11]
        assert sense(request(driver, bytes(6))[3]) == SENSE["bus reset"]
        assert request(driver, bytes(6))[1] == 0
        assert function(5, b"\1\0\x40\2" + bytes(4)) == 0
        assert request(driver, bytes(6))[1] == 0, "another unit was reset"
        assert function(5, b"\1\0\x40\3" + bytes(4)) == Response.INCORRECT_LUN
        assert function(5, b"\1\1\x40\0" + bytes(4)) == Response.BAD_TARGET
        assert driver.transact(CONTROL, [struct.pack("<I8sI", 2, UNIT, 2)], [5]) == (5, [bytes(5)])
        assert driver.transact(CONTROL, [struct.pack("<I8sI", 1, b"\1\1" + bytes(6), 2)], [5]) == (5, [b"\0\0\0\0\3"])
        for wrong in (b"\0", struct.pack("<I", 9), struct.pack("<II", 0, 5)):
            assert driver.transact(CONTROL, [wrong], [1]) == (1, [bytes([Response.FAILURE])])


def test_commands_come_before_the_function_that_follows_them(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, order = host(files), []
    command, control = model._command, model._control
    monkeypatch.setattr(model, "_command", lambda chain: (order.append("command"), command(chain))[1])
    monkeypatch.setattr(model, "_control", lambda request: (order.append("function"), control(request))[1])
    home = ModelDevice(model, "model:scsi")
    try:
        with Device(home.open()) as device, ScsiDriver(device) as driver:
            with home.runner.lock:  # the model finds all of them at once
                posted = [driver.post(REQUESTS, [UNIT + bytes(43)], [108]) for _ in range(20)]
                posted.append(driver.post(CONTROL, [struct.pack("<II8sQ", 0, 1, UNIT, 7)], [1]))
            driver.wait(lambda: all(one.written >= 0 for one in posted), "the answers")
    finally:
        home.close()
    assert order == ["command"] * 20 + ["function"]


def test_sizes_that_a_driver_chooses(files: list[Path]) -> None:
    with opened(host(files)) as device, ScsiDriver(device) as driver:
        device.set_config(20, struct.pack("<II", 252, 16))
        driver.restart()
        device.set_config(20, struct.pack("<II", 17, 300))
        assert struct.unpack("<II", device.get_config(20, 8)) == (96, 32), "as they were after a reset; wrong ones are not taken"
        device.set_config(20, struct.pack("<II", 252, 16))
        device.set_config(0, b"\xff" * 20)
        assert device.get_config(0, 4) == b"\1\0\0\0"
        head = UNIT + bytes(11) + bytes((0x12, 0, 0, 0, 36, 0)).ljust(16, b"\0")
        assert driver.transact(REQUESTS, [head], [264, 36])[0] == 300


@settings(max_examples=150, deadline=None)
@given(
    queue=st.sampled_from([CONTROL, REQUESTS]),
    request=st.one_of(
        st.binary(max_size=80),
        st.builds(
            lambda code, rest: UNIT + bytes(11) + bytes([code]) + rest,
            st.sampled_from([0x00, 0x03, 0x08, 0x0A, 0x12, 0x1A, 0x25, 0x28, 0x2A, 0x35, 0x5A, 0x88, 0x8A, 0x91, 0x9E, 0xA0]),
            st.binary(min_size=31, max_size=31 + 1024),
        ),
    ),
    rooms=st.lists(st.integers(1, 600), max_size=3),
)
def test_any_request_is_answered_and_the_ring_goes_on(queue: int, request: bytes, rooms: list[int]) -> None:
    if not request and not rooms:
        return
    with driving(ScsiModel.from_options({"size": "64K,64K"})) as driver:
        written, _ = driver.transact(queue, [request] if request else [], rooms)
        assert written <= sum(rooms)
        if queue == REQUESTS:
            assert (written >= 108) == (sum(rooms) >= 108)
        assert driver.inquiry().vendor == "VDPA-BR"
        assert len(driver.read(0, 4096, lun=1)) == 4096
