# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A guest's ext4 on a disk that the launched program serves: what processes write at once is what the guest reads when its
cache is gone, and what the host finds in a file system without a fault."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import md5
from pathlib import Path

import pytest

from tests.support.guest import QEMU, kit_modules, newer_qemu, run_guest
from tests.support.nbd import qemu_nbd
from tests.support.programs import program
from tests.support.seen import Seen

pytestmark = pytest.mark.peers

MIB = 1 << 20
SEED = random.Random("ext4").randbytes(4 * MIB)
"""What the file system begins with; writers copy parts of it."""
PAGE = 4096
WRITERS, FILES = 4, 8
ENVIRONMENT = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}

SCRIPT = """
set -e
for module in MODULES; do insmod /$module; done
until [ -b /dev/vda ]; do sleep 0.1; done
echo queues $(ls /sys/block/vda/mq | wc -l)
mkdir /mnt
mount -t ext4 /dev/vda /mnt
cd /mnt
for writer in WRITERS; do
    (
        mkdir $writer
        for file in FILES; do
            dd if=seed of=$writer/$file bs=4k skip=$((writer * 31 + file * 7)) count=$((1 + writer * file * 13)) 2>/dev/null
            [ $((file % 3)) != 0 ] || sync $writer/$file
        done
        dd if=seed of=$writer/0 bs=4k seek=3 skip=$writer count=2 conv=notrunc 2>/dev/null
        mv $writer/1 $writer/moved
        rm $writer/2
    ) &
done
wait
sync
echo 3 > /proc/sys/vm/drop_caches
md5sum seed */*
cd /
umount /mnt
"""


def expected() -> dict[str, bytes]:
    """Every file as the writers leave it."""
    files = {"seed": SEED}
    for writer in range(WRITERS):
        for file in range(FILES):
            first = (writer * 31 + file * 7) * PAGE
            files[f"{writer}/{file}"] = SEED[first : first + (1 + writer * file * 13) * PAGE]
        files[f"{writer}/0"] = files[f"{writer}/0"].ljust(3 * PAGE, b"\0") + SEED[writer * PAGE : (writer + 2) * PAGE]
        files[f"{writer}/moved"] = files.pop(f"{writer}/1")
        del files[f"{writer}/2"]
    return files


def tool(*command: str) -> str:
    """A program of e2fsprogs, which ends well."""
    done = subprocess.run(command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(("which", "ring", "queues"), [("QEMU", "split", 2), ("QEMU, newer", "packed", 1)])
def test_files_of_several_processes(short_dir: Path, seen: Seen, which: str, ring: str, queues: int) -> None:
    check_files(short_dir, which, ring, queues, lambda image: nullcontext(["--blk-file", str(image)]))
    seen("clients", which, "blk", "model", ring)


@pytest.mark.skipif(not shutil.which("qemu-nbd"), reason="needs qemu-nbd: run tools/setup peers")
def test_files_on_a_server_that_dies_and_comes_back(short_dir: Path) -> None:
    @contextmanager
    def served(image: Path) -> Iterator[list[str]]:
        over = threading.Event()

        def restart() -> None:
            with qemu_nbd(short_dir / "n", image):
                before = image.stat().st_mtime_ns
                up.set()
                while image.stat().st_mtime_ns == before and not over.wait(0.01):  # until the guest writes
                    pass
            with qemu_nbd(short_dir / "n", image):
                over.wait(120)

        up, thread = threading.Event(), threading.Thread(target=restart)
        thread.start()
        try:
            assert up.wait(20)
            yield ["--nbd", f"nbd+unix:///?socket={short_dir / 'n'}"]
        finally:
            over.set()
            thread.join(20)

    check_files(short_dir, "QEMU", "split", 2, served)


def check_files(short_dir: Path, which: str, ring: str, queues: int, options: Callable[[Path], AbstractContextManager[list[str]]]) -> None:
    image, content, back = (short_dir / name for name in ("disk", "content", "back"))
    for directory in (content, back):
        directory.mkdir()
    (content / "seed").write_bytes(SEED)
    tool("mkfs.ext4", "-q", "-d", str(content), str(image), "96M")
    modules = kit_modules("ext4")
    script = SCRIPT.replace("MODULES", " ".join(modules))
    script = script.replace("WRITERS", " ".join(map(str, range(WRITERS)))).replace("FILES", " ".join(map(str, range(FILES))))
    with options(image) as place, program("blk", "--socket-path", f"{short_dir}/s", *place, "--queues", str(queues), "-v") as server:
        server.logs("ready")
        result = run_guest(
            script,
            modules=["virtio_blk"],
            files=modules,
            cpus=queues,
            qemu_args=[
                *("-chardev", f"socket,id=c0,path={short_dir}/s"),
                *("-device", f"vhost-user-blk-pci,chardev=c0,num-queues={queues},packed={'on' if ring == 'packed' else 'off'}"),
            ],
            qemu=QEMU if which == "QEMU" else newer_qemu(),
        )
        assert "--nbd" not in place or "connected again" in server.log
        server.end()
    assert result.status == 0, result.output + result.errors + result.log + server.log
    assert f"queues {queues}\n" in result.output
    files = expected()
    sums = dict(reversed(line.split()) for line in result.output.splitlines()[1:])
    assert sums == {name: md5(data, usedforsecurity=False).hexdigest() for name, data in files.items()}
    tool("e2fsck", "-fn", str(image))
    tool("debugfs", "-R", f"rdump / {back}", str(image))
    assert {str(file.relative_to(back)): file.read_bytes() for file in back.rglob("*") if file.is_file()} == files
