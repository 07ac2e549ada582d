// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * virtqueue: both ends of a virtqueue, in batches.
 *
 * Rule: whatever the other side writes can only break the queue. `fault` then says what was seen, for good; no call
 * touches the ring any more, and nothing outside the mapped memory is read or written on the way there.
 * The calls name no ring format: `packed` in the configuration chooses it, for good. A packed ring's "head" is its
 * buffer id, its base has the available cursor in bits 0-15 and the used one in bits 16-31 (see packed.h).
 * Synchronization: each end belongs to one thread at a time. No call allocates, except init.
 */
#ifndef VDPA_BRIDGE_VIRTQUEUE_H
#define VDPA_BRIDGE_VIRTQUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "iova.h"
#include "packed.h"
#include "vring.h"

enum vq_fault_code {
	VQ_OK,
	/* seen by the device's end */
	VQ_AVAIL_JUMP,
	VQ_HEAD_RANGE,
	VQ_HEAD_BUSY,
	VQ_NEXT_RANGE,
	VQ_CHAIN_LONG,
	VQ_CHAIN_BYTES,
	VQ_CHAIN_ORDER,
	VQ_CHAIN_UNMAPPED,
	VQ_CHAIN_PIECES,
	VQ_INDIRECT_REFUSED,
	VQ_INDIRECT_NESTED,
	VQ_INDIRECT_NEXT,
	VQ_INDIRECT_SIZE,
	VQ_INDIRECT_UNMAPPED,
	VQ_RING_UNMAPPED,
	/* the same, on packed rings only */
	VQ_CHAIN_PARTIAL,
	VQ_ID_RANGE,
	VQ_ID_BUSY,
	VQ_RING_OVERRUN,
	/* seen by the driver's end */
	VQ_USED_JUMP,
	VQ_USED_ID,
	VQ_USED_NOT_POSTED,
	VQ_USED_LENGTH,
	VQ_USED_ORDER,
	/* seen by both */
	VQ_POISONED,
};

struct vq_fault {
	enum vq_fault_code code;
	uint32_t where; /* ring index, descriptor or head, as the code's text says */
	uint64_t value;
};

/* One line for people, without a newline; returns what snprintf returns. */
int vq_fault_describe(const struct vq_fault *fault, char *text, size_t size);

/* Longest indirect table a device accepts on a ring of any size: what today's peers accept and drivers stay below. */
enum { VQ_INDIRECT_MAX = 1024 };

/* A packed ring's base before anything moved: both cursors at 0, both wrap counters 1. */
#define VQ_PACKED_START UINT32_C(0x80008000)

bool vq_num_valid(uint32_t num, bool packed);

/* As SET_VRING_BASE has it: an available index, or two cursors that lie in the ring. */
bool vq_base_valid(uint32_t num, uint32_t base, bool packed);

/* ---- device ---- */

/* The pieces for reading, and behind them the writable ones; they lie where vq_device_pop was told to put them. */
struct vq_chain {
	struct iovec *iov;
	uint32_t readable_pieces;
	uint32_t writable_pieces;
	uint64_t readable;
	uint64_t writable;
	uint16_t head;
};

struct vq_used {
	uint32_t written;
	uint16_t head;
};

/* An address that a queue waits for, and how it wants to use it (enum iova_perm). */
struct vq_miss {
	uint64_t iova;
	uint32_t perm;
};

/* Misses that are noted at once; the rest of a long chain is found missing when these are there. */
enum { VQ_MISSES = 64 };

struct vq_device_config {
	const struct iova_map *map; /* outlives the queue */
	uint64_t desc, avail, used; /* IOVAs */
	uint32_t num;
	uint32_t base; /* where to start */
	bool event_idx;
	bool indirect;
	bool packed;
	bool wait; /* for mappings that are not there: see vq_device_misses */
	bool in_order; /* VIRTIO_F_IN_ORDER: chains go back in the order they came, whatever order they are pushed in */
};

/* What IN_ORDER remembers, by head. */
struct vq_held {
	uint32_t written;
	bool done; /* pushed; goes back as soon as those before it do */
	bool silent; /* nothing writable in it: needs no used entry of its own */
};

