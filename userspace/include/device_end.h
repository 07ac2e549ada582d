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
COLD bool device_miss(struct vq_device *vq, enum vq_fault_code code, uint32_t where, uint64_t iova,
				       uint64_t length, uint32_t perm);

/* The packed format of the calls in virtqueue.h. */
size_t packed_device_pop(struct vq_device *vq, struct vq_chain *chains, size_t limit, struct iova_pieces *pieces);
int packed_device_push(struct vq_device *vq, const struct vq_used *done, size_t count);
int packed_device_enable_kick(struct vq_device *vq);
void packed_device_disable_kick(struct vq_device *vq);

COLD static bool device_fault(struct vq_device *vq, enum vq_fault_code code, uint32_t where, uint64_t value)
{
	vq->fault = (struct vq_fault){ .code = code, .where = where, .value = value };
	return false;
}

/* The same as the answer of a walk. */
COLD static int device_broken(struct vq_device *vq, enum vq_fault_code code, uint32_t where, uint64_t value)
{
	device_fault(vq, code, where, value);
	return -EPROTO;
}

/* Before a batch: not broken, and the ring is where it was or has been found again. */
static inline bool device_usable(struct vq_device *vq)
{
	if (UNLIKELY(vq->fault.code != VQ_OK))
		return false;
	return LIKELY(vq->generation == vq->config.map->generation) || device_look_up(vq);
}

/* The answer of a call on a queue that is not usable: `waiting` when only a mapping is missing. */
static inline int device_unusable(const struct vq_device *vq, int waiting)
{
	return vq->fault.code == VQ_OK ? waiting : -EPROTO;
}

COLD static bool device_look_for_poison(struct vq_device *vq)
{
	vq->guard_seen = guard_events();
	return !iova_map_poisoned(vq->config.map) || device_fault(vq, VQ_POISONED, 0, 0);
}

/* After a batch: what was read came from the driver, not from a mapping the guard replaced. */
static inline bool device_sound(struct vq_device *vq)
{
	return LIKELY(guard_events() == vq->guard_seen) || device_look_for_poison(vq);
}

/*
 * Chains are walked in two ways. The quick walk knows the usual chain alone: all buffers in the region hit last, which may be
 * read and written, an indirect table in its own, nothing wrong. It gives up on any other, which the thorough walk then
 * reads anew, and says what is wrong. Either reads each word of a descriptor once.
 *
 * What a batch moves is held in locals: an atomic access makes the compiler store what it holds of memory, and load it again.
 * Chains of one buffer, which need few of them, have a way of their own.
 */
struct device_walk {
	struct iova_view view; /* the region hit last */
	struct iova_view tables; /* the same for indirect tables; of none when they are not allowed */
	const struct iovec *end; /* of the room for pieces */
};

static inline struct device_walk device_walk(const struct vq_device *vq, const struct iova_pieces *pieces)
{
	return (struct device_walk){ .view = iova_view(vq->config.map, vq->hint, IOVA_RW),
				     .tables = iova_view(vq->config.map, vq->config.indirect ? vq->table_hint : SIZE_MAX,
							 IOVA_RO),
				     .end = pieces->iov + pieces->capacity };
}

/* Pieces up to `end` were appended by the quick walk. */
static inline void device_walked(const struct device_walk *walk, struct iova_pieces *pieces, const struct iovec *end)
{
	size_t first = pieces->used;

	pieces->used = (size_t)(end - pieces->iov);
	for (size_t i = first; pieces->iova && i < pieces->used; i++)
		pieces->iova[i] = walk->view.iova + (uint64_t)((uint8_t *)pieces->iov[i].iov_base - walk->view.host);
}

/* An indirect table of a usual size that lies in the view and can be read in place, or NULL. */
INLINED void *device_table(const struct device_walk *walk, uint64_t address, uint32_t length)
{
	uint64_t offset = address - walk->tables.iova;
	uint8_t *table;

	if (UNLIKELY(!iova_covers(&walk->tables, offset, length)))
		return NULL;
	table = walk->tables.host + offset;
	if (UNLIKELY((uintptr_t)table % sizeof(uint64_t) || length % VRING_DESC_SIZE ||
		     length > VQ_INDIRECT_MAX * VRING_DESC_SIZE))
		return NULL;
	return table;
}

