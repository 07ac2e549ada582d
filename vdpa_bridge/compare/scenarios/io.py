# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Requests of disks and frames of network devices, with every byte checked."""

from __future__ import annotations

import struct

from ...drivers import BlkDriver, BlkRequest, NetDriver
from ...virtio.features import BlockFeature, NetFeature
from ..record import Run
from .traffic import AREA, borrowed, came, check_traffic, echo, frame, mac_of, pattern, rewrite, same

_QUIET = 0.3
"""Seconds after which a frame is taken for dropped."""
_UNKNOWN_TYPE = 77
"""A request type that virtio does not define."""


def io(run: Run) -> None:
    """What the device type is for."""
    if run.is_blk:
        with run.must("bring up", "disk", lambda: BlkDriver(run.device)) as disk, borrowed(run, disk):
            _disk(run, disk)
    elif run.is_net:
        with run.must("bring up", "nic", lambda: NetDriver(run.device)) as nic:
            _nic(run, nic)
    else:
        check_traffic(run, "without a driver of its type")


def _disk(run: Run, disk: BlkDriver) -> None:
    sector, page, large = pattern(512, 1), pattern(4096, 2), pattern(AREA // 2, 3)
    end = disk.info.size
    run.step("write", "a sector, read back", lambda: rewrite(disk, 512, sector), show=lambda got: same(got, sector))
    run.step("write", "4 KiB, read back", lambda: rewrite(disk, 8192, page), show=lambda got: same(got, page))
    run.step("write", "512 KiB, read back", lambda: rewrite(disk, AREA // 2, large), show=lambda got: same(got, large))
    run.step("read", "64 requests in flight", lambda: _in_flight(disk, AREA // 2, 64, 4096), show=lambda got: same(got, large[: 64 * 4096]))
    run.step("read", "in odd segments", lambda: _in_pieces(disk, 16), show=lambda got: same(got, page))
    run.step("flush", "", disk.flush)
    run.step("get_id", "", disk.get_id, detail=lambda text: text)
    if disk.features & BlockFeature.WRITE_ZEROES:
        run.step("write_zeroes", "64 KiB", lambda: disk.write_zeroes(AREA // 2, 65536))
        run.step("read", "zeroes", lambda: disk.read(AREA // 2, 65536), show=lambda got: same(got, bytes(65536)))
    else:
        run.not_offered("write_zeroes", "64 KiB", "the device does not offer WRITE_ZEROES")
        run.not_offered("read", "zeroes", "the device does not offer WRITE_ZEROES")
    if disk.features & BlockFeature.DISCARD:
        run.step("discard", "64 KiB", lambda: disk.discard(AREA // 2, 65536))
    else:
        run.not_offered("discard", "64 KiB", "the device does not offer DISCARD")
    run.step("read", "beyond the end", lambda: disk.read(end, 512, unchecked=True))
    run.step("read", "across the end", lambda: disk.read(end - 512, 1024, unchecked=True))
    run.step("write", "beyond the end", lambda: disk.write(end, sector, unchecked=True))
    unknown = BlkRequest(_UNKNOWN_TYPE, length=512)
    run.step("request", "of an unknown type", lambda: _status(disk, unknown), show=_refused, detail=lambda status: f"status {status}")
    run.step("read", "after the errors", lambda: disk.read(8192, 4096), show=lambda got: same(got, page))


def _in_flight(disk: BlkDriver, offset: int, count: int, size: int) -> bytes:
    """Many reads at once, put together in the order of their places."""
    requests = [BlkRequest(0, (offset + at * size) // 512, length=size) for at in range(count)]
    done = disk.complete(disk.submit(requests))
    for request in done:
        request.check(disk.name)
    return b"".join(request.data for request in sorted(done, key=lambda request: request.sector))


def _in_pieces(disk: BlkDriver, sector: int) -> bytes:
    """One read whose header and buffers are cut where no driver cuts them (virtio 1.2, 2.7.4.1)."""
    header = struct.pack("<IIQ", 0, 0, sector)
    _, parts = disk.transact(0, [header[:5], header[5:]], [1, 2047, 2048, 1])
    if parts[-1] != b"\0":
        raise OSError(5, f"status {parts[-1][0]}")
    return b"".join(parts[:-1])


def _status(disk: BlkDriver, request: BlkRequest) -> int:
    (done,) = disk.complete(disk.submit([request]))
    return done.status


def _refused(status: int) -> str:
    """Which status is the device's affair: UNSUPP (2) is right, vdpa_sim_blk of Linux 6.12 says IOERR (1)."""
    return "refused" if status in (1, 2) else f"status {status}"


def _nic(run: Run, nic: NetDriver) -> None:
    def returns(case: str, sent: bytes) -> None:
        run.step("send", case, lambda: echo(run, nic, sent), show=lambda got: came(run, got, sent))

    for length in (60, 61, 600):
        returns(f"{length} bytes, broadcast", frame(nic, length, length))
    returns("a full MTU, broadcast", frame(nic, nic.mtu + 14, 4))
    returns("multicast", frame(nic, 100, 5, to=bytes.fromhex("01005e000001")))
    returns("to its own address", frame(nic, 100, 6, to=mac_of(nic)))
    other = frame(nic, 100, 7, to=bytes.fromhex("020000aabbcc"))
    run.step("send", "to another address", lambda: _dropped(run, nic, other), show=lambda text: text)
    burst = [frame(nic, 60 + 40 * at, 100 + at) for at in range(32)]
    run.step("send", "32 frames in a burst", lambda: _burst(run, nic, burst), show=lambda got: came(run, b"".join(got), b"".join(burst)))
    many = [frame(nic, 1000, 1000 + at) for at in range(320)]
    run.step("send", "320 frames, 10 bursts", lambda: _burst(run, nic, many), show=lambda got: came(run, b"".join(got), b"".join(many)))
    if nic.features & NetFeature.CTRL_MAC_ADDR:
        _control(run, nic)
    else:
        for case in ("and receive there", "and back"):
            run.not_offered("set_mac", case, "the device does not offer CTRL_MAC_ADDR")


def _control(run: Run, nic: NetDriver) -> None:
    """Another address, by the control queue; and the old one again."""
    before = nic.mac

    def elsewhere() -> bytes:
        nic.set_mac("02:00:00:00:77:01")
        return echo(run, nic, frame(nic, 100, 8, to=mac_of(nic)))

    run.step("set_mac", "and receive there", elsewhere, show=lambda got: came(run, got[:6], bytes.fromhex("020000007701")))
    run.step("set_mac", "and back", lambda: nic.set_mac(before))


def _dropped(run: Run, nic: NetDriver, sent: bytes) -> str:
    nic.send(sent)
    if not run.place.loops:
        return "sent"
    return "came back" if nic.receive_many(1, _QUIET) else "dropped"


def _burst(run: Run, nic: NetDriver, frames: list[bytes]) -> list[bytes]:
    """Frames that come back, in bursts that fit the receive queue of any device."""
    back: list[bytes] = []
    for at in range(0, len(frames), 32):
        part = frames[at : at + 32]
        nic.send_many(part)
        if run.place.loops:
            back += nic.receive_many(len(part))
    return back
