// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * relay: moves chains from a driver's ring to a ring of ours on another device, and what was done back.
 *
 * Rule: the data stays where it is. Each buffer's address is replaced by the one under which the device has the same
 * memory; what either side writes wrongly breaks its own ring, and `fault` of that end says what it was.
 * Synchronization: both ends and the map belong to one thread at a time.
 */
#ifndef VDPA_BRIDGE_RELAY_H
#define VDPA_BRIDGE_RELAY_H

#include "virtqueue.h"

enum { RELAY_BATCH = 64 };

/* What relay_move asks its caller to do. */
enum relay_due {
	RELAY_KICK = 1, /* the device waits for one */
	RELAY_CALL = 2, /* the driver waits for one */
	RELAY_AGAIN = 4, /* there is more to do at once */
	RELAY_MOVED = 8, /* the device gave something back */
};

struct relay {
	struct vq_device *from; /* the driver's ring */
	struct vq_driver *to; /* the device's; not smaller */
	const struct iova_map *places; /* from the driver's addresses to the device's, which stand where pointers do */
	size_t hint;
	struct iova_pieces pieces; /* of the chains in hand */
	struct vq_chain chains[RELAY_BATCH]; /* popped; those from `at` on are not posted yet */
	size_t at, count;
	struct vq_buffer *buffers; /* of the chain being posted */
	uint64_t *order; /* by head: how many chains were popped before */
	uint64_t popped, pushed;
	uint64_t furthest; /* the last of those pushed has so many chains up to it */
};

/* 0, -EINVAL (the device's ring is the smaller one), -ENOMEM. All three outlive the relay. */
int relay_init(struct relay *relay, struct vq_device *from, struct vq_driver *to, const struct iova_map *places);
void relay_destroy(struct relay *relay);

/*
 * One round: hands back what the device has done, and posts what the driver made available unless !`take`; then asks
 * both for the next notification. A set of relay_due, or -EPROTO: an end is broken.
 */
int relay_move(struct relay *relay, bool take);

/* How many chains were popped and not handed back. */
uint64_t relay_open(const struct relay *relay);

/*
 * Where the driver's ring can go on without this relay once its device has stopped for good: behind the last chain
 * handed back. False when chains before that one are still open: they would be lost.
 */
bool relay_base(const struct relay *relay, uint32_t *base);

#endif
