# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge net``: Ethernet frames out and in."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, BinaryIO

import click

from .common import Group, Output, Trace, common_options, opened, target_argument, target_of

if TYPE_CHECKING:
    from ..drivers import NetDriver

_ETHERTYPE = bytes.fromhex("88b5")
"""Local experimental use (IEEE 802): no host stack answers it."""
_BURST = 32
_SHORTEST = 60
"""Bytes of the shortest Ethernet frame without its checksum."""


@click.group(
    name="net",
    short_help="Send and receive Ethernet frames.",
    cls=Group,
    examples="""
vdpa-bridge net /dev/vhost-vdpa-1 info
vdpa-bridge net model:net loop --count 1000
vdpa-bridge net 'vhost-user:/run/net.sock?type=net' send ffffffffffff02000000000188b5cafe
vdpa-bridge net /dev/vhost-vdpa-1 recv --count 10 --timeout 30 --json
vdpa-bridge net /dev/vhost-vdpa-1 tap tap0 --up
""",
)
@target_argument
def command(target: str) -> None:
    """Send and receive Ethernet frames on the network device TARGET."""


@contextmanager
def _nic(ctx: click.Context, trace: Trace, pairs: int = 1) -> Iterator[NetDriver]:
    from ..drivers import NetDriver

    with opened(target_of(ctx), trace) as device, NetDriver(device, pairs=pairs) as nic:
        yield nic


@command.command()
@common_options
@click.pass_context
def info(ctx: click.Context, output: Output, trace: Trace) -> None:
    """Show address, MTU, link and features."""
    with _nic(ctx, trace) as nic:
        facts = {"target": nic.name, **nic.info}

    def text() -> None:
        for key, value in facts.items():
            click.echo(f"{key.replace('_', ' '):10}{' '.join(value) if isinstance(value, list) else value}")

    output.emit(facts, text)


def _frame(ctx: click.Context, param: click.Parameter, value: str | None) -> bytes | None:
    try:
        return None if value is None else bytes.fromhex(value.replace(":", ""))
    except ValueError:
        raise click.BadParameter("a frame is hex digits, from the destination address on") from None


@command.command()
@click.argument("frame", required=False, callback=_frame, metavar="HEX")
@click.option("--file", "file", type=click.File("rb"), metavar="FILE", help="Take the bytes of the frame from a file (- for stdin).")
@click.option("--count", type=click.IntRange(1, 1 << 20), default=1, show_default=True, help="How often.")
@common_options
@click.pass_context
def send(ctx: click.Context, frame: bytes | None, file: BinaryIO | None, count: int, output: Output, trace: Trace) -> None:
    """Send a frame, given from its destination address on, without virtio_net_hdr and checksum."""
    if (frame is None) == (file is None):
        raise click.UsageError("a frame is given as HEX or by --file")
    data = frame if frame is not None else file.read() if file is not None else b""
    with _nic(ctx, trace) as nic:
        nic.send_many([data] * count)
    output.emit({"frames": count, "length": len(data)}, lambda: click.echo(f"{count} frame{'s' * (count != 1)} of {len(data)} bytes sent"))


@command.command()
@click.option("--count", type=click.IntRange(1, 1 << 20), default=1, show_default=True, help="How many frames to wait for.")
@click.option("--timeout", type=click.FloatRange(0), default=5.0, show_default=True, help="Seconds to wait for each.")
@common_options
@click.pass_context
def recv(ctx: click.Context, count: int, timeout: float, output: Output, trace: Trace) -> int:
    """Print frames as they come in, one line of hex each. Exit status 1 when fewer come than wanted."""
    came = 0
    with _nic(ctx, trace) as nic:
        while came < count:
            try:
                frame = nic.receive(timeout)
            except TimeoutError as error:
                click.echo(f"error: {error.strerror or error}: {came} of {count} frames came", err=True)
                return 1
            came += 1
            output.event(frame.hex(), frame=frame.hex(), length=len(frame))
    return 0


