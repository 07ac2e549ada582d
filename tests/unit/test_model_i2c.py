# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The I2C model: what is on the bus, groups of requests, and what no request may do (virtio 1.2, 5.16)."""

from __future__ import annotations

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
from vdpa_bridge.drivers import Driver, I2cDriver
from vdpa_bridge.drivers.base import RING_FEATURES
from vdpa_bridge.flags import Feature
from vdpa_bridge.models import make_model
from vdpa_bridge.virtio.features import I2cFeature

__all__ = ["quiet"]  # an autouse fixture

FAIL_NEXT, READ = 1, 2
OK, ERR = 0, 1


@contextmanager
def bus(devices: str) -> Iterator[I2cDriver]:
    with opened(make_model("i2c", {"devices": devices})) as device, I2cDriver(device) as driver:
        yield driver


def request(driver: Driver, address: int, data: bytes = b"", room: int = 0, flags: int = 0) -> tuple[int, int, bytes]:
    """Status, bytes written and data read of one request put on the ring as it is."""
    header = struct.pack("<HHI", address, 0, flags)
    written, answer = driver.transact(0, [header, data] if data else [header], [room, 1] if room else [1])
    return answer[-1][0], written, b"".join(answer[:-1])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rings", ["split", "packed"])
def test_bus(tmp_path: Path, way: str, rings: str, seen: Seen) -> None:
    """Our driver finds the devices, writes and reads both memories, and what the EEPROM was written is in its file."""
    features = RING_FEATURES | (Feature.RING_PACKED if rings == "packed" else 0)
    before = random.Random(6).randbytes(256)
    file = tmp_path / "eeprom"
    file.write_bytes(before)
    model = make_model("i2c", {"devices": f"eeprom@50:file={file},ram@51:size=16,thermometer@48:temperature=-3.5"})
    with in_way(way, model) as device, I2cDriver(device, ring_features=features) as driver:
        assert driver.features & features == features
        found = []
        for address in range(8, 0x78):
            try:
                driver.transfer(address)
            except OSError:
                continue
            found.append(address)
        assert found == [0x48, 0x50, 0x51]
        assert driver.transfer(0x50, b"\0", 256) == before
        driver.transfer(0x50, b"\x10hello")
        assert driver.transfer(0x50, b"\x0e", 10) == before[0x0E:0x10] + b"hello" + before[0x15:0x18]
        assert driver.transfer(0x50, count=2) == before[0x18:0x1A], "on from where the last read ended"
        driver.transfer(0x51, b"\x0e1234")
        assert driver.transfer(0x51, b"\x0e", 6) == b"1234\0\0"
        assert driver.transfer(0x48, b"\0", 2) == struct.pack(">h", -7 << 7)
        driver.restart()
        assert driver.transfer(0x51, b"\x0e", 2) == b"12"
    assert file.read_bytes() == before[:16] + b"hello" + before[21:]
    seen("devices", "i2c", "i2c", "model", rings, "restart", *{way} & set(WAYS[1:]))


@pytest.mark.parametrize(
    ("devices", "text"),
    [
        ("eeprom", "it is KIND@ADDRESS"),
        ("clock@50", "with one of eeprom, ram, thermometer"),
        ("ram@07", "hex, from 08 to 77"),
        ("ram@", "hex, from 08 to 77"),
        ("ram@78", "hex, from 08 to 77"),
        ("ram@50,ram@50", "two devices at address 50"),
        ("ram@52,eeprom@50:size=1024", "two devices at address 52: one with 1 addresses begins at 52|with 4 addresses begins at 50"),
        ("ram@50:size=0", "from 1 to 256"),
        ("ram@50:size", "'size' is not OPTION=VALUE"),
        ("ram@50:page=8", "i2c: ram has no option page; there is: size"),
        ("eeprom@50:size=300", "an EEPROM of 300 bytes"),
        ("eeprom@50:size=128K", "up to 64K"),
        ("eeprom@50:page=48", "page=48 does not divide"),
        ("eeprom@50:file=/dev/null", "neither a file nor a block device"),
        ("thermometer@48:temperature=warm", "'warm' is no temperature"),
        ("thermometer@48:temperature=200", "an LM75 knows"),
        ("thermometer@48:temperature=2;file=a", "not both"),
    ],
)
def test_wrong_options_are_named(devices: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_model("i2c", {"devices": devices})


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(100))
    with pytest.raises(ValueError, match="an EEPROM of 100 bytes"):
        make_model("i2c", {"devices": f"ram@20,eeprom@50:file={tmp_path}/short"})
    with pytest.raises(ValueError, match="has 100 bytes, the EEPROM 256"):
        make_model("i2c", {"devices": f"eeprom@50:file={tmp_path}/short;size=256"})
    with pytest.raises(FileNotFoundError):
        make_model("i2c", {"devices": f"eeprom@51,eeprom@50:file={tmp_path}/missing"})


