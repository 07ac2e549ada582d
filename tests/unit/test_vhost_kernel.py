# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The kernel's own vhost as far as no kernel is needed: names that cannot be, and what is said about them."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from vdpa_bridge import Target, connect
from vdpa_bridge.backends.vhost_vsock import VhostVsock


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vhost-net:", "a target is"),
        ("vhost-net:tap0?queues=2", "there is: mac"),
        ("vhost-net:tap0?mac=52:54", "not a MAC address"),
        ("vhost-net:a/b", "no name of an interface"),
        ("vhost-vsock:", "a target is"),
        ("vhost-vsock:2", "from 3 to 4294967294"),
        ("vhost-vsock:4294967295", "from 3 to 4294967294"),
        ("vhost-vsock:-3", "from 3 to 4294967294"),
        ("vhost-vsock:guest", "from 3 to 4294967294"),
        ("vhost-vsock:3?type=vsock", "there is: none"),
        ("/dev/vhost-net", "vhost-net:TAP"),
        ("/dev/vhost-vsock", "vhost-vsock:CID"),
    ],
)
def test_targets_that_are_none(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Target.parse(text).open()


def test_kernel_without_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VhostVsock, "node", str(tmp_path / "vhost-vsock"))
    with pytest.raises(OSError, match="modprobe vhost_vsock") as refused:
        connect("vhost-vsock:42")
    assert refused.value.errno == errno.ENOENT


def test_node_of_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is no vhost node is given back."""
    monkeypatch.setattr(VhostVsock, "node", "/dev/null")
    with pytest.raises(OSError, match="vhost-vsock:42") as refused:
        connect("vhost-vsock:42")
    assert refused.value.errno == errno.ENOTTY
