// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * net_engine: a queue pair of a network device (virtio 1.2, 5.1) that needs no wire.
 *
 * Rule: frames given back on both queues are pushed received before sent, so that a driver that sees its frame sent finds it
 * received. A frame for which no buffer waits is dropped; one that is longer than its buffer is cut.
 */
#ifndef VDPA_BRIDGE_NET_ENGINE_H
#define VDPA_BRIDGE_NET_ENGINE_H

#include "engine.h"

enum net_kind {
	NET_LOOP, /* comes back verbatim if it goes to a group or to the device itself, at most NET_LONGEST bytes of it */
	NET_ECHO, /* all comes back, with a header that is right for receivers */
	NET_SINK, /* nothing comes back */
	NET_SOURCE, /* as NET_SINK, and every receive buffer gets a frame of 60 bytes */
};

enum { NET_LONGEST = 4096 }; /* header and frame */

struct net_engine {
	struct engine engine; /* rings: receive, transmit */
	enum net_kind kind;
	/* The owner's, while the gate is held: */
	uint32_t header; /* bytes, 10 or 12 */
	uint8_t mac[6];
	bool used; /* else what is sent is dropped */
	struct vq_used received[ENGINE_BATCH];
};

void net_engine_init(struct net_engine *net, enum net_kind kind);

#endif
