// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * The driver's end of a packed virtqueue. Partners of the barriers here are in packed_device.c (or in the peer's device).
 * Descriptors are written when a chain is added, all but the flags of the batch's first one: publishing stores these,
 * and the device, which takes descriptors in ring order, sees the batch appear as a whole.
 */
#include "driver_end.h"

void packed_driver_start(struct vq_driver *vq)
{
	uint8_t *area = vq->config.area;
	uint16_t start = (uint16_t)vq->config.base;

	vq->packed = (struct packed_ring){ .desc = (void *)(area + vq->layout.desc),
					   .driver_event = (void *)(area + vq->layout.avail),
					   .device_event = (void *)(area + vq->layout.used),
					   .num = vq->config.num };
	vq->next_avail = vq->last_used = start;
	/* As if all of the lap before had been used: zeros, for the start that the specification knows. */
	for (uint16_t i = 0; i < vq->config.num; i++) {
		uint16_t lap = start ^ (i < cursor_position(start) ? 0 : CURSOR_WRAP);

		ring16_store(&vq->packed.desc[i].flags, used_mark(lap), memory_order_relaxed);
	}
	if (vq->config.event_idx)
		event_store(vq->packed.driver_event, event_value(EVENT_DESC, start));
}

/* What adding moves. The flags of the batch's first descriptor are kept for later. */
struct place {
	const uint16_t *next;
	struct vq_driver_slot *slots;
	struct packed_desc *withheld;
	struct packed_spot spot;
	uint32_t free, id, added;
	uint16_t withheld_flags;
};

/* A descriptor of the batch in hand. */
INLINED void describe(struct place *at, struct packed_desc *desc, uint64_t address, uint32_t length, uint32_t id,
		      uint32_t flags)
{
	address_store(desc, address);
	if (LIKELY(at->withheld)) {
		second_store(desc, (struct packed_second){ length, (uint16_t)id, (uint16_t)flags });
	} else {
		second_store_unmarked(desc, length, (uint16_t)id);
		at->withheld = desc;
		at->withheld_flags = (uint16_t)flags;
	}
}

/* A chain's descriptors are written, and belong to the batch; its id. */
INLINED int post(struct place *at, struct packed_spot behind, uint64_t token, uint64_t writable, uint32_t needed)
{
	uint32_t id = at->id;

	at->slots[id] = driver_slot(token, writable, needed, at->added, id);
	at->spot = behind;
	at->id = at->next[id];
	at->free -= needed;
	at->added++;
	return (int)id;
}

/* Fills the table of an id, one descriptor per buffer, in which NEXT has no meaning; its writable bytes, or a negative
 * errno. virtio 1.2, 2.8.7 and 2.8.19 */
static int64_t fill_table(const struct vq_driver *vq, uint32_t id, const struct vq_buffer *buffers, size_t readable,
			  size_t count)
{
	struct packed_desc *table = (void *)((uint8_t *)vq->config.area + driver_table(vq, id));
	uint64_t total = 0, before = 0;

	for (size_t i = 0; i < count; i++) {
		if (UNLIKELY(buffers[i].length == 0))
			return -EINVAL;
		total += buffers[i].length;
		before = i < readable ? total : before;
		address_store(&table[i], buffers[i].iova);
		second_store(&table[i], (struct packed_second){ buffers[i].length, 0, i < readable ? 0 : DESC_WRITE });
	}
	return LIKELY(total <= UINT64_C(1) << 32) ? (int64_t)(total - before) : -EINVAL; /* virtio 1.2, 2.7.5.2 */
}

/*
 * Writes all descriptors of a chain but the first, in the ring's order, of which *spot then stands behind the last, and returns
 * its writable bytes; or a negative errno: then they are marked as if they had not been written, as the device takes every
 * marked one for part of the batch.
 */