struct vq_device {
	struct vq_device_config config;
	union {
		struct vring ring;
		struct packed_ring packed;
	};
	uint64_t generation; /* of the map, when `ring` was looked up */
	uint64_t guard_seen;
	size_t hint; /* of buffers */
	size_t table_hint; /* of indirect tables, which mostly lie elsewhere */
	uint16_t next_avail; /* packed: a cursor */
	uint16_t looked; /* behind the last chain popped, put back or not: kicks are asked for what comes there */
	uint16_t avail_seen; /* avail->idx as last read; split only */
	uint16_t used_idx; /* packed: a cursor */
	bool call_always; /* until the first push: the driver may have missed one before us */
	bool found; /* the ring was looked up once, and where its used index stands was read */
	uint32_t missing; /* entries of `misses`; 0: the queue waits for nothing */
	uint32_t in_flight;
	uint32_t taken; /* descriptors of the chains in flight; packed only */
	uint16_t *busy; /* by head: ring entries of the chain popped and not pushed, or 0 */
	uint64_t *table; /* copy of the indirect table being walked */
	uint16_t *order; /* with in_order: heads in flight, a ring of `num` of which the first `in_flight` from `oldest` on are meant */
	struct vq_held *held; /* with in_order, by head */
	uint16_t oldest;
	struct vq_fault fault;
	struct vq_fault missed; /* what the misses would be in a queue that does not wait */
	struct vq_miss misses[VQ_MISSES];
};

/*
 * 0, -EINVAL (num, base or alignment), -EFAULT (an area is not mapped in one piece), -ENOMEM. A queue that waits may be
 * set up before its areas are mapped.
 */
int vq_device_init(struct vq_device *vq, const struct vq_device_config *config);
void vq_device_destroy(struct vq_device *vq);

/* What GET_VRING_BASE reports. */
uint32_t vq_device_base(const struct vq_device *vq);

/*
 * Takes up to `limit` chains, appending their pieces. Stops early before a chain whose pieces do not fit beside the
 * others' or whose mappings are waited for, and after a fault: the chains returned are good all the same.
 */
size_t vq_device_pop(struct vq_device *vq, struct vq_chain *chains, size_t limit, struct iova_pieces *pieces);

/*
 * Hands back `count` chains at once: by one index update, or on a packed ring with the first one's flags last. 1: a call
 * is due; 0: not; -EINVAL: a head was not popped (the ones before it are handed back); -EPROTO: broken; -EAGAIN: the
 * ring's own mapping is waited for, nothing was handed back.
 */
int vq_device_push(struct vq_device *vq, const struct vq_used *done, size_t count);

/*
 * Puts the last `count` chains that were popped back, as if they had not been: the next pop finds them again, and
 * enable_kick asks for chains behind them. For who finds that they are too few. `heads` are theirs, in order of pops.
 * 0; -EINVAL: one of them is not in flight, nothing was put back.
 */
int vq_device_put_back(struct vq_device *vq, const uint16_t *heads, size_t count);

/* 1: chains are waiting already; 0: none, the driver will kick, or the next has to wait for mappings; -EPROTO: broken. */
int vq_device_enable_kick(struct vq_device *vq);
void vq_device_disable_kick(struct vq_device *vq);

/*
 * With `wait`, memory that is not mapped holds the queue up instead of breaking it: the ring's areas, indirect tables,
 * and the buffers of the chain that comes next, all of which can be mapped later and unmapped at any time. Nothing is
 * consumed; once the misses are mapped, whatever was called is called again. Chains that were popped do not wait: who
 * uses them looks their pieces up again (iova_refresh).
 * How many of `misses` are still missing; they come first in it.
 */
size_t vq_device_misses(struct vq_device *vq);

/* No mapping will come for `iova`: breaks the queue that waits, as if it did not. */
void vq_device_refuse(struct vq_device *vq, uint64_t iova);

/* ---- driver ---- */

struct vq_layout {
	uint64_t desc, avail, used, tables; /* offsets */
	uint64_t size;
};

/* One contiguous area; what the device alone writes starts a cache line of its own. `table_entries` 0: no indirect
 * tables. A packed ring's `avail` and `used` are the driver's and the device's event structures. */