/* Puts a buffer that lies in the view at `*at`, and moves on; false when it does not. */
INLINED bool device_append_quickly(const struct device_walk *walk, struct iovec **at, uint64_t address, uint32_t length)
{
	uint64_t offset = address - walk->view.iova;

	if (UNLIKELY(*at == walk->end || !iova_covers(&walk->view, offset, length)))
		return false;
	(*at)->iov_base = walk->view.host + offset;
	(*at)->iov_len = length;
	++*at;
	return true;
}

/* A chain of one buffer, at `at`. Behind it, or NULL, as all quick walks end. */
INLINED struct iovec *device_walk_one(const struct device_walk *walk, struct vq_chain *chain, struct iovec *at, uint64_t address,
				      uint32_t length, bool write)
{
	chain->iov = at;
	if (write) {
		chain->readable_pieces = 0;
		chain->writable_pieces = 1;
		chain->readable = 0;
		chain->writable = length;
	} else {
		chain->readable_pieces = 1;
		chain->writable_pieces = 0;
		chain->readable = length;
		chain->writable = 0;
	}
	return LIKELY(device_append_quickly(walk, &at, address, length)) ? at : NULL;
}

/* A chain of the pieces from `first` to `behind`, which are readable, and to `at`; NULL when they have too many bytes. */
INLINED struct iovec *device_walk_end(struct vq_chain *chain, struct iovec *first, struct iovec *behind, struct iovec *at,
				      uint64_t readable, uint64_t bytes)
{
	chain->iov = first;
	chain->readable_pieces = (uint32_t)(behind - first);
	chain->writable_pieces = (uint32_t)(at - behind);
	chain->readable = readable;
	chain->writable = bytes - readable;
	return LIKELY(bytes <= UINT32_MAX) ? at : NULL;
}

/* A buffer of the thorough walk: 0, -ENOSPC, -EPROTO (a fault is set). A miss is 0: the walk goes on, so that all that the
 * chain misses is known at once. */
int device_append(struct vq_device *vq, struct iova_pieces *pieces, uint16_t head, uint64_t address, uint32_t length,
		  uint32_t perm);

/* The sums of a chain while its buffers are walked. */
struct device_sum {
	uint64_t readable, writable;
	size_t behind; /* pieces up to the last readable one */
	bool writes;
};

/* Buffer `step` of a chain. 0, -ENOSPC or -EPROTO. */
static inline int device_add_buffer(struct vq_device *vq, struct iova_pieces *pieces, struct device_sum *sum,
				    uint16_t head, uint64_t address, uint32_t length, bool write, uint32_t step)
{
	int error;

	if (!write && sum->writes) /* virtio 1.2, 2.7.4.2 and 2.8.17 */
		return device_broken(vq, VQ_CHAIN_ORDER, head, step);
	error = device_append(vq, pieces, head, address, length, write ? IOVA_WO : IOVA_RO);
	if (error)
		return error;
	sum->readable += write ? 0 : length;
	sum->writable += write ? length : 0;
	sum->behind = write ? sum->behind : pieces->used;
	sum->writes |= write;
	return 0;
}

/* A chain whose pieces begin at `first`. */
static inline struct vq_chain device_chain(const struct device_sum *sum, const struct iova_pieces *pieces, size_t first,
					   uint16_t head)
{
	return (struct vq_chain){ .iov = pieces->iov + first,
				  .readable_pieces = (uint32_t)(sum->behind - first),
				  .writable_pieces = (uint32_t)(pieces->used - sum->behind),
				  .readable = sum->readable,
				  .writable = sum->writable,
				  .head = head };
}

/* virtio 1.2, 2.7.5.2 */
static inline bool device_sum_allowed(const struct device_sum *sum)
{
	return sum->readable + sum->writable <= UINT64_C(1) << 32;
}

/* After a pop: the chains are in flight, and with IN_ORDER their order is known. */
void device_note_order(struct vq_device *vq, const struct vq_chain *chains, size_t count);

/* With IN_ORDER: `done` are given back, as far as heads are in flight; how many of them were. */
size_t device_hold(struct vq_device *vq, const struct vq_used *done, size_t count);

/* With IN_ORDER: the next used entry, for the oldest chains that are given back and need none of their own and the one
 * behind them; how many chains it stands for, 0 when the oldest is not back yet; *entries of the ring were theirs. */
uint32_t device_release(struct vq_device *vq, struct vq_used *entry, uint32_t *entries);

#endif
