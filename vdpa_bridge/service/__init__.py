# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Devices served by one process that people rely on: sockets, activation, log, reload, end. No transport of its own."""
