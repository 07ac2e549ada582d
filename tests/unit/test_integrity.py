# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Disks that an engine serves, under load that knows what every sector must hold. Every pair of choices meets in some case."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.homes import connector, socket_path
from vdpa_bridge import Device
from vdpa_bridge.backends.base import Backend
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.drivers import BlkDriver
from vdpa_bridge.flags import Feature
from vdpa_bridge.load import BlkWork, Timing, blk_memory, load_blk
from vdpa_bridge.models import make_model
from vdpa_bridge.vhost_user.server import Server

KIB, MIB = 1 << 10, 1 << 20
SIZE = 32 * MIB
FLYING = 4 * MIB
"""Bytes in flight on a queue at most."""
CHOICES = (
    ("here", "vdpa", "legacy"),
    ("memory", "file", "direct"),
    (512, 4 * KIB, 24 * KIB, 128 * KIB, MIB),
    ("split", "packed"),
    ("tables", "no tables"),
    ("event", "poll"),
    (1, 2, 3, 4),
)
"""Where the disk is reached, what it lies on, bytes of a request, ring, indirect tables, how both wait, queues."""
CASES: list[tuple[str, str, int, str, str, str, int]] = [
    ("here", "memory", 4 * KIB, "packed", "tables", "event", 1),
    ("here", "memory", 128 * KIB, "split", "tables", "poll", 2),
    ("here", "memory", MIB, "packed", "no tables", "event", 4),
    ("vdpa", "memory", 24 * KIB, "packed", "tables", "poll", 3),
    ("legacy", "memory", 512, "split", "tables", "event", 4),
    ("here", "file", 24 * KIB, "split", "no tables", "poll", 2),
    ("vdpa", "file", 512, "packed", "tables", "poll", 3),
    ("vdpa", "file", 4 * KIB, "split", "no tables", "event", 2),
    ("vdpa", "file", 128 * KIB, "packed", "tables", "poll", 4),
    ("legacy", "file", 512, "packed", "no tables", "poll", 2),
    ("legacy", "file", 24 * KIB, "packed", "tables", "event", 1),
    ("legacy", "file", MIB, "packed", "no tables", "event", 3),
    ("here", "direct", 512, "packed", "no tables", "poll", 1),
    ("here", "direct", 4 * KIB, "split", "tables", "poll", 4),
    ("here", "direct", 128 * KIB, "packed", "no tables", "event", 3),
    ("vdpa", "direct", MIB, "split", "tables", "poll", 2),
    ("vdpa", "direct", MIB, "split", "no tables", "poll", 1),
    ("legacy", "direct", 4 * KIB, "split", "tables", "poll", 3),
    ("legacy", "direct", 24 * KIB, "split", "tables", "event", 4),
    ("legacy", "direct", 128 * KIB, "split", "tables", "poll", 1),
]


def test_every_pair_of_choices_is_tried() -> None:
    for one, other in itertools.combinations(range(len(CHOICES)), 2):
        assert {(case[one], case[other]) for case in CASES} == set(itertools.product(CHOICES[one], CHOICES[other]))


@contextlib.contextmanager
def forgetful(file: Path) -> Iterator[None]:
    """Pages of *file* leave the page cache all the time, so that reads have to wait for the medium."""
    done = threading.Event()

    def forget() -> None:
        with file.open("rb") as opened:
            while not done.wait(0.02):
                os.fdatasync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    thread = threading.Thread(target=forget)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def reached(device: ModelDevice, home: str) -> Iterator[Backend]:
    """An opening of *device*: in this process, or over a socket in one of its modes."""
    if home == "here":
        yield device.open()
        return
    with socket_path() as path, Server(device.open, path):
        yield connector(path, "blk", "require" if home == "vdpa" else "off")()


@pytest.mark.parametrize(("home", "medium", "block", "ring", "tables", "wait", "queues"), CASES)
def test_what_is_written_is_read(tmp_path: Path, home: str, medium: str, block: int, ring: str, tables: str, wait: str, queues: int) -> None:
    """Back through the device while it is under load and when all is written; and what the device says then is what lies in the file."""
    wanted = (Feature.RING_PACKED if ring == "packed" else 0) | (Feature.RING_INDIRECT_DESC if tables == "tables" else 0)
    depth = min(max(FLYING // block, 4), 48)
    work = BlkWork(Timing(duration=0.4, poll=wait == "poll"), block, depth, reads=50, offset=SIZE // 4, length=SIZE // 2, verify=True)
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))) if medium == "memory" else tmp_path
        file = place / "disk"
        file.write_bytes(os.urandom(SIZE))
        if medium != "memory":
            stack.enter_context(forgetful(file))
        options = {"file": str(file), "queues": str(queues), "threads": str(-(-queues // 2)), "engine": "native"}
        device = ModelDevice(make_model("blk", options | {"direct": "on"} if medium == "direct" else options), "disk")
        stack.callback(device.close)
        opened = stack.enter_context(Device(stack.enter_context(reached(device, home))))
        rings = {"queues": range(queues), "ring_features": Feature.RING_EVENT_IDX | wanted, "required": wanted}
        disk = stack.enter_context(BlkDriver(opened, pool_size=blk_memory(work, queues) + 4 * MIB, **rings))
        result = load_blk(disk, work)
        assert result.compared > 0
        assert result.read_back > queues
        assert result.writes.count >= result.read_back
        with file.open("rb") as there:
            for offset in range(0, SIZE, MIB):
                assert disk.read(offset, MIB) == there.read(MIB), offset
