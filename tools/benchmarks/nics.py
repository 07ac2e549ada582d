# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""NICs for ``tools/bench data``: frames of 64 bytes between DPDK's virtio-user and ours or DPDK's vhost port; our driver next to
virtio-user on DPDK's vhost port.

Both sides poll, the back-end on the first CPU, the client on the second. What testpmd does is counted by its own reports, a second
each, of which the first one is not counted. An echo has as many frames under way as testpmd begins with.
"""

from __future__ import annotations

import re
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from disks import directory, serve
from drive import BURST, FRAME, RING, on_cpu, testpmd
from quiet import used
from rows import OURS, Meter, Row, Sample, Servers, Span, Work

from vdpa_bridge import Feature, connect
from vdpa_bridge.drivers import NetDriver
from vdpa_bridge.drivers.base import RING_FEATURES
from vdpa_bridge.load import Mode, NetWork, Timing, load_net

TESTPMD = "dpdk-testpmd"
MOST = 3
"""Turns: testpmd takes seconds to start."""
FLIGHT = 256
"""Frames that testpmd sends at once in an echo, and so those that are under way."""
FLOWS = {"client sends": ("txonly", "sink", "rxonly", "Tx"), "client receives": ("rxonly", "source", "txonly", "Rx"), "echo": ("io", "echo", "io", "Rx")}
"""What the client does, the rule of our model that answers it, what testpmd's back-end does, and the side of the client that is counted."""
RINGS = {"split": "", "packed": ",packed_vq=1"}


def fewer(span: Span) -> Span:
    """With no more turns than programs that start slowly allow."""
    return replace(span, turns=min(span.turns, MOST))


def reported(path: Path, pid: int, cpus: tuple[int, int], span: Span, flow: str, ring: str) -> Sample:
    """Frames per second of virtio-user on a socket, in whole seconds: those of *span*, one at least."""
    mode, _, _, side = FLOWS[flow]
    more = ["--tx-first", f"--burst={FLIGHT}"] if mode == "io" else [f"--burst={BURST}"]
    command = testpmd(*cpus, f"net_virtio_user0,path={path},queue_size={RING}{RINGS[ring]}", f"--forward-mode={mode}", f"--txpkts={FRAME}", *more)
    rates: list[float] = []
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said, server = "", Meter(lambda: used(pid))
        for line in process.stdout:
            said = said[-2000:] + line
            if found := re.search(rf"{side}-pps:\s+(\d+)", line):
                rates.append(float(found[1]))
                if len(rates) == 2:
                    server = Meter(lambda: used(pid))
            if len(rates) >= 2 + max(round(span.seconds), 1):
                break
        process.terminate()
        process.stdout.read()
    if len(rates) < 3:
        raise SystemExit(f"bench: {' '.join(command)} ended early: {said}")
    return Sample(statistics.mean(rates[2:]), server=server.share())


def back_ends(span: Span, cpus: tuple[int, int], left_out: dict[str, str]) -> Iterator[Row]:
    """Our model next to DPDK's vhost port, with virtio-user as the client of both; each back-end runs while it is measured."""

    def one(name: str, flow: str, ring: str) -> Sample:
        with directory() as place, Servers(cpus[0], {}) as servers:
            path = place / "s"
            command = serve(f"model:net?rule={FLOWS[flow][1]}", path)
            if name == TESTPMD:
                command = testpmd(cpus[1], cpus[0], f"net_vhost0,iface={path}", f"--forward-mode={FLOWS[flow][2]}", f"--txpkts={FRAME}", f"--burst={BURST}")
            return reported(path, servers.start(name, command, path), cpus, span, flow, ring)

    for ring in RINGS:
        for flow in FLOWS:
            ways: dict[str, Callable[[], Sample]] = {name: partial(one, name, flow, ring) for name in (OURS, TESTPMD)}
            yield Work("net", f"NIC, 64 bytes, {flow}, {ring}", "frames/s", least=1.0).take(ways, fewer(span))


def frames(path: Path, pid: int, cpu: int, span: Span, mode: Mode, ring: str) -> Sample:
    """Frames per second of our load generator."""
    packed = Feature.RING_PACKED if ring == "packed" else 0
    with (
        on_cpu(cpu),
        connect(f"vhost-user:{path}?type=net&vdpa=off") as device,
        NetDriver(device, ring_features=RING_FEATURES | packed, required=packed, queue_size=RING) as nic,
    ):
        server = Meter(lambda: used(pid))
        result = load_net(nic, NetWork(Timing(span.seconds, span.warmup, poll=True), mode, FRAME, 2 * BURST))
        count = result.sent if mode is Mode.SEND else result.received
        return Sample(count / result.spent.seconds, result.spent.cpu / result.spent.seconds, server.share())


def drivers(span: Span, cpus: tuple[int, int], left_out: dict[str, str]) -> Iterator[Row]:
    """Our driver next to virtio-user on DPDK's vhost port."""
    for flow, mode in (("client sends", Mode.SEND), ("client receives", Mode.RECEIVE)):
        for ring in RINGS:
            with directory() as place, Servers(cpus[0], left_out) as servers:
                path = place / "s"
                command = testpmd(cpus[1], cpus[0], f"net_vhost0,iface={path}", f"--forward-mode={FLOWS[flow][2]}", f"--txpkts={FRAME}", f"--burst={BURST}")
                pid = servers.start(TESTPMD, command, path)
                ways: dict[str, Callable[[], Sample]] = {
                    OURS: partial(frames, path, pid, cpus[1], span, mode, ring),
                    "virtio-user": partial(reported, path, pid, cpus, span, flow, ring),
                }
                yield Work("drivers", f"NIC of testpmd, 64 bytes, {flow}, {ring}", "frames/s", least=1.0).take(ways, fewer(span), [pid])
