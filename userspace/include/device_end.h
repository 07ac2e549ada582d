// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * device_end: what the device's end does alike on split and packed rings, inline for the sake of both loops.
 *
 * Rule: private to the ring core; a call here trusts nothing that was read from shared memory.
 */
#ifndef VDPA_BRIDGE_DEVICE_END_H
#define VDPA_BRIDGE_DEVICE_END_H

#include <errno.h>
#include <string.h>

#include "guard.h"
#include "virtqueue.h"

/* Looks the three areas up; false with the IOVA in the fault, or among the misses, when one is not there. */
bool device_look_up(struct vq_device *vq);

/* Copies an indirect table, so that it is read once whatever the driver does to it meanwhile. */
bool device_open_table(struct vq_device *vq, uint16_t head, uint64_t address, uint32_t length);

/* Memory is not there: a miss in a queue that waits, when it can be mapped at all, else a fault and false. */
__attribute__((cold)) bool device_miss(struct vq_device *vq, enum vq_fault_code code, uint32_t where, uint64_t iova,
				       uint64_t length, uint32_t perm);

/* The packed format of the calls in virtqueue.h. */
size_t packed_device_pop(struct vq_device *vq, struct vq_chain *chains, size_t limit, struct iova_pieces *pieces);
int packed_device_push(struct vq_device *vq, const struct vq_used *done, size_t count);
int packed_device_enable_kick(struct vq_device *vq);
void packed_device_disable_kick(struct vq_device *vq);

static inline bool device_fault(struct vq_device *vq, enum vq_fault_code code, uint32_t where, uint64_t value)
{
	vq->fault = (struct vq_fault){ .code = code, .where = where, .value = value };
	return false;
}

/* Before a batch: not broken, and the ring is where it was or has been found again. */
static inline bool device_usable(struct vq_device *vq)
{
	if (vq->fault.code != VQ_OK)
		return false;
	return vq->generation == vq->config.map->generation || device_look_up(vq);
}

/* The answer of a call on a queue that is not usable: `waiting` when only a mapping is missing. */
static inline int device_unusable(const struct vq_device *vq, int waiting)
{
	return vq->fault.code == VQ_OK ? waiting : -EPROTO;
}

/* After a batch: what was read came from the driver, not from a mapping the guard replaced. */
static inline bool device_sound(struct vq_device *vq)
{
	uint64_t now = guard_events();

	if (now == vq->guard_seen)
		return true;
	vq->guard_seen = now;
	return !iova_map_poisoned(vq->config.map) || device_fault(vq, VQ_POISONED, 0, 0);
}

/* Appends buffer `step` to the chain; *full when its pieces do not fit. */
__attribute__((always_inline)) static inline bool device_append(struct vq_device *vq, struct vq_chain *chain,
								uint64_t address, uint32_t length, bool write,
								uint32_t step, struct iova_pieces *pieces, bool *full)
{
	size_t before = pieces->used;
	int error;

	if (!write && chain->writable_pieces) /* virtio 1.2, 2.7.4.2 and 2.8.17 */
		return device_fault(vq, VQ_CHAIN_ORDER, chain->head, step);
	error = iova_translate(vq->config.map, &vq->hint, address, length, write ? IOVA_WO : IOVA_RO, pieces);
	if (error == -ENOSPC) {
		*full = true;
		return false;
	}
	if (error) /* the walk goes on, so that all that the chain misses is known at once */
		return device_miss(vq, VQ_CHAIN_UNMAPPED, chain->head, address, length, write ? IOVA_WO : IOVA_RO);
	if (write) {
		chain->writable_pieces += (uint32_t)(pieces->used - before);
		chain->writable += length;
	} else {
		chain->readable_pieces += (uint32_t)(pieces->used - before);
		chain->readable += length;
	}
	if (chain->readable + chain->writable > UINT64_C(1) << 32) /* virtio 1.2, 2.7.5.2 */
		return device_fault(vq, VQ_CHAIN_BYTES, chain->head, chain->readable + chain->writable);
	return true;
}

#endif
