// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * The device's end of a packed virtqueue. Partners of the barriers here are in packed_driver.c (or in the peer's driver):
 * [E] a descriptor's flags, available; [F] asking for kicks; [G] a descriptor's flags, used; [H] asking for calls.
 * Used descriptors go where chains became available, in order of completion: both cursors skip a chain's length.
 */
#include "device_end.h"

INLINED bool available(const struct packed_ring *ring, struct packed_spot spot)
{
	/* pair [E]: acquire, sees what the driver stored before these flags. virtio 1.2, 2.8.21.1 */
	return marked(ring16_load(&spot_desc(ring, spot)->flags, memory_order_acquire), (uint16_t)spot.mark);
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
APART struct iovec *walk_table_quickly(const struct device_walk *walk, struct vq_chain *chain, struct iovec *at,
				       uint64_t address, uint32_t length)
{
	struct packed_desc *desc = device_table(walk, address, length), *end;
	struct iovec *first = at, *behind = at;
	uint64_t bytes = 0, readable = 0;

	if (!desc)
		return NULL;
	for (end = desc + length / VRING_DESC_SIZE; desc < end; desc++) {
		struct packed_second second = second_load(desc);

		if (!device_append_quickly(walk, &at, address_load(desc), second.length))
			return NULL;
		bytes += second.length;
		if (second.flags & DESC_WRITE)
			continue;
		if (UNLIKELY(at - behind != 1)) /* a writable one came before */
			return NULL;
		behind = at;
		readable = bytes;
	}
	return device_walk_end(chain, first, behind, at, readable, bytes);
}

/* What of a descriptor says how its chain goes on, and on which lap it is. */
INLINED uint32_t kind_of(struct packed_second second)
{
	return second.flags & (DESC_NEXT | DESC_WRITE | DESC_INDIRECT | PACKED_AVAIL | PACKED_USED);
}

/*
 * A usual chain of several buffers, at `at`, the first descriptor's second word being read already: see struct device_walk.
 * Readable buffers come first, then writable ones, each kind in a loop of its own, where flags and mark are compared at once.
 * A chain that goes round the ring's end is not usual.
 */
INLINED struct iovec *walk_quickly(const struct device_walk *walk, const struct packed_ring *ring, struct vq_chain *chain,
				 struct iovec *at, struct packed_spot spot, struct packed_second second)
{
	struct packed_desc *desc = spot_desc(ring, spot), *end = ring->desc + ring->num;
	struct iovec *first = at, *behind;
	uint64_t bytes = 0, readable;
	uint32_t mark = spot.mark;

	while (kind_of(second) == (DESC_NEXT | mark)) {
		if (!device_append_quickly(walk, &at, address_load(desc), second.length) || UNLIKELY(++desc == end))
			return NULL;
		bytes += second.length;
		second = second_load(desc);
	}
	behind = at;
	readable = bytes;
	while (kind_of(second) == (DESC_NEXT | DESC_WRITE | mark)) {
		if (!device_append_quickly(walk, &at, address_load(desc), second.length) || UNLIKELY(++desc == end))
			return NULL;
		bytes += second.length;
		second = second_load(desc);
	}
	if (!device_append_quickly(walk, &at, address_load(desc), second.length))
		return NULL;
	bytes += second.length;
	if (kind_of(second) == mark && LIKELY(at - behind == 1)) { /* the last one is readable, as are those before */
		behind = at;
		readable = bytes;
	} else if (UNLIKELY(kind_of(second) != (DESC_WRITE | mark))) {
		return NULL;
	}
	chain->head = second.id;
	return device_walk_end(chain, first, behind, at, readable, bytes);
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
	*chain = device_chain(&sum, pieces, first, second.id);
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
	struct packed_spot next = packed_spot(vq->next_avail, available_mark(vq->next_avail));
	struct device_walk walk;
	struct packed_ring ring;
	struct iovec *at;
	size_t count;
	uint32_t taken = vq->taken;
	uint16_t *busy = vq->busy;

	vq->missing = 0;
	if (!device_usable(vq))
		return 0;
	ring = vq->packed;
	walk = device_walk(vq, pieces);
	at = pieces->iov + pieces->used;
	for (count = 0; count < limit && available(&ring, next); count++) {
		struct packed_desc *desc = spot_desc(&ring, next);
		struct packed_second second = second_load(desc);
		struct vq_chain *chain = &chains[count];
		struct iovec *behind;
		uint32_t descriptors = 1;

		chain->head = second.id;
		if (!(second.flags & (DESC_NEXT | DESC_INDIRECT))) {
			behind = device_walk_one(&walk, chain, at, address_load(desc), second.length, second.flags & DESC_WRITE);
		} else if (second.flags & DESC_NEXT) {
			behind = walk_quickly(&walk, &ring, chain, at, next, second);
			descriptors = chain->readable_pieces + chain->writable_pieces;
		} else {
			behind = walk_table_quickly(&walk, chain, at, address_load(desc), second.length);
		}
		if (UNLIKELY(!behind)) {
			device_walked(&walk, pieces, at);
			descriptors = walk_thoroughly(vq, pieces, chain, spot_cursor(next));
			if (!descriptors)
				break;
			walk = device_walk(vq, pieces);
			behind = pieces->iov + pieces->used;
		}
		if (UNLIKELY(chain->head >= ring.num || busy[chain->head] || taken + descriptors > ring.num)) {
			refuse(vq, (uint16_t)next.position, chain->head, taken + descriptors);
			break;
		}
		at = behind;
		busy[chain->head] = (uint16_t)descriptors;
		taken += descriptors;
		next = spot_advance(next, descriptors, ring.num);
	}
	device_walked(&walk, pieces, at);
	vq->taken = taken;
	vq->next_avail = vq->looked = spot_cursor(next);
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

/* A used descriptor; the flags of the batch's first one are stored when the rest is there. */
INLINED void use(struct packed_desc *desc, uint32_t mark, struct vq_used done, bool first)
{
	if (UNLIKELY(first))
		second_store_unmarked(desc, done.written, done.head);
	else
		second_store(desc, (struct packed_second){ done.written, done.head,
							   (uint16_t)(mark | (done.written ? DESC_WRITE : 0)) });
}

/* How many of `done` are given back, but for the first flags; *moved descriptors. */
static size_t use_all(struct vq_device *vq, const struct vq_used *done, size_t count, uint32_t *moved)
{
	struct packed_spot spot = packed_spot(vq->used_idx, used_mark(vq->used_idx));
	const struct packed_ring ring = vq->packed;
	uint16_t *busy = vq->busy;
	uint32_t behind = 0, usual = 1;
	size_t i;

	for (i = 0; i < count; i++) {
		uint16_t id = done[i].head, descriptors;

		if (UNLIKELY(id >= ring.num || !busy[id]))
			break;
		descriptors = busy[id];
		busy[id] = 0;
		use(spot_desc(&ring, spot), spot.mark, done[i], i == 0);
		spot = spot_skip(spot, descriptors, &usual, ring.num);
		behind += descriptors;
	}
	vq->used_idx = spot_cursor(spot);
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
		use(packed_at(&vq->packed, vq->used_idx), used_mark(vq->used_idx), entry, *moved == 0);
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
	more = available(&vq->packed, packed_spot(vq->looked, available_mark(vq->looked))) && !vq->missing;
	return device_sound(vq) ? more : -EPROTO;
}

void packed_device_disable_kick(struct vq_device *vq)
{
	if (!device_usable(vq))
		return;
	event_store(vq->packed.device_event, event_value(EVENT_DISABLE, 0));
	(void)device_sound(vq);
}
