# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The programs of the back-end conventions as processes, and what QEMU's vhost-user.json demands of what they say.

Rule of this file: the schema's rules are written down anew, in its strict reading: a member that it does not name is wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from tests.support.service import Serve, serving

TYPES = {"9p", "balloon", "block", "caif", "console", "crypto", "gpu", "input", "net", "rng", "rpmsg", "rproc-serial", "scsi", "vsock", "fs"}
"""``VHostUserBackendType``."""
OTHERS = {"gpio", "i2c"}
"""Types of which the schema knows nothing: programs that say so, without a descriptor."""
FEATURES = {"block": {"read-only", "blk-file"}, "input": {"evdev-path", "no-grab"}, "gpu": {"render-node", "virgl"}}
"""Of the types that have a ``VHostUserBackendCapabilities`` structure of their own: there, ``features`` must be."""


def command(kind: str) -> list[str]:
    """What an installed ``vhost-user-vdpa-KIND`` does, from wherever the package is."""
    return [sys.executable, "-c", f"from vdpa_bridge.cli.programs import {kind}; {kind}()"]


@contextmanager
def program(kind: str, *arguments: str, fds: Sequence[int] = (), **more: Any) -> Iterator[Serve]:
    with serving(*arguments, command=command(kind), fds=fds, **more) as process:
        yield process


def _texts(value: object) -> list[str]:
    assert isinstance(value, list)
    assert all(isinstance(each, str) for each in value)
    return value


def capabilities(text: str) -> dict[str, Any]:
    """*text* as a ``VHostUserBackendCapabilities``."""
    said = json.loads(text)
    assert isinstance(said, dict)
    assert said["type"] in TYPES | OTHERS
    known = FEATURES.get(said["type"])
    assert set(said) == ({"type"} if known is None else {"type", "features"})
    if known is not None:
        features = _texts(said["features"])
        assert len(features) == len(set(features))
        assert set(features) <= known
    return said


def descriptor(text: str) -> dict[str, Any]:
    """*text* as a ``VhostUserBackend``."""
    said = json.loads(text)
    assert isinstance(said, dict)
    assert {"description", "type", "binary"} <= set(said) <= {"description", "type", "binary", "tags"}
    assert isinstance(said["description"], str)
    assert said["type"] in TYPES
    assert PurePosixPath(said["binary"]).is_absolute()
    _texts(said.get("tags", []))
    return said
