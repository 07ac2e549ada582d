# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Engines: the device's side of queues in C, without the GIL.

An engine serves plain requests of its queues, in a loop that waits for kicks itself; for everything else, refusals among
it, it leaves the request in the ring and asks for the model, whose ``process`` then finds it there. So the model stays
the one place that says what a request means, and a device is the same with and without engine, but for its speed.

Rule: whoever changes an engine, its rings or its memory holds the device's `Gate`. Loops step aside for that between two
batches, when what they had in flight has been handed back.
"""

from __future__ import annotations

from ._virtqueue import BlkEngine, BlkMemory, Engine, Gate, Loop, NetEngine, NetFilter, TapEngine

__all__ = ["BlkEngine", "BlkMemory", "Engine", "Gate", "Loop", "NetEngine", "NetFilter", "TapEngine"]