INLINED int64_t describe_rest(const struct vq_driver *vq, const struct packed_ring *ring, struct packed_spot *spot, uint32_t id,
			      const struct vq_request *request)
{
	const struct vq_buffer *buffer = request->buffers, *writable = buffer + request->readable;
	const struct vq_buffer *last = writable + request->writable - 1;
	uint64_t total = buffer->length, before = request->readable ? total : 0;
	uint32_t empty = total == 0, count = request->readable + request->writable;

	do {
		uint32_t flags;

		buffer++;
		*spot = spot_advance(*spot, 1, ring->num);
		flags = (buffer < writable ? 0 : DESC_WRITE) | (buffer < last ? DESC_NEXT : 0) | spot->mark;
		empty |= buffer->length == 0;
		total += buffer->length;
		before = buffer < writable ? total : before;
		address_store(spot_desc(ring, *spot), buffer->iova);
		second_store(spot_desc(ring, *spot), (struct packed_second){ buffer->length, (uint16_t)id, (uint16_t)flags });
	} while (buffer < last);
	if (LIKELY(!empty && total <= UINT64_C(1) << 32)) { /* virtio 1.2, 2.7.5.2 */
		*spot = spot_advance(*spot, 1, ring->num);
		return (int64_t)(total - before);
	}
	for (uint16_t cursor = spot_cursor(*spot); --count; cursor = cursor_retreat(cursor, 1, ring->num))
		ring16_store(&packed_at(ring, cursor)->flags, used_mark(cursor ^ CURSOR_WRAP), memory_order_relaxed);
	return driver_refuse(vq, request->buffers, request->readable + request->writable);
}

/* The id, or a negative errno. */
INLINED int add(struct vq_driver *vq, const struct packed_ring *ring, struct place *at, const struct vq_request *request)
{
	size_t count = (size_t)request->readable + request->writable;
	const struct vq_buffer *first = request->buffers;
	struct packed_spot spot = at->spot;
	uint32_t mark = spot.mark;
	int64_t writable;

	if (UNLIKELY(count == 0 || at->free == 0))
		return driver_refuse(vq, first, count);
	if (count == 1) {
		if (UNLIKELY(first->length == 0))
			return -EINVAL;
		describe(at, spot_desc(ring, spot), first->iova, first->length, at->id, (request->writable ? DESC_WRITE : 0) | mark);
		return post(at, spot_advance(spot, 1, ring->num), request->token, request->writable ? first->length : 0, 1);
	}
	if (count <= vq->config.table_entries) {
		writable = fill_table(vq, at->id, first, request->readable, count);
		if (UNLIKELY(writable < 0))
			return (int)writable;
		describe(at, spot_desc(ring, spot), vq->config.iova + driver_table(vq, at->id), (uint32_t)(VRING_DESC_SIZE * count),
			 at->id, DESC_INDIRECT | mark);
		return post(at, spot_advance(spot, 1, ring->num), request->token, (uint64_t)writable, 1);
	}
	if (UNLIKELY(count > at->free))
		return driver_refuse(vq, first, count);
	writable = describe_rest(vq, ring, &spot, at->id, request);
	if (UNLIKELY(writable < 0))
		return (int)writable;
	describe(at, spot_desc(ring, at->spot), first->iova, first->length, at->id,
		 DESC_NEXT | (request->readable ? 0 : DESC_WRITE) | mark);
	return post(at, spot, request->token, (uint64_t)writable, (uint32_t)count);
}

static inline struct place place_of(const struct vq_driver *vq)
{
	return (struct place){ .next = vq->next,
			       .slots = vq->slots,
			       .withheld = vq->withheld,
			       .spot = packed_spot(vq->next_avail, available_mark(vq->next_avail)),
			       .free = vq->free,
			       .withheld_flags = vq->withheld_flags,
			       .id = vq->free_id,
			       .added = vq->added };
}

static inline void move_to(struct vq_driver *vq, struct place at)
{
	vq->in_flight += at.added - vq->added;
	vq->batch = (uint16_t)(vq->batch + (vq->free - at.free));
	vq->withheld = at.withheld;
	vq->withheld_flags = at.withheld_flags;
	vq->free_id = (uint16_t)at.id;
	vq->free = at.free;
	vq->next_avail = spot_cursor(at.spot);
	vq->added = (uint16_t)at.added;
}

size_t packed_driver_add_many(struct vq_driver *vq, const struct vq_request *requests, size_t count, int *error)
{
	const struct packed_ring ring = vq->packed;
	struct place at = place_of(vq);
	size_t i;

	for (i = 0; i < count; i++) {
		int id = add(vq, &ring, &at, &requests[i]);

		if (UNLIKELY(id < 0)) {
			*error = id;
			break;
		}
	}
	move_to(vq, at);
	return i;
}

int packed_driver_add(struct vq_driver *vq, const struct vq_request *request)
{
	const struct packed_ring ring = vq->packed;
	struct place at = place_of(vq);
	int id = add(vq, &ring, &at, request);

	move_to(vq, at);
	return id;
}

