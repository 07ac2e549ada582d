// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * slots: chains of one buffer each, from an array of buffers of one size that a queue posts again and again - what the
 * queues of a NIC carry.
 *
 * Rule: no call and no division for a frame. The buffer given back last goes first: it is in the cache.
 * Synchronization: that of the queue. No call allocates, except init.
 */
#ifndef VDPA_BRIDGE_SLOTS_H
#define VDPA_BRIDGE_SLOTS_H

#include "virtqueue.h"

struct vq_slots {
	struct vq_driver *vq; /* outlives the slots; other chains may be in it, with token 0 */
	uint8_t *memory; /* slot i lies at memory + i * stride, for the device at iova + i * stride */
	uint64_t iova;
	uint32_t stride;
	uint32_t count;
	bool writable; /* by the device */
	uint32_t idle_count;
	uint16_t *idle; /* a stack: what the driver may write to, or read from, and post */
};

/* All idle, the first one next. 0, -EINVAL (no slot, more than VRING_MAX_NUM, a stride of 0), -ENOMEM. */
int vq_slots_init(struct vq_slots *slots, struct vq_driver *vq, void *memory, uint64_t iova, uint32_t stride,
		  uint32_t count, bool writable);
void vq_slots_destroy(struct vq_slots *slots);

/* The slot that goes after `ahead` others, which must be fewer than there are idle ones. */
static inline uint16_t vq_slots_next(const struct vq_slots *slots, size_t ahead)
{
	return slots->idle[slots->idle_count - 1 - ahead];
}

static inline uint8_t *vq_slots_data(const struct vq_slots *slots, uint16_t slot)
{
	return slots->memory + (size_t)slot * slots->stride;
}

/* How many of `count` have a slot and room in the ring. */
static inline size_t vq_slots_room(const struct vq_slots *slots, size_t count)
{
	count = count < slots->idle_count ? count : slots->idle_count;
	return count < slots->vq->free ? count : slots->vq->free;
}

/*
 * Adds the next `count` slots, with lengths[i] bytes each, or all of them with lengths[0] if !`each`. How many were added:
 * fewer when there is no room for more, when a length is 0 or above the stride, and none when the queue is broken.
 */
size_t vq_slots_add(struct vq_slots *slots, const uint32_t *lengths, bool each, size_t count);

/* The slot of a completed chain, idle again; -1 for one that is none of ours. */
static inline int vq_slots_take(struct vq_slots *slots, const struct vq_done *done)
{
	if (!done->token)
		return -1;
	slots->idle[slots->idle_count++] = (uint16_t)(done->token - 1);
	return (int)(done->token - 1);
}

#endif
