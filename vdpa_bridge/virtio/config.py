# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Configuration spaces: what each device type puts where (virtio 1.2, section 5, the "Device configuration layout" of each).

Rule of this file: layouts are tables, little-endian whatever the machine is. A field that a feature bit guards is shown
only when that bit is there: what lies in its place otherwise is not defined (QEMU fills it with 0xff). A space may be
shorter than the table, as older devices have fewer fields, and is read as far as it goes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .features import BalloonFeature as Bal
from .features import BlockFeature as Blk
from .features import ConsoleFeature as Con
from .features import FsFeature as Fs
from .features import IommuFeature as Iom
from .features import MemFeature as Mem
from .features import NetFeature as Net
from .ids import DeviceId

Value = int | str


@dataclass(frozen=True)
class Field:
    """*name* is the spec's; *code* is of the struct module, ``mac`` or ``text``; any bit of *gate* (0: always) makes the field legal."""

    name: str
    code: str
    gate: int = 0

    @property
    def size(self) -> int:
        """Bytes."""
        return struct.calcsize("<" + self._format)

    @property
    def _format(self) -> str:
        return {"mac": "6s", "text": "36s"}.get(self.code, self.code)

    def decode(self, data: bytes) -> Value:
        """The value in exactly ``size`` bytes."""
        value = struct.unpack("<" + self._format, data)[0]
        if self.code == "mac":
            return mac_text(value)
        if self.code == "text":
            return str(value.split(b"\0")[0], "utf-8", "backslashreplace")
        return int(value)

    def encode(self, value: Value | bytes) -> bytes:
        """The reverse of ``decode``; ValueError when *value* does not fit. A MAC address can be six bytes, too."""
        try:
            if self.code == "mac":
                value = parse_mac(value) if isinstance(value, str) else value
            elif self.code == "text":
                value = str(value).encode()
            data = struct.pack("<" + self._format, value)
        except struct.error as error:
            raise ValueError(f"{self.name} = {value!r}: {error}") from None
        if isinstance(value, bytes) and len(value) > self.size:
            raise ValueError(f"{self.name} = {value!r} is longer than {self.size} bytes")
        return data


PAD = ""
"""Name of bytes that mean nothing."""

_LAYOUTS: dict[int, tuple[Field, ...]] = {
    DeviceId.NET: (
        Field("mac", "mac", Net.MAC),
        Field("status", "H", Net.STATUS),
        Field("max_virtqueue_pairs", "H", Net.MQ | Net.RSS),
        Field("mtu", "H", Net.MTU),
        Field("speed", "I", Net.SPEED_DUPLEX),
        Field("duplex", "B", Net.SPEED_DUPLEX),
        Field("rss_max_key_size", "B", Net.RSS | Net.HASH_REPORT),
        Field("rss_max_indirection_table_length", "H", Net.RSS),
        Field("supported_hash_types", "I", Net.RSS | Net.HASH_REPORT),
    ),
    DeviceId.BLOCK: (
        Field("capacity", "Q"),
        Field("size_max", "I", Blk.SIZE_MAX),
        Field("seg_max", "I", Blk.SEG_MAX),
        Field("cylinders", "H", Blk.GEOMETRY),
        Field("heads", "B", Blk.GEOMETRY),
        Field("sectors", "B", Blk.GEOMETRY),
        Field("blk_size", "I", Blk.BLK_SIZE),
        Field("physical_block_exp", "B", Blk.TOPOLOGY),
        Field("alignment_offset", "B", Blk.TOPOLOGY),
        Field("min_io_size", "H", Blk.TOPOLOGY),
        Field("opt_io_size", "I", Blk.TOPOLOGY),
        Field("writeback", "B", Blk.CONFIG_WCE),
        Field(PAD, "B"),
        Field("num_queues", "H", Blk.MQ),
        Field("max_discard_sectors", "I", Blk.DISCARD),
        Field("max_discard_seg", "I", Blk.DISCARD),
        Field("discard_sector_alignment", "I", Blk.DISCARD),
        Field("max_write_zeroes_sectors", "I", Blk.WRITE_ZEROES),
        Field("max_write_zeroes_seg", "I", Blk.WRITE_ZEROES),
        Field("write_zeroes_may_unmap", "B", Blk.WRITE_ZEROES),
        Field(PAD, "3s"),
        Field("max_secure_erase_sectors", "I", Blk.SECURE_ERASE),
        Field("max_secure_erase_seg", "I", Blk.SECURE_ERASE),
        Field("secure_erase_sector_alignment", "I", Blk.SECURE_ERASE),
    ),
    DeviceId.CONSOLE: (
        Field("cols", "H", Con.SIZE),
        Field("rows", "H", Con.SIZE),
        Field("max_nr_ports", "I", Con.MULTIPORT),
        Field(PAD, "I"),
    ),
    DeviceId.BALLOON: (
        Field("num_pages", "I"),
        Field("actual", "I"),
        Field("free_page_hint_cmd_id", "I", Bal.FREE_PAGE_HINT),
        Field("poison_val", "I", Bal.PAGE_POISON),
    ),
    DeviceId.SCSI: (
        Field("num_queues", "I"),
        Field("seg_max", "I"),
        Field("max_sectors", "I"),
        Field("cmd_per_lun", "I"),
        Field("event_info_size", "I"),
        Field("sense_size", "I"),
        Field("cdb_size", "I"),
        Field("max_channel", "H"),
        Field("max_target", "H"),
        Field("max_lun", "I"),
    ),
    DeviceId.GPU: (
        Field("events_read", "I"),
        Field(PAD, "I"),
        Field("num_scanouts", "I"),
        Field("num_capsets", "I"),
    ),
    DeviceId.INPUT: (Field("select", "B"), Field("subsel", "B"), Field("size", "B"), Field(PAD, "133s")),
    DeviceId.VSOCK: (Field("guest_cid", "Q"),),
    DeviceId.CRYPTO: (
        Field("status", "I"),
        Field("max_dataqueues", "I"),
        Field("crypto_services", "I"),
        Field("cipher_algo_l", "I"),
        Field("cipher_algo_h", "I"),
        Field("hash_algo", "I"),
        Field("mac_algo_l", "I"),
        Field("mac_algo_h", "I"),
        Field("aead_algo", "I"),
        Field("max_cipher_key_len", "I"),
        Field("max_auth_key_len", "I"),
        Field("akcipher_algo", "I"),
        Field("max_size", "Q"),
    ),
    DeviceId.IOMMU: (
        Field("page_size_mask", "Q"),
        Field("input_range_start", "Q", Iom.INPUT_RANGE),
        Field("input_range_end", "Q", Iom.INPUT_RANGE),
        Field("domain_range_start", "I", Iom.DOMAIN_RANGE),
        Field("domain_range_end", "I", Iom.DOMAIN_RANGE),
        Field("probe_size", "I", Iom.PROBE),
        Field("bypass", "B", Iom.BYPASS_CONFIG),
        Field(PAD, "3s"),
    ),
    DeviceId.MEM: (
        Field("block_size", "Q"),
        Field("node_id", "H", Mem.ACPI_PXM),
        Field(PAD, "6s"),
        Field("addr", "Q"),
        Field("region_size", "Q"),
        Field("usable_region_size", "Q"),
        Field("plugged_size", "Q"),
        Field("requested_size", "Q"),
    ),
    DeviceId.SOUND: (Field("jacks", "I"), Field("streams", "I"), Field("chmaps", "I")),
    DeviceId.FS: (Field("tag", "text"), Field("num_request_queues", "I"), Field("notify_buf_size", "I", Fs.NOTIFICATION)),
    DeviceId.PMEM: (Field("start", "Q"), Field("size", "Q")),
    DeviceId.GPIO: (Field("ngpio", "H"), Field(PAD, "2s"), Field("gpio_names_size", "I")),
    DeviceId.RNG: (),
    DeviceId.RPMSG: (),
    DeviceId.SCMI: (),
    DeviceId.I2C: (),
}

