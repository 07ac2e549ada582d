# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""All there is to know of a device at rest, as one value.

Rule of this file: ask, do not assume. Whether an operation is there is decided by asking it where asking changes
nothing that closing does not undo; "native" alone would only repeat what the way to the device promises.
"""

from __future__ import annotations

import errno
import os
from typing import Any

from .. import ops
from ..backends.base import ABSENT, Backend, Capability
from ..errors import reason
from ..flags import BackendFeature, Status, bit_names
from ..virtio.config import parse_config
from ..virtio.features import feature_names
from ..virtio.ids import device_name
from ..wire import EMPTY, ConfigRange, VringState

Answers = dict[ops.Op[Any, Any], Any]
"""What each operation answered: a reply or an OSError."""

_OF_A_RING = (ops.GET_VRING_SIZE, ops.GET_VRING_GROUP, ops.GET_VRING_DESC_GROUP, ops.GET_VRING_BASE)
_CHUNK = 256
"""Bytes of configuration space asked for at once: what any peer can send."""


def report(backend: Backend) -> dict[str, Any]:
    """Everything, as JSON takes it; what the device cannot tell is None."""
    answers: Answers = dict(
        zip(
            questions := [op for op in ops.TABLE if op.harmless],
            backend.call_many([(op, EMPTY) for op in questions]),
            strict=True,
        )
    )
    for op in (ops.GET_FEATURES, ops.GET_STATUS):
        if isinstance(answers[op], OSError):
            raise answers[op]
    device_id, features = _value(answers, ops.GET_DEVICE_ID), answers[ops.GET_FEATURES].value
    status, offered = answers[ops.GET_STATUS].value, _value(answers, ops.GET_BACKEND_FEATURES)
    limits = answers[ops.GET_IOVA_RANGE]
    return {
        "target": backend.name,
        "facts": backend.facts(),
        "device": {"id": device_id, "name": None if device_id is None else device_name(device_id)},
        "status": {"value": status, "names": bit_names(Status, status)},
        "features": {"value": f"{features:#x}", "names": feature_names(device_id, features)},
        "backend_features": None if offered is None else {"value": f"{offered:#x}", "names": bit_names(BackendFeature, offered)},
        "queue_size": _value(answers, ops.GET_VRING_NUM),
        "queues": _queues(backend, answers),
        "config": _config(backend, answers, device_id, features),
        "iova_range": None if isinstance(limits, OSError) else {"first": f"{limits.first:#x}", "last": f"{limits.last:#x}"},
        "groups": _value(answers, ops.GET_GROUP_NUM),
        "address_spaces": _value(answers, ops.GET_AS_NUM),
        "operations": _operations(backend, answers, offered or 0),
    }


def _value(answers: Answers, op: ops.Op[Any, Any]) -> int | None:
    reply = answers[op]
    return None if isinstance(reply, OSError) else int(reply.value)


def _queues(backend: Backend, answers: Answers) -> list[dict[str, int | None]] | None:
    """What each ring tells; needs an owner, which closing takes away again."""
    count = _value(answers, ops.GET_VQS_COUNT)
    if not count:
        return None
    answers[ops.SET_OWNER] = backend.call(ops.SET_OWNER, EMPTY)
    replies = backend.call_many([(op, VringState(index, 0)) for index in range(count) for op in _OF_A_RING])
    answers.update(zip(_OF_A_RING, replies, strict=False))
    queues = []
    for index in range(count):
        of_ring = replies[index * len(_OF_A_RING) : (index + 1) * len(_OF_A_RING)]
        values = [None if isinstance(reply, OSError) else reply.num for reply in of_ring]
        queues.append({"index": index, "size": values[0], "group": values[1], "descriptor_group": values[2], "base": values[3]})
    return queues


def _config(backend: Backend, answers: Answers, device_id: int | None, features: int) -> dict[str, Any] | None:
    size = _value(answers, ops.GET_CONFIG_SIZE)
    if size is None:
        return None
    data = b""
    try:
        while len(data) < size:
            data += backend.call(ops.GET_CONFIG, ConfigRange(len(data), min(size - len(data), _CHUNK))).data
    except OSError as error:
        answers[ops.GET_CONFIG] = error
        if not data:
            return {"size": size, "data": None, "fields": {}, "error": reason(error)}
    return {"size": size, "data": data.hex(), "fields": parse_config(device_id, features, data)}


def _operations(backend: Backend, answers: Answers, offered: int) -> dict[str, dict[str, str]]:
    found = {}
    for op in ops.TABLE:
        capability = backend.capability(op)
        answer = answers.get(op)
        if capability.level == ABSENT:
            pass  # and it says why
        elif isinstance(answer, OSError) and answer.errno == errno.EOPNOTSUPP:
            why = reason(answer).partition(f"{os.strerror(errno.EOPNOTSUPP)}: ")[2]
            capability = Capability(ABSENT, why or "the device does not do it")
        elif op.gate is not None and not offered & op.gate:
            capability = Capability(ABSENT, f"back-end feature {op.gate.name} not offered")
        found[op.name] = {"level": capability.level, "note": capability.note}
    return found
