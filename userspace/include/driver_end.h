// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * driver_end: what the driver's end does alike on split and packed rings, inline for the sake of both loops.
 *
 * Rule: private to the ring core. The device may write all of the area, descriptors included, so free list and chain
 * lengths are kept in memory of our own: by head descriptor, or by buffer id on a packed ring. Loops hold what they move
 * in locals: every atomic access would make the compiler store it and load it again.
 */
#ifndef VDPA_BRIDGE_DRIVER_END_H
#define VDPA_BRIDGE_DRIVER_END_H

#include <errno.h>
#include <string.h>

#include "guard.h"
#include "virtqueue.h"

/* The packed format of the calls in virtqueue.h; start follows the common part of init. */
void packed_driver_start(struct vq_driver *vq);
int packed_driver_add(struct vq_driver *vq, const struct vq_request *request);
size_t packed_driver_add_many(struct vq_driver *vq, const struct vq_request *requests, size_t count, int *error);
int packed_driver_publish(struct vq_driver *vq);
size_t packed_driver_reap(struct vq_driver *vq, struct vq_done *done, size_t limit);
int packed_driver_enable_call(struct vq_driver *vq);
void packed_driver_disable_call(struct vq_driver *vq);

COLD static void driver_fault(struct vq_driver *vq, enum vq_fault_code code, uint32_t where, uint64_t value)
{
	vq->fault = (struct vq_fault){ .code = code, .where = where, .value = value };
}

COLD static bool driver_look_for_poison(struct vq_driver *vq)
{
	vq->guard_seen = guard_events();
	if (guard_poisoned_range(vq->config.area, vq->layout.size))
		driver_fault(vq, VQ_POISONED, 0, 0);
	return vq->fault.code == VQ_OK;
}

static inline bool driver_sound(struct vq_driver *vq)
{
	return LIKELY(guard_events() == vq->guard_seen) ? vq->fault.code == VQ_OK : driver_look_for_poison(vq);
}

/* Why a request cannot be added: -EINVAL, for good, or -ENOSPC. */
COLD static int driver_refuse(const struct vq_driver *vq, const struct vq_buffer *buffers, size_t count)
{
	bool indirect = count > 1 && count <= vq->config.table_entries;
	uint64_t total = 0;

	if (count == 0 || (!indirect && count > vq->config.num))
		return -EINVAL;
	for (size_t i = 0; i < count; i++) {
		if (buffers[i].length == 0)
			return -EINVAL;
		total += buffers[i].length;
	}
	return total > UINT64_C(1) << 32 ? -EINVAL : -ENOSPC; /* virtio 1.2, 2.7.5.2 */
}

/* Where the indirect table of a slot lies in the area. */
static inline uint64_t driver_table(const struct vq_driver *vq, uint32_t head)
{
	return vq->layout.tables + (uint64_t)VRING_DESC_SIZE * head * vq->config.table_entries;
}

static inline struct vq_driver_slot driver_slot(uint64_t token, uint64_t writable, uint32_t count, uint32_t position,
						uint32_t last)
{
	return (struct vq_driver_slot){ .token = token,
					.writable = writable > UINT32_MAX ? UINT32_MAX : (uint32_t)writable,
					.count = (uint16_t)count,
					.position = (uint16_t)position,
					.last = (uint16_t)last };
}

/* A used entry's length is more than there is to write. What it counts for, or -1 with a fault. `reserved`: it may have
 * no meaning, see packed_driver.c. */
COLD static int64_t driver_judge_length(struct vq_driver *vq, uint32_t id, uint32_t written, bool reserved)
{
	if (!vq->config.overstated && !reserved) {
		driver_fault(vq, VQ_USED_LENGTH, id, written);
		return -1;
	}
	return vq->config.overstated ? vq->slots[id].writable : 0;
}

COLD static int64_t driver_refuse_used(struct vq_driver *vq, uint32_t where, uint32_t id)
{
	driver_fault(vq, id >= vq->config.num ? VQ_USED_ID : VQ_USED_NOT_POSTED, where, id);
	return -1;
}

/* What used entries are checked against, for loops. */
struct driver_posted {
	struct vq_driver_slot *slots;
	uint32_t num;
	uint16_t published;
};

static inline struct driver_posted driver_posted(const struct vq_driver *vq)
{
	return (struct driver_posted){ vq->slots, vq->config.num, vq->published };
}

/* A used entry's chain is in flight, and `written` is at most what could be written: the bytes it says, else -1 and a fault. */
INLINED int64_t driver_check_used(struct vq_driver *vq, struct driver_posted posted, uint32_t where, uint32_t id,
				  uint32_t written, bool reserved)
{
	const struct vq_driver_slot *slot = &posted.slots[id];

	if (UNLIKELY(id >= posted.num || slot->count == 0 ||
		     (uint16_t)(posted.published - slot->position - 1) >= VRING_MAX_NUM))
		return driver_refuse_used(vq, where, id);
	return LIKELY(written <= slot->writable) ? written : driver_judge_length(vq, id, written, reserved);
}

/*
 * With IN_ORDER: takes a used entry for all chains from the oldest to the one it names, of which there must be no more
 * than `most`. False with a fault when it names none. virtio 1.2, 2.7.9 and 2.8.8
 */
static inline bool driver_take_batch(struct vq_driver *vq, uint32_t where, uint32_t id, uint32_t written, bool reserved,
				     uint32_t most)
{
	int64_t counted = driver_check_used(vq, driver_posted(vq), where, id, written, reserved);
	uint32_t chains;

	if (counted < 0)
		return false;
	chains = (uint16_t)(vq->slots[id].position - vq->slots[vq->oldest].position) + 1u;
	if (chains > most) {
		driver_fault(vq, VQ_USED_ORDER, where, id);
		return false;
	}
	vq->batch_left = (uint16_t)chains;
	vq->batch_written = (uint32_t)counted;
	return true;
}

/*
 * The oldest chain of the batch in hand comes back: a device has used all of those that it skipped. How many ring entries
 * it had.
 */
static inline uint16_t driver_reap_oldest(struct vq_driver *vq, struct vq_done *done)
{
	uint16_t head = vq->oldest;
	struct vq_driver_slot *slot = &vq->slots[head];
	uint16_t count = slot->count;

	*done = (struct vq_done){ slot->token, vq->batch_left == 1 ? vq->batch_written : slot->writable, head };
	vq->oldest = vq->next[slot->last];
	vq->batch_left--;
	vq->free += count;
	vq->in_flight--;
	slot->count = 0;
	return count;
}

#endif
