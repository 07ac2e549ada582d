# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The process in the sandbox: how it is made, and the order in which everything is closed behind it.

Rules of this file: what the process needs is open before; no thread runs until all is closed; what could not be closed is
said, layer by layer, and it is for the caller to go on or not.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from . import landlock, namespaces, privileges, seccomp
from .kernel import PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, prctl
from .policy import Policy

_GO = b"go"


@dataclass(frozen=True)
class Lack:
    """A layer that could not be closed, why, and what to type."""

    layer: str
    why: str
    cure: str

    def __str__(self) -> str:
        return f"no {self.layer}: {self.why}; {self.cure}"


@dataclass(frozen=True)
class Outside:
    """This is the process that forked: the number of the one in the sandbox, and a socket to it (SOCK_SEQPACKET)."""

    pid: int
    link: socket.socket

    def go(self) -> None:
        """Let it close the sandbox and begin."""
        self.link.send(_GO)


@dataclass(frozen=True)
class Inside:
    """This is the process to be closed in, and it has no thread but this one."""

    link: socket.socket
    _user_namespace: bool
    _lack: Lack | None

    def close(self, policy: Policy) -> list[Lack]:
        """Close everything but what *policy* leaves open; what could not be closed."""
        lacks = [self._lack] if self._lack is not None else []
        filters: list[seccomp.Filter] = []

        def attempt(layer: str, cure: str, action: Callable[[], object]) -> None:
            try:
                action()
            except OSError as error:
                lacks.append(Lack(layer, error.strerror or str(error), cure))

        _detach()
        privileges.close_inherited()
        limits = {
            "CORE": 0,
            "MSGQUEUE": 0,
            "DATA": privileges.own_memory() + policy.memory,
            "NOFILE": privileges.open_descriptors() + policy.descriptors,
        }
        if self._user_namespace:
            limits["NPROC"] = policy.tasks
        attempt("seccomp filter", "apt-get install libseccomp2", lambda: filters.append(seccomp.Filter(policy.rules())))
        if self._lack is None:
            writable = {path: bool(access & landlock.CHANGES) for path, access in policy.paths.items()}
            attempt("empty root", namespaces.CURE, lambda: namespaces.empty_root(writable))
        privileges.limit(limits)
        privileges.drop()
        self._die_with_parent()
        attempt("Landlock", "a kernel with CONFIG_SECURITY_LANDLOCK, and lsm=landlock,... on its command line", lambda: landlock.close(policy.paths, policy.needs.network))
        for each in filters:
            attempt("seccomp", "a kernel with CONFIG_SECCOMP_FILTER", each.close)
        return lacks

    def _die_with_parent(self) -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, what="PR_SET_PDEATHSIG")
        watch = select.poll()
        watch.register(self.link, 0)
        if watch.poll(0):  # it died before
            os._exit(1)


def check_threads() -> None:
    """ValueError when there are others: a fork would lose them, and Landlock would not hold for them."""
    if len(os.listdir("/proc/self/task")) > 1:
        names = ", ".join(thread.name for thread in threading.enumerate() if thread is not threading.main_thread())
        raise ValueError(f"threads run before the sandbox is closed ({names or 'not of Python'}): a model starts its own in start(), not when it is made")


def _detach() -> None:
    """No terminal, and nothing to read from who started us."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    if nothing:
        os.close(nothing)


def split(network: bool) -> Outside | Inside:
    """Fork into namespaces; returns twice. *network*: see ``Needs``. There is no thread beside this one (``check_threads``)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    prctl(PR_SET_CHILD_SUBREAPER, 1, what="PR_SET_CHILD_SUBREAPER")
    middle = os.fork()
    if middle == 0:
        ours.close()
        return _middle(theirs, network)
    theirs.close()
    pid = ours.recv(16)
    os.waitpid(middle, 0)  # from now on, the process in the sandbox is our child
    prctl(PR_SET_CHILD_SUBREAPER, 0, what="PR_SET_CHILD_SUBREAPER")
    if not pid:
        ours.close()
        raise ChildProcessError("the process for the sandbox died at once")
    return Outside(int(pid), ours)


def _middle(link: socket.socket, network: bool) -> Inside:
    """A PID namespace begins with the next child: make that, and leave it to our parent."""
    lack, user = None, False
    try:
        try:
            user = namespaces.enter(network)
        except OSError as error:
            lack = Lack("namespaces", error.strerror or str(error), namespaces.CURE)
        pid = os.fork()
        if pid:
            link.send(str(pid).encode())
            os._exit(0)
    except BaseException:
        os._exit(1)
    if link.recv(16) != _GO:
        os._exit(1)
    return Inside(link, user, lack)
