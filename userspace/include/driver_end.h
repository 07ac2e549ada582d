// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * driver_end: what the driver's end does alike on split and packed rings, inline for the sake of both loops.
 *
 * Rule: private to the ring core. The device may write all of the area, descriptors included, so free list and chain
 * lengths are kept in slots of our own: by head descriptor, or by buffer id on a packed ring.
 */
#ifndef VDPA_BRIDGE_DRIVER_END_H
#define VDPA_BRIDGE_DRIVER_END_H

#include <errno.h>
#include <string.h>

#include "guard.h"
#include "virtqueue.h"

/* The packed format of the calls in virtqueue.h; start follows the common part of init. */
void packed_driver_start(struct vq_driver *vq);
int packed_driver_add(struct vq_driver *vq, const struct vq_buffer *buffers, size_t readable, size_t writable,
		      uint64_t token);
int packed_driver_publish(struct vq_driver *vq);
size_t packed_driver_reap(struct vq_driver *vq, struct vq_done *done, size_t limit);
int packed_driver_enable_call(struct vq_driver *vq);
void packed_driver_disable_call(struct vq_driver *vq);

static inline void driver_fault(struct vq_driver *vq, enum vq_fault_code code, uint32_t where, uint64_t value)
{
	vq->fault = (struct vq_fault){ .code = code, .where = where, .value = value };
}

static inline bool driver_sound(struct vq_driver *vq)
{
	uint64_t now = guard_events();

	if (now != vq->guard_seen) {
		vq->guard_seen = now;
		if (guard_poisoned_range(vq->config.area, vq->layout.size))
			driver_fault(vq, VQ_POISONED, 0, 0);
	}
	return vq->fault.code == VQ_OK;
}

/* Whether a chain may be added at all; its ring entries, and its writable bytes. 0, -EPROTO, -EINVAL or -ENOSPC. */
static inline int driver_admit(struct vq_driver *vq, const struct vq_buffer *buffers, size_t readable, size_t count,
			       uint16_t *needed, uint64_t *writable)
{
	bool indirect = count > 1 && count <= vq->config.table_entries;
	uint64_t bytes = 0, total = 0;

	if (vq->fault.code != VQ_OK)
		return -EPROTO;
	if (count == 0 || (!indirect && count > vq->config.num))
		return -EINVAL;
	for (size_t i = 0; i < count; i++) {
		if (buffers[i].length == 0)
			return -EINVAL;
		total += buffers[i].length;
		bytes += i < readable ? 0 : buffers[i].length;
	}
	if (total > UINT64_C(1) << 32) /* virtio 1.2, 2.7.5.2 */
		return -EINVAL;
	*needed = indirect ? 1 : (uint16_t)count;
	*writable = bytes;
	return *needed > vq->free ? -ENOSPC : 0;
}

/* Where the indirect table of a slot lies in the area. */
static inline uint64_t driver_table(const struct vq_driver *vq, uint16_t head)
{
	return vq->layout.tables + (uint64_t)VRING_DESC_SIZE * head * vq->config.table_entries;
}

/* Fills the slot of a chain that was just written. */
static inline void driver_post(struct vq_driver *vq, uint16_t head, uint16_t needed, uint64_t writable, uint64_t token)
{
	struct vq_driver_slot *slot = &vq->slots[head];

	slot->token = token;
	slot->writable = writable;
	slot->count = needed;
	slot->position = vq->added;
	vq->free -= needed;
	vq->added++;
	vq->in_flight++;
}

/* The slot that a used entry completes, or NULL with a fault; *written is at most what could be written. */
static inline struct vq_driver_slot *driver_check_used(struct vq_driver *vq, uint32_t where, uint32_t id,
						       uint32_t *written)
{
	struct vq_driver_slot *slot;

	if (id >= vq->config.num) {
		driver_fault(vq, VQ_USED_ID, where, id);
		return NULL;
	}
	slot = &vq->slots[id];
	if (slot->count == 0 || (uint16_t)(vq->published - slot->position - 1) >= VRING_MAX_NUM) {
		driver_fault(vq, VQ_USED_NOT_POSTED, where, id);
		return NULL;
	}
	if (*written > slot->writable) {
		if (!vq->config.overstated) {
			driver_fault(vq, VQ_USED_LENGTH, id, *written);
			return NULL;
		}
		*written = (uint32_t)slot->writable;
	}
	return slot;
}

/* Gives a completed chain's slot back; `last` is the end of its part of the free list. */
static inline void driver_release(struct vq_driver *vq, struct vq_driver_slot *slot, uint16_t head, uint16_t last)
{
	vq->slots[last].next = vq->free_head;
	vq->free_head = head;
	vq->free += slot->count;
	slot->count = 0;
	vq->in_flight--;
}

#endif
