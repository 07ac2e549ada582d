# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A process that can do nothing but what the models in it need (docs/sandbox.md).

Each file is one means of the kernel; ``policy`` decides, ``process`` closes. Nothing here knows devices at work or clients.
"""
