# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Where peers differ from their specifications, and what is done about it: one table.

Rule of this file: a quirk is a row. Those that hold for some peers only say so by ``known_by``, from what a peer offers, for it
has no name to ask for; the code that gives way asks for the row, and the documentation is made of all rows (`tools/render`).
Differences of homes in what operations answer are in `differences.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .flags import ProtocolFeature as P
from .virtio.features import NetFeature
from .virtio.ids import DeviceId


class Offer(NamedTuple):
    """What is known of a stock back-end when a session begins."""

    device_id: int | None
    features: int
    protocol: int


@dataclass(frozen=True)
class Quirk:
    """*peer* in *version* does *what*; *answer* is what we do, to every peer or to those *known_by* their offer."""

    name: str
    peer: str
    version: str
    what: str
    answer: str
    known_by: Callable[[Offer], bool] | None = None


CONTROL_QUEUE = Quirk(
    "control queue of nobody",
    "DPDK vhost",
    "22.11",
    "offers a network device's CTRL_VQ, which it leaves to the VMM, and has no such queue",
    "net device without CONFIG: CTRL_VQ and what needs it is hidden",
    lambda offer: offer.device_id == DeviceId.NET and bool(offer.features & NetFeature.CTRL_VQ) and not offer.protocol & P.CONFIG,
)
STALE_RINGS = Quirk(
    "rings looked up again",
    "libvhost-user (qemu-storage-daemon, virtiofsd, vhost-user-gpu)",
    "7.2 to 10.0",
    "hangs up when the memory under a stopped ring goes, as every change of memory makes it look up all rings",
    "no VDPA, no GPA_ADDRESSES: stopped rings are moved to memory that stays",
    lambda offer: not offer.protocol & (P.VDPA | P.GPA_ADDRESSES),
)
QUIRKS = (
    CONTROL_QUEUE,
    STALE_RINGS,
    Quirk(
        "configuration from 0",
        "libvhost-user, DPDK vhost",
        "10.0, 22.11",
        "ignores the offset of GET_CONFIG",
        "the configuration space is read from 0 and cut",
    ),
    Quirk(
        "need-reply in replies",
        "libvhost-user",
        "10.0",
        "answers some questions with NEED_REPLY still set",
        "the bit is not looked at in replies",
    ),
    Quirk(
        "success before the end",
        "libvhost-user",
        "10.0",
        "acknowledges with success what it cannot do, and hangs up after that",
        "a question follows where it matters (SET_CONFIG, the start), and its answer counts",
    ),
    Quirk(
        "no call descriptor",
        "libvhost-user",
        "7.2",
        "hangs up at its first interrupt for a queue without a call descriptor",
        "every queue gets one",
    ),
    Quirk(
        "blind until kicked",
        "libvhost-user",
        "10.0",
        "looks at a queue that has started only after a kick",
        "queues are kicked when they start",
    ),
    Quirk(
        "half a base",
        "DPDK vhost",
        "22.11",
        "tells one half of a packed ring's base",
        "the other half is taken to be the same, as a ring at rest has it",
    ),
    Quirk(
        "selector not repeated",
        "virtio-input of QEMU",
        "7.2",
        "does not repeat the selector of what it does not have",
        "it is looked at only where there is an answer",
    ),
    Quirk(
        "too many bytes written",
        "virtio-scsi, virtio-input of QEMU, libvhost-user's disk",
        "7.2",
        "counts bytes that it read as written",
        "drivers of these types, and the one for any type, take the count for all that could be written",
    ),
    Quirk(
        "used without WRITE",
        "QEMU's packed rings",
        "7.2",
        "never sets WRITE in a used descriptor; DPDK's leaves a length there that means nothing",
        "without WRITE, the length counts where it can be true",
    ),
    Quirk(
        "change accepted unoffered",
        "vhost-user-scsi of QEMU, a client",
        "7.2",
        "accepts VIRTIO_SCSI_F_CHANGE for its guest, offered or not",
        "the SCSI model offers it, and has no change to tell of",
    ),
    Quirk(
        "calls unseen",
        "vhost-user-scsi of QEMU, a client",
        "7.2",
        "looks no more at a call descriptor once it has sent another, read by then or not",
        "the new one is signalled when it comes while the ring runs",
    ),
    Quirk(
        "interrupts of lines unoffered",
        "vhost-user-gpio of QEMU, a client",
        "7.2",
        "does not offer VIRTIO_GPIO_F_IRQ to its guest",
        "the guest has lines without interrupts",
    ),
    Quirk(
        "a page of configuration",
        "vp_vdpa",
        "Linux 6.12",
        "says that the configuration space is as large as the PCI region it lies in",
        "drivers read what belongs to the type; an unknown type's first 256 bytes",
    ),
)
"""All of them: those that some peers are known by first."""


def quirks_of(offer: Offer) -> frozenset[Quirk]:
    """Those that are known by the offer."""
    return frozenset(quirk for quirk in QUIRKS if quirk.known_by is not None and quirk.known_by(offer))


CONTROLLED = (
    NetFeature.CTRL_VQ
    | NetFeature.CTRL_RX
    | NetFeature.CTRL_VLAN
    | NetFeature.CTRL_RX_EXTRA
    | NetFeature.CTRL_GUEST_OFFLOADS
    | NetFeature.GUEST_ANNOUNCE
    | NetFeature.CTRL_MAC_ADDR
)
"""The features of a network device that need its control queue."""
