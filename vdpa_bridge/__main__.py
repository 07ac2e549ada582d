# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``python -m vdpa_bridge`` is the command ``vdpa-bridge``."""

from .cli import main

if __name__ == "__main__":
    main()
