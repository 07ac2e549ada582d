# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Where the frames of network devices go: taps, sockets, user networking, captures. Nothing here knows virtqueues."""

from .base import HEADER, LONGEST, PLAIN, SHORTEST, Netdev
from .dgram import DgramNetdev
from .pcap import Capture, Playback
from .stream import StreamClient, StreamServer
from .tap import TapNetdev
from .user import UserNetdev

__all__ = [
    "HEADER",
    "LONGEST",
    "PLAIN",
    "SHORTEST",
    "Capture",
    "DgramNetdev",
    "Netdev",
    "Playback",
    "StreamClient",
    "StreamServer",
    "TapNetdev",
    "UserNetdev",
]
