# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Our drivers on stock back-ends: DPDK's vhost library, libvhost-user's disk, virtiofsd, vhost-user-gpu; every byte checked."""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.backends import GPU, VIRTIOFSD, backend, display, net_vhost
from tests.support.seen import Seen
from vdpa_bridge import Device, Target
from vdpa_bridge.cli import main
from vdpa_bridge.drivers import BlkDriver, FsDriver, GenericDriver, NetDriver
from vdpa_bridge.drivers.base import RING_FEATURES
from vdpa_bridge.errors import DeviceBroken
from vdpa_bridge.flags import Feature
from vdpa_bridge.load import BlkWork, Timing, load_blk
from vdpa_bridge.quirks import CONTROL_QUEUE
from vdpa_bridge.vhost_user.server import Server
from vdpa_bridge.virtio.features import NetFeature

pytestmark = pytest.mark.peers

PACKED = RING_FEATURES | Feature.RING_PACKED


def needs(program: str, group: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not shutil.which(program), reason=f"needs {program}: run tools/setup {group}")


def opened(path: Path, kind: str, more: str = "") -> Device:
    return Device(Target.parse(f"vhost-user:{path}?type={kind}{more}").open())


# DPDK ------------------------------------------------------------------------------------------------------------------------


def frames(count: int, seed: int) -> list[bytes]:
    rng = random.Random(seed)
    return [b"\2\0\0\0\0\1" + b"\2\0\0\0\0\2" + b"\x88\xb5" + rng.randbytes(46 + at * 7) for at in range(count)]


@needs("dpdk-testpmd", "dpdk")
@pytest.mark.parametrize("rings", ["split", "packed"])
@pytest.mark.parametrize("order", [(), ("in order",)], ids=["any", "in-order"])
def test_dpdk_frames(short_dir: Path, rings: str, order: tuple[str, ...], seen: Seen) -> None:
    """Frames come back with their addresses swapped and otherwise byte for byte, and do so again for the next driver."""
    path, features = short_dir / "s", (PACKED if rings == "packed" else RING_FEATURES) | Feature.IN_ORDER * bool(order)
    with backend(net_vhost(path, mode="macswap"), path), opened(path, "net") as device:
        for seed in range(2):
            with NetDriver(device, ring_features=features) as nic:
                assert nic.features & features == features
                sent = frames(200, seed)
                nic.send_many(sent)
                assert nic.receive_many(200) == [frame[6:12] + frame[:6] + frame[12:] for frame in sent]
                nic.restart()
                nic.send_many(sent)
                assert len(nic.receive_many(200)) == 200
    seen("devices", "net", "net", "dpdk-testpmd", rings, "restart", "legacy", *order)


@needs("dpdk-testpmd", "dpdk")
@pytest.mark.parametrize(("rings", "options"), [("split", ""), ("packed", ",iommu-support=1")])
def test_dpdk_queue_pairs(short_dir: Path, rings: str, options: str, seen: Seen) -> None:
    """Each pair has its own loop. That DPDK offers to ask for addresses changes nothing, as we do not take it up."""
    path = short_dir / "s"
    features = PACKED if rings == "packed" else RING_FEATURES
    with (
        backend(net_vhost(path, queues=3, options=options), path),
        opened(path, "net") as device,
        NetDriver(device, pairs=3, ring_features=features) as nic,
    ):
        for pair in range(3):
            nic.send_many(frames(50, pair), pair=pair)
        assert [nic.receive_many(50, pair=pair) for pair in range(3)] == [frames(50, pair) for pair in range(3)]
    seen("devices", "net", "net", "dpdk-testpmd", rings, "multi-queue", "legacy")


@needs("dpdk-testpmd", "dpdk")
def test_dpdk_has_no_control_queue(short_dir: Path) -> None:
    """It offers one to whom it takes for a VMM; a driver that believed it would wait for answers."""
    path = short_dir / "s"
    with backend(net_vhost(path), path), opened(path, "net") as device:
        assert CONTROL_QUEUE.name in str(device.backend.facts()["quirks"])
        assert not device.get_features() & NetFeature.CTRL_VQ
        assert device.identify().config_size == 0
        with NetDriver(device) as nic, pytest.raises(OSError, match="CTRL_MAC_ADDR is not among the features") as refused:
            nic.set_mac("02:00:00:00:00:09")
        assert refused.value.errno == errno.EOPNOTSUPP


