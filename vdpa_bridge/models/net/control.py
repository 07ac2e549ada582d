# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a driver says over the control queue of a network device (virtio 1.2, 5.1.6.5), and which frames it gets by that.

Rule of this file: a command changes something only when all of it is right, and when its feature was accepted.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from ...engines import NetFilter
from ...netdev import HEADER
from ...virtio.features import NetFeature as F
from .offload import GUEST_OFFLOADS

LONGEST_COMMAND = 1 << 16
_BROADCAST = b"\xff" * 6
_VLAN_TAG = b"\x81\0"
_MOST_MACS = 64
"""Addresses in a table; one that is longer lets all through, as QEMU does."""
_RX, _MAC, _VLAN, _ANNOUNCE, _PAIRS, _OFFLOADS = range(6)
_RX_MODES = ("promisc", "allmulti", "alluni", "nomulti", "nouni", "nobcast")
"""By the number of the command; all but the first two take CTRL_RX_EXTRA."""


class Control:
    """The state that commands change. Synchronization: as the model's."""

    def __init__(self, mac: bytes, pairs: int) -> None:
        self.mac = mac
        self.pairs = pairs
        """How many there are."""
        self.announce = False
        """Whether the driver is asked to tell the network where it is now."""
        self.start(0)

    def start(self, features: int) -> None:
        """A driver that has said nothing gets all frames, on all pairs; with CTRL_VLAN, those with a tag when it names that."""
        self.features = features
        self.used = self.pairs
        """How many pairs the driver wants to use."""
        self.offloads = features & GUEST_OFFLOADS
        self.modes = {mode: mode == "promisc" for mode in _RX_MODES}
        self.tables: list[set[bytes] | None] = [set(), set()]
        """Unicast and multicast addresses; None for any."""
        self.vlans: set[int] = set()

    def carry_out(self, command: bytes) -> bool:
        """Whether *command* is one, and done."""
        if len(command) < 2:
            return False
        group, number, value = command[0], command[1], command[2:]
        if group == _RX and number < len(_RX_MODES):
            return self._set_mode(number, value)
        if group == _MAC and number == 0:
            return bool(self.features & F.CTRL_RX) and self._set_tables(value)
        if group == _MAC and number == 1:
            return self._set_mac(value)
        if group == _VLAN and number < 2:
            return self._set_vlan(value, number == 0)
        if (group, number) == (_ANNOUNCE, 0):
            told, self.announce = self.announce, False
            return told
        if (group, number) == (_PAIRS, 0):
            return self._set_pairs(value)
        if (group, number) == (_OFFLOADS, 0):
            return self._set_offloads(value)
        return False

    def _set_mode(self, number: int, value: bytes) -> bool:
        if len(value) != 1 or not self.features & (F.CTRL_RX if number < 2 else F.CTRL_RX_EXTRA):
            return False
        self.modes[_RX_MODES[number]] = bool(value[0])
        return True

    def _set_mac(self, value: bytes) -> bool:
        if len(value) != 6:
            return False
        self.mac = value
        return True

    def _set_tables(self, value: bytes) -> bool:
        tables: list[set[bytes] | None] = []
        for _ in range(2):
            if len(value) < 4:
                return False
            count, value = struct.unpack_from("<I", value)[0], value[4:]
            if len(value) < 6 * count:
                return False
            tables.append({value[at : at + 6] for at in range(0, 6 * count, 6)} if count <= _MOST_MACS else None)
            value = value[6 * count :]
        if value:
            return False
        self.tables = tables
        return True

    def _set_vlan(self, value: bytes, add: bool) -> bool:
        tag = int.from_bytes(value, "little")
        if len(value) != 2 or tag > 0xFFF or not self.features & F.CTRL_VLAN:
            return False
        (self.vlans.add if add else self.vlans.discard)(tag)
        return True

    def _set_pairs(self, value: bytes) -> bool:
        pairs = int.from_bytes(value, "little")
        if len(value) != 2 or not 1 <= pairs <= self.pairs or not self.features & F.MQ:
            return False
        self.used = pairs
        return True

    def _set_offloads(self, value: bytes) -> bool:
        offloads = int.from_bytes(value, "little")
        if len(value) != 8 or offloads & ~(self.features & GUEST_OFFLOADS) or not self.features & F.CTRL_GUEST_OFFLOADS:
            return False
        self.offloads = offloads
        return True

    def accepts(self, packet: bytes) -> bool:
        """Whether the driver wants a frame that came."""
        modes = self.modes
        if modes["promisc"]:
            return True
        to = packet[HEADER : HEADER + 6]
        if self.features & F.CTRL_VLAN and packet[HEADER + 12 : HEADER + 14] == _VLAN_TAG:
            tag = int.from_bytes(packet[HEADER + 14 : HEADER + 16], "big") & 0xFFF
            if tag not in self.vlans:
                return False
        if to == _BROADCAST:
            return not modes["nobcast"]
        group = to[0] & 1
        if modes["nomulti" if group else "nouni"]:
            return False
        table = self.tables[group]
        return modes["allmulti" if group else "alluni"] or table is None or to in table or (not group and to == self.mac)

    def filter(self) -> NetFilter:
        """The same for an engine, as it is now."""
        modes = self.modes
        any_unicast, any_multicast = (table is None for table in self.tables)
        return NetFilter(
            self.mac,
            promisc=modes["promisc"],
            every=(modes["alluni"] or any_unicast, modes["allmulti"] or any_multicast),
            none=(modes["nouni"], modes["nomulti"]),
            nobcast=modes["nobcast"],
            tables=(self.tables[0] or (), self.tables[1] or ()),
            vlans=self.vlans if self.features & F.CTRL_VLAN else None,
        )

    def snapshot(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {
            "mac": self.mac.hex(),
            "used": self.used,
            "offloads": self.offloads,
            "modes": [mode for mode, on in self.modes.items() if on],
            "tables": [None if table is None else sorted(mac.hex() for mac in table) for table in self.tables],
            "vlans": sorted(self.vlans),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """The reverse; ValueError for what no driver can have said."""
        try:
            mac = bytes.fromhex(state["mac"])
            tables = [None if table is None else {bytes.fromhex(mac) for mac in table} for table in state["tables"]]
            modes = {mode: mode in state["modes"] for mode in _RX_MODES}
            used, offloads, vlans = int(state["used"]), int(state["offloads"]), {int(tag) for tag in state["vlans"]}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the state of a network device: {error!r}") from None
        if len(mac) != 6 or len(tables) != 2 or not 1 <= used <= self.pairs:
            raise ValueError("not the state of a network device with these queue pairs")
        self.mac, self.tables, self.modes, self.used, self.offloads, self.vlans = mac, tables, modes, used, offloads, vlans
