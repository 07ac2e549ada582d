// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * net_rules: which packets of a network device pass: what a virtio_net_hdr may ask for, and where a frame may go to (virtio 1.2,
 * 5.1.6).
 *
 * Rule: the same decisions as the model's (models/net/offload.py, control.py), which fills both structs.
 */
#ifndef VDPA_BRIDGE_NET_RULES_H
#define VDPA_BRIDGE_NET_RULES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
	NET_HEADER = 12, /* bytes of struct virtio_net_hdr_v1 */
	NET_SHORTEST = 14, /* bytes of a frame */
	NET_LARGEST = 65535 + 14 + 4, /* the longest IP packet behind an Ethernet header with a VLAN tag */
	NET_TOP = 16, /* bytes at a frame's beginning by which it is filtered */
	NET_MACS = 64, /* addresses in a table */
};

/* What was agreed on for one direction. */
struct net_terms {
	bool csum; /* checksums may be left to make */
	bool ecn;
	bool valid; /* "the checksum was checked" is told */
	uint8_t gso; /* a bit for each type of segmentation, from bit 0 for GSO_NONE on */
};

/*
 * Whether a frame of `length` bytes may pass behind this header, which then has nothing but what it asks for, and the number of
 * buffers 0.
 */
bool net_header_agreed(uint8_t header[NET_HEADER], uint64_t length, const struct net_terms *terms);

static inline bool net_header_large(const uint8_t header[NET_HEADER])
{
	return header[1] != 0;
}

/* What the driver wants to get; index 0 of pairs is unicast, 1 multicast. */
struct net_filter {
	bool promisc, nobcast;
	bool all[2], none[2];
	bool tagged; /* frames with a VLAN tag need theirs in `vlans` */
	uint8_t mac[6];
	uint32_t count[2];
	uint8_t macs[2][NET_MACS][6];
	uint64_t vlans[64];
};

bool net_filter_accepts(const struct net_filter *filter, const uint8_t top[NET_TOP]);

#endif