# Devices ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "page", "addresses"), [(128, 8, 1), (256, 8, 1), (512, 16, 2), (2048, 16, 8), (4096, 32, 1), (16384, 64, 1), (65536, 128, 1)])
def test_eeproms(tmp_path: Path, size: int, page: int, addresses: int) -> None:
    """A write stays in its page, a read goes round the memory; small ones have an address on the bus for each 256 bytes."""
    before = random.Random(size).randbytes(size)
    file = tmp_path / "eeprom"
    file.write_bytes(before)
    with bus(f"eeprom@50:file={file}") as driver:
        for address in range(0x50, 0x58):
            assert (request(driver, address << 1)[0] == OK) == (address < 0x50 + addresses)

        def place(at: int) -> tuple[int, bytes]:
            return (0x50, struct.pack(">H", at)) if size > 2048 else (0x50 + at // 256, bytes([at % 256]))

        last = size - page
        address, at = place(last + page - 2)
        driver.transfer(address, at + b"abcd")
        model = bytearray(before)
        model[last + page - 2 :], model[last : last + 2] = b"ab", b"cd"
        assert file.read_bytes() == model
        assert driver.transfer(0x50, count=4) == model[last + 2 : last + 6]
        address, at = place(size - 3)
        assert driver.transfer(address, at, 10) == bytes(model[-3:] + model[:7])
        driver.transfer(*place(0))
        assert driver.transfer(0x50, count=min(size + 5, 65535)) == bytes(model + model[:5])[:65535]
        address, at = place(0)
        driver.transfer(address, at + bytes(range(page)) + b"around")
        assert driver.transfer(address, at, page) == (b"around" + bytes(range(6, page)))[:page]


def test_eeprom_that_is_not_to_be_written(tmp_path: Path) -> None:
    file = tmp_path / "eeprom"
    file.write_bytes(b"precious".ljust(256, b"."))
    file.chmod(0o400)
    with bus(f"eeprom@50:file={file};readonly=on") as driver:
        assert driver.transfer(0x50, b"\0", 8) == b"precious"
        with pytest.raises(OSError, match="address 0x50 failed: status 1"):
            driver.transfer(0x50, b"\0w")
        os.truncate(file, 4)
        assert driver.transfer(0x50, b"\0", 8) == b"prec\xff\xff\xff\xff"
    assert file.read_bytes() == b"prec"


def test_thermometer(tmp_path: Path) -> None:
    """The registers of an LM75; what it measures is what the file says."""
    file = tmp_path / "degrees"
    file.write_text("25.4\n")
    with bus(f"thermometer@48:file={file}") as driver:
        assert [driver.transfer(0x48, bytes([at]), 2).hex() for at in range(4)] == ["1980", "0000", "4b00", "5000"]
        driver.transfer(0x48, b"\3\x28\0")
        driver.transfer(0x48, b"\2\x27")
        driver.transfer(0x48, b"\1\x01\xff")
        driver.transfer(0x48, b"\0\xaa\xaa")
        assert [driver.transfer(0x48, bytes([at]), 4).hex() for at in (0, 1, 2, 3)] == ["19801980", "01010101", "27002700", "28002800"]
        for text, answer in (("-10", "f600"), ("not yet", "f600"), ("300", "f600"), ("100", "6400")):
            file.write_text(text)
            assert driver.transfer(0x48, b"\4", 2).hex() == answer, "register 4 is register 0"


# Requests -------------------------------------------------------------------------------------------------------------------


def test_a_failed_request_takes_its_group_with_it() -> None:
    with bus("ram@20") as driver:
        driver.transfer(0x20, b"\0abc")
        assert request(driver, 0x21 << 1, b"\0", flags=FAIL_NEXT)[0] == ERR
        assert request(driver, 0x20 << 1, b"\0xyz", flags=FAIL_NEXT)[0] == ERR
        assert request(driver, 0x20 << 1, room=3, flags=READ)[0] == ERR
        assert request(driver, 0x20 << 1, b"\0")[0] == OK
        assert request(driver, 0x20 << 1, room=3, flags=READ) == (OK, 4, b"abc")
        assert request(driver, 0x21 << 1, b"\0", flags=FAIL_NEXT)[0] == ERR
        driver.restart()
        assert request(driver, 0x20 << 1)[0] == OK, "a reset ends the group"


@pytest.mark.parametrize(
    ("address", "data", "room", "flags"),
    [
        (0x20, b"", 0, 0),  # not shifted
        (0x41, b"", 0, 0),  # the bit for reading is not part of it
        (0x0140, b"", 0, 0),  # too high
        (0xF0, b"", 0, 0),  # ten bits: nobody has such an address here
        (0x40, b"\0", 4, 0),  # room to read, but it writes
        (0x40, b"\0", 4, READ),  # data, but it reads
        (0x40, b"", 0, 4),  # a flag that there is not
    ],
)
def test_requests_that_are_none(address: int, data: bytes, room: int, flags: int) -> None:
    with bus("ram@20") as driver:
        driver.transfer(0x20, b"\0abc")
        assert request(driver, address, data, room, flags) == (ERR, 1, bytes(room))
        assert driver.transfer(0x20, b"\0", 3) == b"abc"


def test_lengths() -> None:
    """Zero bytes either way ask whether the device is there; more than a bus carries is no segment."""
    with bus("ram@20") as driver:
        assert request(driver, 0x40) == (OK, 1, b"")
        assert request(driver, 0x40, flags=READ) == (OK, 1, b"")
        assert len(driver.transfer(0x20, b"\0", 65535)) == 65535
        assert request(driver, 0x40, room=65536, flags=READ)[:2] == (ERR, 1)
        assert request(driver, 0x40, bytes(65535))[0] == OK
        assert request(driver, 0x40, bytes(65536))[0] == ERR
        assert driver.transact(0, [struct.pack("<HHI", 0x40, 0, 0)])[0] == 0, "no room for a status"
        assert driver.transact(0, [b"\x40\0"], [1]) == (1, [b"\1"])
        assert driver.transact(0, [], [1]) == (1, [b"\1"])


def test_a_driver_without_zero_length_requests_is_refused() -> None:
    with opened(make_model("i2c", {})) as device, pytest.raises(OSError, match=r"SET_FEATURES .*the driver does without features 0x1, which it must accept"):
        Driver(device)


def test_a_successor_knows_what_is_on_the_bus(tmp_path: Path) -> None:
    devices = "ram@20,eeprom@50,thermometer@48"
    one, other = make_model("i2c", {"devices": devices}), make_model("i2c", {"devices": devices})
    with opened(one) as device, I2cDriver(device) as driver:
        for address in (0x20, 0x48, 0x50):
            driver.transfer(address, b"\3\x12\x34")
        driver.transfer(0x50, b"\3")
        other.restore(one.snapshot())
    with opened(other) as device, I2cDriver(device) as driver:
        assert [driver.transfer(address, count=2) for address in (0x48, 0x50)] == [b"\x12\x34"] * 2
        assert driver.transfer(0x20, b"\3", 2) == b"\x12\x34"
    with pytest.raises(ValueError, match="had devices at 20, 50, 48"):
        make_model("i2c", {"devices": "ram@21"}).restore({"fails": False, "devices": {"20": {}, "50": {}, "48": {}}})


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(
        st.tuples(
            st.one_of(st.binary(max_size=10), st.builds(lambda a, f, d: struct.pack("<HHI", a << 1, 0, f) + d, st.sampled_from([0x20, 0x48, 0x50, 0x55]), st.integers(0, 5), st.binary(max_size=300))),
            st.lists(st.integers(1, 600), max_size=3),
        ),
        max_size=8,
    )
)
def test_any_request_is_answered_and_the_ring_goes_on(parts: list[tuple[bytes, list[int]]]) -> None:
    with opened(make_model("i2c", {"devices": "ram@20:size=7,thermometer@48,eeprom@50"})) as device, Driver(device, wanted=I2cFeature.ZERO_LENGTH_REQUEST) as driver:
        for data, rooms in parts:
            if data or rooms:
                written, _ = driver.transact(0, [data] if data else [], rooms)
                assert bool(rooms) == bool(written)
                assert written <= sum(rooms)
        request(driver, 0x20 << 1)
        assert request(driver, 0x20 << 1, b"\0")[0] == OK
        assert request(driver, 0x20 << 1, room=7, flags=READ)[:2] == (OK, 8)
