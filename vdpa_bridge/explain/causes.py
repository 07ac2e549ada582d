# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Every kind of problem that ``explain`` tells apart: its name, its exit status, what it means and what cures it.

Rule of this file: a status is never given to another cause, as scripts depend on it. ``{words}`` of a cure are filled
in from what was found.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """A kind of problem."""

    name: str
    status: int
    """Exit status of ``vdpa-bridge explain``."""
    means: str
    cure: str
    """What to type, or do, with ``{words}`` to fill in."""

    def typed(self, **words: object) -> str:
        """The cure for a case."""
        return self.cure.format(**words)

    def shown(self) -> str:
        """The cure for readers: ``modprobe MODULE``."""
        return re.sub(r"\{(\w+)\}", lambda match: match[1].upper(), self.cure)


MODULE_MISSING = Cause("module-missing", 10, "a kernel module is not loaded", "modprobe {modules}")
MODULE_UNAVAILABLE = Cause(
    "module-unavailable", 11, "this kernel was built without a module", "use a kernel with {config}; tools/lab boots one without installing it"
)
NO_SUCH_DEVICE = Cause("no-such-device", 12, "there is no device of that name or number", "vdpa-bridge mgmt dev add name {name} mgmtdev {mgmtdev}")
WRONG_DRIVER = Cause("wrong-driver", 13, "the device is bound to virtio_vdpa, for the kernel's own use, or to no driver", "vdpa-bridge mgmt bind {name} vhost_vdpa")
PERMISSION = Cause("permission", 14, "this user may not open the node, or connect to the socket", "sudo chgrp kvm {path} && sudo chmod 660 {path}")
BUSY = Cause("busy", 15, "somebody has the device: a node has one user, and most back-ends serve one client", "end {holder}")
NO_IOMMU = Cause("no-iommu", 16, "the device needs an IOMMU that this machine does not give it", "boot with intel_iommu=on (AMD: amd_iommu=on), and enable it in the firmware")
STUCK = Cause("not-answering", 17, "the kernel device does not answer: for VDUSE, its daemon is stuck or gone", "restart its daemon; vdpa-bridge mgmt dev del {name} takes it off the bus")
NO_VDUSE = Cause("no-vduse", 18, "the kernel takes no devices from programs: there is no /dev/vduse", "modprobe vduse")
MEMLOCK = Cause(
    "memlock", 20, "the device pins memory, and the process may not lock as much", "ulimit -l {kib} as root, before it starts (a service: LimitMEMLOCK={size}; one that runs: prlimit --memlock={size} --pid PID)"
)
IOVA_RANGE = Cause("iova-range", 21, "the device cannot address as much memory", "give it at most {size} bytes, within {first} to {last}")
FEATURE_WITHHELD = Cause("feature-withheld", 22, "the device does not offer a feature that is wanted", "vdpa-bridge mgmt dev del {name}; vdpa-bridge mgmt dev add name {name} mgmtdev {mgmtdev} device_features {bits}")
MEMORY_NOT_SHARED = Cause("memory-not-shared", 23, "a client keeps its memory to itself, so that no back-end can reach it", "start the client with memory that it shares (QEMU: -object memory-backend-memfd,...,share=on)")
TOO_OLD = Cause("too-old", 24, "the back-end, or the kernel, lacks an operation that the device's driver needs", "is ?type= right? else use a newer back-end, or kernel: {operation} is what the driver needs")
NO_VDPA_MODE = Cause("no-vdpa-mode", 25, "vDPA mode is required and not offered", "say vdpa=prefer instead of vdpa=require, or update the back-end")
NO_SOCKET = Cause("no-socket", 30, "nothing has made the socket", "start the back-end, or vdpa-bridge list to see what listens")
NOT_A_SOCKET = Cause("not-a-socket", 31, "there is something else at that path, or a socket of another type", "vdpa-bridge list")
SOCKET_DEAD = Cause("socket-dead", 32, "the socket is there, but nobody listens: who made it is gone", "start the back-end again; rm {path} if that does not")
PATH_TOO_LONG = Cause("path-too-long", 33, "a UNIX socket's path has at most 107 bytes", "ln -s {directory} /tmp/s; then vhost-user:/tmp/s/{name}")
SILENT = Cause("silent", 34, "somebody listens and says nothing", "restart {holder}, or wait longer: ?timeout=30")
NOT_A_BACKEND = Cause("not-a-backend", 35, "who listens does not speak vhost-user, or does not want this client", "vdpa-bridge list shows who listens where; its own log says why it hung up")
CANNOT_OPEN = Cause("cannot-open", 39, "opening the device fails for another reason", "the same with --trace, to see what it was asked")
BROKEN = Cause("broken", 40, "the device was opened and then did what no device may do", "the same with --trace, to see what it was asked")

CAUSES: tuple[Cause, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Cause))
"""All of them, in the order of their statuses."""
