# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Stopping and going on: reset in the middle of work, suspend and resume, close and open."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

from ... import ops
from ...drivers import BlkDriver, Driver, NetDriver
from ...wire import VringState
from ..record import Run
from .traffic import borrowed, check_traffic, echo, frame, pattern, same

Work = Callable[[], bytes]
"""Takes one entry of a queue."""

_TIMES = 5
_REQUESTS = 3
_PAUSE = 0.05
"""Seconds in which a suspended device must not touch a request."""
_READ = struct.pack("<IIQ", 0, 0, 0)
"""Read sector 0 (virtio 1.2, 5.2.6)."""


def restart(run: Run) -> None:
    """With the driver of the device type."""
    if run.is_blk:
        with run.must("bring up", "disk", lambda: BlkDriver(run.device)) as disk, borrowed(run, disk):
            data = pattern(4096, 11)
            run.step("write", "4 KiB", lambda: disk.write(0, data))
            _cycle(run, disk, lambda: disk.read(0, 4096), data)
            _suspend(run, disk, 0, lambda: disk.read(0, 4096), data, ([_READ], [4096, 1]))
    elif run.is_net:
        with run.must("bring up", "nic", lambda: NetDriver(run.device)) as nic:
            sent = frame(nic, 200, 11)
            _cycle(run, nic, lambda: echo(run, nic, sent), sent if run.place.loops else b"")
            _suspend(run, nic, 1, lambda: echo(run, nic, sent), sent if run.place.loops else b"", ([bytes(nic.header) + sent], []))
    else:
        with run.must("bring up", "all queues", lambda: Driver(run.device)) as driver:
            _cycle(run, driver, lambda: b"", b"")
    run.open("again")
    check_traffic(run, "opened again")


def _cycle(run: Run, driver: Driver, work: Work, expected: bytes) -> None:
    """*work* must give *expected*, each time."""
    run.step("restart", "and work", lambda: _restarted(driver, work), show=lambda got: same(got, expected))
    run.step(
        "restart",
        f"{_TIMES} times",
        lambda: b"".join(_restarted(driver, work) for _ in range(_TIMES)),
        show=lambda got: same(got, expected * _TIMES),
    )


def _suspend(run: Run, driver: Driver, queue: int, work: Work, expected: bytes, chain: tuple[list[bytes], list[int]]) -> None:
    """Also with *chain*, which any such device takes, posted meanwhile."""
    if not driver.device.can_suspend:
        for operation, case in (
            ("restart", f"and work {_REQUESTS} times"),
            ("SUSPEND", "while running"),
            ("GET_VRING_BASE", "while suspended"),
            ("GET_STATUS", "while suspended"),
            ("RESUME", "while suspended"),
            ("resume", "and work"),
            ("resume", "with a request waiting"),
        ):
            run.not_offered(operation, case, "back-end features SUSPEND and RESUME are not offered")
        return
    run.must("restart", f"and work {_REQUESTS} times", lambda: _restarted(driver, lambda: b"".join(work() for _ in range(_REQUESTS))))
    run.op(ops.SUSPEND, "while running")
    run.op(ops.GET_VRING_BASE, "while suspended", VringState(queue, 0), show=lambda reply: f"base {reply.num}")
    run.op(ops.GET_STATUS, "while suspended", show=lambda reply: f"{reply.value:#04x}")
    run.op(ops.RESUME, "while suspended")
    run.step("resume", "and work", work, show=lambda got: same(got, expected))
    run.step("resume", "with a request waiting", lambda: _kept(driver, queue, *chain), show=lambda text: text)


def _restarted(driver: Driver, work: Work) -> bytes:
    driver.restart()
    return work()


def _kept(driver: Driver, queue: int, readable: list[bytes], writable: list[int]) -> str:
    """When a chain is served that is posted while the device is suspended."""
    driver.suspend()
    posted = driver.post(queue, readable, writable)
    time.sleep(_PAUSE)
    driver.poll()
    early = posted.written >= 0
    driver.resume()
    driver.wait(lambda: posted.written >= 0, "a chain posted while suspended")
    return "served early" if early else "served then"
