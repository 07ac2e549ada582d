// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * The device's end of a packed virtqueue. Partners of the barriers here are in packed_driver.c (or in the peer's driver):
 * [E] a descriptor's flags, available; [F] asking for kicks; [G] a descriptor's flags, used; [H] asking for calls.
 * Used descriptors go where chains became available, in order of completion: both cursors skip a chain's length.
 */
#include "device_end.h"

static bool available(const struct vq_device *vq, uint16_t cursor, uint16_t *flags)
{
	/* pair [E]: acquire, sees what the driver stored before these flags. virtio 1.2, 2.8.21.1 */
	*flags = ring16_load(&packed_at(&vq->packed, cursor)->flags, memory_order_acquire);
	return marked(*flags, available_mark(cursor));
}

/* The buffers of an indirect table: all of them are in it, flags but WRITE mean nothing. virtio 1.2, 2.8.7 */
static bool walk_table(struct vq_device *vq, struct vq_chain *chain, uint64_t address, uint32_t length,
		       struct iova_pieces *pieces, bool *full)
{
	if (!device_open_table(vq, chain->head, address, length))
		return false;
	for (uint32_t i = 0; i < length / VRING_DESC_SIZE; i++) {
		uint64_t second = le64toh(vq->table[2 * i + 1]); /* length, id, flags */

		if (!device_append(vq, chain, le64toh(vq->table[2 * i]), (uint32_t)second,
				   second >> 48 & DESC_WRITE, i, pieces, full))
			return false;
	}
	return true;
}

/*
 * Reads every descriptor of the chain at a cursor once; `flags` are the first one's, read already. The descriptors it
 * has, or 0: a fault is set, or *full, or its table is missing. The id is the last one's.
 */
static uint32_t walk(struct vq_device *vq, struct vq_chain *chain, uint16_t cursor, uint16_t flags,
		     struct iova_pieces *pieces, bool *full, uint16_t *id)
{
	for (uint32_t step = 0;; step++) {
		struct packed_desc *desc = packed_at(&vq->packed, cursor);
		uint64_t address = le64toh(atomic_load_explicit(&desc->address, memory_order_relaxed));
		uint32_t length = le32toh(atomic_load_explicit(&desc->length, memory_order_relaxed));

		if (flags & DESC_INDIRECT) {
			if (!vq->config.indirect)
				return device_fault(vq, VQ_INDIRECT_REFUSED, chain->head, 0);
			if (step || (flags & DESC_NEXT)) /* virtio 1.2, 2.8.19 */
				return device_fault(vq, VQ_INDIRECT_NEXT, chain->head, 0);
			if (!walk_table(vq, chain, address, length, pieces, full))
				return 0;
		} else if (!device_append(vq, chain, address, length, flags & DESC_WRITE, step, pieces, full)) {
			return 0;
		}
		if (!(flags & DESC_NEXT)) {
			*id = ring16_load(&desc->id, memory_order_relaxed);
			return step + 1;
		}
		if (step + 1 == vq->packed.num)
			return device_fault(vq, VQ_CHAIN_LONG, chain->head, vq->packed.num);
		cursor = cursor_advance(cursor, 1, vq->packed.num);
		flags = ring16_load(&packed_at(&vq->packed, cursor)->flags, memory_order_relaxed);
		if (!marked(flags, available_mark(cursor))) /* virtio 1.2, 2.8.6 and 2.8.17 */
			return device_fault(vq, VQ_CHAIN_PARTIAL, chain->head, cursor_position(cursor));
	}
}

/* What a chain's id and length must be, now that all of it is read. */
static bool acceptable(struct vq_device *vq, uint16_t position, uint16_t id, uint32_t descriptors)
{
	if (id >= vq->packed.num)
		return device_fault(vq, VQ_ID_RANGE, position, id);
	if (vq->busy[id])
		return device_fault(vq, VQ_ID_BUSY, position, id);
	if (vq->taken + descriptors > vq->packed.num)
		return device_fault(vq, VQ_RING_OVERRUN, position, vq->taken + descriptors);
	return true;
}

