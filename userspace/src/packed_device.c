// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * The device's end of a packed virtqueue. Partners of the barriers here are in packed_driver.c (or in the peer's driver):
 * [E] a descriptor's flags, available; [F] asking for kicks; [G] a descriptor's flags, used; [H] asking for calls.
 * Used descriptors go where chains became available, in order of completion: both cursors skip a chain's length.
 */
#include "device_end.h"

INLINED bool available(const struct packed_ring *ring, uint16_t cursor)
{
	/* pair [E]: acquire, sees what the driver stored before these flags. virtio 1.2, 2.8.21.1 */
	return marked(ring16_load(&packed_at(ring, cursor)->flags, memory_order_acquire), available_mark(cursor));
}

/* The buffers of an indirect table: all of them are in it, flags but WRITE mean nothing. virtio 1.2, 2.8.7 */
static int walk_table(struct vq_device *vq, struct iova_pieces *pieces, struct device_sum *sum, uint16_t position,
		      uint64_t address, uint32_t length)
{
	int error = 0;

	if (!device_open_table(vq, position, address, length))
		return -EPROTO;
	for (uint32_t i = 0; i < length / VRING_DESC_SIZE && !error; i++) {
		struct packed_second second = second_value(vq->table[2 * i + 1]);

		error = device_add_buffer(vq, pieces, sum, position, le64toh(vq->table[2 * i]), second.length,
					  second.flags & DESC_WRITE, i);
	}
	return error;
}

/* An id that is not in the ring or in flight, or more descriptors than the ring has. */
COLD static void refuse(struct vq_device *vq, uint16_t position, uint16_t id, uint32_t taken)
{
	if (id >= vq->config.num)
		device_fault(vq, VQ_ID_RANGE, position, id);
	else if (vq->busy[id])
		device_fault(vq, VQ_ID_BUSY, position, id);
	else
		device_fault(vq, VQ_RING_OVERRUN, position, taken);
}

/* The usual table: all of its descriptors are buffers, flags but WRITE mean nothing. virtio 1.2, 2.8.7 */
static bool walk_table_quickly(struct device_walk *walk, struct vq_chain *chain, uint64_t address, uint32_t length)
{
	struct packed_desc *desc = device_table(walk, address, length), *end;
	size_t at = walk->at, behind = at;
	uint64_t readable = 0, writable = 0;

	if (!desc)
		return false;
	for (end = desc + length / VRING_DESC_SIZE; desc < end; desc++) {
		struct packed_second second = second_load(desc);

		if (!device_append_quickly(walk, &at, address_load(desc), second.length))
			return false;
		if (second.flags & DESC_WRITE) {
			writable += second.length;
		} else {
			if (UNLIKELY(writable))
				return false;
			readable += second.length;
			behind = at;
		}
	}
	return device_end_chain(walk, chain, at, behind, readable, writable);
}

/*
 * The usual chain: see struct device_walk, which then stands behind it; `descriptors` it has. Readable buffers first, then
 * writable ones, each kind in a loop of its own. A chain that goes round the ring's end is not usual.
 */
INLINED bool walk_quickly(const struct packed_ring *ring, struct device_walk *walk, struct vq_chain *chain, uint16_t cursor,
			  uint32_t *descriptors)
{
	struct packed_desc *desc = packed_at(ring, cursor), *end = ring->desc + ring->num;
	struct packed_second second = second_load(desc);
	size_t first = walk->at, at = first, behind = first;
	uint32_t flags = second.flags & (DESC_NEXT | DESC_WRITE | DESC_INDIRECT), mark = available_mark(cursor);
	uint64_t readable = 0, writable = 0;

	chain->head = second.id;
	*descriptors = 1;
	if (flags == 0 && (walk->view.perm & IOVA_RO)) { /* one buffer */
		device_single(chain, first / PIECE, second.length, 0);
		return device_append_quickly(walk, &walk->at, address_load(desc), second.length);
	}
	if (flags == DESC_WRITE && (walk->view.perm & IOVA_WO)) {
		device_single(chain, first / PIECE, 0, second.length);
		return device_append_quickly(walk, &walk->at, address_load(desc), second.length);
	}
	if (flags == DESC_INDIRECT)
		return walk_table_quickly(walk, chain, address_load(desc), second.length);
	while (!(second.flags & (DESC_WRITE | DESC_INDIRECT))) {
		if (!device_append_quickly(walk, &at, address_load(desc), second.length))
			return false;
		readable += second.length;
		behind = at;
		if (!(second.flags & DESC_NEXT))
			goto end;
		if (UNLIKELY(++desc == end))
			return false;
		second = second_load(desc);
		if (UNLIKELY(!marked(second.flags, (uint16_t)mark)))
			return false;
	}
	for (;;) {
		if (UNLIKELY((second.flags & (DESC_WRITE | DESC_INDIRECT)) != DESC_WRITE) ||
		    !device_append_quickly(walk, &at, address_load(desc), second.length))
			return false;
		writable += second.length;
		if (!(second.flags & DESC_NEXT))
			break;
		if (UNLIKELY(++desc == end))
			return false;
		second = second_load(desc);
		if (UNLIKELY(!marked(second.flags, (uint16_t)mark)))
			return false;
	}
end:
	if (!device_end_chain(walk, chain, at, behind, readable, writable))
		return false;
	*descriptors = (uint32_t)((at - first) / PIECE);
	chain->head = second.id;
	return true;
}

