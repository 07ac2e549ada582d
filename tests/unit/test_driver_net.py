# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The network driver: frames, lengths, addresses, merged buffers, and devices that get these wrong."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Mapping
from typing import Any

import pytest

from tests.support.driven import frame, net, quiet
from vdpa_bridge.drivers import NetDriver
from vdpa_bridge.errors import DeviceBroken
from vdpa_bridge.models import NetModel, make_model
from vdpa_bridge.models.base import Queue
from vdpa_bridge.virtio.features import NetFeature

__all__ = ["quiet"]  # an autouse fixture

# Net -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"ring_features": 0}, {"queue_size": 4}, {"pool_size": 16384}])
def test_frames_in_order(options: dict[str, Any]) -> None:
    with net(**options) as nic:
        frames = [frame(n, 60 + n % 1400) for n in range(3000)]
        nic.send_many(frames)
        assert nic.receive_many(3000) == frames
        nic.send(frames[5])
        assert nic.receive() == frames[5]
        assert nic.receive_many(1, timeout=0.02) == []
        with pytest.raises(TimeoutError, match=r"model:test: no end of the arrival of a frame within 0.02 s"):
            nic.receive(timeout=0.02)


def test_frame_lengths() -> None:
    with net(make_model("net", {"mtu": "100"})) as nic:
        assert (nic.mtu, nic.max_frame, nic.header) == (100, 118, 12)
        for length in (13, 119):
            with pytest.raises(ValueError, match="14 to 118"):
                nic.send_many([frame(), bytes(length)])
        nic.send_many([frame(1)[:14], frame(2, 118)])
        assert [len(f) for f in nic.receive_many(2)] == [14, 118]


def test_address_and_link() -> None:
    with net() as nic:
        assert (nic.mac, nic.link_up) == ("52:54:00:00:00:07", True)
        nic.set_mac("52:54:00:aa:bb:cc")
        assert nic.mac == "52:54:00:aa:bb:cc" == nic._config()["mac"]
        with pytest.raises(ValueError, match="not a MAC address"):
            nic.set_mac("52-54-00-aa-bb-cc")
        to_us = bytes.fromhex("525400aabbcc") + frame()[6:]
        nic.send(to_us)
        assert nic.receive() == to_us
        nic.restart()
        assert nic.mac == "52:54:00:aa:bb:cc"
        nic.send(frame(3))
        assert nic.receive() == frame(3)


def test_no_control_queue() -> None:
    with net(wanted=NetFeature.MAC | NetFeature.MTU) as nic:
        with pytest.raises(OSError, match="CTRL_MAC_ADDR") as caught:
            nic.set_mac("52:54:00:aa:bb:cc")
        assert caught.value.errno == errno.EOPNOTSUPP
        nic.send(frame())
        assert nic.receive() == frame()
        assert nic.info["features"] == ["MTU", "MAC", "RING_INDIRECT_DESC", "RING_EVENT_IDX", "VERSION_1", "ACCESS_PLATFORM"]


def test_suspended_nic_keeps_frames() -> None:
    with net() as nic:
        nic.suspend()
        with pytest.raises(TimeoutError, match="transmission"):
            nic.send(frame(1), timeout=0.05)
        nic.resume()
        assert nic.receive() == frame(1)
        nic.send_many(frame(n) for n in range(2, 400))
        assert nic.receive_many(398) == [frame(n) for n in range(2, 400)]


def send_and_receive(nic: NetDriver) -> bytes:
    nic.send(frame())
    return nic.receive()


class Merging(NetModel):
    """Gives each frame back 100 bytes a buffer (virtio 1.2, 5.1.6.4), and waits for buffers; or says a wrong number of them."""

    features = NetModel.features | NetFeature.MRG_RXBUF
    said: int | None = None

    def __init__(self) -> None:
        super().__init__(bytes(6))
        self.parts: deque[bytes] = deque()

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        while index < 2:
            if not self.parts:
                sent = queues[1].pop(1)
                if not sent:
                    return
                data = sent[0].read()[12:]
                queues[1].push([(sent[0], 0)])
                count = -(-len(data) // 100) if self.said is None else self.said
                self.parts.extend(
                    (bytes(10) + count.to_bytes(2, "little") + data[at : at + 100])[0 if not at else 12 :]
                    for at in range(0, len(data), 100)
                )
            buffers = queues[0].pop(len(self.parts))
            if not buffers:
                return
            queues[0].push([(buffer, buffer.write(self.parts.popleft())) for buffer in buffers])


def test_merged_buffers_are_one_frame() -> None:
    with net(Merging(), wanted=NetFeature.MRG_RXBUF) as nic:
        frames = [frame(n, 60 + n) for n in range(1000)]
        nic.send_many(frames)
        assert nic.receive_many(1000) == frames


@pytest.mark.parametrize("count", [0, 60000])
def test_impossible_number_of_merged_buffers(count: int) -> None:
    model = Merging()
    model.said = count
    with net(model, wanted=NetFeature.MRG_RXBUF) as nic, pytest.raises(DeviceBroken, match=f"in {count} buffers"):
        send_and_receive(nic)


def test_received_buffer_without_a_header() -> None:
    class Headless(NetModel):
        def process(self, queues: Mapping[int, Queue], index: int) -> None:
            if index == 1:
                queues[1].push([(chain, 0) for chain in queues[1].pop()])
                queues[0].push([(chain, 11) for chain in queues[0].pop(1)])

    with net(Headless(bytes(6))) as nic, pytest.raises(DeviceBroken, match="with 11 bytes"):
        send_and_receive(nic)
