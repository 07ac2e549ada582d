# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Configuration space: bounds, and that pieces are pieces of the whole."""

from __future__ import annotations

import errno

import pytest

from tests.support.probe import Probe
from vdpa_bridge import ops
from vdpa_bridge.wire import ConfigData, ConfigRange, EventFile

PART = 24
"""Bytes that every device type of these tests has at least, and one message of any protocol can carry."""


WRITABLE = {"blk": 32, "net": 0, "vsock": 0}
"""Offset of writeback, of the first byte of the MAC address, of the context id."""


def size_of(probe: Probe) -> int:
    """Bytes of configuration space."""
    return probe.get(ops.GET_CONFIG_SIZE)


@pytest.mark.parametrize("case", ["0+0", "0+size+1", "size+0", "size+1", "far"])
def test_reading_out_of_bounds(probe: Probe, case: str) -> None:
    size = size_of(probe)
    wrong = {"0+0": (0, 0), "0+size+1": (0, size + 1), "size+0": (size, 0), "size+1": (size, 1), "far": (0xFFFFFFFF, 2)}[case]
    probe.expect(errno.EINVAL, ops.GET_CONFIG, ConfigRange(*wrong))


@pytest.mark.parametrize("case", ["0+0", "0+size+1", "size+1", "far"])
def test_writing_out_of_bounds(probe: Probe, case: str) -> None:
    size = size_of(probe)
    offset, length = {"0+0": (0, 0), "0+size+1": (0, size + 1), "size+1": (size, 1), "far": (0xFFFFFFFF, 2)}[case]
    probe.expect(errno.EINVAL, ops.SET_CONFIG, ConfigData(offset, bytes(length)))


def test_pieces(probe: Probe) -> None:
    whole = probe.ask(ops.GET_CONFIG, ConfigRange(0, min(PART, size_of(probe)))).data
    assert any(whole)
    for offset, length in ((0, 1), (1, 3), (2, 6), (len(whole) - 1, 1)):
        reply = probe.ask(ops.GET_CONFIG, ConfigRange(offset, length))
        assert reply == ConfigData(offset, whole[offset : offset + length])


def test_last_byte(probe: Probe) -> None:
    size = size_of(probe)
    probe.expect(0, ops.GET_CONFIG, ConfigRange(size - 1, 1), "beyond what one message carries" if size > 256 else "")


def test_writing(probe: Probe) -> None:
    """Whether the device takes it is the device's affair; the same byte does no harm. QEMU takes this one alone."""
    where = WRITABLE[probe.home.kind]
    same = probe.ask(ops.GET_CONFIG, ConfigRange(where, 1))
    probe.expect(0, ops.SET_CONFIG, same)
    assert probe.ask(ops.GET_CONFIG, ConfigRange(where, 1)) == same


def test_config_call(probe: Probe) -> None:
    probe.expect(0, ops.SET_CONFIG_CALL, EventFile(probe.eventfd()))
    probe.expect(0, ops.SET_CONFIG_CALL, EventFile(probe.eventfd()))
    probe.expect(0, ops.SET_CONFIG_CALL, EventFile(-1))
    probe.expect(0, ops.SET_CONFIG_CALL, EventFile(-1))
    probe.expect(errno.EBADF, ops.SET_CONFIG_CALL, EventFile(1 << 20))
    probe.expect(errno.EINVAL, ops.SET_CONFIG_CALL, EventFile(probe.region().fd))