int packed_driver_publish(struct vq_driver *vq)
{
	uint16_t moved = vq->batch;
	bool due;

	if (!driver_sound(vq))
		return -EPROTO;
	if (moved == 0)
		return 0;
	/* pair [E]: release, the first flags open the batch: all of it, and the data, is visible with them. virtio 1.2,
	 * 2.8.21.1 */
	ring16_store(&vq->withheld->flags, vq->withheld_flags, memory_order_release);
	vq->batch = 0;
	vq->withheld = NULL;
	vq->published = vq->added;
	/* pair [F]: full fence, the flags are stored before the device's wish is read. virtio 1.2, 2.8.21.2 */
	atomic_thread_fence(memory_order_seq_cst);
	due = event_asks(event_load(vq->packed.device_event), vq->next_avail, moved, vq->packed.num, vq->config.event_idx);
	return driver_sound(vq) ? due : -EPROTO;
}

INLINED bool used(const struct packed_ring *ring, struct packed_spot spot)
{
	/* pair [G]: acquire, sees what the device stored before these flags. virtio 1.2, 2.8.22 */
	return marked(ring16_load(&spot_desc(ring, spot)->flags, memory_order_acquire), (uint16_t)spot.mark);
}

static inline struct packed_spot used_spot(const struct vq_driver *vq)
{
	return packed_spot(vq->last_used, used_mark(vq->last_used));
}

/*
 * Whether a used descriptor's length may have no meaning. Without WRITE it is reserved (virtio 1.2, 2.8.4): DPDK's vhost
 * leaves the available length there, but QEMU never sets WRITE. So it counts whenever it can be true.
 */
INLINED bool reserved(struct packed_second entry)
{
	return !(entry.flags & DESC_WRITE);
}

static size_t reap_in_order(struct vq_driver *vq, struct vq_done *done, size_t limit)
{
	size_t count = 0;

	while (count < limit && (vq->batch_left || used(&vq->packed, used_spot(vq)))) {
		struct packed_second entry = second_load(packed_at(&vq->packed, vq->last_used));

		if (!vq->batch_left && !driver_take_batch(vq, cursor_position(vq->last_used), entry.id, entry.length,
							  reserved(entry), VRING_MAX_NUM))
			break;
		vq->last_used = cursor_advance(vq->last_used, driver_reap_oldest(vq, &done[count++]), vq->packed.num);
	}
	return count;
}

size_t packed_driver_reap(struct vq_driver *vq, struct vq_done *done, size_t limit)
{
	const struct driver_posted posted = driver_posted(vq);
	const struct packed_ring ring = vq->packed;
	struct packed_spot at = used_spot(vq);
	uint16_t id_free = vq->free_id, *next = vq->next;
	uint32_t free = vq->free, usual = 1;
	size_t count = 0;

	if (vq->fault.code != VQ_OK)
		return 0;
	if (vq->config.in_order) {
		count = reap_in_order(vq, done, limit);
		(void)driver_sound(vq);
		return count;
	}
	for (; count < limit && used(&ring, at); count++) {
		struct packed_second entry = second_load(spot_desc(&ring, at));
		int64_t written = driver_check_used(vq, posted, at.position, entry.id, entry.length, reserved(entry));
		struct vq_driver_slot *slot;

		if (UNLIKELY(written < 0))
			break;
		slot = &posted.slots[entry.id];
		at = spot_skip(at, slot->count, &usual, ring.num);
		done[count] = (struct vq_done){ .token = slot->token, .written = (uint32_t)written, .head = entry.id };
		next[entry.id] = id_free;
		id_free = entry.id;
		free += slot->count;
		slot->count = 0;
	}
	vq->last_used = spot_cursor(at);
	vq->free_id = id_free;
	vq->free = free;
	vq->in_flight -= (uint32_t)count;
	(void)driver_sound(vq);
	return count;
}

int packed_driver_enable_call(struct vq_driver *vq)
{
	int more;

	if (!driver_sound(vq))
		return -EPROTO;
	event_store(vq->packed.driver_event, vq->config.event_idx ? event_value(EVENT_DESC, vq->last_used) :
								    event_value(EVENT_ENABLE, 0));
	/* pair [H]: full fence, the wish is stored before the flags are read again. virtio 1.2, 2.8.22 */
	atomic_thread_fence(memory_order_seq_cst);
	more = vq->batch_left || used(&vq->packed, used_spot(vq));
	return driver_sound(vq) ? more : -EPROTO;
}

void packed_driver_disable_call(struct vq_driver *vq)
{
	if (driver_sound(vq))
		event_store(vq->packed.driver_event, event_value(EVENT_DISABLE, 0));
}
