# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""QEMU guests whose kernels make an input device of the input model: what programs there read from it, and the lights they switch.

The QEMU is a newer one: 7.2 has no vhost-user-input without KVM.
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.support.guest import Guest, newer_qemu
from tests.support.programs import program
from tests.support.seen import Seen
from vdpa_bridge import Target
from vdpa_bridge.vhost_user.server import Server

pytestmark = pytest.mark.peers

PATIENCE = 60.0
FIND = """
    until [ -n "$node" ]; do
        sleep 0.1
        for each in /sys/class/input/event*; do [ "$(cat $each/device/name)" = "%s" ] && node=/dev/input/${each##*/}; done
    done
"""
"""Puts into $node the device of that name, among those that the guest has besides."""


def device(path: Path) -> list[str]:
    return ["-chardev", f"socket,id=c0,path={path}", "-device", "vhost-user-input-pci,chardev=c0"]


def read_lines(sock: socket.socket, count: int) -> list[str]:
    data = b""
    while data.count(b"\n") < count:
        more = sock.recv(1 << 16)
        assert more, data
        data += more
    return data.decode().splitlines()


def test_a_keyboard(short_dir: Path, event_program: bytes, seen: Seen) -> None:
    """All that it says of itself, lights, and 150 presses and releases in their order."""
    script = FIND % "a keyboard" + "/events $node 600"
    presses = [code for _ in range(2) for code in range(2, 77)]
    path, control = short_dir / "s", short_dir / "c"
    target = Target.parse(f"model:input?name=a+keyboard&serial=K+7&control={control}")
    target.open().close()  # the model is there
    with (
        Server(target.open, str(path)),
        Guest(script, modules=["virtio_input", "evdev"], files={"events": event_program}, qemu_args=device(path), qemu=newer_qemu()) as guest,
        socket.socket(socket.AF_UNIX) as somebody,
    ):
        somebody.settimeout(PATIENCE)
        somebody.connect(str(control))
        guest.wait_output("READY", timeout=90)
        assert read_lines(somebody, 4) == ["light 0 1", "light 1 1", "light 0 0", "light 1 0"]
        # the guest's kernel keeps 64 events for a program that is slow
        somebody.sendall(b"".join(b"event 1 %d 1\nevent 1 %d 0\n%s" % (code, code, b"sleep 0.2\n" if code % 5 == 1 else b"") for code in presses))
        assert read_lines(somebody, 2 * len(presses) + 30) == ["ok"] * (2 * len(presses) + 30)
        result = guest.wait(timeout=60)
    target.close()
    assert result.status == 0, result.output + result.errors + result.log
    lines = result.output.splitlines()
    ready = lines.index("READY")
    assert lines[:ready] == [
        "name a keyboard, serial K 7, ids 6 0 1 1",
        f"type 1: 248 codes, sum {sum(range(1, 249))}",
        "type 17: 3 codes, sum 3",
    ]
    assert lines[ready + 1 :] == [line for code in presses for value in (1, 0) for line in (f"event 1 {code} {value}", "event 0 0 0")]
    seen("clients", "QEMU, newer", "input", "model", "split")


def test_a_tablet_over_a_reboot(short_dir: Path, event_program: bytes, seen: Seen) -> None:
    """A program by the back-end conventions, in its sandbox; its script is played to the guest before and after the reset."""
    (short_dir / "script").write_text("sleep 4\nabs x 100, abs y 32767\nkey left\n" * 5)
    script = FIND % "paper" + """
        /events $node 7 || exit 1
        echo 1 > /proc/sys/kernel/sysrq; echo b > /proc/sysrq-trigger; sleep 30
    """
    path = short_dir / "s"
    options = ["--kind", "tablet", "--script", f"{short_dir}/script", "--name", "paper", "-v"]
    with program("input", "--socket-path", str(path), *options) as server:
        server.logs("ready")
        arguments = [*device(path), "-action", "reboot=reset"]
        with Guest(script, modules=["virtio_input", "evdev"], files={"events": event_program}, qemu_args=arguments, qemu=newer_qemu()) as guest:
            guest.wait_output("READY", timeout=90)
            said = [
                "name paper, serial , ids 6 0 3 1",
                f"type 1: 5 codes, sum {sum(range(0x110, 0x115))}",
                "type 2: 1 codes, sum 8",
                "type 3: 2 codes, sum 1",
                "axis 0: 0 to 32767",
                "axis 1: 0 to 32767",
                "READY",
                *("event 3 0 100", "event 3 1 32767", "event 0 0 0", "event 1 272 1", "event 0 0 0", "event 1 272 0", "event 0 0 0"),
            ]
            guest.wait_output("\n".join([*said, *said, ""]), timeout=60)
        server.end()
    seen("clients", "QEMU, newer", "input", "model", "split", "reboot")
