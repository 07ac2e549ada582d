# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the machine says of devices: its vdpa bus and who manages it, its processes and their sockets.

Rule of this package: it reads what the kernel tells everybody (sysfs, proc, netlink); a device is opened only to learn whether it is free.
"""
