# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A QEMU guest for one shell script: boots in 3 s under TCG, returns its output and status.

Rule: a guest is one QEMU process in its own session with one temporary directory; both are
gone when `Guest.close` returns, on every path, and every wait has a deadline. The guest's root
is an initial RAM disk (busybox and the virtio and vDPA modules of the kernel kit that
kernel/build makes), so a test can boot it with any device it wants to try as a client::

    result = run_guest(
        "dd if=/dev/vda bs=512 count=1 | md5sum",
        modules=["virtio_blk"],
        qemu_args=[
            *("-chardev", f"socket,id=c0,path={path}"),
            *("-device", "vhost-user-blk-pci,chardev=c0"),
        ],
    )

The guest's RAM is a shared memfd, as vhost-user needs. CPUs are emulated (TCG), so it
runs anywhere; $VDPA_BRIDGE_ACCEL names another QEMU accelerator, such as kvm, and
$VDPA_BRIDGE_QEMU another QEMU.
"""

from __future__ import annotations

import contextlib
import lzma
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

REPO = Path(__file__).resolve().parents[2]
QEMU = os.environ.get("VDPA_BRIDGE_QEMU", "qemu-system-x86_64")
GRACE = 10.0
"""Seconds between the script's end and QEMU's own exit before it is killed."""

Sink = Callable[[bytes], object]


class GuestError(RuntimeError):
    """The guest could not start, or ended without reporting the script's status."""


class GuestTimeout(GuestError, TimeoutError):
    """The deadline passed before the script's status arrived; the guest has been killed."""


@dataclass(frozen=True)
class GuestResult:
    """What a script did: its exit status, what it printed, and the seconds from start to end."""

    status: int
    output: str
    """Standard output."""
    errors: str
    """Standard error."""
    log: str
    """The console: kernel messages; if the status is not 0, the tail of dmesg too."""
    seconds: float


def kernel_kit() -> Path:
    """The directory with `vmlinuz`, `initrd`, `modules` and `release`; made first if it is missing.

    Takes $VDPA_BRIDGE_KERNEL_DIR if set, else asks `tools/setup kernel`.

    Raises:
        GuestError: the kit cannot be made here; the text says why.
    """
    return Path(_place("VDPA_BRIDGE_KERNEL_DIR", "kernel"))