struct vq_layout vq_layout(uint32_t num, uint32_t table_entries, bool packed);

struct vq_buffer {
	uint64_t iova;
	uint32_t length;
};

struct vq_done {
	uint64_t token;
	uint32_t written;
	uint16_t head;
};

struct vq_driver_slot {
	uint64_t token;
	uint32_t writable; /* bytes; 2^32 - 1 for all of 2^32, as no used length says more */
	uint16_t count; /* descriptors of the chain that starts here (packed: has this id); 0: none does */
	uint16_t position; /* what `added` was when it was added */
	uint16_t last; /* the chain's last descriptor (packed: its id) */
};

struct vq_driver_config {
	void *area; /* mapped for as long as the queue lives */
	uint64_t iova;
	uint32_t num;
	uint32_t table_entries;
	uint32_t base; /* packed: both cursors the same, as nothing is in flight */
	bool event_idx;
	bool packed;
	bool overstated; /* the device may count more bytes written than there is room for: taken for all of them */
	bool in_order; /* VIRTIO_F_IN_ORDER: one used entry may stand for all chains up to the one it names */
	bool notification_data; /* VIRTIO_F_NOTIFICATION_DATA: kicks say how far the ring is, see doorbell.h */
};

struct vq_driver {
	struct vq_driver_config config;
	struct vq_layout layout;
	union {
		struct vring ring;
		struct packed_ring packed;
	};
	uint64_t guard_seen;
	uint16_t added; /* available index after the last add; packed: chains added */
	uint16_t published; /* of those, what the device may see */
	uint16_t last_used; /* packed: a cursor */
	uint16_t next_avail; /* from here on, packed only: the cursor after the last add */
	uint16_t batch; /* descriptors added and not published */
	uint16_t withheld_flags; /* of the batch's first descriptor */
	struct packed_desc *withheld; /* that descriptor */
	/*
	 * Free descriptors (packed: ids) are a list, of which chains take their descriptors in order, and leave them linked. With
	 * in_order the list is a ring that never changes: what comes back first is behind what was free last.
	 */
	uint16_t *next;
	uint16_t free_id; /* where it begins */
	uint32_t free; /* descriptors */
	uint32_t in_flight;
	struct vq_driver_slot *slots;
	struct vq_fault fault;
	/* with in_order: */
	uint16_t oldest; /* head of the chain that comes back next */
	uint16_t batch_left; /* chains that the last used entry still stands for */
	uint32_t batch_written; /* of the last of them */
};

/* Clears the area. 0, -EINVAL (num, base or alignment), -ENOMEM. */
int vq_driver_init(struct vq_driver *vq, const struct vq_driver_config *config);
void vq_driver_destroy(struct vq_driver *vq);

/* Readable buffers first. The head, or -ENOSPC (try again after a reap), -EINVAL (can never fit, an empty buffer). */
int vq_driver_add(struct vq_driver *vq, const struct vq_buffer *buffers, size_t readable, size_t writable,
		  uint64_t token);

/* A chain to add. */
struct vq_request {
	const struct vq_buffer *buffers; /* readable first */
	uint32_t readable, writable; /* how many of each */
	uint64_t token;
};

/* Adds requests up to the first that cannot be; how many. *error is 0, or what vq_driver_add says to that one. */
size_t vq_driver_add_many(struct vq_driver *vq, const struct vq_request *requests, size_t count, int *error);

/* Makes all added chains visible at once. 1: a kick is due; 0: not; -EPROTO: broken. */
int vq_driver_publish(struct vq_driver *vq);

/* How far the ring is published, as NOTIFICATION_DATA says it: the available index, or a packed ring's cursor. virtio 1.2, 2.9 */
static inline uint16_t vq_driver_offset(const struct vq_driver *vq)
{
	return vq->config.packed ? cursor_retreat(vq->next_avail, vq->batch, vq->config.num) : vq->published;
}

size_t vq_driver_reap(struct vq_driver *vq, struct vq_done *done, size_t limit);

/* 1: completions are waiting already; 0: none, the device will call; -EPROTO: broken. */
int vq_driver_enable_call(struct vq_driver *vq);
void vq_driver_disable_call(struct vq_driver *vq);

#endif