/*
 * Any chain; every descriptor is read once. The descriptors it has, -ENOSPC, or -EPROTO: a fault is set, or its table is
 * missing. The head is the id, which is the last one's.
 */
static int walk(struct vq_device *vq, struct iova_pieces *pieces, struct vq_chain *chain, uint16_t cursor)
{
	struct device_sum sum = { .behind = pieces->used };
	uint16_t position = cursor_position(cursor);
	struct packed_second second;
	size_t first = pieces->used;
	uint32_t step;

	for (step = 0;; step++) {
		struct packed_desc *desc = packed_at(&vq->packed, cursor);
		int error;

		second = second_load(desc);
		if (step && !marked(second.flags, available_mark(cursor))) /* virtio 1.2, 2.8.6 and 2.8.17 */
			return device_broken(vq, VQ_CHAIN_PARTIAL, position, cursor_position(cursor));
		if (!(second.flags & DESC_INDIRECT))
			error = device_add_buffer(vq, pieces, &sum, position, address_load(desc), second.length,
						  second.flags & DESC_WRITE, step);
		else if (!vq->config.indirect)
			return device_broken(vq, VQ_INDIRECT_REFUSED, position, 0);
		else if (step || (second.flags & DESC_NEXT)) /* virtio 1.2, 2.8.19 */
			return device_broken(vq, VQ_INDIRECT_NEXT, position, 0);
		else
			error = walk_table(vq, pieces, &sum, position, address_load(desc), second.length);
		if (error)
			return error;
		if (!(second.flags & DESC_NEXT))
			break;
		if (step + 1 == vq->packed.num)
			return device_broken(vq, VQ_CHAIN_LONG, position, vq->packed.num);
		cursor = cursor_advance(cursor, 1, vq->packed.num);
	}
	*chain = device_chain(&sum, first, pieces->used, second.id);
	if (!device_sum_allowed(&sum))
		return device_broken(vq, VQ_CHAIN_BYTES, position, sum.readable + sum.writable);
	return (int)step + 1;
}

/* The same, out of the loop that pops; 0 when the chain is not taken. */
COLD static uint32_t walk_thoroughly(struct vq_device *vq, struct iova_pieces *pieces, struct vq_chain *chain,
				     uint16_t cursor)
{
	size_t first = pieces->used;
	int descriptors = walk(vq, pieces, chain, cursor);

	if (descriptors > 0 && !vq->missing)
		return (uint32_t)descriptors;
	pieces->used = first;
	if (descriptors == -ENOSPC && first == 0)
		device_fault(vq, VQ_CHAIN_PIECES, cursor_position(cursor), pieces->capacity);
	return 0;
}