def kit_modules(name: str) -> dict[str, bytes]:
    """A module that the initial RAM disk has not, with all that it needs: files for a guest's root, to be given to insmod in this order."""
    kit = kernel_kit()
    command = ["modprobe", "-d", str(kit / "root"), "-S", (kit / "release").read_text().strip(), "--show-depends", name]
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True)
    sources = [Path(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("insmod ")]
    return {source.name.partition(".")[0] + ".ko": lzma.decompress(source.read_bytes()) if source.suffix == ".xz" else source.read_bytes() for source in sources}


def newer_qemu() -> str:
    """A QEMU newer than the release's, where that is an old one, for what is wrong there; unpacked first if it is missing.

    Takes $VDPA_BRIDGE_NEWER_QEMU if set, else asks `tools/setup newer`.

    Raises:
        GuestError: there is none; the text says why.
    """
    return _place("VDPA_BRIDGE_NEWER_QEMU", "newer")


def _place(variable: str, group: str) -> str:
    """What `tools/setup GROUP` says in a variable, unless the environment has it."""
    if named := os.environ.get(variable):
        return named
    done = subprocess.run([str(REPO / "tools" / "setup"), group], capture_output=True, text=True, check=False)
    if done.returncode:
        raise GuestError(f"tools/setup {group} failed:\n{done.stderr.strip()}")
    return dict(word.split("=", 1) for word in shlex.split(done.stdout) if "=" in word)[variable]


def quoted(value: str | Path) -> str:
    """A value inside a QEMU option, where a comma separates and two stand for one."""
    return str(value).replace(",", ",,")


def cpio_newc(files: Mapping[str, bytes]) -> bytes:
    """An uncompressed "newc" archive of executable files, named relative to the guest's root.

    The kernel unpacks concatenated archives in order, so this one is appended to the kit's.
    Layout: kernel Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    archive = bytearray()
    for inode, (name, data) in enumerate([*files.items(), ("TRAILER!!!", b"")], start=1):
        path = name.encode() + b"\0"
        mode = 0 if name == "TRAILER!!!" else 0o100755
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        archive += b"070701" + b"".join(b"%08x" % field for field in fields) + path
        archive += bytes(-len(archive) % 4)
        archive += data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


class Guest:
    """A running guest, and a context manager. `wait` for its end, `wait_output` for a word of it.

    Args:
        script: busybox sh text, run as the guest's only program with stdin at /dev/null.
        modules: kernel modules to load before it, with what they depend on.
        qemu_args: further QEMU arguments: devices, chardevs, objects.
        append: further kernel command line words; KEY=VALUE words reach the script as environment.
        files: further files of the guest's root, by name.
        memory: RAM in MiB. cpus: number of virtual CPUs.
        kit: the kernel kit; default `kernel_kit()`.
        qemu: the program; default the installed one.
        out, err: called with what the script prints, as it arrives (while somebody waits).

    Raises:
        GuestError: QEMU is not there or did not start.
    """

    def __init__(
        self,
        script: str,
        *,
        modules: Sequence[str] = (),
        qemu_args: Sequence[str] = (),
        append: str = "",
        files: Mapping[str, bytes] | None = None,
        memory: int = 512,
        cpus: int = 1,
        kit: Path | None = None,
        qemu: str = QEMU,
        out: Sink | None = None,
        err: Sink | None = None,
    ) -> None:
        if shutil.which(qemu) is None:
            raise GuestError(f"{qemu} is not installed: run tools/setup peers")
        kit = kit or kernel_kit()
        if not (kit / "initrd").is_file():
            raise GuestError(f"{kit} is not a kernel kit as kernel/build makes it: no initrd")
        self._directory = tempfile.TemporaryDirectory(prefix="guest-")
        self._process: subprocess.Popen[bytes] | None = None
        self._streams = {"out": bytearray(), "err": bytearray()}
        self._sinks = {"out": out, "err": err}
        self._started = time.monotonic()
        try:
            directory = Path(self._directory.name)
            initrd = directory / "initrd"
            own = {"payload": script.encode(), **(files or {})}
            base = (kit / "initrd").read_bytes()
            initrd.write_bytes(base + bytes(-len(base) % 4) + cpio_newc(own))
            words = "console=ttyS0 panic=-1 quiet mitigations=off"
            words += f" modules={','.join(modules)} {append}"
            command = [qemu, *_machine(memory, cpus), "-kernel", str(kit / "vmlinuz")]
            command += ["-initrd", str(initrd), "-append", words.strip()]
            command += ["-device", "virtio-serial-pci,id=guest-ports"]
            for name in ("log", "out", "err", "status"):
                command += ["-chardev", f"file,id=guest-{name},path={quoted(directory / name)}"]
                port = f"virtserialport,bus=guest-ports.0,chardev=guest-{name},name={name}"
                command += ["-serial", "chardev:guest-log"] if name == "log" else ["-device", port]
            self._process = self._start([*command, *qemu_args], directory / "qemu")
        except BaseException:
            self._directory.cleanup()
            raise

    @staticmethod
    def _start(command: list[str], errors: Path) -> subprocess.Popen[bytes]:
        # QEMU must not outlive us, whatever ends us: the kernel kills it when its parent dies.
        setpriv = shutil.which("setpriv")
        prefix = [setpriv, "--pdeathsig", "KILL"] if setpriv else []
        with errors.open("wb") as stderr:
            return subprocess.Popen(
                prefix + command,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        if self._process is None:
            raise ValueError("the guest is closed")
        return self._process.pid

    @property
    def output(self) -> str:
        """The script's standard output so far."""
        self._pump()
        return self._streams["out"].decode(errors="replace")

    @property
    def log(self) -> str:
        """The console and QEMU's own messages so far."""
        return (self._read("qemu") + self._read("log")).decode(errors="replace")

    def _read(self, name: str, offset: int = 0) -> bytes:
        try:
            with (Path(self._directory.name) / name).open("rb") as file:
                file.seek(offset)
                return file.read()
        except FileNotFoundError:
            return b""

    def _pump(self) -> None:
        for name, stream in self._streams.items():
            fresh = self._read(name, len(stream))
            stream += fresh
            sink = self._sinks[name]
            if fresh and sink is not None:
                sink(fresh)

    def wait_output(self, text: str, timeout: float = 60.0) -> None:
        """Waits until the script has printed `text` on standard output.

        Raises:
            GuestTimeout: not within `timeout` seconds.
            GuestError: the guest ended without printing it.
        """
        deadline = time.monotonic() + timeout
        while text not in self.output:
            ended = self._process is None or self._process.poll() is not None
            if ended and text not in self.output:
                raise GuestError(f"the guest ended without printing {text!r}\n{self._tail()}")
            if time.monotonic() > deadline:
                raise GuestTimeout(f"no {text!r} in {timeout:g} s\n{self._tail()}")
            time.sleep(0.02)

    def wait(self, timeout: float = 90.0) -> GuestResult:
        """Waits for the script's end, at most `timeout` seconds from now, and closes the guest.

        Raises:
            GuestTimeout: the script has not ended by then.
            GuestError: the guest ended (panic, QEMU error) without the script's status.
        """
        deadline = time.monotonic() + timeout
        try:
            process = self._process
            if process is None:
                raise ValueError("the guest is closed")
            while not (status := self._read("status")).endswith(b"\n"):
                self._pump()
                if process.poll() is not None:
                    if (status := self._read("status")).endswith(b"\n"):
                        break
                    cause = f"QEMU's exit status is {process.returncode}"
                    raise GuestError(f"the guest ended without a status; {cause}\n{self._tail()}")
                if time.monotonic() > deadline:
                    raise GuestTimeout(f"the script did not end in {timeout:g} s\n{self._tail()}")
                time.sleep(0.02)
            seconds = time.monotonic() - self._started
            # Let it power off by itself: its devices see the reset that a real shutdown makes.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            self._pump()
            errors = self._streams["err"].decode(errors="replace")
            return GuestResult(int(status), self.output, errors, self.log, seconds)
        finally:
            self.close()

    def _tail(self, lines: int = 60) -> str:
        self._pump()
        parts = {"console": self.log, "output": self.output}
        parts["errors"] = self._streams["err"].decode(errors="replace")
        return "\n".join(
            f"--- guest {name} (tail)\n" + "\n".join(text.splitlines()[-lines:]) for name, text in parts.items() if text.strip()
        )

    def close(self) -> None:
        """Kills QEMU if it still runs and removes the temporary directory. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._pump()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _machine(memory: int, cpus: int) -> list[str]:
    # One TCG thread: with several, QEMU 7.2 lets one CPU run another's half-patched jump label
    # and the kernel dies of a stray int3. Later options win, so qemu_args can say otherwise.
    # A /dev/kvm that opens may still not run a guest (nested virtualisation): it is not guessed.
    accelerator = os.environ.get("VDPA_BRIDGE_ACCEL", "tcg,thread=single")
    machine = ["-machine", "q35,memory-backend=guest-ram", "-accel", accelerator]
    machine += ["-object", f"memory-backend-memfd,id=guest-ram,size={memory}M,share=on"]
    machine += ["-cpu", "max", "-smp", str(cpus), "-m", f"{memory}M"]
    return [*machine, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]


def run_guest(
    script: str,
    *,
    modules: Sequence[str] = (),
    qemu_args: Sequence[str] = (),
    append: str = "",
    files: Mapping[str, bytes] | None = None,
    memory: int = 512,
    cpus: int = 1,
    qemu: str = QEMU,
    timeout: float = 90.0,
) -> GuestResult:
    """Boots a guest, runs `script`, returns the result; arguments and errors as for `Guest`."""
    with Guest(
        script,
        modules=modules,
        qemu_args=qemu_args,
        append=append,
        files=files,
        memory=memory,
        cpus=cpus,
        qemu=qemu,
    ) as guest:
        return guest.wait(timeout)
