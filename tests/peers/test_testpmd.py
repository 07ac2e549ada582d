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
from pathlib import Path

import pytest

from tests.support.seen import Seen
from vdpa_bridge import Target
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


def bounce(socket_path: str, directory: Path, frames: list[bytes], options: str = "") -> list[bytes]:
    """Send *frames* from a pcap file into the socket's device and return what comes back, in the order of arrival."""
    source, sink, log = directory / "in.pcap", directory / "out.pcap", directory / "log"
    write_pcap(source, frames)
    command = [
        *("dpdk-testpmd", "--lcores", f"0@0,1@{min(1, (os.cpu_count() or 1) - 1)}", "--no-huge", "-m", "256", "--no-pci", "--no-telemetry", "--no-shconf"),
        *("--vdev", f"net_virtio_user0,path={socket_path},queue_size=256{options}"),
        *("--vdev", f"net_pcap0,rx_pcap={source},tx_pcap={sink}"),
        *("--", "--nb-cores=1", "--forward-mode=io", "--no-flush-rx", "--auto-start", "--stats-period=1", "--total-num-mbufs=4096"),
    ]
    with log.open("wb") as output, subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as process:
        try:
            end = time.monotonic() + 45
            size = sum(map(len, frames)) + _RECORD.size * len(frames)
            while time.monotonic() < end and process.poll() is None:
                if f"TX-packets: {len(frames)} " in log.read_text(errors="replace") and sink.exists():
                    time.sleep(1)
                    break
                time.sleep(0.2)
            assert process.poll() is None, f"testpmd ended:\n{log.read_text(errors='replace')[-3000:]}"
            process.send_signal(signal.SIGINT)
            process.wait(20)
        finally:
            process.kill()
    got = read_pcap(sink)
    assert got or not size, f"nothing came back:\n{log.read_text(errors='replace')[-3000:]}"
    return got


@pytest.mark.parametrize("options", ["", ",packed_vq=1", ",mrg_rxbuf=0", ",packed_vq=1,mrg_rxbuf=0"])
def test_echo_byte_for_byte(short_dir: Path, heard: Counter[str], seen: Seen, options: str) -> None:
    rng = random.Random(3)
    frames = [b"\xff" * 6 + b"\x02\0\0\0\0\x01\x88\xb5" + at.to_bytes(4, "big") + rng.randbytes(46 + 11 * at) for at in range(100)]
    target = Target.parse("model:net")
    path = str(short_dir / "s")
    with Server(target.open, path) as server:
        assert bounce(path, short_dir, frames, options) == frames
    assert server.served == 1
    assert heard["SET_MEM_TABLE"]
    target.close()
    seen("clients", "dpdk-testpmd", "net", "model", "packed" if "packed" in options else "split", "memory table")
