# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Why a device does not work, and what to type.

``Target.examination`` gives the checks that fit where a device lives; ``Examination.run`` makes them in order. A check
returns what is so, or raises Problem or Unknown; each kind of problem is a row of ``causes.CAUSES`` with its exit status.
"""

from .causes import CAUSES, Cause
from .examination import Check, Examination, Explanation, Finding, Problem, Unknown, Wishes

__all__ = ["CAUSES", "Cause", "Check", "Examination", "Explanation", "Finding", "Problem", "Unknown", "Wishes"]
