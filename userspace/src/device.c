// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * The device's end of a split virtqueue, and the way to the packed one; device_setup.c is what comes before both. Partners
 * of the barriers here are in driver.c (or in the peer's driver): [A] avail->idx, [B] asking for kicks, [C] used->idx, [D]
 * asking for calls.
 */
#include "device_end.h"

/* Chains that wait, after reading avail->idx once; 0 with a fault when the index is impossible. */
static inline uint16_t waiting(struct vq_device *vq)
{
	uint16_t count;

	/* pair [A]: acquire, sees the ring entries and descriptors stored before the driver's idx. virtio 1.2, 2.7.13.3 */
	vq->avail_seen = ring16_load(avail_idx(&vq->ring), memory_order_acquire);
	count = (uint16_t)(vq->avail_seen - vq->next_avail);
	if (UNLIKELY(count > vq->ring.num)) {
		device_fault(vq, VQ_AVAIL_JUMP, vq->next_avail, vq->avail_seen);
		return 0;
	}
	return count;
}

/* Fields of a descriptor's second word. */
INLINED uint32_t length_of(uint64_t second)
{
	return (uint32_t)second;
}

INLINED uint32_t flags_of(uint64_t second)
{
	return (uint32_t)(second >> 32) & (DESC_NEXT | DESC_WRITE | DESC_INDIRECT);
}

INLINED uint32_t next_of(uint64_t second)
{
	return (uint32_t)(second >> 48);
}

/*
 * A usual chain of several buffers, at `at`, the first descriptor's second word being read already: see struct device_walk.
 * Readable buffers come first, then writable ones, each kind in a loop of its own, where flags are compared once. A chain
 * that loops ends for want of room, if not before.
 */
INLINED struct iovec *walk_quickly(const struct device_walk *walk, const struct vring *ring, struct vq_chain *chain,
				 struct iovec *at, uint32_t head, uint64_t second)
{
	uint64_t address = desc_first(ring, head), bytes = 0, readable;
	struct iovec *first = at, *behind;
	struct vring from = *ring; /* or the table */

	if (flags_of(second) == DESC_INDIRECT) {
		from.desc = device_table(walk, address, length_of(second));
		from.num = length_of(second) / VRING_DESC_SIZE;
		if (UNLIKELY(!from.desc))
			return NULL;
		address = desc_first(&from, 0);
		second = desc_second(&from, 0);
	}
	while (flags_of(second) == DESC_NEXT) {
		if (UNLIKELY(next_of(second) >= from.num) || !device_append_quickly(walk, &at, address, length_of(second)))
			return NULL;
		bytes += length_of(second);
		address = desc_first(&from, next_of(second));
		second = desc_second(&from, next_of(second));
	}
	behind = at;
	readable = bytes;
	while (flags_of(second) == (DESC_NEXT | DESC_WRITE)) {
		if (UNLIKELY(next_of(second) >= from.num) || !device_append_quickly(walk, &at, address, length_of(second)))
			return NULL;
		bytes += length_of(second);
		address = desc_first(&from, next_of(second));
		second = desc_second(&from, next_of(second));
	}
	if (!device_append_quickly(walk, &at, address, length_of(second)))
		return NULL;
	bytes += length_of(second);
	if (flags_of(second) == 0 && LIKELY(at - behind == 1)) { /* the last one is readable, as are those before */
		behind = at;
		readable = bytes;
	} else if (UNLIKELY(flags_of(second) != DESC_WRITE)) {
		return NULL;
	}
	return LIKELY((size_t)(at - first) <= from.num) ? device_walk_end(chain, first, behind, at, readable, bytes) : NULL;
}

/* A chain's table is opened, and its descriptors follow; false with a fault or misses. */
static bool enter(struct vq_device *vq, uint16_t head, struct vring_desc_value desc, bool inside)
{
	if (inside) /* virtio 1.2, 2.7.5.3.1 */
		return device_fault(vq, VQ_INDIRECT_NESTED, head, 0);
	if (!vq->config.indirect)
		return device_fault(vq, VQ_INDIRECT_REFUSED, head, 0);
	if (desc.flags & DESC_NEXT) /* virtio 1.2, 2.7.5.3.1 */
		return device_fault(vq, VQ_INDIRECT_NEXT, head, 0);
	return device_open_table(vq, head, desc.address, desc.length);
}

/* Any chain; every descriptor is read once. 0, -ENOSPC, or -EPROTO: a fault is set, or its table is missing. */
static int walk(struct vq_device *vq, struct iova_pieces *pieces, struct vq_chain *chain, uint16_t head)
{
	struct device_sum sum = { .behind = pieces->used };
	uint32_t limit = vq->ring.num, index = head;
	size_t first = pieces->used;
	bool inside = false;

	for (uint32_t step = 0;; step++) {
		struct vring_desc_value desc;
		int error;

		if (step == limit)
			return device_broken(vq, VQ_CHAIN_LONG, head, limit);
		desc = inside ? desc_value(vq->table[2 * index], vq->table[2 * index + 1]) :
				vring_desc_load(&vq->ring, index);
		if (desc.flags & DESC_INDIRECT) {
			if (!enter(vq, head, desc, inside))
				return -EPROTO;
			inside = true;
			limit = desc.length / VRING_DESC_SIZE;
			index = 0;
			step = UINT32_MAX; /* the table counts from 0 again */
			continue;
		}
		error = device_add_buffer(vq, pieces, &sum, head, desc.address, desc.length, desc.flags & DESC_WRITE, step);
		if (error)
			return error;
		if (!(desc.flags & DESC_NEXT))
			break;
		if (desc.next >= limit)
			return device_broken(vq, VQ_NEXT_RANGE, index, desc.next);
		index = desc.next;
	}
	*chain = device_chain(&sum, pieces, first, head);
	return device_sum_allowed(&sum) ? 0 : device_broken(vq, VQ_CHAIN_BYTES, head, sum.readable + sum.writable);
}

/* The same, out of the loop that pops; false when the chain is not taken. */
COLD static bool walk_thoroughly(struct vq_device *vq, struct iova_pieces *pieces, struct vq_chain *chain, uint16_t head)
{
	size_t first = pieces->used;
	int error = walk(vq, pieces, chain, head);

	if (!error && !vq->missing)
		return true;
	pieces->used = first;
	if (error == -ENOSPC && first == 0)
		device_fault(vq, VQ_CHAIN_PIECES, head, pieces->capacity);
	return false;
}

/* A head that is not in the ring, or is in flight. */
COLD static void refuse(struct vq_device *vq, uint16_t next, uint16_t head)
{
	device_fault(vq, head < vq->config.num ? VQ_HEAD_BUSY : VQ_HEAD_RANGE, next, head);
}

size_t vq_device_pop(struct vq_device *vq, struct vq_chain *chains, size_t limit, struct iova_pieces *pieces)
{
	struct device_walk walk;
	struct iovec *at;
	struct vring ring;
	uint16_t *busy = vq->busy, next = vq->next_avail, ready;
	size_t count;

	if (vq->config.packed)
		return packed_device_pop(vq, chains, limit, pieces);
	vq->missing = 0;
	if (!device_usable(vq))
		return 0;
	ready = (uint16_t)(vq->avail_seen - next);
	if (ready < limit)
		ready = waiting(vq);
	ring = vq->ring;
	limit = limit < ready ? limit : ready;
	walk = device_walk(vq, pieces);
	at = pieces->iov + pieces->used;
	for (count = 0; count < limit; count++, next++) {
		uint16_t head = ring16_load(avail_slot(&ring, next), memory_order_relaxed);
		struct vq_chain *chain = &chains[count];
		struct iovec *behind;
		uint64_t second;

		if (UNLIKELY(head >= ring.num || busy[head])) {
			refuse(vq, next, head);
			break;
		}
		chain->head = head;
		second = desc_second(&ring, head);
		if (!(flags_of(second) & (DESC_NEXT | DESC_INDIRECT)))
			behind = device_walk_one(&walk, chain, at, desc_first(&ring, head), length_of(second),
						 flags_of(second) & DESC_WRITE);
		else
			behind = walk_quickly(&walk, &ring, chain, at, head, second);
		if (UNLIKELY(!behind)) {
			device_walked(&walk, pieces, at);
			if (!walk_thoroughly(vq, pieces, chain, head))
				break;
			walk = device_walk(vq, pieces);
			behind = pieces->iov + pieces->used;
		}
		at = behind;
		busy[head] = 1;
	}
	device_walked(&walk, pieces, at);
	vq->next_avail = vq->looked = next;
	device_note_order(vq, chains, count);
	if (!device_sound(vq))
		return 0;
	return count;
}

/* Whether the driver wants to know that used->idx went from `before` to the current one. */
static bool call_due(struct vq_device *vq, uint16_t before)
{
	bool always = vq->call_always;

	vq->call_always = false;
	/* pair [D]: full fence, used->idx is stored before the driver's wish is read. virtio 1.2, 2.7.7 */
	atomic_thread_fence(memory_order_seq_cst);
	if (!vq->config.event_idx)
		return !(ring16_load(avail_flags(&vq->ring), memory_order_relaxed) & RING_NO_NOTIFY);
	return passes_event(ring16_load(used_event(&vq->ring), memory_order_relaxed), vq->used_idx, before) || always;
}

/* Writes the used entry at `index`. */
INLINED void use(const struct vring *ring, uint16_t index, struct vq_used done)
{
	_Atomic uint32_t *slot = used_slot(ring, index);

	atomic_store_explicit(&slot[0], htole32(done.head), memory_order_relaxed);
	atomic_store_explicit(&slot[1], htole32(done.written), memory_order_relaxed);
}

/* How many of `done` are given back; they are not seen yet. */
static size_t use_all(struct vq_device *vq, const struct vq_used *done, size_t count)
{
	const struct vring ring = vq->ring;
	uint16_t *busy = vq->busy, used = vq->used_idx;
	size_t i;

	for (i = 0; i < count; i++) {
		if (UNLIKELY(done[i].head >= ring.num || !busy[done[i].head]))
			break;
		busy[done[i].head] = 0;
		use(&ring, used++, done[i]);
	}
	vq->used_idx = used;
	vq->in_flight -= (uint32_t)i;
	return i;
}

/* The same with IN_ORDER: what is seen is all that is complete from the oldest on. */
static size_t use_in_order(struct vq_device *vq, const struct vq_used *done, size_t count)
{
	size_t held = device_hold(vq, done, count);
	struct vq_used entry;
	uint32_t chains, entries;

	while ((chains = device_release(vq, &entry, &entries))) {
		use(&vq->ring, vq->used_idx, entry);
		vq->used_idx = (uint16_t)(vq->used_idx + chains);
	}
	return held;
}

int vq_device_push(struct vq_device *vq, const struct vq_used *done, size_t count)
{
	uint16_t before = vq->used_idx;
	size_t given;
	bool due = false;

	if (vq->config.packed)
		return packed_device_push(vq, done, count);
	if (!device_usable(vq))
		return device_unusable(vq, count ? -EAGAIN : 0);
	before = vq->used_idx; /* known for sure only now */
	given = vq->config.in_order ? use_in_order(vq, done, count) : use_all(vq, done, count);
	if (vq->used_idx != before) {
		/* pair [C]: release, entries and the data written before are visible with the index. virtio 1.2, 2.7.8.2 */
		ring16_store(used_idx(&vq->ring), vq->used_idx, memory_order_release);
		due = call_due(vq, before);
	}
	if (!device_sound(vq))
		return -EPROTO;
	return given < count ? -EINVAL : due;
}

int vq_device_enable_kick(struct vq_device *vq)
{
	int more;

	if (vq->config.packed)
		return packed_device_enable_kick(vq);
	if (!device_usable(vq))
		return device_unusable(vq, 0);
	ring16_store(used_flags(&vq->ring), 0, memory_order_relaxed);
	if (vq->config.event_idx)
		ring16_store(avail_event(&vq->ring), vq->looked, memory_order_relaxed);
	/* pair [B]: full fence, the wish is stored before avail->idx is read again. virtio 1.2, 2.7.10 */
	atomic_thread_fence(memory_order_seq_cst);
	more = waiting(vq) > (uint16_t)(vq->looked - vq->next_avail) && !vq->missing;
	return device_sound(vq) && vq->fault.code == VQ_OK ? more : -EPROTO;
}

void vq_device_disable_kick(struct vq_device *vq)
{
	if (vq->config.packed) {
		packed_device_disable_kick(vq);
		return;
	}
	if (!device_usable(vq))
		return;
	if (vq->config.event_idx) /* an index just passed comes again after 65535 more */
		ring16_store(avail_event(&vq->ring), (uint16_t)(vq->next_avail - 1), memory_order_relaxed);
	else
		ring16_store(used_flags(&vq->ring), RING_NO_NOTIFY, memory_order_relaxed);
	(void)device_sound(vq);
}
