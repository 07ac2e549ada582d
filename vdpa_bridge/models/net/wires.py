# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Which wire the options of a network device name."""

from __future__ import annotations

from collections.abc import Mapping

from ...netdev import Capture, DgramNetdev, Netdev, Playback, StreamClient, StreamServer, TapNetdev, UserNetdev
from ..options import parse_switch

OPTIONS = ("tap", "dgram", "stream", "server", "user", "tcp-ports", "udp-ports", "pcap-in", "pcap-out")
_KINDS = ("tap", "dgram", "stream", "user", "pcap-in")
_WITH = {"server": "stream", "tcp-ports": "user", "udp-ports": "user"}


def open_wire(options: Mapping[str, str], pairs: int, mtu: int) -> Netdev | None:
    """The other end, None for a loop; ValueError for options that do not go together, OSError with what to do."""
    chosen = [kind for kind in _KINDS if kind in options and not (kind == "user" and not parse_switch("user", options["user"]))]
    if len(chosen) > 1:
        raise ValueError(f"{chosen[0]}= and {chosen[1]}=: a device has one wire; write one of {', '.join(f'{kind}=' for kind in _KINDS)}")
    for option, kind in _WITH.items():
        if option in options and chosen != [kind]:
            raise ValueError(f"{option}= goes with {kind}=")
    if not chosen and "pcap-out" not in options:
        return None
    if pairs > 1 and chosen != ["tap"]:
        raise ValueError(f"pairs={pairs}: a tap and a loop have several queue pairs, {chosen[0] if chosen else 'pcap-out'}= has one")
    capture = Capture(options["pcap-out"]) if "pcap-out" in options else None
    try:
        wire = _open(chosen[0] if chosen else "", options, pairs, mtu)
    except BaseException:
        if capture is not None:
            capture.close()
        raise
    wire.capture = capture
    return wire


def _open(kind: str, options: Mapping[str, str], pairs: int, mtu: int) -> Netdev:
    if kind == "tap":
        return TapNetdev(options["tap"], pairs, mtu)
    if kind == "dgram":
        local, _, remote = options["dgram"].partition(",")
        return DgramNetdev(local, remote)
    if kind == "stream":
        server = parse_switch("server", options.get("server", "off"))
        return StreamServer(options["stream"]) if server else StreamClient(options["stream"])
    if kind == "user":
        words = [(option, options[name]) for option, name in (("--tcp-ports", "tcp-ports"), ("--udp-ports", "udp-ports")) if name in options]
        return UserNetdev([word for pair in words for word in pair])
    return Playback(options.get("pcap-in", ""))
