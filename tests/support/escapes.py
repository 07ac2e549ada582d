# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A device whose model tries to get out: each request names an attempt, and the answer says what came of it.

Rule of this file: an attempt does the thing itself, by system calls, and undoes it if it succeeds. It is an OSError when it
fails and nothing when it succeeds, so that a run without a sandbox proves that it can.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from tests.support.misbehaviours import FOREIGN, MISBEHAVIOURS
from vdpa_bridge.models import Model, Needs, Queue

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
X86 = os.uname().machine == "x86_64"
NUMBERS = {  # x86-64, asm-generic
    "clone": (56, 220), "ptrace": (101, 117), "mount": (165, 40), "setresuid": (117, 147), "chroot": (161, 51), "unshare": (272, 97),
    "bpf": (321, 280), "perf_event_open": (298, 241), "kexec_load": (246, 104), "add_key": (248, 217), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "process_vm_readv": (310, 270), "shmget": (29, 194), "pidfd_open": (434, 434), "memfd_create": (319, 279),
    "execve": (59, 221), "prctl": (157, 167), "sethostname": (170, 161), "clone3": (435, 435), "prlimit64": (302, 261),
}
CLONE_NEWUSER, CLONE_NEWNS, CLONE_NEWNET = 0x10000000, 0x20000, 0x40000000
PTRACE_ATTACH_LIKE, PTRACE_DETACH = 0x4206, 17  # PTRACE_SEIZE stops nobody
TIOCSTI, FIOSETOWN = 0x5412, 0x8901
SO_ATTACH_FILTER = 26

Facts = Mapping[str, "str | int"]
"""What the test has made for attempts: paths, ports, processes."""


ATTEMPTS: dict[str, Callable[[Facts], None]] = {}
"""By name."""


def attempt(function: Callable[[Facts], None]) -> Callable[[Facts], None]:
    """Puts it into the table."""
    ATTEMPTS[function.__name__.removeprefix("_")] = function
    return function


def call(name: str, *arguments: object) -> int:
    """A system call; OSError when it fails."""
    number = NUMBERS[name][not X86]
    result = int(libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)))
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


@attempt
def _read_file(facts: Facts) -> None:
    Path(str(facts["secret"])).read_text()


@attempt
def _list_directory(facts: Facts) -> None:
    os.listdir(str(facts["folder"]))


@attempt
def _write_file(facts: Facts) -> None:
    with open(str(facts["secret"]), "r+b") as file:
        file.write(b"S")


@attempt
def _make_file(facts: Facts) -> None:
    path = Path(str(facts["folder"]), "made")
    path.touch()
    path.unlink()


@attempt
def _make_link(facts: Facts) -> None:
    path = Path(str(facts["folder"]), "link")
    path.symlink_to("/etc")
    path.unlink()


@attempt
def _remove_file(facts: Facts) -> None:
    os.rename(str(facts["secret"]), str(facts["secret"]) + "2")
    os.rename(str(facts["secret"]) + "2", str(facts["secret"]))


@attempt
def _reopen_for_writing(facts: Facts) -> None:
    os.close(os.open(f"/proc/self/fd/{facts['read_only']}", os.O_RDWR))


@attempt
def _above_descriptors(facts: Facts) -> None:
    os.close(os.open("/proc/self/fd/../../../../etc/passwd", os.O_RDONLY))


@attempt
def _memory_of_another(facts: Facts) -> None:
    os.close(os.open(f"/proc/{facts['victim']}/mem", os.O_RDONLY))


@attempt
def _environment_of_another(facts: Facts) -> None:
    Path(f"/proc/{facts['victim']}/environ").read_bytes()


@attempt
def _tcp_connect(facts: Facts) -> None:
    with socket.socket() as sock:
        sock.settimeout(2)
        sock.connect(("127.0.0.1", int(facts["tcp"])))


@attempt
def _tcp_listen(facts: Facts) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()


@attempt
def _udp_send(facts: Facts) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", int(facts["udp"])))
        sock.send(b"out")


@attempt
def _netlink(facts: Facts) -> None:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close()


@attempt
def _packet_socket(facts: Facts) -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()


@attempt
def _abstract_socket(facts: Facts) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect("\0" + str(facts["abstract"]))


@attempt
def _unix_socket(facts: Facts) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(facts["socket"]))


