# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The system calls that serving a device takes, by purpose.

Rule of this file: a call is here because something in the process makes it after the sandbox is closed; what it can do to
others is cut off by its arguments. Calls that some architectures lack are harmless: those do not get them.
"""

from __future__ import annotations

import fcntl
import os
import socket

from .kernel import PR_SET_NAME
from .seccomp import INT, Argument, Rule

_PROT_EXEC = 4
_CLONE_THREAD = 0x10000
_CLONE_NEW = 0x7E020080
"""CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID, NET and TIME"""
_AT_EMPTY_PATH = 0x1000

_MEMORY = "brk munmap mremap madvise mincore memfd_create"
_THREADS = (
    "futex futex_waitv set_robust_list get_robust_list rseq exit exit_group wait4 gettid getpid getppid getuid geteuid getgid getegid "
    "sched_yield sched_getaffinity membarrier restart_syscall rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack"
)
_TIME = "clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time getrusage timerfd_create timerfd_settime timerfd_gettime"
_DESCRIPTORS = (
    "read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek close dup dup2 dup3 fstat fsync fdatasync "
    "sync_file_range fallocate ftruncate fadvise64 readlink readlinkat eventfd2 pipe2 poll ppoll select pselect6 "
    "epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2"
)
_CLIENTS = "accept accept4 recvmsg recvfrom recvmmsg sendmsg sendmmsg shutdown getsockname getpeername getsockopt"
_WORLD = "getrandom uname sysinfo"

_FCNTL = (
    *(fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL),
    *(fcntl.F_GETLK, fcntl.F_SETLK, fcntl.F_SETLKW, fcntl.F_ADD_SEALS, fcntl.F_GET_SEALS),
)
"""All but those by which a descriptor sends signals (F_SETOWN, F_SETSIG)."""
_IOCTLS = (0x5401, 0x541B, 0x5421, 0x5451)
"""TCGETS (is it a terminal?), FIONREAD, FIONBIO, FIOCLEX (asm-generic/ioctls.h)."""
_SO_RCVTIMEO_NEW, _SO_SNDTIMEO_NEW = 66, 67
_SOCKOPTS = (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO, _SO_RCVTIMEO_NEW, _SO_SNDTIMEO_NEW, socket.SO_RCVBUF, socket.SO_SNDBUF)
"""No filters, no BPF."""

_READING = "open openat stat lstat newfstatat statx access faccessat faccessat2 getdents64 statfs fstatfs getxattr lgetxattr fgetxattr listxattr flistxattr getcwd"
_WRITING = (
    "creat mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink symlinkat mknod mknodat truncate "
    "chmod fchmod fchmodat chown lchown fchown fchownat utimensat setxattr fsetxattr removexattr fremovexattr flock umask copy_file_range"
)
_SOCKETS = "connect bind listen"
_IO_URING = "io_uring_setup io_uring_enter io_uring_register"


def always(controls: tuple[int, ...]) -> list[Rule]:
    """For whatever device. *controls*: see ``models.needs``."""
    return [
        *_plain(_MEMORY, _THREADS, _TIME, _DESCRIPTORS, _CLIENTS, _WORLD),
        ("mmap", (Argument(2, 0, _PROT_EXEC),)),
        ("mprotect", (Argument(2, 0, _PROT_EXEC),)),
        ("clone", (Argument(0, _CLONE_THREAD, _CLONE_THREAD | _CLONE_NEW),)),
        ("tgkill", (Argument(0, os.getpid(), INT),)),
        ("prctl", (Argument(0, PR_SET_NAME, INT),)),
        ("prlimit64", (Argument(2, 0),)),
        ("sendto", (Argument(4, 0),)),
        ("newfstatat", (Argument(3, _AT_EMPTY_PATH, _AT_EMPTY_PATH),)),
        *(("fcntl", (Argument(1, command, INT),)) for command in _FCNTL),
        *(("ioctl", (Argument(1, request, INT),)) for request in dict.fromkeys((*_IOCTLS, *controls))),
        *(("setsockopt", (Argument(1, socket.SOL_SOCKET, INT), Argument(2, name, INT))) for name in _SOCKOPTS),
    ]


def reading() -> list[Rule]:
    """To open files."""
    return _plain(_READING)


def writing() -> list[Rule]:
    """To make and change files."""
    return _plain(_READING, _WRITING)


def connecting() -> list[Rule]:
    """For UNIX sockets of one's own."""
    unix = [Argument(0, socket.AF_UNIX, INT)]
    return [*_plain(_SOCKETS, "unlink unlinkat"), *((name, tuple(unix)) for name in ("socket", "socketpair"))]


def networking() -> list[Rule]:
    """For the network, and the netlink socket by which libc asks for its own addresses."""
    families = (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
    return [*_plain(_SOCKETS, "setsockopt sendto"), *(("socket", (Argument(0, family, INT),)) for family in families)]


def io_uring() -> list[Rule]:
    """For rings of requests to the kernel, which pass this filter by, but not Landlock."""
    return _plain(_IO_URING)


def _plain(*groups: str) -> list[Rule]:
    return [(name, ()) for group in groups for name in group.split()]