@command.command()
@click.argument("name")
@click.option("--up", is_flag=True, help="Bring the interface up.")
@common_options
@click.pass_context
def tap(ctx: click.Context, name: str, up: bool, output: Output, trace: Trace) -> int:
    """Make the device an interface of this system: a tap called NAME, with the device's address and MTU, until SIGTERM or SIGINT.

    It is made if it is not there (CAP_NET_ADMIN), and goes at the end unless it was made to persist. A line on stdout says that
    frames pass; a service manager is told as well (NOTIFY_SOCKET).
    """
    from ..drivers.tap import TapDriver
    from ..service.manager import Notifier
    from ..service.service import STOP, Signals
    from ..tap import Tap

    notifier = Notifier()
    with Signals() as signals, Tap(name) as interface, opened(target_of(ctx), trace) as device, TapDriver(device, interface) as nic:
        if up:
            interface.set_up()
        facts = {"interface": name, "target": nic.name, "mac": nic.mac, "mtu": nic.mtu}
        output.event(f"{name} is {nic.name} (mac {nic.mac or 'of its own'}, mtu {nic.mtu})", event="ready", **facts)
        notifier.send("READY=1")
        nic.forward(signals.fileno())
        while (got := signals.wait()) and got not in STOP:
            nic.forward(signals.fileno())
        counts = {way: asdict(tally) for way, tally in (("sent", nic.sent), ("received", nic.came))}
        text = ", ".join(f"{way} {n['frames']} frames of {n['bytes']} bytes and dropped {n['dropped']}" for way, n in counts.items())
        why = f"stopped by {signal.Signals(got).name}" if got else "stopped because a thread died"
        output.event(f"{why}: {text}", event="stopped", **counts)
        notifier.close()
    return 0 if got else 1


@command.command()
@click.option("--count", type=click.IntRange(1, 1 << 24), default=256, show_default=True, help="Frames to send.")
@click.option("--size", type=click.IntRange(_SHORTEST, 65535), help="Bytes of each.  [default: from 60 to the largest]")
@click.option("--pairs", type=click.IntRange(1, 127), default=1, show_default=True, help="Queue pairs; bursts go over each in turn.")
@click.option("--timeout", type=click.FloatRange(0), default=5.0, show_default=True, help="Seconds to wait for a burst.")
@common_options
@click.pass_context
def loop(ctx: click.Context, count: int, size: int | None, pairs: int, timeout: float, output: Output, trace: Trace) -> int:
    """Test a device that loops broadcasts back (vdpa_sim_net, model:net): every frame must return as it was sent, on the queue pair
    it was sent over."""
    with _nic(ctx, trace, pairs) as nic:
        largest = nic.mtu + 14
        if size is not None and size > largest:
            raise ValueError(f"--size {size}: {nic.name} takes frames of up to {largest} bytes")
        start, octets, wrong, missing = time.perf_counter(), 0, 0, 0
        for first in range(0, count, _BURST):
            burst = [
                _test_frame(nic, size or _SHORTEST + (at * 97) % (largest - _SHORTEST + 1))
                for at in range(first, min(count, first + _BURST))
            ]
            pair = first // _BURST % pairs
            nic.send_many(burst, timeout, pair)
            back = nic.receive_many(len(burst), timeout, pair)
            octets += sum(map(len, back))
            wrong += sum(got != sent for got, sent in zip(back, burst, strict=False))
            missing += len(burst) - len(back)
            if missing:
                break  # the next bursts would wait as long, for nothing
        seconds = time.perf_counter() - start
    facts = {"frames": count, "missing": missing, "wrong": wrong, "bytes": octets, "seconds": round(seconds, 6)}
    ended = "all came back" if not missing and not wrong else f"{missing} did not come back, {wrong} came back wrong"
    output.emit(facts, lambda: click.echo(f"{count} frames, {octets} bytes, {seconds:.3f} s: {ended}"))
    if missing == min(count, _BURST) and not octets:
        click.echo("error: nothing came back: is this a device that loops (vdpa_sim_net, model:net)?", err=True)
    return int(bool(missing or wrong))


def _test_frame(nic: NetDriver, size: int) -> bytes:
    source = bytes.fromhex(nic.mac.replace(":", "")) if nic.mac else bytes.fromhex("020000000001")
    return b"\xff" * 6 + source + _ETHERTYPE + os.urandom(size - 14)
