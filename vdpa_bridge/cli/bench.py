# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge bench``: load for a disk or a NIC, and how it bears it.

Rule of this file: words and numbers; what is done is in ``vdpa_bridge.load``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .common import SIZE, Group, Output, Trace, common_options, human_size, opened, target_argument, timeout_option

if TYPE_CHECKING:
    from ..load import Progress, Timing

F = TypeVar("F", bound=Callable[..., Any])

_Row = tuple[int, float, float, Mapping[str, float]]
"""How many, how many a second, bytes a second, latencies."""
_LATENCIES = ("min", "mean", "p50", "p90", "p99", "p99.9", "max")


@click.group(
    name="bench",
    short_help="Put load on a disk or NIC, measure and verify.",
    cls=Group,
    examples="""
vdpa-bridge bench blk /dev/vhost-vdpa-0 --depth 64 --duration 30
vdpa-bridge bench blk 'vhost-user:/run/disk.sock?type=blk' --poll --queues 2 --json
vdpa-bridge bench blk 'vhost-user:/run/disk.sock?type=blk' --poll-for 50us --depth 1
vdpa-bridge bench blk model:blk --reads 50 --verify --count 100000
vdpa-bridge bench blk vdpa:blk0 --reads 0 --sequential --block 128K --rate 2000
vdpa-bridge bench net 'vhost-user:/run/net.sock?type=net' --poll --frame 64
vdpa-bridge bench net model:net --mode echo --pairs 2
""",
)
def command() -> None:
    """Put load on a device, wherever it lives: as fast as it goes or at a rate, with latencies and the client's CPU time.

    Each queue has a thread of its own, whose loop is native. Without --poll it sleeps until the
    device calls, with --poll-for only once nothing came for that long, or when waiting so was in vain lately.
    """


def _timing_options(function: F) -> F:
    """What blocks and frames have in common; the command gets it as *timing*."""
    options = (
        click.option("--duration", type=click.FloatRange(0), help="Seconds to measure.  [default: 10, or no limit with --count]"),
        click.option("--warmup", type=click.FloatRange(0), help="Seconds before that.  [default: 0.5, none with --count]"),
        click.option("--count", type=click.IntRange(0), default=0, metavar="N", help="End after so many.  [default: no limit]"),
        click.option("--rate", type=click.FloatRange(0), default=0.0, metavar="N", help="So many each second.  [default: as fast as it goes]"),
        click.option("--poll", is_flag=True, help="Look at the rings all the time instead of sleeping until called."),
        click.option("--poll-for", default="off", show_default=True, metavar="TIME", help="Look at them for so long before sleeping, such as 50us."),
        click.option("--packed", is_flag=True, help="Packed rings; an error where the device has none."),
        click.option("--queue-size", type=click.IntRange(2, 32768), default=256, show_default=True, help="Entries of a ring at most."),
        timeout_option,
        common_options,
    )
    for option in reversed(options):
        function = option(function)
    return function


def _timing(duration: float | None, warmup: float | None, count: int, rate: float, poll: bool, poll_for: str) -> Timing:
    from ..load import Timing
    from ..models.options import parse_duration

    if duration is None:
        duration = 0.0 if count else 10.0
    if warmup is None:
        warmup = 0.0 if count else 0.5
    return Timing(duration, warmup, count, rate, poll, parse_duration("--poll-for", poll_for) / 1e9)


def _ring(packed: bool, queue_size: int, timeout: float) -> dict[str, Any]:
    """Options of a driver."""
    from ..drivers.base import RING_FEATURES
    from ..flags import Feature

    needed = int(Feature.RING_PACKED) if packed else 0
    return {"ring_features": RING_FEATURES | needed, "required": needed, "queue_size": queue_size, "timeout": timeout}