@attempt
def _socket_filter(facts: Facts) -> None:
    instruction = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0xFFFF))
    PAIR[0].setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HxxxxxxP", 1, ctypes.addressof(instruction)))


@attempt
def _fork(facts: Facts) -> None:
    _wait(call("clone", signal.SIGCHLD, 0, 0, 0, 0))


@attempt
def _run_program(facts: Facts) -> None:
    subprocess.run(["/bin/true"], check=True)


@attempt
def _become_program(facts: Facts) -> NoReturn:
    os.execv("/bin/true", ["/bin/true"])


@attempt
def _user_namespace(facts: Facts) -> None:
    _wait(call("clone", signal.SIGCHLD | CLONE_NEWUSER, 0, 0, 0, 0))


@attempt
def _clone3(facts: Facts) -> None:
    arguments = (ctypes.c_uint64 * 8)(0, 0, 0, 0, signal.SIGCHLD)
    _wait(call("clone3", arguments, 64))


def _wait(pid: int) -> None:
    if pid == 0:
        libc._exit(0)
    os.waitpid(pid, 0)


@attempt
def _mount_namespace(facts: Facts) -> None:
    call("unshare", CLONE_NEWNS)


@attempt
def _network_namespace(facts: Facts) -> None:
    call("unshare", CLONE_NEWNET)


@attempt
def _mount(facts: Facts) -> None:
    call("mount", b"tmpfs", str(facts["folder"]).encode(), b"tmpfs", 0, b"")
    libc.umount2(str(facts["folder"]).encode(), 2)


@attempt
def _chroot(facts: Facts) -> None:
    call("chroot", b"/")


@attempt
def _hostname(facts: Facts) -> None:
    name = socket.gethostname().encode()
    call("sethostname", name, len(name))


@attempt
def _trace(facts: Facts) -> None:
    call("ptrace", PTRACE_ATTACH_LIKE, int(facts["victim"]), 0, 0)
    libc.ptrace(PTRACE_DETACH, int(facts["victim"]), 0, 0)


@attempt
def _read_memory(facts: Facts) -> None:
    buffer = ctypes.create_string_buffer(1)
    here, there = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 1), (ctypes.c_uint64 * 2)(int(facts["address"]), 1)
    call("process_vm_readv", int(facts["victim"]), here, 1, there, 1, 0)


@attempt
def _signal(facts: Facts) -> None:
    os.kill(int(facts["victim"]), signal.SIGWINCH)


@attempt
def _signal_parent(facts: Facts) -> None:
    os.kill(int(facts["parent"]), signal.SIGWINCH)


@attempt
def _pidfd(facts: Facts) -> None:
    os.close(call("pidfd_open", int(facts["victim"]), 0))


@attempt
def _limits_of_another(facts: Facts) -> None:
    call("prlimit64", int(facts["victim"]), 4, (ctypes.c_uint64 * 2)(0, 0), None)  # RLIMIT_CORE


@attempt
def _own_limits(facts: Facts) -> None:
    call("prlimit64", 0, 4, (ctypes.c_uint64 * 2)(0, 0), None)


@attempt
def _signal_by_descriptor(facts: Facts) -> None:
    """O_ASYNC: the kernel sends SIGIO for us."""
    fcntl.fcntl(PAIR[0], fcntl.F_SETOWN, int(facts["victim"]))
    fcntl.fcntl(PAIR[0], fcntl.F_SETOWN, 0)


@attempt
def _signal_by_ioctl(facts: Facts) -> None:
    fcntl.ioctl(PAIR[0], FIOSETOWN, struct.pack("i", int(facts["victim"])))
    fcntl.ioctl(PAIR[0], FIOSETOWN, struct.pack("i", 0))


@attempt
def _type_into_terminal(facts: Facts) -> None:
    fcntl.ioctl(TERMINAL[1], TIOCSTI, b"x")


@attempt
def _type_into_terminal_by_high_bits(facts: Facts) -> None:
    """The kernel looks at the lower half of the number only."""
    letter = ctypes.create_string_buffer(b"x")
    if libc.syscall(ctypes.c_long(16 if X86 else 29), ctypes.c_long(TERMINAL[1]), ctypes.c_ulong(1 << 32 | TIOCSTI), letter) < 0:
        raise OSError(ctypes.get_errno(), "ioctl")


@attempt
def _ids(facts: Facts) -> None:
    call("setresuid", -1, -1, -1)


@attempt
def _dumpable(facts: Facts) -> None:
    call("prctl", 4, 1, 0, 0, 0)


