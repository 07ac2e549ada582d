// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* The ring is the queue's business: here is only which buffer goes next. */
#include "slots.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int vq_slots_init(struct vq_slots *slots, struct vq_driver *vq, void *memory, uint64_t iova, uint32_t stride,
		  uint32_t count, bool writable)
{
	memset(slots, 0, sizeof(*slots));
	if (!count || count > VRING_MAX_NUM || !stride)
		return -EINVAL;
	slots->idle = calloc(count, sizeof(*slots->idle));
	if (!slots->idle)
		return -ENOMEM;
	for (uint32_t i = 0; i < count; i++)
		slots->idle[i] = (uint16_t)(count - 1 - i);
	slots->vq = vq;
	slots->memory = memory;
	slots->iova = iova;
	slots->stride = stride;
	slots->count = slots->idle_count = count;
	slots->writable = writable;
	return 0;
}

void vq_slots_destroy(struct vq_slots *slots)
{
	free(slots->idle);
	memset(slots, 0, sizeof(*slots));
}

/* The next one, as a request for the queue; false when that cannot be. */
static inline bool request(const struct vq_slots *slots, size_t ahead, uint32_t length, struct vq_buffer *buffer,
			   struct vq_request *request)
{
	uint64_t slot = vq_slots_next(slots, ahead);

	*buffer = (struct vq_buffer){ .iova = slots->iova + slot * slots->stride, .length = length };
	*request = (struct vq_request){ .buffers = buffer, .readable = !slots->writable, .writable = slots->writable, .token = slot + 1 };
	return length && length <= slots->stride;
}

size_t vq_slots_add(struct vq_slots *slots, const uint32_t *lengths, bool each, size_t count)
{
	enum { BATCH = 64 };
	struct vq_buffer buffers[BATCH];
	struct vq_request requests[BATCH];
	size_t done = 0, wanted, ready, added;
	int error;

	count = vq_slots_room(slots, count);
	do {
		wanted = count - done < BATCH ? count - done : BATCH;
		for (ready = 0; ready < wanted; ready++)
			if (!request(slots, ready, lengths[each ? done + ready : 0], &buffers[ready], &requests[ready]))
				break;
		added = vq_driver_add_many(slots->vq, requests, ready, &error);
		slots->idle_count -= (uint32_t)added;
		done += added;
	} while (added == BATCH);
	return done;
}
