# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What sits on a simulated I2C bus: memories and a thermometer, with the registers of the parts that drivers know.

Rule of this file: a device sees one segment of a transaction at a time, as on a bus: bytes written to it, or a number of bytes to be
read from it. It keeps its address pointer in between, and acknowledges or raises NoAck.
"""

from __future__ import annotations

import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from .image import open_image
from .options import check_options, parse_count, parse_size, parse_switch


class NoAck(Exception):
    """The device does not acknowledge."""


class BusDevice(ABC):
    """At one address, or at *addresses* that follow one another."""

    addresses: int = 1
    known: ClassVar[tuple[str, ...]]
    """The options that it has."""

    def __init__(self, options: Mapping[str, str]) -> None:
        """ValueError for a wrong option, OSError when a file cannot be opened."""
        self._pointer = 0

    @abstractmethod
    def write(self, block: int, data: bytes) -> None:
        """*data* is written to the *block*-th of its addresses; empty to ask whether it is there. NoAck."""

    @abstractmethod
    def read(self, block: int, count: int) -> bytes:
        """*count* bytes are read."""

    @property
    def state(self) -> dict[str, Any]:
        """What a driver has changed, as plain values."""
        return {"pointer": self._pointer}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self._pointer = int(state["pointer"])

    def close(self) -> None:  # noqa: B027 - most have nothing
        """Give files back."""


class Ram(BusDevice):
    """A register file: the first byte written is the address, what follows is stored from there on, and reads go on from there."""

    known = ("size",)

    def __init__(self, options: Mapping[str, str]) -> None:
        super().__init__(options)
        size = options.get("size", "256")
        self._memory = bytearray(parse_count("size", size, 1, 256))

    def write(self, block: int, data: bytes) -> None:
        """Wraps at the end."""
        if data:
            self._pointer = data[0] % len(self._memory)
        for byte in data[1:]:
            self._memory[self._pointer] = byte
            self._pointer = (self._pointer + 1) % len(self._memory)

    def read(self, block: int, count: int) -> bytes:
        """Wraps at the end."""
        size = len(self._memory)
        answer = bytes(self._memory[(self._pointer + at) % size] for at in range(count))
        self._pointer = (self._pointer + count) % size
        return answer

    @property
    def state(self) -> dict[str, Any]:
        """Its contents as well, in hex."""
        return {"pointer": self._pointer, "memory": self._memory.hex()}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        memory = bytes.fromhex(state["memory"])
        if len(memory) != len(self._memory):
            raise ValueError(f"{len(memory)} bytes for a memory of {len(self._memory)}")
        self._pointer, self._memory[:] = int(state["pointer"]) % len(memory), memory


class Eeprom(BusDevice):
    """A 24C01 to 24C512, by its size: bytes written beyond the end of a page go to its beginning; reads wrap at the end of the memory.

    Up to 2 KiB, addresses have one byte, and each 256 bytes an address on the bus; from 4 KiB on they have two bytes.
    """

    known = ("file", "size", "page", "readonly")

    def __init__(self, options: Mapping[str, str]) -> None:
        super().__init__(options)
        self._readonly = parse_switch("readonly", options.get("readonly", "off"))
        self._fd = open_image(options["file"], self._readonly) if "file" in options else -1
        try:
            there = os.lseek(self._fd, 0, os.SEEK_END) if self._fd >= 0 else 256
            self._size = parse_size(options["size"]) if "size" in options else there
            if self._size not in {128 << shift for shift in range(10)}:
                raise ValueError(f"an EEPROM of {self._size} bytes; there are those of 128, 256, 512 and so on, up to 64K")
            if self._fd >= 0 and there < self._size:
                raise ValueError(f"{options['file']} has {there} bytes, the EEPROM {self._size}")
            if self._fd < 0:
                self._fd = os.memfd_create("vdpa-bridge-eeprom", os.MFD_CLOEXEC)
                os.pwrite(self._fd, b"\xff" * self._size, 0)
            self._wide = self._size > 2048
            self.addresses = 1 if self._wide else max(1, self._size // 256)
            usual = 8 if self._size <= 256 else 16 if not self._wide else 32 << (self._size.bit_length() - 13) // 2
            self._page = parse_count("page", options.get("page", str(usual)), 1, 256)
            if self._size % self._page:
                raise ValueError(f"page={self._page} does not divide the {self._size} bytes")
        except BaseException:
            self.close()
            raise

    def write(self, block: int, data: bytes) -> None:
        """Every byte is in the file when this ends. NoAck when the memory is not to be written, or its file fails."""
        head = 2 if self._wide else 1
        if len(data) < head:  # no address, or half of one: the pointer stays
            return
        self._pointer = (int.from_bytes(data[:head], "big") + 256 * block) % self._size
        if not (data := data[head:]):
            return
        if self._readonly:
            raise NoAck
        start = self._pointer - self._pointer % self._page
        try:
            page = bytearray(self._load(start, self._page))
            for byte in data:
                page[self._pointer - start] = byte
                self._pointer = start + (self._pointer + 1 - start) % self._page
            if os.pwrite(self._fd, page, start) != len(page):
                raise NoAck
        except OSError:
            raise NoAck from None

    def read(self, block: int, count: int) -> bytes:
        """NoAck when the file fails."""
        try:
            whole = self._load(0, self._size)
        except OSError:
            raise NoAck from None
        turns = (self._pointer + count) // self._size + 1
        answer = (whole * turns)[self._pointer : self._pointer + count]
        self._pointer = (self._pointer + count) % self._size
        return answer

    def _load(self, start: int, length: int) -> bytes:
        """As erased, where the file has become too short."""
        return os.pread(self._fd, length, start).ljust(length, b"\xff")

    @property
    def state(self) -> dict[str, Any]:
        """The contents are those of the file."""
        return {"pointer": self._pointer, "memory": self._load(0, self._size).hex()}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self._pointer = int(state["pointer"]) % self._size
        memory = bytes.fromhex(state["memory"])
        if memory != self._load(0, self._size):
            os.pwrite(self._fd, memory[: self._size], 0)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Thermometer(BusDevice):
    """An LM75: temperature, configuration, hysteresis and limit, of which the pointer chooses one. Half degrees."""

    known = ("temperature", "file")
    TEMPERATURE, CONFIGURATION, HYSTERESIS, LIMIT = range(4)

    def __init__(self, options: Mapping[str, str]) -> None:
        super().__init__(options)
        if {"temperature", "file"} <= set(options):
            raise ValueError("a thermometer has temperature= or file=, not both")
        self._degrees = _degrees(options.get("temperature", "21.5"))
        self._registers = {self.CONFIGURATION: b"\0", self.HYSTERESIS: _register(75), self.LIMIT: _register(80)}
        self._fd = open_image(options["file"], readonly=True) if "file" in options else -1

    @property
    def degrees(self) -> float:
        """What is measured: what the file says at the moment, or the last that it did."""
        if self._fd >= 0:
            try:
                self._degrees = _degrees(os.pread(self._fd, 64, 0).decode("ascii", "replace"))
            except (OSError, ValueError):  # being written
                pass
        return self._degrees

    def write(self, block: int, data: bytes) -> None:
        """Pointer, and perhaps a register; what is too much for it is ignored, and so is a write to the temperature."""
        if data:
            self._pointer = data[0] & 3
        old = self._registers.get(self._pointer)
        if old is not None and len(data) > 1:
            self._registers[self._pointer] = (data[1 : 1 + len(old)] + old[len(data) - 1 :])[: len(old)]

    def read(self, block: int, count: int) -> bytes:
        """The register, again and again."""
        register = self._registers.get(self._pointer) or _register(self.degrees)
        return (register * (count // len(register) + 1))[:count]

    @property
    def state(self) -> dict[str, Any]:
        """The registers as well."""
        return {"pointer": self._pointer, "registers": [value.hex() for value in self._registers.values()]}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self._pointer = int(state["pointer"]) & 3
        self._registers = {number: bytes.fromhex(text) for number, text in zip(self._registers, state["registers"], strict=True)}

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _degrees(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text.strip()!r} is no temperature; it is written 21.5") from None
    if not -55 <= value <= 125:
        raise ValueError(f"{value:g} degrees; an LM75 knows -55 to 125")
    return value


def _register(degrees: float) -> bytes:
    """Half degrees in the upper nine bits."""
    return struct.pack(">h", round(degrees * 2) << 7)


PARTS: dict[str, type[BusDevice]] = {"eeprom": Eeprom, "ram": Ram, "thermometer": Thermometer}


def parse_device(text: str) -> tuple[int, BusDevice]:
    """Address and device of ``eeprom@50:file=PATH;size=256``; ValueError, OSError."""
    place, _, rest = text.partition(":")
    kind, at, address = place.partition("@")
    if kind not in PARTS or not at:
        raise ValueError(f"devices={text}; it is KIND@ADDRESS[:OPTION=VALUE;...] with one of {', '.join(PARTS)}")
    try:
        number = int(address, 16)
    except ValueError:
        number = -1
    if not 0x08 <= number <= 0x77:
        raise ValueError(f"devices={text}; an address is hex, from 08 to 77")
    options = dict(_option(text, word) for word in rest.split(";") if word)
    check_options(f"i2c: {kind}", options, PARTS[kind].known)
    return number, PARTS[kind](options)


def _option(text: str, word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals:
        raise ValueError(f"devices={text}; {word!r} is not OPTION=VALUE")
    return name, value
