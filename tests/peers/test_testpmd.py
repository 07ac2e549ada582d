# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""DPDK's virtio-user as a client of our net device: frames go from a file through it, are looped back, and come out byte for byte."""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.seen import Seen
from tests.support.tally import tallied
from vdpa_bridge import Feature, Target
from vdpa_bridge.backends.relay import relayed
from vdpa_bridge.models.net import NetModel
from vdpa_bridge.vhost_user.server import Server

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not shutil.which("dpdk-testpmd"), reason="needs dpdk-testpmd: run tools/setup dpdk"),
]

_FILE = struct.Struct("<IHHiIII")
_RECORD = struct.Struct("<IIII")


def write_pcap(path: Path, frames: list[bytes]) -> None:
    records = [_RECORD.pack(0, at, len(frame), len(frame)) + frame for at, frame in enumerate(frames)]
    path.write_bytes(_FILE.pack(0xA1B2C3D4, 2, 4, 0, 0, 65535, 1) + b"".join(records))


def read_pcap(path: Path) -> list[bytes]:
    data = path.read_bytes() if path.exists() else b""
    at, frames = _FILE.size, []
    while at + _RECORD.size <= len(data):
        length = _RECORD.unpack_from(data, at)[2]
        frames.append(data[at + _RECORD.size : at + _RECORD.size + length])
        at += _RECORD.size + length
    return frames


def bounce_many(socket_path: str, directory: Path, frames: Sequence[list[bytes]], options: str = "", eal: Sequence[str] = ()) -> list[list[bytes]]:
    """Send *frames*, a list for each queue pair, from pcap files into the socket's device; what comes back on each, in order.

    *options* are of the virtio-user port, *eal* of DPDK.
    """
    count, total, log = len(frames), sum(map(len, frames)), directory / "log"
    files = [(directory / f"in{at}.pcap", directory / f"out{at}.pcap") for at in range(count)]
    for (source, _), some in zip(files, frames, strict=True):
        write_pcap(source, some)
    pcap = "".join(f",rx_pcap={source}" for source, _ in files) + "".join(f",tx_pcap={sink}" for _, sink in files)
    queues = f",queues={count},cq=1" if count > 1 else ""
    command = [
        *("dpdk-testpmd", "--lcores", f"0@0,1@{min(1, (os.cpu_count() or 1) - 1)}", "--no-huge", "-m", "256", "--no-pci", "--no-telemetry", "--no-shconf"),
        *eal,
        *("--vdev", f"net_virtio_user0,path={socket_path},queue_size=256{queues}{options}", "--vdev", f"net_pcap0{pcap}"),
        *("--", "--nb-cores=1", "--forward-mode=io", "--no-flush-rx", "--auto-start", "--stats-period=1", "--total-num-mbufs=8192"),
        *(f"--rxq={count}", f"--txq={count}"),
    ]
    with log.open("wb") as output, subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as process:
        try:
            end = time.monotonic() + 45
            while time.monotonic() < end and process.poll() is None:
                if f"TX-packets: {total} " in log.read_text(errors="replace") and all(sink.exists() for _, sink in files):
                    time.sleep(1)
                    break
                time.sleep(0.2)
            assert process.poll() is None, f"testpmd ended:\n{log.read_text(errors='replace')[-3000:]}"
            process.send_signal(signal.SIGINT)
            process.wait(20)
        finally:
            process.kill()
    got = [read_pcap(sink) for _, sink in files]
    assert all(got) or not total, f"nothing came back:\n{log.read_text(errors='replace')[-3000:]}"
    return got


def bounce(socket_path: str, directory: Path, frames: list[bytes], options: str = "", eal: Sequence[str] = ()) -> list[bytes]:
    """The same over one queue pair."""
    return bounce_many(socket_path, directory, [frames], options, eal)[0]


def make_frames(seed: int, count: int) -> list[bytes]:
    """Broadcasts of growing size, no two alike."""
    rng = random.Random(seed)
    return [b"\xff" * 6 + b"\x02\0\0\0\0\x01\x88\xb5" + at.to_bytes(4, "big") + rng.randbytes(46 + 11 * at) for at in range(count)]


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The features that clients start the model with."""
    starts: list[int] = []
    start = NetModel.start

    def noted(model: NetModel, features: int) -> None:
        starts.append(features)
        start(model, features)

    monkeypatch.setattr(NetModel, "start", noted)
    return starts


@pytest.mark.parametrize("order", ["", ",in_order=0", ",vectorized=1"])
@pytest.mark.parametrize("options", ["", ",packed_vq=1", ",mrg_rxbuf=0", ",packed_vq=1,mrg_rxbuf=0"])
def test_echo_byte_for_byte(short_dir: Path, heard: Counter[str], accepted: list[int], seen: Seen, options: str, order: str) -> None:
    """In order unless it is switched off: virtio-user then looks for each receive buffer's length, and for no send buffer's id."""
    frames = make_frames(3, 100)
    target = Target.parse("model:net")
    path = str(short_dir / "s")
    with Server(target.open, path) as server:
        assert bounce(path, short_dir, frames, options + order, ["--force-max-simd-bitwidth=512"] if "vectorized" in order else []) == frames
    assert server.served == 1
    in_order = bool(accepted[-1] & Feature.IN_ORDER)
    assert in_order == ("in_order=0" not in order)
    assert heard["SET_MEM_TABLE"]
    target.close()
    seen("clients", "dpdk-testpmd", "net", "model", "packed" if "packed" in options else "split", "memory table", *["in order"] * in_order)


@pytest.mark.parametrize("options", ["", ",packed_vq=1"])
def test_echo_in_order_through_a_relay(short_dir: Path, accepted: list[int], seen: Seen, options: str) -> None:
    """The device behind the relay gives back in order, too, and our driver's end of its rings hears of batches."""
    frames = make_frames(4, 100)
    target = Target.parse("model:net")
    path = str(short_dir / "s")
    with Server(lambda: relayed(target.open()), path):
        assert bounce(path, short_dir, frames, options) == frames
    assert accepted[-1] & Feature.IN_ORDER
    target.close()
    seen("clients", "dpdk-testpmd", "net", "model", "packed" if options else "split", "in order")


@pytest.mark.parametrize(("pairs", "options"), [(2, ""), (2, ",packed_vq=1"), (4, ""), (4, ",packed_vq=1")])
def test_echo_on_every_queue_pair(short_dir: Path, seen: Seen, pairs: int, options: str) -> None:
    """What goes out over a pair comes back on it; the device has more pairs than are used, and sees nothing on those."""
    frames = [make_frames(seed, 60) for seed in range(pairs)]
    path = str(short_dir / "s")
    with tallied(f"model:net?pairs={pairs + 1}") as (opener, chains), Server(opener, path):
        assert bounce_many(path, short_dir, frames, options) == frames
    assert dict(chains) == dict.fromkeys(range(2 * pairs), 60)
    seen("clients", "dpdk-testpmd", "net", "model", "packed" if options else "split", "multi-queue")
