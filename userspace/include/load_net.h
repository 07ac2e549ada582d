// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * load_net: frames over one queue pair: sent, received, or sent and awaited back.
 *
 * Rule: as in load.h. The frames lie in the slots of a driver, made once; each that goes out gets a stamp: whose it is, its
 * number, and when it was sent. A frame that comes back tells by it whether frames were lost or changed places on the way.
 */
#ifndef VDPA_BRIDGE_LOAD_NET_H
#define VDPA_BRIDGE_LOAD_NET_H

#include "load.h"
#include "slots.h"

enum load_net_mode { LOAD_NET_SEND = 1, LOAD_NET_RECEIVE = 2, LOAD_NET_ECHO = 3 };

/* Behind the Ethernet header, unaligned, little-endian. */
struct load_net_stamp {
	uint64_t seed, number, sent;
};

struct load_net_config {
	struct load_ring sender, receiver;
	struct vq_slots *outgoing, *incoming; /* all idle or with the device; SEND uses no incoming ones */
	struct load_pace pace;
	enum load_net_mode mode;
	uint32_t header; /* bytes of virtio_net_hdr */
	uint32_t frame; /* bytes behind it, with room for an Ethernet header and a stamp */
	uint32_t room; /* bytes of a receive buffer */
	uint32_t batch; /* frames shown to the device at once, 1 to LOAD_NET_BATCH */
	uint32_t window; /* ECHO: frames sent and not back at most; 0: no limit */
	uint64_t linger; /* nanoseconds after which a frame that is not back is lost */
	uint64_t seed; /* of stamps */
};

enum { LOAD_NET_ETHERNET = 14, LOAD_NET_BATCH = 256, LOAD_NET_SHORTEST = LOAD_NET_ETHERNET + sizeof(struct load_net_stamp) };

struct load_net_counts {
	uint64_t sent; /* and given back by the device */
	uint64_t received, received_bytes; /* without virtio_net_hdr */
	uint64_t ours, reordered, foreign; /* ECHO: with our stamp; after one with a higher number; others */
	uint64_t lost; /* ECHO: that did not come back */
	struct histogram latency; /* ECHO: from when it was sent */
};

struct load_net {
	struct load_net_config config;
	struct load_net_counts counts;
	uint64_t started, finished; /* frames posted, and taken by the device */
	uint64_t open; /* ECHO: posted, not back, not lost; 0 otherwise */
	uint64_t expected; /* number of the next frame */
	uint64_t began;
	uint64_t heard; /* when something came back last */
	bool echoed; /* a frame of ours came back */
	uint32_t headless; /* after LOAD_FAILED: bytes of a received buffer, fewer than a virtio_net_hdr */
};

/* 0 or -EINVAL. */
int load_net_init(struct load_net *load, const struct load_net_config *config);

/* Goes on for at most `slice` nanoseconds. */
enum load_state load_net_run(struct load_net *load, uint64_t slice);

#endif
