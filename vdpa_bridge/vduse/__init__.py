# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The exporter to the kernel: any back-end as a VDUSE device, and so as a disk, an interface or /dev/vhost-vdpa-N."""
