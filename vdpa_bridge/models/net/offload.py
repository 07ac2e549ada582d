# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a virtio_net_hdr asks for, checked: work that one side leaves to the other (virtio 1.2, 5.1.6).

Rule of this file: a packet leaves a device only with what was agreed on and with what can be done: a checksum within the
frame, segments of some size. The rest of a header means nothing and is cleared.
"""

from __future__ import annotations

import struct

from ...netdev import HEADER, PLAIN, SHORTEST
from ...virtio.features import NetFeature as F

NEEDS_CSUM, DATA_VALID = 1, 2
GSO_NONE, GSO_TCPV4, GSO_UDP, GSO_TCPV6, GSO_UDP_L4, GSO_ECN = 0, 1, 3, 4, 5, 0x80

_FIELDS = struct.Struct("<BBHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset; num_buffers follows
_SENT = {GSO_TCPV4: F.HOST_TSO4, GSO_TCPV6: F.HOST_TSO6, GSO_UDP: F.HOST_UFO, GSO_UDP_L4: F.HOST_USO}
_RECEIVED = {
    GSO_TCPV4: F.GUEST_TSO4,
    GSO_TCPV6: F.GUEST_TSO6,
    GSO_UDP: F.GUEST_UFO,
    GSO_UDP_L4: F.GUEST_USO4 | F.GUEST_USO6,
}
GUEST_OFFLOADS = F.GUEST_CSUM | F.GUEST_TSO4 | F.GUEST_TSO6 | F.GUEST_ECN | F.GUEST_UFO | F.GUEST_USO4 | F.GUEST_USO6
"""Which a driver can put on and off while it runs (virtio 1.2, 5.1.6.5.6)."""


def terms(features: int, sent: bool) -> tuple[bool, bool, bool, int]:
    """The same rules in the words of an engine (``_virtqueue.Terms``)."""
    kinds = _SENT if sent else _RECEIVED
    gso = sum(1 << kind for kind, any_of in kinds.items() if features & any_of)
    if sent:
        return bool(features & F.CSUM), bool(features & F.HOST_ECN), False, gso
    csum = bool(features & F.GUEST_CSUM)
    return csum, bool(features & F.GUEST_ECN), csum, gso


def sent(packet: bytes, features: int) -> bytes | None:
    """What a driver that accepted *features* sends, as it can be handed on; None for what it may not leave undone, and for what is no frame."""
    if len(packet) < HEADER + SHORTEST:
        return None
    if packet[0] & NEEDS_CSUM == 0 and packet[1] == GSO_NONE:
        return packet if packet.startswith(PLAIN) else PLAIN + packet[HEADER:]
    return _checked(packet, bool(features & F.CSUM), bool(features & F.HOST_ECN), _SENT.get(packet[1] & ~GSO_ECN, 0), features)


def received(packet: bytes, features: int) -> bytes | None:
    """What comes from outside, as a driver that accepted *features* gets it; None for what it would have to finish and cannot."""
    if packet[0] & NEEDS_CSUM == 0 and packet[1] == GSO_NONE:
        valid = packet[0] & DATA_VALID if features & F.GUEST_CSUM else 0
        return bytes((valid,)) + PLAIN[1:] + packet[HEADER:] if packet[:HEADER] != PLAIN else packet
    return _checked(packet, bool(features & F.GUEST_CSUM), bool(features & F.GUEST_ECN), _RECEIVED.get(packet[1] & ~GSO_ECN, 0), features)


def _checked(packet: bytes, csum: bool, ecn: bool, gso: int, features: int) -> bytes | None:
    """The packet with nothing but what it asks for in its header; None when it may not, or asks for what cannot be done."""
    flags, kind, header, size, start, offset = _FIELDS.unpack_from(packet)
    length = len(packet) - HEADER
    if flags & NEEDS_CSUM == 0:
        start = offset = 0
    elif not csum or start < SHORTEST or start + offset + 2 > length:
        return None
    if kind == GSO_NONE:
        header = size = 0
    else:
        agreed = gso & features and (not kind & GSO_ECN or (ecn and kind & ~GSO_ECN in (GSO_TCPV4, GSO_TCPV6)))
        if not agreed or not size or (not flags & NEEDS_CSUM and kind != GSO_UDP):
            return None
    return _FIELDS.pack(flags & NEEDS_CSUM, kind, min(header, length), size, start, offset) + PLAIN[_FIELDS.size :] + packet[HEADER:]
