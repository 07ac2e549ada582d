# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The same steps on several devices, and whether they answer alike.

Rules of this package: scenarios know Device and drivers and nothing below; the first target is the reference; a
difference is either in `vdpa_bridge.differences`, or a capability that the home says it lacks, or an error.
What belongs to the device rather than to its home (capacity, feature words, addresses) is shown and not compared.
"""

from __future__ import annotations

from .judge import Comparison, Judged, judge
from .record import Outcome, Place, Run
from .runner import run_all
from .scenarios import SCENARIOS

__all__ = ["SCENARIOS", "Comparison", "Judged", "Outcome", "Place", "Run", "judge", "run_all"]
