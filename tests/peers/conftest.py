# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What tests on real programs share."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from vdpa_bridge.vhost_user.framing import Frame
from vdpa_bridge.vhost_user.legacy_server import LegacyService
from vdpa_bridge.vhost_user.messages import message_name


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many of each message legacy clients sent to servers in this process."""
    count: Counter[str] = Counter()
    handle = LegacyService.handle

    def counting(service: LegacyService, message: Frame) -> bytes:
        count[message_name(message.request).partition(" ")[0]] += 1
        return handle(service, message)

    monkeypatch.setattr(LegacyService, "handle", counting)
    return count


def _static_program(source: str, directory: Path) -> bytes:
    """A program of tests/support that runs in a guest, where there are no libraries."""
    program = directory / "program"
    gcc = shutil.which("gcc")
    assert gcc is not None
    subprocess.run([gcc, "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(Path(__file__).parents[1] / "support" / source)], check=True)
    return program.read_bytes()


@pytest.fixture(scope="session")
def packet_program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Sends frames on a packet socket and compares what comes back."""
    return _static_program("packets.c", tmp_path_factory.mktemp("packets"))


@pytest.fixture(scope="session")
def vsock_program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Connects stdin and stdout with an AF_VSOCK socket, or is the other end."""
    return _static_program("vsock_cat.c", tmp_path_factory.mktemp("vsock"))


@pytest.fixture(scope="session")
def lines_program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Uses GPIO lines and I2C buses by their character devices."""
    return _static_program("lines.c", tmp_path_factory.mktemp("lines"))


@pytest.fixture(scope="session")
def event_program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Says what an input device is and does."""
    return _static_program("events.c", tmp_path_factory.mktemp("events"))
