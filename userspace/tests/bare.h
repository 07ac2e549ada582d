// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * bare: what a ring costs at the least. Both ends as one would write them for one known peer: every index, id, length and
 * address is checked against the ring and one memory region, indices and flags are acquired and released; there is no
 * event index, no second region, no indirect table, no chain in flight that is remembered, and no reason given.
 *
 * Rule: the measure for the ring core in bench.c, not a ring to use.
 */
#ifndef VDPA_BRIDGE_BARE_H
#define VDPA_BRIDGE_BARE_H

#include "test.h"

struct bare {
	struct vring ring;
	struct packed_ring packed;
	uint64_t iova, size; /* the region */
	uint8_t *host;
	uint16_t *next; /* free list, and chains in flight */
	uint16_t free_head, added, popped, pushed, reaped; /* packed: the last three are cursors */
	uint16_t *count; /* packed: descriptors by id */
};

/* A chain as the device has it: its pieces follow those of the one before. */
struct bare_chain {
	uint32_t pieces;
	uint16_t head;
};

static inline void bare_open(struct bare *b, const struct bench *like)
{
	uint32_t num = like->driver.config.num;
	uint8_t *area = like->area;
	struct vq_layout at = vq_layout(num, 0, like->driver.config.packed);

	memset(b, 0, sizeof(*b));
	memset(area, 0, at.size);
	b->ring = (struct vring){ (void *)(area + at.desc), (void *)(area + at.avail), (void *)(area + at.used), num };
	b->packed = (struct packed_ring){ (void *)(area + at.desc), (void *)(area + at.avail), (void *)(area + at.used), num };
	b->iova = DATA_IOVA;
	b->size = DATA_SIZE;
	b->host = like->data;
	b->next = calloc(num, sizeof(*b->next));
	b->count = calloc(num, sizeof(*b->count));
	CHECK(b->next && b->count);
	for (uint32_t i = 0; i < num; i++)
		b->next[i] = (uint16_t)(i + 1);
	if (like->driver.config.packed)
		b->added = b->popped = b->pushed = b->reaped = CURSOR_WRAP;
}

static inline void bare_close(struct bare *b)
{
	free(b->next);
	free(b->count);
}

static inline bool bare_translate(const struct bare *b, uint64_t address, uint32_t length, struct iovec *to)
{
	uint64_t offset = address - b->iova;

	if (offset >= b->size || length > b->size - offset)
		return false;
	*to = (struct iovec){ .iov_base = b->host + offset, .iov_len = length };
	return true;
}

/* ---- split ---- */

static inline void bare_add(struct bare *b, const struct vq_buffer *list, uint32_t buffers, size_t count)
{
	const struct vring ring = b->ring;
	uint16_t head = b->free_head, added = b->added;

	for (size_t done = 0; done < count; done++) {
		uint16_t at = head;

		for (uint32_t i = 0; i < buffers; i++) {
			uint16_t next = b->next[at];
			uint16_t flags = (uint16_t)((i ? DESC_WRITE : 0) | (i + 1 < buffers ? DESC_NEXT : 0));

			desc_store(&ring.desc[2 * at], (struct vring_desc_value){ list[i].iova, list[i].length, flags, next });
			at = next;
		}
		ring16_store(avail_slot(&ring, added++), head, memory_order_relaxed);
		head = at;
	}
	b->free_head = head;
	b->added = added;
	ring16_store(avail_idx(&ring), added, memory_order_release);
}

static inline size_t bare_pop(struct bare *b, struct bare_chain *chains, struct iovec *iov, size_t limit)
{
	const struct vring ring = b->ring;
	uint16_t popped = b->popped, ready = (uint16_t)(ring16_load(avail_idx(&ring), memory_order_acquire) - popped);
	size_t count = 0;

	CHECK(ready <= ring.num);
	for (; count < limit && count < ready; count++) {
		uint16_t head = ring16_load(avail_slot(&ring, popped++), memory_order_relaxed), at = head;
		struct vring_desc_value desc;
		uint32_t pieces = 0;

		do {
			CHECK(at < ring.num && pieces < ring.num);
			desc = vring_desc_load(&ring, at);
			CHECK(bare_translate(b, desc.address, desc.length, iov++));
			pieces++;
			at = desc.next;
		} while (desc.flags & DESC_NEXT);
		chains[count] = (struct bare_chain){ pieces, head };
	}
	b->popped = popped;
	return count;
}

static inline void bare_push(struct bare *b, const struct bare_chain *chains, size_t count)
{
	const struct vring ring = b->ring;
	uint16_t pushed = b->pushed;

	for (size_t i = 0; i < count; i++) {
		_Atomic uint32_t *slot = used_slot(&ring, pushed++);

		atomic_store_explicit(&slot[0], htole32(chains[i].head), memory_order_relaxed);
		atomic_store_explicit(&slot[1], htole32(0), memory_order_relaxed);
	}
	b->pushed = pushed;
	ring16_store(used_idx(&ring), pushed, memory_order_release);
}

