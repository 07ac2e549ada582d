# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Programs for tests of many devices: a process that serves them, and clients that storm one each.

    python -m tests.support.many serve DIRECTORY COUNT    sockets DIRECTORY/0 ...; a line of JSON when ready, one at the end (of stdin)
    python -m tests.support.many storm PATH HOW           kicks, messages, stall: until it is killed

Device 0 of the first has a model that raises whenever it is to work.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Mapping

from vdpa_bridge import ops
from vdpa_bridge.backends.model import ModelDevice
from vdpa_bridge.models import BlkModel, make_model
from vdpa_bridge.models.base import Queue
from vdpa_bridge.vhost_user.framing import frame
from vdpa_bridge.vhost_user.server import Server

from .bare import STEP, Bare


class Raising(BlkModel):
    """A disk whose program is wrong."""

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        raise RuntimeError("a model's defect")

    def reset(self) -> None:
        raise RuntimeError("another one")


def resident() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def say(**facts: object) -> None:
    """A line of JSON."""
    print(json.dumps(facts), flush=True)


def serve(directory: str, count: int) -> None:
    """Serve until stdin ends; then stop."""
    logging.getLogger("vdpa_bridge").setLevel(logging.CRITICAL + 1)  # devices are broken on purpose
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    make_model("blk", {"size": "1M"}).close()
    before = resident()
    raising = Raising.from_options({"size": "1M"})
    devices = [ModelDevice(raising if n == 0 else make_model("blk", {"size": "1M"}), f"disk {n}") for n in range(count)]
    servers = [Server(device.open, f"{directory}/{n}").start() for n, device in enumerate(devices)]
    say(ready=count, per_device=(resident() - before) // count, threads=threading.active_count())
    sys.stdin.read()
    started = time.monotonic()
    for server in servers:
        server.stop()
    for device in devices:
        device.close()
    say(stopped=time.monotonic() - started, threads=threading.active_count(), sockets=len(os.listdir(directory)), served=sum(s.served for s in servers))


def storm(path: str, how: str) -> None:
    """Keep one device as busy as one client can."""
    with Bare(path, "vdpa", 60) as client:
        if how == "messages":
            client.raw.enter()
            burst = frame(ops.GET_STATUS.number) * 200
            say(storming=how)
            while True:
                client.raw.send(burst)
                for _ in range(200):
                    client.raw.reply()
        elif how == "stall":
            client.raw.enter().send(frame(ops.GET_STATUS.number)[:7])
            say(storming=how)
            time.sleep(600)
        client.bring_up().fill()
        say(storming=how)
        index = 0
        while True:
            index += STEP
            client.offer(index)
            for _ in range(1000):
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_write(client.kick, 1)


if __name__ == "__main__":
    program, *words = sys.argv[1:]
    if program == "serve":
        serve(words[0], int(words[1]))
    else:
        with contextlib.suppress(ConnectionError):  # the server ends first
            storm(words[0], words[1])
