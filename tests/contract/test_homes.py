# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""That the homes are there at all, and are opened and closed alike."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.support.homes import DEVICE_IDS, HOMES, TIMEOUT, Home, Opener
from tests.support.probe import Probe, probing
from vdpa_bridge import ops
from vdpa_bridge.backends.base import ABSENT, EMULATED, NATIVE
from vdpa_bridge.differences import ROWS, documented
from vdpa_bridge.errors import PeerTimeout
from vdpa_bridge.wire import EMPTY


@pytest.mark.parametrize("home", [pytest.param(h, id=str(h), marks=[getattr(pytest.mark, h.mark)] if h.mark else []) for h in HOMES])
def test_home_is_there(home: Home) -> None:
    """The other tests run only in homes that are; this one tells of those that are not."""
    if home.missing:
        pytest.skip(home.missing)
    with home.start(home.kind) as opener, opener() as backend:
        assert backend.call(ops.GET_DEVICE_ID, EMPTY).value == DEVICE_IDS[home.kind]


def test_rows_of_the_table_of_differences_are_distinct() -> None:
    keys = [(row.home, row.operation, row.scenario) for row in ROWS]
    assert len(set(keys)) == len(keys)
    tried = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert [row for row in ROWS if f'"{row.scenario}"' not in tried] == []
    assert {row.operation for row in ROWS} <= set(ops.BY_NAME) | {"open"}
    assert {row.home for row in ROWS} <= {trait for home in HOMES for trait in home.traits}


def test_capabilities_name_every_operation(probe: Probe) -> None:
    capabilities = probe.backend.capabilities()
    assert list(capabilities) == list(ops.BY_NAME)
    assert all(c.level in (NATIVE, EMULATED, ABSENT) for c in capabilities.values())
    assert all(c.note for c in capabilities.values() if c.level == ABSENT)
    assert probe.backend.name
    assert set(probe.backend.traits) <= set(probe.home.traits)
    assert set(probe.home.traits) - set(probe.backend.traits) <= {"qemu-storage-daemon", "libvduse"}, "a home that no back-end can tell"
    assert probe.backend.facts()["transport"]


def test_second_open_is_refused(home: Home, opener: Opener) -> None:
    row = documented(home.traits, "open", "while somebody else has it open")
    with opener() as first:
        if row is None:
            with pytest.raises(OSError) as refused:
                opener()
            assert refused.value.errno == errno.EBUSY
        elif home.mark != "peers":  # the storage daemon takes more than one connection; which is its own affair
            with pytest.raises(PeerTimeout):
                _impatient(home, first.name)
        assert first.call(ops.GET_STATUS, EMPTY).value == 0
    with opener() as second:
        assert second.call(ops.GET_STATUS, EMPTY).value == 0


def _impatient(home: Home, name: str) -> None:
    from tests.support.homes import connector

    path = name.removeprefix("vhost-user:")
    connector(path, home.kind, "prefer", TIMEOUT / 50)()


def test_close_is_idempotent_and_final(opener: Opener) -> None:
    backend = opener()
    backend.close()
    backend.close()
    with pytest.raises((OSError, ConnectionError)):
        backend.call(ops.GET_STATUS, EMPTY)


def test_close_resets_and_drops_all(home: Home, opener: Opener) -> None:
    """Whatever the state, the next one finds the device as new."""
    for _ in range(2):
        with probing(home, opener()) as probe:
            assert probe.get(ops.GET_STATUS) == 0
            probe.run()
