# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Feature bits of each device type by the names of virtio 1.2, section 5, and of linux/virtio_*.h.

Rule of this file: names only. Bits of the transport and of the rings are in `flags.Feature`; the same bit means
something else on each device type, so a name needs the device id.
"""

from __future__ import annotations

from enum import IntEnum

from ..flags import Feature
from .ids import DeviceId


class NetFeature(IntEnum):
    """VIRTIO_NET_F_* (virtio 1.2, 5.1.3)."""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    CTRL_GUEST_OFFLOADS = 1 << 2
    MTU = 1 << 3
    MAC = 1 << 5
    GSO = 1 << 6
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    GUEST_ECN = 1 << 9
    GUEST_UFO = 1 << 10
    HOST_TSO4 = 1 << 11
    HOST_TSO6 = 1 << 12
    HOST_ECN = 1 << 13
    HOST_UFO = 1 << 14
    MRG_RXBUF = 1 << 15
    STATUS = 1 << 16
    CTRL_VQ = 1 << 17
    CTRL_RX = 1 << 18
    CTRL_VLAN = 1 << 19
    CTRL_RX_EXTRA = 1 << 20
    GUEST_ANNOUNCE = 1 << 21
    MQ = 1 << 22
    CTRL_MAC_ADDR = 1 << 23
    VQ_NOTF_COAL = 1 << 52
    NOTF_COAL = 1 << 53
    GUEST_USO4 = 1 << 54
    GUEST_USO6 = 1 << 55
    HOST_USO = 1 << 56
    HASH_REPORT = 1 << 57
    GUEST_HDRLEN = 1 << 59
    RSS = 1 << 60
    RSC_EXT = 1 << 61
    STANDBY = 1 << 62
    SPEED_DUPLEX = 1 << 63


class BlockFeature(IntEnum):
    """VIRTIO_BLK_F_* (virtio 1.2, 5.2.3)."""

    BARRIER = 1 << 0
    SIZE_MAX = 1 << 1
    SEG_MAX = 1 << 2
    GEOMETRY = 1 << 4
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    SCSI = 1 << 7
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    CONFIG_WCE = 1 << 11
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14
    LIFETIME = 1 << 15
    SECURE_ERASE = 1 << 16
    ZONED = 1 << 17


class ConsoleFeature(IntEnum):
    """VIRTIO_CONSOLE_F_* (virtio 1.2, 5.3.3)."""

    SIZE = 1 << 0
    MULTIPORT = 1 << 1
    EMERG_WRITE = 1 << 2


class BalloonFeature(IntEnum):
    """VIRTIO_BALLOON_F_* (virtio 1.2, 5.5.3)."""

    MUST_TELL_HOST = 1 << 0
    STATS_VQ = 1 << 1
    DEFLATE_ON_OOM = 1 << 2
    FREE_PAGE_HINT = 1 << 3
    PAGE_POISON = 1 << 4
    REPORTING = 1 << 5


class ScsiFeature(IntEnum):
    """VIRTIO_SCSI_F_* (virtio 1.2, 5.6.3)."""

    INOUT = 1 << 0
    HOTPLUG = 1 << 1
    CHANGE = 1 << 2
    T10_PI = 1 << 3


class GpuFeature(IntEnum):
    """VIRTIO_GPU_F_* (virtio 1.2, 5.7.3)."""

    VIRGL = 1 << 0
    EDID = 1 << 1
    RESOURCE_UUID = 1 << 2
    RESOURCE_BLOB = 1 << 3
    CONTEXT_INIT = 1 << 4


class P9Feature(IntEnum):
    """VIRTIO_9P_* (linux/virtio_9p.h)."""

    MOUNT_TAG = 1 << 0


class VsockFeature(IntEnum):
    """VIRTIO_VSOCK_F_* (virtio 1.2, 5.10.3)."""

    STREAM = 1 << 0
    SEQPACKET = 1 << 1


class CryptoFeature(IntEnum):
    """VIRTIO_CRYPTO_F_* (virtio 1.2, 5.9.3)."""

    REVISION_1 = 1 << 0
    CIPHER_STATELESS_MODE = 1 << 1
    HASH_STATELESS_MODE = 1 << 2
    MAC_STATELESS_MODE = 1 << 3
    AEAD_STATELESS_MODE = 1 << 4
    AKCIPHER_STATELESS_MODE = 1 << 5


class IommuFeature(IntEnum):
    """VIRTIO_IOMMU_F_* (virtio 1.2, 5.13.3)."""

    INPUT_RANGE = 1 << 0
    DOMAIN_RANGE = 1 << 1
    MAP_UNMAP = 1 << 2
    BYPASS = 1 << 3
    PROBE = 1 << 4
    MMIO = 1 << 5
    BYPASS_CONFIG = 1 << 6


class MemFeature(IntEnum):
    """VIRTIO_MEM_F_* (virtio 1.2, 5.15.3)."""

    ACPI_PXM = 1 << 0
    UNPLUGGED_INACCESSIBLE = 1 << 1


class FsFeature(IntEnum):
    """VIRTIO_FS_F_* (virtio 1.2, 5.11.3)."""

    NOTIFICATION = 1 << 0


class ScmiFeature(IntEnum):
    """VIRTIO_SCMI_F_* (virtio 1.2, 5.17.3)."""

    P2A_CHANNELS = 1 << 0
    SHARED_MEMORY = 1 << 1


class I2cFeature(IntEnum):
    """VIRTIO_I2C_F_* (virtio 1.2, 5.16.3)."""

    ZERO_LENGTH_REQUEST = 1 << 0


class GpioFeature(IntEnum):
    """VIRTIO_GPIO_F_* (virtio 1.2, 5.18.3)."""

    IRQ = 1 << 0


_BY_DEVICE: dict[int, type[IntEnum]] = {
    DeviceId.NET: NetFeature,
    DeviceId.BLOCK: BlockFeature,
    DeviceId.CONSOLE: ConsoleFeature,
    DeviceId.BALLOON: BalloonFeature,
    DeviceId.SCSI: ScsiFeature,
    DeviceId.P9: P9Feature,
    DeviceId.GPU: GpuFeature,
    DeviceId.VSOCK: VsockFeature,
    DeviceId.CRYPTO: CryptoFeature,
    DeviceId.IOMMU: IommuFeature,
    DeviceId.MEM: MemFeature,
    DeviceId.FS: FsFeature,
    DeviceId.SCMI: ScmiFeature,
    DeviceId.I2C: I2cFeature,
    DeviceId.GPIO: GpioFeature,
}


def feature_type(device_id: int | None) -> type[IntEnum] | None:
    """The flags of a device type; None for one that has no feature bits of its own (rng, input, pmem, ...) or is unknown."""
    return None if device_id is None else _BY_DEVICE.get(device_id)


def feature_names(device_id: int | None, value: int) -> list[str]:
    """The set bits of a feature word by name, lowest first; ``bit 57`` for one that the device type does not define."""
    own = feature_type(device_id)
    known = {int(flag): flag.name for flag in Feature}
    known |= {int(flag): flag.name for flag in own} if own else {}
    return [known.get(1 << bit, f"bit {bit}") for bit in range(value.bit_length()) if value >> bit & 1]


def feature_mask(device_id: int | None, names: list[str]) -> int:
    """The inverse of ``feature_names``; also takes ``57`` for a bit. ValueError with the choices for an unknown name."""
    own = feature_type(device_id)
    known = {flag.name: int(flag) for flag in Feature}
    known |= {flag.name: int(flag) for flag in own} if own else {}
    mask = 0
    for name in names:
        text = name.strip().upper().removeprefix("BIT ")
        if text.isdigit() and int(text) < 64:
            mask |= 1 << int(text)
        elif text in known:
            mask |= known[text]
        else:
            raise ValueError(f"unknown feature {name!r}; use a bit number or one of {', '.join(sorted(known))}")
    return mask
