# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The worked example of docs/vhost-user-vdpa.md, byte for byte against our back-end and our front-end's encoder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vdpa_bridge import ProtocolFeature, Target, ops
from vdpa_bridge.flags import VHOST_USER_F_PROTOCOL_FEATURES
from vdpa_bridge.vhost_user.framing import HEADER, Receiver, frame
from vdpa_bridge.vhost_user.messages import message_name
from vdpa_bridge.vhost_user.session import Session
from vdpa_bridge.vhost_user.vdpa_mode import HELLO_OP, MAX_PAYLOAD, OUR_HELLO, fds_wanted, request_bytes
from vdpa_bridge.wire import EMPTY, U64, ConfigRange, IotlbUpdate, Iova, VringFile

SPEC = Path(__file__).parents[2] / "docs" / "vhost-user-vdpa.md"


@dataclass
class Line:
    sent: bool
    data: bytes
    word: str
    descriptor: str


def example() -> list[Line]:
    block = re.search(r"```wire\n(.*?)```", SPEC.read_text(), re.S)
    assert block is not None
    lines = []
    for text in block[1].splitlines():
        match = re.match(r"([<>])((?: +(?:[0-9a-f]{2})+(?= |$))+)(?: +@([\w-]+))?(?: +\+(\w+))?", text)
        assert match is not None, text
        lines.append(Line(match[1] == ">", bytes.fromhex(match[2].replace(" ", "")), match[3] or "", match[4] or ""))
    return lines


@pytest.fixture
def descriptors() -> Iterator[dict[str, int]]:
    made = {"eventfd": os.eventfd(0), "memfd": os.memfd_create("spec")}
    os.ftruncate(made["memfd"], 65536)
    yield made
    for fd in made.values():
        os.close(fd)


def test_back_end_answers_as_written(descriptors: dict[str, int]) -> None:
    target = Target.parse("model:blk?size=1M")
    session = Session(target.open())
    receiver = Receiver(fds_wanted, MAX_PAYLOAD, message_name)
    answers = bytearray()
    checked = 0
    try:
        for line in example():
            if line.sent:
                assert not answers, f"the back-end said more than the example: {answers.hex()}"
                receiver.feed(line.data, [os.dup(descriptors[line.descriptor])] if line.descriptor else [])
                message = receiver.next()
                assert message is not None
                answers += session.handle(message)
                continue
            expected = line.data
            assert answers[: len(expected)] == expected
            del answers[: len(expected)]
            if line.word:
                word = U64.unpack(answers[:8]).value
                assert word & (VHOST_USER_F_PROTOCOL_FEATURES if line.word == "features" else ProtocolFeature.VDPA)
                del answers[:8]
            checked += 1
        assert not answers
        assert checked >= 12
    finally:
        receiver.close()
        session.close()
        target.close()


def test_front_end_sends_as_written() -> None:
    sent = [line for line in example() if line.sent]
    eventfd, memfd = 7, 8
    ours = [
        (frame(1), ()),
        (frame(15), ()),
        (frame(16, U64(ProtocolFeature.VDPA).pack()), ()),
        (frame(HELLO_OP.number, OUR_HELLO.pack()), ()),
        request_bytes(ops.GET_STATUS, EMPTY),
        request_bytes(ops.SET_OWNER, EMPTY),
        request_bytes(ops.SET_OWNER, EMPTY),
        request_bytes(ops.IOTLB_UPDATE, IotlbUpdate(Iova(0x100000), 0x10000, memfd)),
        request_bytes(ops.SET_VRING_KICK, VringFile(0, eventfd)),
        request_bytes(ops.GET_CONFIG, ConfigRange(0, 8)),
        request_bytes(ops.GET_CONFIG, ConfigRange(0, 0)),
        request_bytes(ops.SET_VRING_KICK, VringFile(99, eventfd)),
    ]
    for line, (data, fds) in zip(sent, ours, strict=False):
        assert data == line.data
        assert [{eventfd: "eventfd", memfd: "memfd"}[fd] for fd in fds] == ([line.descriptor] if line.descriptor else [])
    assert len(sent) == len(ours) + 1, "only the unknown request at the end has no encoder"
    assert HEADER.unpack(sent[-1].data)[0] == 0x8004AF99


def test_numbers_in_the_text() -> None:
    text = SPEC.read_text()
    assert f"0x{HELLO_OP.number:08x}" in text
    assert f"0x{ops.IOTLB:08x}" in text
    assert f"0x{ops.GET_CONFIG.number:08x}" in text
    assert f"0x{OUR_HELLO.magic:x}" in text