static inline size_t bare_reap(struct bare *b, size_t limit, uint32_t buffers)
{
	const struct vring ring = b->ring;
	uint16_t reaped = b->reaped, ready = (uint16_t)(ring16_load(used_idx(&ring), memory_order_acquire) - reaped);
	uint16_t free_head = b->free_head;
	size_t count = 0;

	for (; count < limit && count < ready; count++) {
		_Atomic uint32_t *slot = used_slot(&ring, reaped++);
		uint32_t id = le32toh(atomic_load_explicit(&slot[0], memory_order_relaxed)), last = id;

		CHECK(id < ring.num && atomic_load_explicit(&slot[1], memory_order_relaxed) <= DATA_SIZE);
		for (uint32_t i = 1; i < buffers; i++)
			last = b->next[last];
		b->next[last] = free_head;
		free_head = (uint16_t)id;
	}
	b->free_head = free_head;
	b->reaped = reaped;
	return count;
}

/* ---- packed ---- */

static inline void bare_packed_add(struct bare *b, const struct vq_buffer *list, uint32_t buffers, size_t count)
{
	const struct packed_ring ring = b->packed;
	uint16_t added = b->added, id = b->free_head, first_flags = 0;
	struct packed_desc *first = packed_at(&ring, added);

	for (size_t done = 0; done < count; done++) {
		for (uint32_t i = 0; i < buffers; i++) {
			struct packed_desc *desc = packed_at(&ring, added);
			uint16_t flags = (uint16_t)((i ? DESC_WRITE : 0) | (i + 1 < buffers ? DESC_NEXT : 0) |
						    available_mark(added));

			atomic_store_explicit(&desc->address, htole64(list[i].iova), memory_order_relaxed);
			atomic_store_explicit(&desc->length, htole32(list[i].length), memory_order_relaxed);
			ring16_store(&desc->id, id, memory_order_relaxed);
			if (desc == first)
				first_flags = flags;
			else
				ring16_store(&desc->flags, flags, memory_order_relaxed);
			added = cursor_advance(added, 1, ring.num);
		}
		b->count[id] = (uint16_t)buffers;
		id = b->next[id];
	}
	b->added = added;
	b->free_head = id;
	ring16_store(&first->flags, first_flags, memory_order_release);
}

static inline size_t bare_packed_pop(struct bare *b, struct bare_chain *chains, struct iovec *iov, size_t limit)
{
	const struct packed_ring ring = b->packed;
	uint16_t popped = b->popped;
	size_t count = 0;

	for (; count < limit; count++) {
		struct packed_desc *desc = packed_at(&ring, popped);
		uint16_t flags = ring16_load(&desc->flags, memory_order_acquire), id;
		uint32_t pieces = 0;

		if (!marked(flags, available_mark(popped)))
			break;
		for (;;) {
			CHECK(pieces < ring.num);
			CHECK(bare_translate(b, le64toh(atomic_load_explicit(&desc->address, memory_order_relaxed)),
					     le32toh(atomic_load_explicit(&desc->length, memory_order_relaxed)), iov++));
			pieces++;
			popped = cursor_advance(popped, 1, ring.num);
			if (!(flags & DESC_NEXT))
				break;
			desc = packed_at(&ring, popped);
			flags = ring16_load(&desc->flags, memory_order_relaxed);
		}
		id = ring16_load(&desc->id, memory_order_relaxed);
		CHECK(id < ring.num);
		chains[count] = (struct bare_chain){ pieces, id };
	}
	b->popped = popped;
	return count;
}

static inline void bare_packed_push(struct bare *b, const struct bare_chain *chains, size_t count)
{
	const struct packed_ring ring = b->packed;
	struct packed_desc *first = packed_at(&ring, b->pushed);
	uint16_t pushed = b->pushed, first_flags = used_mark(pushed);

	for (size_t i = 0; i < count; i++) {
		struct packed_desc *desc = packed_at(&ring, pushed);

		atomic_store_explicit(&desc->length, htole32(0), memory_order_relaxed);
		ring16_store(&desc->id, chains[i].head, memory_order_relaxed);
		if (i)
			ring16_store(&desc->flags, used_mark(pushed), memory_order_relaxed);
		pushed = cursor_advance(pushed, chains[i].pieces, ring.num);
	}
	b->pushed = pushed;
	ring16_store(&first->flags, first_flags, memory_order_release);
}

static inline size_t bare_packed_reap(struct bare *b, size_t limit)
{
	const struct packed_ring ring = b->packed;
	uint16_t reaped = b->reaped, free_head = b->free_head;
	size_t count = 0;

	for (; count < limit; count++) {
		struct packed_desc *desc = packed_at(&ring, reaped);
		uint16_t id;

		if (!marked(ring16_load(&desc->flags, memory_order_acquire), used_mark(reaped)))
			break;
		id = ring16_load(&desc->id, memory_order_relaxed);
		CHECK(id < ring.num && atomic_load_explicit(&desc->length, memory_order_relaxed) <= DATA_SIZE);
		reaped = cursor_advance(reaped, b->count[id], ring.num);
		b->next[id] = free_head;
		free_head = id;
	}
	b->free_head = free_head;
	b->reaped = reaped;
	return count;
}

#endif