size_t packed_device_pop(struct vq_device *vq, struct vq_chain *chains, size_t limit, struct iova_pieces *pieces)
{
	struct device_walk at;
	struct packed_ring ring;
	size_t count;
	uint32_t taken = vq->taken;
	uint16_t next = vq->next_avail, *busy = vq->busy;

	vq->missing = 0;
	if (!device_usable(vq))
		return 0;
	ring = vq->packed;
	at = device_walk_start(vq, pieces);
	for (count = 0; count < limit && available(&ring, next); count++) {
		struct vq_chain *chain = &chains[count];
		size_t first = at.at;
		uint32_t descriptors;

		if (UNLIKELY(!walk_quickly(&ring, &at, chain, next, &descriptors))) {
			pieces->used = first / PIECE;
			descriptors = walk_thoroughly(vq, pieces, chain, next);
			if (!descriptors)
				break;
			at = device_walk_start(vq, pieces);
		}
		if (UNLIKELY(chain->head >= ring.num || busy[chain->head] || taken + descriptors > ring.num)) {
			refuse(vq, cursor_position(next), chain->head, taken + descriptors);
			at.at = first;
			break;
		}
		busy[chain->head] = (uint16_t)descriptors;
		taken += descriptors;
		next = cursor_advance(next, descriptors, ring.num);
	}
	pieces->used = at.at / PIECE;
	vq->taken = taken;
	vq->next_avail = vq->looked = next;
	device_note_order(vq, chains, count);
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

/* A used descriptor at a cursor; the flags of the batch's first one are stored when the rest is there. */
INLINED void use(const struct packed_ring *ring, uint16_t cursor, struct vq_used done, bool first)
{
	struct packed_desc *desc = packed_at(ring, cursor);
	uint16_t flags = (uint16_t)(used_mark(cursor) | (done.written ? DESC_WRITE : 0));

	if (first)
		second_store_unmarked(desc, done.written, done.head);
	else
		second_store(desc, (struct packed_second){ done.written, done.head, flags });
}

/* How many of `done` are given back, but for the first flags; *moved descriptors. */
static size_t use_all(struct vq_device *vq, const struct vq_used *done, size_t count, uint32_t *moved)
{
	const struct packed_ring ring = vq->packed;
	uint16_t *busy = vq->busy, cursor = vq->used_idx;
	uint32_t behind = 0, usual = 1;
	size_t i;

	for (i = 0; i < count; i++) {
		uint16_t id = done[i].head, descriptors;

		if (UNLIKELY(id >= ring.num || !busy[id]))
			break;
		descriptors = busy[id];
		busy[id] = 0;
		use(&ring, cursor, done[i], i == 0);
		cursor = cursor_skip(cursor, descriptors, &usual, ring.num);
		behind += descriptors;
	}
	vq->used_idx = cursor;
	vq->in_flight -= (uint32_t)i;
	*moved = behind;
	return i;
}

/* The same with IN_ORDER, for all that is complete from the oldest chain on; *written is the first entry's. */
static size_t use_in_order(struct vq_device *vq, const struct vq_used *done, size_t count, uint32_t *moved,
			   uint32_t *written)
{
	size_t held = device_hold(vq, done, count);
	struct vq_used entry;
	uint32_t entries;

	*moved = 0;
	while (device_release(vq, &entry, &entries)) {
		*written = *moved ? *written : entry.written;
		use(&vq->packed, vq->used_idx, entry, *moved == 0);
		vq->used_idx = cursor_advance(vq->used_idx, entries, vq->packed.num);
		*moved += entries;
	}
	return held;
}

int packed_device_push(struct vq_device *vq, const struct vq_used *done, size_t count)
{
	uint16_t first = vq->used_idx, flags;
	uint32_t moved = 0, written = count ? done[0].written : 0;
	size_t given;
	bool due = false;

	if (!device_usable(vq))
		return device_unusable(vq, count ? -EAGAIN : 0);
	if (vq->config.in_order)
		given = use_in_order(vq, done, count, &moved, &written);
	else
		given = use_all(vq, done, count, &moved);
	if (moved) {
		vq->taken -= moved;
		flags = (uint16_t)(used_mark(first) | (written ? DESC_WRITE : 0));
		/* pair [G]: release, the first flags open the batch: all of it, and the data, is visible with them. The driver
		 * looks at the descriptors behind the first one only after it. virtio 1.2, 2.8.2 and 2.8.9 */
		ring16_store(&packed_at(&vq->packed, first)->flags, flags, memory_order_release);
		due = call_due(vq, moved);
	}
	if (!device_sound(vq))
		return -EPROTO;
	return given < count ? -EINVAL : due;
}

int packed_device_enable_kick(struct vq_device *vq)
{
	int more;

	if (!device_usable(vq))
		return device_unusable(vq, 0);
	event_store(vq->packed.device_event, vq->config.event_idx ? event_value(EVENT_DESC, vq->looked) :
								    event_value(EVENT_ENABLE, 0));
	/* pair [F]: full fence, the wish is stored before the flags are read again. virtio 1.2, 2.8.21.2 */
	atomic_thread_fence(memory_order_seq_cst);
	more = available(&vq->packed, vq->looked) && !vq->missing;
	return device_sound(vq) ? more : -EPROTO;
}

void packed_device_disable_kick(struct vq_device *vq)
{
	if (!device_usable(vq))
		return;
	event_store(vq->packed.device_event, event_value(EVENT_DISABLE, 0));
	(void)device_sound(vq);
}
