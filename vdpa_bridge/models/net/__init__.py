# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The network device: ``model`` is what a driver sees, a data path (``loop``, ``exchange``) is where its frames go."""

from .exchange import Exchange
from .loop import LONGEST, MOST_KEPT
from .model import DataPath, NetModel

__all__ = ["LONGEST", "MOST_KEPT", "DataPath", "Exchange", "NetModel"]
