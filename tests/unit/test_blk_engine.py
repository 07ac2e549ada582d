# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Disks under load by a client in C that knows what every sector must hold; what an engine leaves to the model; rest under load."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from vdpa_bridge import Device
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.drivers import BlkDriver
from vdpa_bridge.engines import BlkEngine, Gate, Loop
from vdpa_bridge.models import BlkModel, Queue, make_model
from vdpa_bridge.vhost_user.server import Server

from ..support.bridge import run_client, start_client
from ..support.homes import socket_path

MIB = 1 << 20
LOAD = "vhost-blk-load"
SECONDS = 0.12
WRONG_DATA = 4


@contextlib.contextmanager
def served(**options: str) -> Iterator[tuple[str, ModelDevice]]:
    device = ModelDevice(make_model("blk", options), "disk")
    try:
        with socket_path() as path, Server(device.open, path):
            yield path, device
    finally:
        device.close()


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "disk"
    path.write_bytes(bytes(64 * MIB))
    return str(path)


def verify(path: str, *options: object) -> dict[str, Any]:
    """Random writes, reads and flushes, each read compared with what was written there last."""
    result = run_client(path, "--verify", "--seconds", SECONDS, *options, program=LOAD)
    assert result["requests"] > result["writes"] > 0
    return result


@pytest.mark.parametrize("poll", [(), ("--poll",)], ids=["event", "poll"])
@pytest.mark.parametrize("direct", [(), ("--direct",)], ids=["indirect", "direct"])
@pytest.mark.parametrize("packed", [(), ("--packed",)], ids=["split", "packed"])
@pytest.mark.parametrize(("queues", "threads"), [(1, 1), (2, 1), (4, 3)])
def test_what_is_written_is_read(queues: int, threads: int, packed: tuple[str, ...], direct: tuple[str, ...], poll: tuple[str, ...]) -> None:
    with served(size="256M", queues=str(queues), threads=str(threads)) as (path, _):
        for size in (4096, MIB):  # and all lengths below
            verify(path, *packed, *direct, *poll, "--queues", queues, "--bytes", size, "--depth", 24)


@pytest.mark.parametrize("how", [{}, {"direct": "on"}, {"io_uring": "off"}, {"engine": "python"}], ids=["cached", "direct", "inline", "python"])
def test_files(image: str, how: dict[str, str]) -> None:
    """The page cache does not know of everything that is written here, nor has all that is read."""
    with served(file=image, queues="2", **how) as (path, _):
        for size in (4096, 256 * 1024):
            verify(path, "--queues", 2, "--bytes", size, "--depth", 16)
            with open(image, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_pages_that_are_not_there_are_read_by_io_uring(image: str) -> None:
    """Written by one client, dropped from the page cache, read by another."""
    with served(file=image) as (path, device):
        run_client(path, "--requests", 2000, "--depth", 32, "--seed", 7)
        with open(image, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        run_client(path, "--requests", 2000, "--depth", 32, "--seed", 7, "--read-only")
        assert device.model.needs.io_uring


def test_rings_are_at_rest_for_whoever_asks(image: str) -> None:
    """Under load, and soon; the load goes on."""
    for options in ({"size": "128M"}, {"file": image, "direct": "on"}):
        with served(queues="2", threads="2", **options) as (path, device), start_client(
            path, "--verify", "--seconds", 1, "--queues", 2, "--depth", 16, "--bytes", 65536, program=LOAD
        ) as client:
            longest, looks = 0.0, 0
            while client.poll() is None:
                start = time.monotonic()
                with device.runner.lock:
                    longest = max(longest, time.monotonic() - start)
                    assert [ring.queue.in_flight for ring in device.runner.rings.values()] in ([], [0], [0, 0])
                    looks += len(device.runner.rings) > 0
                time.sleep(0.001)
            assert client.returncode == 0, client.communicate()[1]
            assert looks > 20
            assert longest < 5


def test_file_that_becomes_shorter(image: str) -> None:
    """Requests beyond its end fail, others do not, and the device serves the next client."""
    with served(file=image) as (path, _):
        os.truncate(image, MIB)
        with start_client(path, "--seconds", 5, "--depth", 8, program=LOAD) as client:
            error = client.communicate(timeout=30)[1]
        assert client.returncode == WRONG_DATA
        assert "status 1" in error
        run_client(path, "--requests", 50, "--bytes", 4096)


def test_null_disk_forgets() -> None:
    with served(engine="null", size="64M") as (path, _):
        assert "0 was read" in run_client(path, "--requests", 10, status=WRONG_DATA)["error"]
        assert run_client(path, "--seconds", 0.1, program=LOAD)["requests"] > 100


class Counting(BlkModel):
    """A disk that says what it is asked itself, though an engine could do it."""

    batches = 0

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        self.batches += 1
        super().process(queues, index)


def test_process_of_ones_own_is_used() -> None:
    device = ModelDevice(model := Counting.from_options({"size": "1M"}), "counting")
    try:
        with Device(device.open()) as opened, BlkDriver(opened) as disk:
            disk.write(0, bytes(512))
            disk.flush()
        assert model.batches >= 2
        assert device.runner.rings == {}
    finally:
        device.close()


def test_model_is_asked_for_what_is_not_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine serves reads, writes and flushes; the rest, and what is wrong, reaches the model's own code and no copy of it."""
    device = ModelDevice(make_model("blk", {"size": "1M", "serial": "asked"}), "disk")
    asked = []
    serve = BlkModel._serve
    monkeypatch.setattr(BlkModel, "_serve", lambda self, chain: asked.append(chain.readable) or serve(self, chain))
    try:
        with Device(device.open()) as opened, BlkDriver(opened) as disk:
            disk.write(0, b"x" * 8192)
            assert disk.read(4096, 512) == b"x" * 512
            disk.flush()
            assert asked == []
            assert disk.get_id() == "asked"
            disk.discard(0, 4096)
            assert disk.read(0, 512) == bytes(512)
            disk.write_zeroes(4096, 4096)
            with pytest.raises(OSError):
                disk.read(MIB, 512, unchecked=True)
            assert len(asked) == 4
    finally:
        device.close()


def test_loop_says_what_is_wrong() -> None:
    gate = Gate()
    with gate:
        loop = Loop(gate)
    for wrong in ({"medium": "paper"}, {"depth": 3}, {"align": 5}, {"block": 7}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            BlkEngine(0, -1, 8, **wrong)  # type: ignore[arg-type]
    engine = BlkEngine(4, -1, 8, medium="null", thread=1)
    assert (engine.served, engine.thread, engine.in_flight, engine.capacity, engine.failure) == (range(4, 5), 1, 0, 8, 0)
    with gate, gate:  # it is recursive
        loop.close()
    assert loop.run() is None
    with gate:
        loop.free()
        loop.free()
