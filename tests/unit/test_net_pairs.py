# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Several queue pairs: the model's rules, and the driver's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.driven import frame, net, opened, quiet
from vdpa_bridge.drivers import NetDriver
from vdpa_bridge.drivers.base import Driver
from vdpa_bridge.errors import FeatureError
from vdpa_bridge.models import NetModel, make_model
from vdpa_bridge.virtio.features import NetFeature

__all__ = ["quiet"]  # an autouse fixture

HEADER = bytes(12)
SET_PAIRS = b"\4\0"


def model(pairs: int) -> NetModel:
    made = make_model("net", {"pairs": str(pairs)})
    assert isinstance(made, NetModel)
    return made


@pytest.mark.parametrize("pairs", ["0", "65", "-1", "two", ""])
def test_impossible_numbers_of_pairs(pairs: str) -> None:
    with pytest.raises(ValueError, match=r"pairs=.* from 1 to 64"):
        make_model("net", {"pairs": pairs})


@pytest.mark.parametrize("pairs", [1, 2, 8, 64])
def test_every_pair_loops_back_for_itself(pairs: int) -> None:
    frames = {pair: [frame(100 * pair + at) for at in range(40)] for pair in range(pairs)}
    with net(model(pairs), pairs=pairs, queue_size=64, pool_size=16 << 20) as nic:
        assert nic.info["pairs"] == pairs
        assert bool(nic.features & NetFeature.MQ) == (pairs > 1)
        for _ in range(2):
            for pair in range(pairs):
                nic.send_many(frames[pair], pair=pair)
            for pair in reversed(range(pairs)):
                assert nic.receive_many(40, pair=pair) == frames[pair]
            nic.set_mac("52:54:00:aa:bb:cc")
            nic.restart()


def test_frames_of_any_pair() -> None:
    with net(model(3), pairs=3) as nic:
        for pair in (2, 0):
            nic.send_many([frame(pair), frame(pair + 10)], pair=pair)
        assert nic.receive() == frame(0)
        assert nic.receive_many(2) == [frame(10), frame(2)]
        assert nic.receive(pair=2) == frame(12)
        with pytest.raises(TimeoutError):
            nic.receive(timeout=0.02, pair=1)
        for pair in (-1, 3):
            with pytest.raises(ValueError, match=f"no queue pair {pair}, the driver has 3"):
                nic.send(frame(), pair=pair)
            with pytest.raises(ValueError, match="no queue pair"):
                nic.receive(pair=pair)


def test_fewer_pairs_than_there_are() -> None:
    """The control queue stays behind the pairs of the device; with one pair MQ is not agreed on, and it is the third queue."""
    for pairs, control in ((1, 2), (2, 10)):
        with net(model(5), pairs=pairs) as nic:
            assert nic.ring(control)
            nic.set_mac("52:54:00:aa:bb:cc")
            nic.send(frame(), pair=pairs - 1)
            assert nic.receive() == frame()


def test_more_pairs_than_there_are() -> None:
    with opened(model(2)) as device, pytest.raises(ValueError, match="has 2 queue pairs, 3 are wanted"):
        NetDriver(device, pairs=3)
    with opened(model(1)) as device, pytest.raises(ValueError, match="has 1 queue pair, 2 are wanted"):
        NetDriver(device, pairs=2)


def test_client_that_keeps_the_control_queue_to_itself() -> None:
    """Nobody says how many pairs there are: the rings that work are used."""
    with net(model(2), pairs=2, wanted=NetFeature.MAC) as nic:
        assert not nic.features & NetFeature.CTRL_VQ
        nic.send(frame(1), pair=1)
        assert nic.receive(pair=1) == frame(1)


@pytest.fixture
def bare() -> Iterator[Driver]:
    """All five queues of two pairs, with MQ."""
    with opened(model(2)) as device, Driver(device, wanted=NetFeature.CTRL_VQ | NetFeature.MQ) as driver:
        yield driver


def loops(driver: Driver, pair: int) -> bool:
    """Whether a frame comes back; if not, the receive buffer is there the next time."""
    ring = driver.ring(2 * pair)
    if ring.queue.free == ring.queue.num:
        driver.post(2 * pair, [], [2048])
    assert driver.transact(2 * pair + 1, [HEADER + frame(pair)]) == (0, [])
    driver.poll()
    return ring.queue.free == ring.queue.num


def test_pairs_that_are_not_used_drop_what_is_sent(bare: Driver) -> None:
    for pairs, used in ((1, [True, False]), (2, [True, True])):
        assert bare.transact(4, [SET_PAIRS, pairs.to_bytes(2, "little")], [1]) == (1, [b"\0"])
        assert [loops(bare, pair) for pair in (0, 1)] == used


@pytest.mark.parametrize("value", [b"\0\0", b"\3\0", b"\1\1", b"\xff\xff", b"", b"\1", b"\1\0\0"])
def test_wrong_numbers_are_refused(bare: Driver, value: bytes) -> None:
    assert bare.transact(4, [SET_PAIRS + value], [1]) == (1, [b"\1"])
    assert [loops(bare, pair) for pair in (0, 1)] == [True, True]


def test_number_of_pairs_needs_mq() -> None:
    with opened(model(2)) as device, Driver(device, wanted=NetFeature.CTRL_VQ) as driver:
        assert driver.transact(2, [SET_PAIRS + b"\1\0"], [1]) == (1, [b"\1"])
        assert loops(driver, 0)
    with opened(model(1)) as device, pytest.raises(FeatureError), Driver(device, required=NetFeature.MQ):
        pass