_SIZES = {DeviceId.NET: 12, DeviceId.BLOCK: 60}
"""Where the table is longer than what every peer of that type can be asked for: up to the MTU; up to write zeroes."""

_MIN_QUEUES = {
    DeviceId.NET: 2,
    DeviceId.CONSOLE: 2,
    DeviceId.BALLOON: 2,
    DeviceId.RPMSG: 2,
    DeviceId.SCSI: 3,
    DeviceId.GPU: 2,
    DeviceId.INPUT: 2,
    DeviceId.VSOCK: 3,
    DeviceId.CRYPTO: 2,
    DeviceId.IOMMU: 2,
    DeviceId.SOUND: 4,
    DeviceId.FS: 2,
}


def mac_text(mac: bytes) -> str:
    """``52:54:00:12:34:56``"""
    return mac.hex(":")


def parse_mac(text: str) -> bytes:
    """Six bytes of ``52:54:00:12:34:56``; ValueError otherwise."""
    parts = text.split(":")
    if len(parts) != 6 or not all(len(part) == 2 and set(part) <= set("0123456789abcdefABCDEF") for part in parts):
        raise ValueError(f"{text!r} is not a MAC address; it is written 52:54:00:12:34:56")
    return bytes(int(part, 16) for part in parts)


def config_layout(device_id: int | None) -> tuple[tuple[int, Field], ...]:
    """(offset, field) of a device type's configuration space; empty where nothing is known."""
    at, layout = 0, []
    for field in _LAYOUTS.get(device_id, ()) if device_id is not None else ():
        layout.append((at, field))
        at += field.size
    return tuple(layout)


def parse_config(device_id: int | None, features: int, data: bytes) -> dict[str, Value]:
    """The fields of *data* (configuration space from offset 0) that *features* make legal, by their names in the spec.

    Numbers are ints, a MAC address and a tag are text. Bytes past the table are ignored, fields past the end of *data* left out.
    """
    return {
        field.name: field.decode(data[at : at + field.size])
        for at, field in config_layout(device_id)
        if field.name and at + field.size <= len(data) and (not field.gate or field.gate & features)
    }


def pack_config(layout: Iterable[Field], values: Mapping[str, Value | bytes]) -> bytes:
    """The configuration space of *layout* with *values* by name; zeroes where the layout has no name. KeyError, ValueError."""
    return b"".join(field.encode(values[field.name]) if field.name else bytes(field.size) for field in layout)


def config_size(device_id: int | None) -> int | None:
    """Bytes of configuration space that a device of this type has at least, for peers that cannot tell; None if unknown or variable (9p)."""
    if device_id is None or device_id not in _LAYOUTS:
        return None
    if device_id in _SIZES:
        return _SIZES[DeviceId(device_id)]
    return sum(field.size for field in _LAYOUTS[device_id])


def min_queues(device_id: int | None) -> int:
    """Virtqueues that a device of this type has at least (virtio 1.2, "Virtqueues" of each type); 1 if unknown."""
    return _MIN_QUEUES.get(DeviceId(device_id), 1) if device_id in set(DeviceId) else 1
