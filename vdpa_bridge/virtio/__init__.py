# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What virtio 1.2 says of device types: ids, feature names, configuration layouts."""
