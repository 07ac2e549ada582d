# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A network device without a wire: the engine in C and the model in Python do the same by every rule."""

from __future__ import annotations

import pytest

from tests.support.driven import frame, net, quiet
from vdpa_bridge.engines import NetEngine
from vdpa_bridge.models import make_model

__all__ = ["quiet"]  # an autouse fixture

OWN, OTHER = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")


@pytest.mark.parametrize("threads", ["0", "1"], ids=["model", "engine"])
@pytest.mark.parametrize("rule", ["loop", "echo", "sink", "source"])
def test_what_comes_back(rule: str, threads: str) -> None:
    """In the order in which it was sent; the address that a driver sets counts at once."""
    frames = [to + frame(at)[6:] for at, to in enumerate((OWN, OTHER, b"\1" + OWN[1:], b"\xff" * 6) * 50)]
    back = {"echo": frames, "loop": [each for each in frames if each[:6] != OTHER]}.get(rule, [])
    with net(make_model("net", {"rule": rule, "threads": threads})) as nic:
        if rule == "source":
            filled = nic.receive_many(1000)
            assert set(filled) == {b"\xff" * 6 + OWN + bytes.fromhex("88b5") + bytes(46)}
            return
        for at in range(0, len(frames), 40):
            nic.send_many(frames[at : at + 40])
            expected = [each for each in back if each in frames[at : at + 40]]
            assert nic.receive_many(len(expected)) == expected
        nic.set_mac("02:00:00:00:00:02")
        nic.send_many([OTHER + frame(1)[6:], OWN + frame(2)[6:]])
        if rule == "loop":
            assert nic.receive() == OTHER + frame(1)[6:]
        if rule == "echo":
            assert nic.receive_many(2) == [OTHER + frame(1)[6:], OWN + frame(2)[6:]]
        with pytest.raises(TimeoutError):
            nic.receive(timeout=0.05)


def test_wrong_options() -> None:
    for options, text in (({"rule": "hub"}, "rule=hub; it is loop, echo"), ({"threads": "2"}, "threads=2"), ({"rule": "echo", "pcap-in": "/dev/null"}, "without a wire")):
        with pytest.raises((ValueError, OSError), match=text):
            make_model("net", options)
    for arguments in ((0, "hub", 12), (0, "echo", 11)):
        with pytest.raises(ValueError):
            NetEngine(*arguments)
    with pytest.raises(ValueError, match="5 bytes"):
        NetEngine(0, "echo", 12).follow(b"short", True)