# libvhost-user ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vb", dir="/dev/shm") as name:
        yield Path(name)


@pytest.mark.skipif("VDPA_BRIDGE_VHOST_USER_BLK" not in os.environ, reason='no $VDPA_BRIDGE_VHOST_USER_BLK: run eval "$(tools/setup newer)"')
@pytest.mark.parametrize("poll", [False, True], ids=["event", "poll"])
def test_libvhost_user_disk(short_dir: Path, memory_dir: Path, poll: bool, seen: Seen) -> None:
    """It opens its file with O_DIRECT, which elsewhere than on tmpfs would want aligned buffers, and does not say so."""
    path, image, size = short_dir / "s", memory_dir / "disk", 8 << 20
    content = bytearray(random.Random(3).randbytes(size))
    image.write_bytes(content)
    command = [os.environ["VDPA_BRIDGE_VHOST_USER_BLK"], "--socket-path", str(path), "--blk-file", str(image)]
    with backend(command, path), opened(path, "blk") as device, BlkDriver(device) as disk:
        assert disk.info.size == size
        assert disk.read(0, 1 << 16) == content[: 1 << 16]
        content[1 << 20 : 2 << 20] = random.Random(4).randbytes(1 << 20)
        disk.write(1 << 20, bytes(content[1 << 20 : 2 << 20]))
        disk.flush()
        work = BlkWork(Timing(duration=0, count=2000, poll=poll), reads=50, verify=True, offset=4 << 20, length=2 << 20)
        result = load_blk(disk, work)
        assert result.reads.count + result.writes.count == 2000
        assert min(result.compared, result.read_back) > 0
    after = image.read_bytes()
    assert after[: 4 << 20] == content[: 4 << 20]
    assert after[6 << 20 :] == content[6 << 20 :], "beyond the range"
    seen("devices", "blk", "blk", "libvhost-user", "split", "legacy")


# virtiofsd -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shared(short_dir: Path) -> Iterator[tuple[Path, Path]]:
    """The socket of a virtiofsd, and the directory that it shares."""
    if os.geteuid():
        pytest.skip("needs root, which virtiofsd wants")
    directory, path = short_dir / "d", short_dir / "s"
    directory.mkdir()
    command = [VIRTIOFSD, f"--socket-path={path}", "-o", f"source={directory},sandbox=chroot,cache=none"]
    with backend(command, path):
        yield path, directory


@needs(VIRTIOFSD, "backends")
def test_virtiofsd(shared: tuple[Path, Path], seen: Seen) -> None:
    path, directory = shared
    content = random.Random(7).randbytes((1 << 20) + 12345)
    (directory / "sub").mkdir()
    (directory / "sub" / "file").write_bytes(content)
    (directory / "empty").touch()
    (directory / "link").symlink_to("sub/file")
    names = {f"{'long' * 40}-{number}" for number in range(900)}
    (directory / "many").mkdir()
    for name in names:
        (directory / "many" / name).touch()
    with opened(path, "fs") as device, FsDriver(device) as fs:
        for _ in range(2):
            assert fs.version[0] == 7
            assert b"".join(fs.read("/sub/file")) == content
            assert b"".join(fs.read("empty")) == b""
            assert set(fs.list("/")) == {"sub", "empty", "link", "many"}
            assert set(fs.list("many")) == names, "more than one answer holds"
            there = (directory / "sub" / "file").stat()
            found = fs.stat("sub/file")
            assert (found.inode, found.size, found.mode, found.mtime) == (there.st_ino, len(content), there.st_mode, there.st_mtime)
            assert stat.S_ISDIR(fs.stat("/").mode)
            assert fs.readlink("link") == "sub/file"
            for call, number in ((lambda: fs.stat("sub/no"), errno.ENOENT), (lambda: list(fs.read("sub")), errno.EISDIR), (lambda: fs.list("empty"), errno.ENOTDIR)):
                with pytest.raises(OSError, match="request") as refused:
                    call()  # type: ignore[no-untyped-call]
                assert refused.value.errno == number
            with pytest.raises(ValueError, match=r"'\.\.' is not a name"):
                fs.stat("sub/../sub")
            fs.restart()
    seen("devices", "fs", "fs", "virtiofsd", "split", "restart", "legacy")


