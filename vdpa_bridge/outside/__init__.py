# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What is outside of a model: sockets, terminals, input devices. Nothing here waits; models do, by their ``Sources``."""
