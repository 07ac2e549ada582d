# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Chains that a device popped and puts back: they are available again, and kicks are asked for others behind them."""

from __future__ import annotations

import pytest

from tests.unit.test_virtqueue import DATA, Pair, closed

__all__ = ["closed"]  # an autouse fixture


@pytest.mark.parametrize("event_idx", [False, True])
def test_chains_that_are_put_back_come_again(event_idx: bool) -> None:
    pair = Pair(event_idx=event_idx, base=65534)
    for _ in range(20):
        assert pair.driver.add_many([([(DATA, 2)], [], at) for at in range(3)]) == 3
        pair.driver.publish()
        first, second, third = pair.device.pop_many()
        for wrong in ([second], [third, second], [first, third], [first, second, third, third]):
            with pytest.raises(ValueError, match=r"last chains popped|more chains than"):
                pair.device.put_back(wrong)
        pair.device.put_back([second, third])
        with pytest.raises(ValueError, match="handed back"):
            second.read()
        assert pair.device.push_many([(first, 0)])
        assert not pair.device.enable_kick(), "what was put back is known"
        assert pair.driver.add_many([([(DATA, 2)], [], 3)]) == 1
        assert pair.driver.publish(), "another one is not"
        again = pair.device.pop_many()
        assert [chain.head for chain in again[:2]] == [second.head, third.head]
        pair.device.push_many([(chain, 0) for chain in again])
        assert [token for token, _ in pair.driver.reap()] == [0, 1, 2, 3]
        pair.driver.enable_call()
    assert pair.device.base == (65534 + 80) % 65536
