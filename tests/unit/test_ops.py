# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The table as a table, and what is derived from it: hints, capabilities, the legacy column."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from vdpa_bridge import ops
from vdpa_bridge.backends.base import ABSENT, EMULATED, NATIVE, Backend, Capability
from vdpa_bridge.backends.hints import hint, lacking
from vdpa_bridge.backends.model import ModelBackend
from vdpa_bridge.backends.vhost_net import VhostNet
from vdpa_bridge.backends.vhost_user_legacy import VhostUserLegacy
from vdpa_bridge.backends.vhost_vsock import VhostVsock
from vdpa_bridge.flags import BackendFeature, Feature, ProtocolFeature, Status, bit_names, status_text
from vdpa_bridge.ops import Absent, Emulated, Message, Op, Rep, Req
from vdpa_bridge.vhost_user import messages as m
from vdpa_bridge.wire import EMPTY, U64, Empty, VringState


def test_table_is_complete() -> None:
    """What linux/vhost.h has for vDPA, by name."""
    assert set(ops.BY_NAME) == {
        *("GET_FEATURES", "SET_FEATURES", "SET_OWNER", "GET_BACKEND_FEATURES", "SET_BACKEND_FEATURES"),
        *("GET_DEVICE_ID", "GET_STATUS", "SET_STATUS", "GET_CONFIG", "SET_CONFIG", "GET_CONFIG_SIZE", "SET_CONFIG_CALL"),
        *("GET_VRING_NUM", "GET_VRING_SIZE", "GET_VQS_COUNT", "SET_VRING_NUM", "SET_VRING_ADDR", "SET_VRING_BASE", "GET_VRING_BASE"),
        *("SET_VRING_KICK", "SET_VRING_CALL", "SET_VRING_ERR", "SET_VRING_ENABLE"),
        *("GET_IOVA_RANGE", "GET_GROUP_NUM", "GET_AS_NUM", "GET_VRING_GROUP", "GET_VRING_DESC_GROUP", "SET_GROUP_ASID"),
        *("SUSPEND", "RESUME", "IOTLB_UPDATE", "IOTLB_INVALIDATE", "IOTLB_BATCH_BEGIN", "IOTLB_BATCH_END"),
    }
    assert set(ops.BY_NAME) <= set(ops.__all__)


@pytest.mark.parametrize("op", ops.TABLE, ids=lambda op: op.name)
def test_legacy_column(op: Op[Any, Any]) -> None:
    """A message is one that we have a row for, with the same gate; everything else says how or why."""
    match op.legacy:
        case Message(number, needs, _):
            assert m.BY_NUMBER[number].needs in (needs, None)
        case Emulated(how):
            assert how
        case Absent(why):
            assert why


@pytest.mark.parametrize("op", ops.TABLE, ids=lambda op: op.name)
def test_everybody_has_a_method(op: Op[Any, Any]) -> None:
    """An operation that a home does not have is one that its column, or the model, calls absent."""
    method = f"_{op.name.lower()}"
    assert hasattr(VhostUserLegacy, method) != isinstance(op.legacy, Absent)
    for home in (ModelBackend, VhostNet, VhostVsock):
        assert hasattr(home, method) or op is ops.GET_VRING_DESC_GROUP


def test_hashed_by_identity() -> None:
    assert len(set(ops.TABLE)) == len(ops.TABLE)
    assert ops.BY_NAME["SET_OWNER"] == ops.SET_OWNER
    assert repr(ops.GET_STATUS) == f"<GET_STATUS {ops.GET_STATUS.number:#010x}>"


def test_harmless() -> None:
    """Questions without arguments, none of which needs an owner."""
    harmless = {op.name for op in ops.TABLE if op.harmless}
    assert {"GET_FEATURES", "GET_STATUS", "GET_AS_NUM", "GET_IOVA_RANGE"} <= harmless
    assert not {name for name in harmless if name.startswith(("SET_", "IOTLB"))}
    assert "GET_VRING_BASE" not in harmless


def test_hints() -> None:
    assert "GET_VQS_COUNT" in hint(ops.SET_VRING_NUM, errno.ENOBUFS)
    assert "SET_OWNER" in hint(ops.SET_VRING_NUM, errno.EPERM)
    assert "eventfd" in hint(ops.SET_VRING_KICK, errno.EINVAL)
    assert "eventfd" in hint(ops.SET_CONFIG_CALL, errno.EBADF)
    assert hint(ops.GET_FEATURES, errno.EIO) == ""


def test_what_lacking_means() -> None:
    """EOPNOTSUPP of an operation that chooses among values is about the value."""
    assert lacking(ops.SUSPEND, errno.EOPNOTSUPP)
    assert not lacking(ops.SUSPEND, errno.EINVAL)
    assert not lacking(ops.SET_BACKEND_FEATURES, errno.EOPNOTSUPP)
    assert not lacking(ops.SET_VRING_ADDR, errno.EOPNOTSUPP)


def test_bits() -> None:
    """Bits without a name count as much as those with one."""
    assert bit_names(Feature, Feature.VERSION_1 | 1 << 57) == ["VERSION_1", "bit 57"]
    assert Feature.VERSION_1 | 1 << 57 == 1 << 32 | 1 << 57
    assert ((1 << 64) - 1) & ~ProtocolFeature.VDPA == (1 << 64) - 1 - (1 << 56)
    assert (1 << 40) & ~(BackendFeature.SUSPEND | BackendFeature.RESUME) == 1 << 40
    assert status_text(Status.ACKNOWLEDGE | Status.DRIVER | 0x20) == "0x23 (ACKNOWLEDGE|DRIVER|bit 5)"


class _Refusing(Backend):
    """Answers GET_FEATURES and refuses the rest."""

    name = "refusing"

    def call(self, op: Op[Req, Rep], request: Req) -> Rep:
        if op is ops.GET_FEATURES:
            return U64(7)  # type: ignore[return-value]
        raise OSError(errno.EPERM, op.name)

    def capability(self, op: Op[Any, Any]) -> Capability:
        return Capability(NATIVE)

    def close(self) -> None:
        """Nothing to close."""


def test_call_many_goes_on_after_an_error() -> None:
    with _Refusing() as backend:
        first, second, third = backend.call_many([(ops.SET_OWNER, EMPTY), (ops.GET_FEATURES, EMPTY), (ops.SET_VRING_NUM, VringState(0, 1))])
    assert first.errno == third.errno == errno.EPERM
    assert second == U64(7)
    assert backend.facts() == {}
    assert set(backend.capabilities()) == set(ops.BY_NAME)
    assert {NATIVE, EMULATED, ABSENT} == {"native", "emulated", "absent"}
    assert ops.SET_OWNER.request is Empty