@needs(VIRTIOFSD, "backends")
def test_vdpa_mode_before_virtiofsd(shared: tuple[Path, Path], short_dir: Path, seen: Seen) -> None:
    """A server of ours between: its client asks what the device is, and suspends it, in words that virtiofsd does not know."""
    path, directory = shared
    content = random.Random(8).randbytes(1 << 20)
    (directory / "file").write_bytes(content)
    target = Target.parse(f"vhost-user:{path}?type=fs")
    with Server(target.open, f"{short_dir}/front"), opened(short_dir / "front", "fs", "&vdpa=require") as device, FsDriver(device) as fs:
        for _ in range(2):
            assert fs.list("/") == {"file": stat.S_IFREG >> 12}
            assert b"".join(fs.read("file")) == content
            fs.suspend()
            fs.resume()
            assert fs.stat("file").size == len(content)
            fs.restart()
    seen("clients", "vdpa_bridge", "fs", "virtiofsd", "split", "restart", "pause", "vDPA mode")


@needs(VIRTIOFSD, "backends")
def test_virtiofsd_from_the_shell(shared: tuple[Path, Path]) -> None:
    path, directory = shared
    (directory / "file").write_bytes(b"content\n")
    result = CliRunner().invoke(main, ["fs", f"vhost-user:{path}?type=fs", "cat", "file"])
    assert (result.exit_code, result.stdout) == (0, "content\n"), result.output


# vhost-user-gpu ----------------------------------------------------------------------------------------------------------------

GET_DISPLAY_INFO, RESOURCE_CREATE_2D, OK_NODATA, OK_DISPLAY_INFO, ERR_INVALID_RESOURCE_ID = 0x100, 0x101, 0x1100, 0x1101, 0x1203


def command(kind: int, *words: int) -> bytes:
    return struct.pack("<IIQII", kind, 0, 0, 0, 0) + struct.pack(f"<{len(words)}I", *words)


@needs(GPU, "backends")
def test_gpu(short_dir: Path, seen: Seen) -> None:
    """The driver for any type: the control queue answers commands, that about displays with what ours is."""
    path = short_dir / "s"
    with backend([GPU, f"--socket-path={path}"], path), opened(path, "gpu") as device, display(device, 1234, 567), GenericDriver(device) as gpu:
        assert gpu.info["device"] == "gpu"
        assert gpu.info["queues"] == 2
        answer = gpu.ask(0, [command(GET_DISPLAY_INFO)], 24 + 16 * 24)
        assert struct.unpack_from("<I", answer)[0] == OK_DISPLAY_INFO
        assert struct.unpack_from("<6I", answer, 24) == (0, 0, 1234, 567, 1, 0)
        for turn, expected in enumerate([OK_NODATA, ERR_INVALID_RESOURCE_ID]):
            answer = gpu.ask(0, [command(RESOURCE_CREATE_2D, 1, 1, 64, 64)], 24)
            assert struct.unpack_from("<I", answer)[0] == expected, f"resource 1 made for time {turn + 1}"
    seen("devices", "any type", "gpu", "vhost-user-gpu", "split", "legacy")


@needs(GPU, "backends")
def test_gpu_of_the_wrong_type(short_dir: Path) -> None:
    """A back-end that is not what the target says fails in its own words, within its time."""
    path = short_dir / "s"
    with (
        backend([GPU, f"--socket-path={path}"], path),
        opened(path, "fs", "&timeout=1") as device,
        pytest.raises((DeviceBroken, TimeoutError), match=str(path)),
    ):
        FsDriver(device, timeout=1)
