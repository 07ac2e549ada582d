# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Tap interfaces and context ids for tests of the kernel's own vhost, and what this machine needs for them."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .tapped import exists, ip, tap_name

_MODULES = ("tun", "vhost_net", "vhost_vsock", "sch_ingress", "cls_matchall", "act_mirred")
_numbers = itertools.count()


def missing() -> str:
    """Why there can be no tap and no context id here; empty if there can."""
    if "VDPA_BRIDGE_LAB" not in os.environ:
        return "needs root and kernel modules: run it in the lab, tools/lab pytest -m lab tests/contract"
    if lacking := [program for program in ("ip", "tc", "modprobe") if not shutil.which(program)]:
        return f"no {lacking[0]}: tools/setup lab installs it"
    return ""


def load() -> None:
    """The kernel modules."""
    subprocess.run(["modprobe", "-a", *_MODULES], check=True, timeout=60)


def new_cid() -> int:
    """A context id that nobody else has."""
    return (1 << 24) + (os.getpid() << 8) + next(_numbers)


@contextmanager
def tap(*, echo: bool = False) -> Iterator[str]:
    """The name of a tap on which the kernel itself says nothing; with *echo* every frame that a NIC sends comes back to it."""
    load()
    name = tap_name()
    ip("tuntap", "add", "dev", name, "mode", "tap")
    try:
        Path("/proc/sys/net/ipv6/conf", name, "disable_ipv6").write_text("1")
        ip("link", "set", "dev", name, "up")
        if echo:
            for words in ("qdisc add dev {0} clsact", "filter add dev {0} ingress matchall action mirred egress redirect dev {0}"):
                subprocess.run(["tc", *words.format(name).split()], check=True, timeout=20)
        yield name
    finally:
        if exists(name):
            ip("link", "delete", "dev", name)


@contextmanager
def wire(name: str, timeout: float = 5) -> Iterator[socket.socket]:
    """This machine's end of a tap: what is sent here a NIC receives, what a NIC sends is received here."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as end:
        end.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
        end.bind((name, _ETH_P_ALL))
        end.settimeout(timeout)
        yield end


_ETH_P_ALL = 3
_SOL_PACKET, _IGNORE_OUTGOING = 263, 23
"""linux/if_packet.h: no copies of what is sent here."""


def counters(name: str) -> dict[str, int]:
    """What the interface has counted; rx is what came from the NIC."""
    return {path.name: int(path.read_text()) for path in Path("/sys/class/net", name, "statistics").iterdir()}