@contextmanager
def _live(what: str) -> Iterator[Progress | None]:
    """A line on stderr that says how it goes, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from .term import ticker

    with ticker() as say:
        last = [0.0, 0]

        def tell(seconds: float, done: int) -> None:
            rate = max(done - last[1], 0) / max(seconds - last[0], 1e-9)
            last[:] = seconds, done
            say(f"{seconds:6.1f} s  {done:,} {what}  {rate:,.0f}/s")

        yield tell


@command.command()
@target_argument
@click.option("--block", type=SIZE, default="4K", show_default=True, metavar="BYTES", help="Bytes of each request.")
@click.option("--depth", type=click.IntRange(1, 32768), default=32, show_default=True, help="Requests in flight on each queue.")
@click.option("--queues", type=click.IntRange(1, 1024), default=1, show_default=True, help="Queues, each with a part of the disk.")
@click.option("--reads", type=click.IntRange(0, 100), default=100, show_default=True, metavar="PERCENT", help="The others are writes: the disk is overwritten.")
@click.option("--sequential", is_flag=True, help="One block after the other.  [default: random]")
@click.option("--offset", type=SIZE, default=0, metavar="BYTES", help="Where the range begins.  [default: 0]")
@click.option("--length", type=SIZE, metavar="BYTES", help="How long it is.  [default: to the end of the disk]")
@click.option("--verify", is_flag=True, help="Mark what is written, compare what is read, read all back at the end.")
@click.option("--seed", type=click.IntRange(0), default=0, metavar="N", help="Of places and marks.  [default: of chance]")
@_timing_options
def blk(
    target: str, block: int, depth: int, queues: int, reads: int, sequential: bool, offset: int, length: int | None, verify: bool,
    seed: int, duration: float | None, warmup: float | None, count: int, rate: float, poll: bool, poll_for: str, packed: bool, queue_size: int,
    timeout: float, output: Output, trace: Trace,
) -> None:  # fmt: skip
    """Read and write blocks of the disk TARGET.

    With less than 100 PERCENT of reads the content of the range is lost. With --verify, writes that were lost, torn, or went elsewhere
    end the run with an error that says which.
    """
    from ..drivers import BlkDriver
    from ..load import BlkWork, blk_memory, load_blk

    timing = _timing(duration, warmup, count, rate, poll, poll_for)
    work = BlkWork(timing, block, depth, reads, not sequential, offset, length, verify, seed)
    options = _ring(packed, queue_size, timeout) | {"pool_size": blk_memory(work, queues), "queues": range(queues)}
    with opened(target, trace) as device, BlkDriver(device, **options) as disk, _live("requests") as progress:
        result = load_blk(disk, work, progress)
        name = disk.name
    facts = {"target": name, "block": block, "depth": depth, "random": not sequential, "poll": poll, "poll_for": timing.poll_for, **result.facts()}

    def text() -> None:
        of = {"reads": facts["reads"], "writes": facts["writes"]}
        rows = {name: (one["requests"], one["iops"], one["iops"] * block, one["latency_us"]) for name, one in of.items()}
        _print("requests", rows)
        order = "in order" if sequential else "at random"
        _say(facts, f"{_many(queues, 'queue')} of {depth} in flight, {block} bytes {order}")
        if verify:
            click.echo(f"{facts['compared']:,} reads compared, {facts['read_back']:,} blocks read back: all as they were written")

    output.emit(facts, text)


@command.command()
@target_argument
@click.option("--mode", type=click.Choice(["send", "receive", "echo"]), default="send", show_default=True, help="Echo: send, and count what comes back.")
@click.option("--frame", type=click.IntRange(1, 65535), default=64, show_default=True, metavar="BYTES", help="Bytes of each, without checksum.")
@click.option("--batch", type=click.IntRange(1, 256), default=64, show_default=True, help="Frames shown to the device at once.")
@click.option("--pairs", type=click.IntRange(1, 127), default=1, show_default=True, help="Queue pairs.")
@click.option("--to", default="ff:ff:ff:ff:ff:ff", show_default=True, metavar="MAC", help="Where frames go.")
@click.option("--window", type=click.IntRange(0), default=0, metavar="N", help="Echo: frames out and not back at most.  [default: the receive buffers]")
@click.option("--linger", type=click.FloatRange(0, min_open=True), default=0.2, show_default=True, metavar="SECONDS", help="Echo: after which a frame is lost.")
@_timing_options
def net(
    target: str, mode: str, frame: int, batch: int, pairs: int, to: str, window: int, linger: float,
    duration: float | None, warmup: float | None, count: int, rate: float, poll: bool, poll_for: str, packed: bool, queue_size: int,
    timeout: float, output: Output, trace: Trace,
) -> None:  # fmt: skip
    """Send and receive frames through the network device TARGET.

    Frames carry a number behind an Ethernet header of type 0x88b5, by which those that come back are known.
    """
    from ..drivers import NetDriver
    from ..load import Mode, NetWork, load_net

    timing = _timing(duration, warmup, count, rate, poll, poll_for)
    work = NetWork(timing, Mode[mode.upper()], frame, batch, to, window, linger)
    options = _ring(packed, queue_size, timeout) | {"pool_size": max(4, 2 * pairs) << 20}
    with opened(target, trace) as device, NetDriver(device, pairs=pairs, **options) as nic, _live("frames") as progress:
        result = load_net(nic, work, progress)
        name = nic.name
    facts = {"target": name, "mode": mode, "frame": frame, "batch": batch, "poll": poll, "poll_for": timing.poll_for, **result.facts()}

    def text() -> None:
        sent: _Row = (facts["sent"], facts["sent_per_second"], facts["sent_bits_per_second"] / 8, {})
        received: _Row = (facts["received"], facts["received_per_second"], facts["received_bits_per_second"] / 8, facts["latency_us"])
        rows = {"send": {"sent": sent}, "receive": {"received": received}, "echo": {"sent": sent, "received": received}}
        _print("frames", rows[mode])
        _say(facts, f"{_many(pairs, 'queue pair')}, {frame} bytes, {batch} at once")
        if mode == "echo":
            share = facts["lost"] / max(facts["sent"], 1)
            click.echo(f"{facts['lost']:,} lost ({share:.4%}), {facts['reordered']:,} out of order, {facts['foreign']:,} others'")

    output.emit(facts, text)


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _print(what: str, rows: Mapping[str, _Row]) -> None:
    """A line for each kind that there was: how many, and rates; then one with its latencies."""
    from .term import print_table

    kinds = {name: row for name, row in rows.items() if row[0]} or rows
    body = [[name, f"{count:,}", f"{rate:,.0f}", f"{human_size(round(octets))}/s"] for name, (count, rate, octets, _) in kinds.items()]
    print_table(["", what, "1/s", "bytes/s"], body, right=(1, 2, 3))
    times = [[name, *(f"{latencies[key]:,.1f}" for key in _LATENCIES)] for name, (*_, latencies) in kinds.items() if latencies]
    if times:
        print_table(["microseconds", *_LATENCIES], times, right=range(1, 1 + len(_LATENCIES)))


def _say(facts: Mapping[str, Any], work: str) -> None:
    way = "polled" if facts["poll"] else f"polled for {facts['poll_for'] * 1e6:g} us, then woken by calls" if facts["poll_for"] else "woken by calls"
    click.echo(f"{facts['target']}: {work}, {way}, {facts['seconds']:.3f} s; this process used {facts['cpu']:.0%} of a CPU")
