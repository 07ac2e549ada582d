# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Load for devices, wherever they live: block requests and frames as fast as they go or at a rate, measured and verified.

Rules of this package: the loops are native (userspace/src/load*.c) and run without the GIL, a thread per queue; here are their
threads, the look at the device meanwhile, and what comes out. Drivers are used, no transport.
"""

from .blk import BlkResult, BlkWork, blk_memory, load_blk
from .net import Mode, NetResult, NetWork, load_net
from .threads import Progress, Timing

__all__ = ["BlkResult", "BlkWork", "Mode", "NetResult", "NetWork", "Progress", "Timing", "blk_memory", "load_blk", "load_net"]