size_t packed_device_pop(struct vq_device *vq, struct vq_chain *chains, size_t limit, struct iova_pieces *pieces)
{
	size_t count = 0;
	uint16_t next = vq->next_avail, flags;

	vq->missing = 0;
	if (!device_usable(vq))
		return 0;
	while (count < limit && available(vq, next, &flags)) {
		struct vq_chain *chain = &chains[count];
		uint16_t position = cursor_position(next), id = 0;
		uint32_t descriptors;
		bool full = false;

		*chain = (struct vq_chain){ .first = pieces->used, .head = position };
		descriptors = walk(vq, chain, next, flags, pieces, &full, &id);
		if (!descriptors || vq->missing || !acceptable(vq, position, id, descriptors)) {
			pieces->used = chain->first;
			if (full && chain->first == 0)
				device_fault(vq, VQ_CHAIN_PIECES, position, pieces->capacity);
			break;
		}
		chain->head = id;
		vq->busy[id] = (uint16_t)descriptors;
		vq->taken += descriptors;
		next = cursor_advance(next, descriptors, vq->packed.num);
		count++;
	}
	vq->next_avail = vq->looked = next;
	vq->in_flight += (uint32_t)count;
	if (!device_sound(vq))
		return 0;
	return count;
}

/* Whether the driver wants to know of the last `moved` descriptors. */
static bool call_due(struct vq_device *vq, uint32_t moved)
{
	uint32_t event;
	bool always = vq->call_always;

	vq->call_always = false;
	/* pair [H]: full fence, the used flags are stored before the driver's wish is read. virtio 1.2, 2.8.22 */
	atomic_thread_fence(memory_order_seq_cst);
	event = event_load(vq->packed.driver_event);
	if (always && (event >> 16 & 3) == EVENT_DESC)
		return true;
	return event_asks(event, vq->used_idx, moved, vq->packed.num, vq->config.event_idx);
}

int packed_device_push(struct vq_device *vq, const struct vq_used *done, size_t count)
{
	uint16_t first = vq->used_idx, cursor = first, first_flags = 0;
	uint32_t moved = 0;
	size_t i;
	bool due = false;

	if (!device_usable(vq))
		return device_unusable(vq, count ? -EAGAIN : 0);
	for (i = 0; i < count; i++) {
		struct packed_desc *desc = packed_at(&vq->packed, cursor);
		uint16_t id = done[i].head, flags = used_mark(cursor);
		uint32_t descriptors;

		if (id >= vq->packed.num || !vq->busy[id])
			break;
		descriptors = vq->busy[id];
		vq->busy[id] = 0;
		if (done[i].written)
			flags |= DESC_WRITE;
		atomic_store_explicit(&desc->length, htole32(done[i].written), memory_order_relaxed);
		ring16_store(&desc->id, id, memory_order_relaxed);
		if (i)
			ring16_store(&desc->flags, flags, memory_order_relaxed);
		else
			first_flags = flags;
		cursor = cursor_advance(cursor, descriptors, vq->packed.num);
		moved += descriptors;
	}
	if (i) {
		vq->used_idx = cursor;
		vq->in_flight -= (uint32_t)i;
		vq->taken -= moved;
		/* pair [G]: release, the first flags open the batch: all of it, and the data, is visible with them. The driver
		 * looks at the descriptors behind the first one only after it. virtio 1.2, 2.8.2 and 2.8.9 */
		ring16_store(&packed_at(&vq->packed, first)->flags, first_flags, memory_order_release);
		due = call_due(vq, moved);
	}
	if (!device_sound(vq))
		return -EPROTO;
	return i < count ? -EINVAL : due;
}

int packed_device_enable_kick(struct vq_device *vq)
{
	uint16_t flags;
	int more;

	if (!device_usable(vq))
		return device_unusable(vq, 0);
	event_store(vq->packed.device_event, vq->config.event_idx ? event_value(EVENT_DESC, vq->looked) :
								    event_value(EVENT_ENABLE, 0));
	/* pair [F]: full fence, the wish is stored before the flags are read again. virtio 1.2, 2.8.21.2 */
	atomic_thread_fence(memory_order_seq_cst);
	more = available(vq, vq->looked, &flags) && !vq->missing;
	return device_sound(vq) ? more : -EPROTO;
}

void packed_device_disable_kick(struct vq_device *vq)
{
	if (!device_usable(vq))
		return;
	event_store(vq->packed.device_event, event_value(EVENT_DISABLE, 0));
	(void)device_sound(vq);
}
