# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A device for ``tools/bench data``: what a model in plain Python costs at least. A target: ``model:tools/benchmarks/untouched.py``."""

from __future__ import annotations

from collections.abc import Mapping

from vdpa_bridge.models import DeviceId, Model, Queue

BATCH = 32


class Untouched(Model):
    """A NIC that returns what is sent as it came, and receives nothing."""

    device_id = DeviceId.NET
    queue_count = 2

    def process(self, queues: Mapping[int, Queue], index: int) -> None:
        """A batch of frames."""
        if index == 1:
            queue = queues[index]
            queue.push([(chain, 0) for chain in queue.pop(BATCH)])