@attempt
def _io_uring(facts: Facts) -> None:
    os.close(call("io_uring_setup", 1, ctypes.create_string_buffer(120)))


@attempt
def _bpf(facts: Facts) -> None:
    os.close(call("bpf", 0, ctypes.create_string_buffer(struct.pack("IIII", 2, 4, 4, 1), 128), 128))  # BPF_MAP_CREATE of an array


@attempt
def _perf(facts: Facts) -> None:
    attributes = ctypes.create_string_buffer(struct.pack("IIQ", 1, 128, 0), 128)  # PERF_TYPE_SOFTWARE
    os.close(call("perf_event_open", attributes, 0, -1, -1, 0))


@attempt
def _kexec(facts: Facts) -> None:
    call("kexec_load", 0, 0, None, 0)


@attempt
def _keys(facts: Facts) -> None:
    call("add_key", b"user", b"vdpa-bridge-test", b"x", 1, -2)  # KEY_SPEC_PROCESS_KEYRING


@attempt
def _userfaultfd(facts: Facts) -> None:
    os.close(call("userfaultfd", 1))  # UFFD_USER_MODE_ONLY


@attempt
def _system_v(facts: Facts) -> None:
    libc.shmctl(call("shmget", 0, 4096, 0o600), 0, None)


@attempt
def _new_code(facts: Facts) -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


@attempt
def _code_of_old_memory(facts: Facts) -> None:
    with mmap.mmap(-1, 4096) as memory:
        where = ctypes.c_char.from_buffer(memory)
        try:
            if libc.mprotect(ctypes.c_void_p(ctypes.addressof(where)), 4096, 5) < 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        finally:
            del where


OF_ROOT = {"packet_socket", "signal_parent", "mount_namespace", "network_namespace", "mount", "chroot", "hostname", "type_into_terminal", "type_into_terminal_by_high_bits", "bpf", "perf", "kexec"}
"""Those that only root can be expected to succeed in."""
MAY_BE_ABSENT = {"io_uring", "bpf", "perf", "kexec", "keys", "userfaultfd", "system_v", "user_namespace", "type_into_terminal", "type_into_terminal_by_high_bits", "above_descriptors"}
"""Those that a kernel may be built or set up without, so that they may fail everywhere."""

PAIR: list[socket.socket] = []
TERMINAL: list[int] = []
"""What a model has made before: sockets, a pty."""


class EscapeModel(Model):
    """One queue: a JSON object with ``attempt`` and what it takes, answered by one with ``errno``, 0 for success."""

    device_id = 0xE5C
    queue_count = 1

    def __init__(self, secret: str, needs: Needs) -> None:
        self.needs = needs
        self._fd = os.open(secret, os.O_RDONLY | os.O_CLOEXEC)
        self._pair = socket.socketpair()
        PAIR[:] = self._pair
        TERMINAL[:] = self._terminal = os.openpty()
        self._code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._code.write(bytes.fromhex("b814000000 cd80 c3"))
        FOREIGN[:] = [ctypes.addressof(ctypes.c_char.from_buffer(self._code))]

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> EscapeModel:
        """``secret=FILE``, which it has open for reading, and what it needs."""
        paths = {name: tuple(filter(None, options.get(name, "").split(","))) for name in ("read", "write", "connect")}
        return cls(options["secret"], Needs(**paths, network="network" in options, io_uring="io_uring" in options, memory=64 << 20))

    def config(self) -> bytes:
        return b""

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        queue = queues[index]
        queue.push([(chain, chain.write(json.dumps(self._answer(json.loads(chain.read(0, chain.readable)))).encode())) for chain in queue.pop()])

    def _answer(self, request: dict[str, str | int]) -> dict[str, object]:
        if (name := request["attempt"]) in MISBEHAVIOURS:
            try:
                MISBEHAVIOURS[str(name)]()
            except (MemoryError, RuntimeError, OSError) as error:
                return {"errno": getattr(error, "errno", -1), "text": repr(error)}
            return {"errno": 0}
        try:
            ATTEMPTS[str(name)](request | {"read_only": self._fd})
        except OSError as error:
            return {"errno": error.errno, "text": str(error)}
        return {"errno": 0}

    def close(self) -> None:
        os.close(self._fd)
        for fd in self._terminal:
            os.close(fd)
        for sock in self._pair:
            sock.close()
