# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""QEMU guests whose kernels drive lines and an I2C bus of ours, by the drivers that kernel/build makes for them."""

from __future__ import annotations

import hashlib
import random
import socket
from pathlib import Path

import pytest

from tests.support.guest import QEMU, Guest, newer_qemu, run_guest
from tests.support.programs import program
from tests.support.seen import Seen

pytestmark = pytest.mark.peers

QEMUS = pytest.mark.parametrize("which", ["QEMU", "QEMU, newer"])


def _qemu(which: str) -> str:
    return QEMU if which == "QEMU" else newer_qemu()


def _board(place: Path) -> list[str]:
    return ["--socket-path", f"{place}/s", "--names", "led,button,,door", "--loop", "led:button", "--control", f"{place}/c", "-v"]


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


class Hand:
    """Somebody who presses buttons."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(path)
        self.file = self.sock.makefile("r")

    def ask(self, text: str) -> str:
        self.sock.sendall(text.encode() + b"\n")
        return self.file.readline().rstrip()

    def close(self) -> None:
        self.file.close()
        self.sock.close()


@QEMUS
def test_lines(short_dir: Path, lines_program: bytes, seen: Seen, which: str) -> None:
    """The guest sees the names, what is set outside, and sets what is seen outside."""
    script = """
        /lines info /dev/gpiochip0
        /lines level /dev/gpiochip0 3
        cat /sys/class/gpio/gpiochip*/base > /sys/class/gpio/export; echo high > /sys/class/gpio/led/direction; echo HIGH
        until [ "$(/lines level /dev/gpiochip0 3)" = "level 0" ]; do sleep 0.1; done
        echo 0 > /sys/class/gpio/led/value; echo LOW
        /lines level /dev/gpiochip0 1
    """
    arguments = ["-chardev", f"socket,id=c0,path={short_dir}/s", "-device", "vhost-user-gpio-pci,chardev=c0"]
    with program("gpio", *_board(short_dir), "--high", "door") as server:
        server.logs("ready")
        with Guest(script, modules=["gpio-virtio"], files={"lines": lines_program}, qemu_args=arguments, qemu=_qemu(which)) as guest:
            guest.wait_output("HIGH", 60)
            hand = Hand(f"{short_dir}/c")
            try:
                assert [hand.ask(f"get {line}") for line in ("led", "button", "door")] == ["ok 1"] * 3
                assert hand.ask("set door 0") == "ok"
                guest.wait_output("LOW", 30)
                assert [hand.ask(f"get {line}") for line in ("led", "button", "door")] == ["ok 0"] * 3
            finally:
                hand.close()
            result = guest.wait(60)
        server.end()
    assert result.status == 0, result.output + result.errors + result.log
    assert result.output.splitlines() == ["4 lines: led button - door", "level 1", "HIGH", "LOW", "level 0"]
    assert "drop" not in server.log
    seen("clients", which, "gpio", "model", "split")


def test_edges(short_dir: Path, lines_program: bytes, seen: Seen) -> None:
    """Interrupts of a line that the guest sets itself, and of one that is set outside."""
    script = "/lines loop /dev/gpiochip0 0 1 200 && /lines edges /dev/gpiochip0 3 6 && /lines level /dev/gpiochip0 3"
    arguments = ["-chardev", f"socket,id=c0,path={short_dir}/s", "-device", "vhost-user-gpio-pci,chardev=c0"]
    with program("gpio", *_board(short_dir)) as server:
        server.logs("ready")
        # QEMU 7.2 does not offer interrupts to its guest
        with Guest(script, modules=["gpio-virtio"], files={"lines": lines_program}, qemu_args=arguments, qemu=newer_qemu()) as guest:
            guest.wait_output("WAITING", 60)
            hand = Hand(f"{short_dir}/c")
            try:
                came = "WAITING\n"
                for turn in range(6):
                    assert hand.ask(f"set door {(turn + 1) & 1}") == "ok"
                    came += "edge falling\n" if turn & 1 else "edge rising\n"
                    guest.wait_output(came, 30)
            finally:
                hand.close()
            result = guest.wait(60)
        server.end()
    assert result.status == 0, result.output + result.errors + result.log
    assert "200 edges came as set" in result.output
    assert "level 0" in result.output
    assert "drop" not in server.log
    seen("clients", "QEMU, newer", "gpio", "model", "split", "events")


@QEMUS
def test_bus(short_dir: Path, lines_program: bytes, seen: Seen, which: str) -> None:
    """The guest reads and writes an EEPROM by transactions of its own and by the kernel's driver, and measures a temperature."""
    script = """
        /lines i2c /dev/i2c-0 50 10 16; /lines i2c /dev/i2c-0 50 40aabbcc 0; /lines i2c /dev/i2c-0 50 3f 5
        /lines i2c /dev/i2c-0 48 - 0; /lines i2c /dev/i2c-0 51 10 4 2> /dev/null || echo NOBODY
        echo lm75 0x48 > /sys/bus/i2c/devices/i2c-0/new_device; cat /sys/class/hwmon/*/temp1_input
        echo 30000 > /sys/class/hwmon/hwmon0/temp1_max; cat /sys/class/hwmon/*/temp1_max
        echo 24c02 0x50 > /sys/bus/i2c/devices/i2c-0/new_device
        cd /sys/bus/i2c/devices/0-0050; md5sum < eeprom; printf 'hello from the guest' | dd of=eeprom bs=1 seek=250 count=6 2> /dev/null
    """
    before = random.Random(7).randbytes(256)
    eeprom = short_dir / "eeprom"
    eeprom.write_bytes(before)
    arguments = ["-chardev", f"socket,id=c0,path={short_dir}/s", "-device", "vhost-user-i2c-pci,chardev=c0"]
    modules = ["i2c-virtio", "i2c-dev", "lm75", "at24"]
    with program("i2c", "--socket-path", f"{short_dir}/s", "--devices", f"eeprom@50:file={eeprom},thermometer@48:temperature=36.5", "-v") as server:
        server.logs("ready")
        result = run_guest(script, modules=modules, files={"lines": lines_program}, qemu_args=arguments, qemu=_qemu(which))
        server.end()
    assert result.status == 0, result.output + result.errors + result.log
    changed = bytearray(before)
    changed[0x40:0x43] = b"\xaa\xbb\xcc"
    got = [line for line in result.output.splitlines() if line.startswith("got")]
    assert got == [f"got {before[0x10:0x20].hex()}", "got ", f"got {changed[0x3F:0x44].hex()}", "got "]
    rest = result.output.splitlines()[len(got) :]
    assert rest == ["NOBODY", "36500", "30000", f"{_md5(bytes(changed))}  -"], result.output + result.log
    changed[250:256] = b"hello "
    assert eeprom.read_bytes() == changed
    assert "drop" not in server.log
    seen("clients", which, "i2c", "model", "split")
