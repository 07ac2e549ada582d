# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The bits of the protocol, by the names of the virtio spec, linux/vhost_types.h and the vhost-user spec.

Rule of this file: a name is one bit, a set of bits is a plain int. A flag type would make an object of each set, which costs
more than the rest of an operation, and its ``~`` knows only bits that have a name.
"""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """Device status byte (virtio 1.2, 2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 0x40
    FAILED = 0x80


class BackendFeature(IntEnum):
    """What a vhost-vdpa back-end can do beyond virtio (VHOST_BACKEND_F_*, linux/vhost_types.h)."""

    IOTLB_MSG_V2 = 1 << 1
    IOTLB_BATCH = 1 << 2
    IOTLB_ASID = 1 << 3
    SUSPEND = 1 << 4
    RESUME = 1 << 5
    ENABLE_AFTER_DRIVER_OK = 1 << 6
    DESC_ASID = 1 << 7
    IOTLB_PERSIST = 1 << 8


class ProtocolFeature(IntEnum):
    """VHOST_USER_PROTOCOL_F_*; VDPA is this project's (docs/vhost-user-vdpa.md)."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM = 1 << 22
    GET_VRING_BASE_SKIP_DRAIN = 1 << 23
    VDPA = 1 << 56


class Feature(IntEnum):
    """Transport feature bits (virtio 1.2, 6) and the two that belong to vhost alone."""

    NOTIFY_ON_EMPTY = 1 << 24
    ANY_LAYOUT = 1 << 27
    RING_INDIRECT_DESC = 1 << 28
    RING_EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    SR_IOV = 1 << 37
    NOTIFICATION_DATA = 1 << 38
    NOTIF_CONFIG_DATA = 1 << 39
    RING_RESET = 1 << 40


VHOST_F_LOG_ALL = 1 << 26
VHOST_USER_F_PROTOCOL_FEATURES = 1 << 30
VHOST_ONLY_FEATURES = VHOST_F_LOG_ALL | VHOST_USER_F_PROTOCOL_FEATURES
"""Bits of a vhost-user feature word that are not the device's."""


def bit_names(flags: type[IntEnum], value: int) -> list[str]:
    """The names of the set bits, ``bit 57`` for those without one."""
    known = {int(member): member.name for member in flags}
    return [known.get(1 << bit, f"bit {bit}") for bit in range(value.bit_length()) if value >> bit & 1]


def status_text(value: int) -> str:
    """``0x3 (ACKNOWLEDGE|DRIVER)``"""
    return f"{value:#x} ({'|'.join(bit_names(Status, value)) or 'reset'})"
