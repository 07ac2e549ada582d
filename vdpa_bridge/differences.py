# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Where a home answers an operation otherwise than the reference, and why it may.

Rule of this file: the reference is vhost-vdpa with vdpa_sim of Linux 6.12.117. A row is one answer of one home in one
scenario; what has no row must answer as the reference does. The contract tests check every row on its home, in both
directions: an answer that differs without a row fails, and so does a row whose home answers as the reference.
An operation that a home lacks altogether is no difference but a capability (``Backend.capability``).
"""

from __future__ import annotations

import errno
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Home = Literal["vp_vdpa", "VDUSE", "libvduse", "vhost-net", "vhost-user", "legacy", "qemu-storage-daemon"]
"""``vp_vdpa``: the kernel's driver for virtio-pci. ``VDUSE``: a device of another process, by way of the kernel.
``libvduse``: such a device of QEMU's programs. ``vhost-net``: /dev/vhost-net with a tap. ``vhost-user``: any socket, both modes. ``legacy``: a socket without vDPA mode."""


@dataclass(frozen=True)
class Difference:
    """*home* answers *operation* in *scenario* with errno *instead* (0: it succeeds; None: the answer is the same, the effect is not)."""

    home: Home
    operation: str
    scenario: str
    instead: int | None
    reason: str


ROWS: tuple[Difference, ...] = (
    Difference("vp_vdpa", "SET_FEATURES", "without ACCESS_PLATFORM", 0, "the driver passes any set on; the virtio-pci device judges at FEATURES_OK"),
    Difference("vp_vdpa", "SET_VRING_BASE", "before FEATURES_OK", errno.EOPNOTSUPP, "virtio-pci has no register for it; only 0 is taken, once negotiated"),
    Difference("vp_vdpa", "SET_VRING_BASE", "not 0", errno.EOPNOTSUPP, "virtio-pci has no register for it"),
    Difference("vp_vdpa", "SET_VRING_ENABLE", "off", None, "virtio-pci forbids it: the device may ask for a reset (QEMU does)"),
    Difference("VDUSE", "SET_FEATURES", "without ACCESS_PLATFORM", 0, "the kernel passes any set on; the daemon judges at FEATURES_OK"),
    Difference("VDUSE", "GET_VQS_COUNT", "control queue", None, "there is none: the kernel takes no device that has to be asked this way"),
    Difference("VDUSE", "SET_VRING_ENABLE", "off while the ring works", None, "the daemon is not told (Linux 6.12)"),
    Difference("libvduse", "GET_VRING_BASE", "before the device runs", None, "the daemon is asked, which is told of a base when the device starts"),
    Difference("libvduse", "SET_STATUS", "reset with requests under way", None, "qemu-storage-daemon ends: an assertion in its libvduse (QEMU 7.2)"),
    Difference("vhost-net", "GET_VQS_COUNT", "control queue", None, "there is none: the kernel serves receive and transmit, and a tap takes any address"),
    Difference("legacy", "IOTLB_UPDATE", "RO mapping of a read-only descriptor", errno.EACCES, "peers map every region for reading and writing"),
    Difference("legacy", "GET_VRING_BASE", "while the ring runs", errno.EBUSY, "the message stops the ring, which a question must not do"),
    Difference("qemu-storage-daemon", "SET_VRING_ENABLE", "off while the ring works", None, "libvhost-user serves a disabled ring (QEMU 7.2)"),
    Difference("qemu-storage-daemon", "SET_STATUS", "reset with requests under way", None, "they go on and may end the connection; wait for them (QEMU 7.2)"),
    Difference("qemu-storage-daemon", "SUSPEND", "with requests under way", None, "they go on and may end the connection; wait for them (QEMU 7.2)"),
    Difference("qemu-storage-daemon", "SET_STATUS", "reset after an unmapped address", None, "libvhost-user hangs up; connect again (QEMU 7.2)"),
    Difference("vhost-user", "open", "while somebody else has it open", errno.ETIMEDOUT, "the socket takes the second client and serves it after the first"),
)


def documented(homes: Collection[str], operation: str, scenario: str) -> Difference | None:
    """The row for any of *homes*, if there is one."""
    return next((row for row in ROWS if row.home in homes and (row.operation, row.scenario) == (operation, scenario)), None)
