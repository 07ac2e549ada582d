// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * The driver's end: setting up, and the split format; packed_driver.c has the other. Partners of the barriers here are
 * in device.c (or in the peer's device).
 */
#include <stdlib.h>

#include "driver_end.h"

static uint64_t align(uint64_t value, uint64_t to)
{
	return (value + to - 1) / to * to;
}

struct vq_layout vq_layout(uint32_t num, uint32_t table_entries, bool packed)
{
	enum { LINE = 64 };
	struct vq_layout layout = { .desc = 0 };

	layout.avail = (uint64_t)VRING_DESC_SIZE * num;
	layout.used = align(layout.avail + (packed ? PACKED_EVENT_SIZE : vring_avail_size(num, true)), LINE);
	layout.tables = align(layout.used + (packed ? PACKED_EVENT_SIZE : vring_used_size(num, true)), LINE);
	layout.size = layout.tables + (uint64_t)VRING_DESC_SIZE * num * table_entries;
	return layout;
}

static void split_start(struct vq_driver *vq)
{
	uint8_t *area = vq->config.area;
	uint16_t base = (uint16_t)vq->config.base;

	vq->added = vq->published = vq->last_used = base;
	vq->ring = (struct vring){ .desc = (void *)(area + vq->layout.desc),
				   .avail = (void *)(area + vq->layout.avail),
				   .used = (void *)(area + vq->layout.used),
				   .num = vq->config.num };
	ring16_store(avail_idx(&vq->ring), base, memory_order_relaxed);
	ring16_store(used_idx(&vq->ring), base, memory_order_relaxed);
	if (vq->config.event_idx)
		ring16_store(used_event(&vq->ring), base, memory_order_relaxed);
}

int vq_driver_init(struct vq_driver *vq, const struct vq_driver_config *config)
{
	memset(vq, 0, sizeof(*vq));
	if (!vq_num_valid(config->num, config->packed) || !vq_base_valid(config->num, config->base, config->packed) ||
	    (config->packed && config->base >> 16 != (uint16_t)config->base) ||
	    config->table_entries > VQ_INDIRECT_MAX || (uintptr_t)config->area % VRING_DESC_ALIGN ||
	    config->iova % VRING_DESC_ALIGN || !config->area)
		return -EINVAL;
	vq->config = *config;
	vq->layout = vq_layout(config->num, config->table_entries, config->packed);
	vq->slots = calloc(config->num, sizeof(*vq->slots));
	vq->next = calloc(config->num, sizeof(*vq->next));
	if (!vq->slots || !vq->next) {
		vq_driver_destroy(vq);
		return -ENOMEM;
	}
	/* Taken from 0 on. Used in order, chains keep up the ring's order, as they must: virtio 1.2, 2.7.9. Otherwise what is
	 * likely to be in the caches comes first. */
	for (uint32_t i = 0; i < config->num; i++)
		vq->next[i] = (uint16_t)(i + 1 == config->num ? 0 : i + 1);
	vq->free = config->num;
	memset(config->area, 0, vq->layout.size);
	if (config->packed)
		packed_driver_start(vq);
	else
		split_start(vq);
	(void)driver_sound(vq);
	return 0;
}

void vq_driver_destroy(struct vq_driver *vq)
{
	free(vq->slots);
	free(vq->next);
	vq->slots = NULL;
	vq->next = NULL;
}

/* What adding moves, and what it needs for that. */
struct place {
	const uint16_t *next;
	struct vq_driver_slot *slots;
	uint32_t free, id, added;
};

/* Fills the table of a head, whose descriptor then stands for the whole chain; its writable bytes, or a negative errno. */
static int64_t add_table(const struct vq_driver *vq, uint32_t head, const struct vq_buffer *buffers, size_t readable,
			 size_t count)
{
	uint64_t offset = driver_table(vq, head), total = 0, before = 0;
	_Atomic uint64_t *table = (void *)((uint8_t *)vq->config.area + offset);
	uint32_t last = (uint32_t)count - 1;

	for (uint32_t i = 0; i <= last; i++) {
		uint32_t flags = (i < readable ? 0u : DESC_WRITE) | (i < last ? DESC_NEXT : 0u);

		if (UNLIKELY(buffers[i].length == 0))
			return -EINVAL;
		total += buffers[i].length;
		before = i < readable ? total : before;
		desc_store(&table[2 * i], (struct vring_desc_value){ buffers[i].iova, buffers[i].length, (uint16_t)flags,
								     (uint16_t)(i + 1) });
	}
	desc_store(&vq->ring.desc[2 * head], (struct vring_desc_value){ .address = vq->config.iova + offset,
									.length = (uint32_t)(VRING_DESC_SIZE * count),
									.flags = DESC_INDIRECT });
	return LIKELY(total <= UINT64_C(1) << 32) ? (int64_t)(total - before) : -EINVAL; /* virtio 1.2, 2.7.5.2 */
}

/* The chain from the first free descriptor to `last` is in the ring; the head. */
INLINED int post(const struct vring *ring, struct place *at, uint64_t token, uint64_t writable, uint32_t needed, uint32_t last)
{
	uint32_t head = at->id;

	ring16_store(avail_slot(ring, (uint16_t)at->added), (uint16_t)head, memory_order_relaxed);
	at->slots[head] = driver_slot(token, writable, needed, at->added, last);
	at->free -= needed;
	at->id = at->next[last];
	at->added++;
	return (int)head;
}

/* Writes a buffer into the descriptor `index`, and counts its bytes; false for an empty one. */
INLINED bool describe_one(const struct vring *ring, uint32_t index, const struct vq_buffer *buffer, uint32_t flags,
			  uint32_t next, uint64_t *bytes)
{
	uint32_t length = buffer->length;

	desc_store(&ring->desc[2 * (size_t)index],
		   (struct vring_desc_value){ buffer->iova, length, (uint16_t)flags, (uint16_t)next });
	*bytes += length;
	return LIKELY(length);
}

/* What became of a request's buffers. */
struct described {
	int64_t writable; /* bytes; negative: they cannot be a chain */
	uint32_t last; /* descriptor */
};

static const struct described REFUSED = { -1, 0 };

/* Writes buffers, of which there is one at least, into the free descriptors from `at` on, each but the last one pointing to
 * the next. virtio 1.2, 2.7.5.2 */
INLINED struct described describe(const struct vring *ring, const uint16_t *next, uint32_t at, const struct vq_request *request)
{
	const struct vq_buffer *buffer = request->buffers;
	uint32_t ins = request->readable, outs = request->writable;
	uint64_t bytes = 0, before;

	for (ins -= !outs; ins; ins--) {
		uint32_t behind = next[at];

		if (!describe_one(ring, at, buffer++, DESC_NEXT, behind, &bytes))
			return REFUSED;
		at = behind;
	}
	if (!outs) {
		bool good = describe_one(ring, at, buffer, 0, 0, &bytes) && bytes <= UINT64_C(1) << 32;

		return good ? (struct described){ 0, at } : REFUSED;
	}
	before = bytes;
	while (--outs) {
		uint32_t behind = next[at];

		if (!describe_one(ring, at, buffer++, DESC_NEXT | DESC_WRITE, behind, &bytes))
			return REFUSED;
		at = behind;
	}
	if (!describe_one(ring, at, buffer, DESC_WRITE, 0, &bytes) || UNLIKELY(bytes > UINT64_C(1) << 32))
		return REFUSED;
	return (struct described){ (int64_t)(bytes - before), at };
}

/*
 * The head, or a negative errno. Descriptors are written while they are checked: the device sees none before they are
 * published.
 */
INLINED int add(const struct vq_driver *vq, const struct vring *ring, struct place *at, const struct vq_request *request)
{
	size_t count = (size_t)request->readable + request->writable;
	uint32_t head = at->id;

	if (UNLIKELY(count == 0 || at->free == 0))
		return driver_refuse(vq, request->buffers, count);
	if (count == 1) {
		const struct vq_buffer *only = request->buffers;
		uint32_t write = request->writable;

		if (UNLIKELY(only->length == 0))
			return -EINVAL;
		desc_store(&ring->desc[2 * (size_t)head],
			   (struct vring_desc_value){ only->iova, only->length, write ? DESC_WRITE : 0, 0 });
		return post(ring, at, request->token, write ? only->length : 0, 1, head);
	}
	if (count <= vq->config.table_entries) {
		int64_t writable = add_table(vq, head, request->buffers, request->readable, count);

		return UNLIKELY(writable < 0) ? (int)writable : post(ring, at, request->token, (uint64_t)writable, 1, head);
	} else {
		struct described chain = LIKELY(count <= at->free) ? describe(ring, at->next, head, request) : REFUSED;

		if (UNLIKELY(chain.writable < 0))
			return driver_refuse(vq, request->buffers, count);
		return post(ring, at, request->token, (uint64_t)chain.writable, (uint32_t)count, chain.last);
	}
}

static inline struct place place_of(const struct vq_driver *vq)
{
	return (struct place){ vq->next, vq->slots, vq->free, vq->free_id, vq->added };
}

static inline void move_to(struct vq_driver *vq, struct place at)
{
	vq->in_flight += at.added - vq->added;
	vq->free_id = (uint16_t)at.id;
	vq->free = at.free;
	vq->added = (uint16_t)at.added;
}

size_t vq_driver_add_many(struct vq_driver *vq, const struct vq_request *requests, size_t count, int *error)
{
	const struct vring ring = vq->ring;
	struct place at = place_of(vq);
	size_t i;

	*error = vq->fault.code == VQ_OK ? 0 : -EPROTO;
	if (*error)
		return 0;
	if (vq->config.packed)
		return packed_driver_add_many(vq, requests, count, error);
	for (i = 0; i < count; i++) {
		int head = add(vq, &ring, &at, &requests[i]);

		if (UNLIKELY(head < 0)) {
			*error = head;
			break;
		}
	}
	move_to(vq, at);
	return i;
}

int vq_driver_add(struct vq_driver *vq, const struct vq_buffer *buffers, size_t readable, size_t writable, uint64_t token)
{
	const struct vq_request request = { buffers, (uint32_t)readable, (uint32_t)writable, token };
	const struct vring ring = vq->ring;
	struct place at = place_of(vq);
	int head;

	if (vq->fault.code != VQ_OK)
		return -EPROTO;
	if (UNLIKELY(readable > UINT32_MAX || writable > UINT32_MAX))
		return -EINVAL;
	if (vq->config.packed)
		return packed_driver_add(vq, &request);
	head = add(vq, &ring, &at, &request);
	move_to(vq, at);
	return head;
}

int vq_driver_publish(struct vq_driver *vq)
{
	uint16_t before = vq->published, event;
	bool due;

	if (vq->config.packed)
		return packed_driver_publish(vq);
	if (!driver_sound(vq))
		return -EPROTO;
	if (vq->added == before)
		return 0;
	/* pair [A]: release, descriptors, entries and data are visible with the index. virtio 1.2, 2.7.13.3 */
	ring16_store(avail_idx(&vq->ring), vq->added, memory_order_release);
	vq->published = vq->added;
	/* pair [B]: full fence, avail->idx is stored before the device's wish is read. virtio 1.2, 2.7.13.4.1 */
	atomic_thread_fence(memory_order_seq_cst);
	if (vq->config.event_idx) {
		event = ring16_load(avail_event(&vq->ring), memory_order_relaxed);
		due = passes_event(event, vq->published, before);
	} else {
		due = !(ring16_load(used_flags(&vq->ring), memory_order_relaxed) & RING_NO_NOTIFY);
	}
	return driver_sound(vq) ? due : -EPROTO;
}

/* Completions that wait; 0 with a fault when the index is impossible. */
static inline uint16_t waiting(struct vq_driver *vq)
{
	/* pair [C]: acquire, sees the entries and data stored before the device's idx. virtio 1.2, 2.7.14 */
	uint16_t now = ring16_load(used_idx(&vq->ring), memory_order_acquire);
	uint16_t count = (uint16_t)(now - vq->last_used);

	if (UNLIKELY(count > (uint16_t)(vq->published - vq->last_used))) {
		driver_fault(vq, VQ_USED_JUMP, vq->last_used, now);
		return 0;
	}
	return count;
}

INLINED uint32_t load_used(_Atomic uint32_t *entry, uint32_t *written)
{
	*written = le32toh(atomic_load_explicit(&entry[1], memory_order_relaxed));
	return le32toh(atomic_load_explicit(&entry[0], memory_order_relaxed));
}

static size_t reap_in_order(struct vq_driver *vq, struct vq_done *done, size_t limit)
{
	uint16_t ready = waiting(vq);
	size_t count = 0;

	while (count < limit && count < ready) {
		uint32_t written, id = load_used(used_slot(&vq->ring, vq->last_used), &written);

		if (!vq->batch_left && !driver_take_batch(vq, vq->last_used, id, written, false, ready - (uint32_t)count))
			break;
		driver_reap_oldest(vq, &done[count++]);
		vq->last_used++;
	}
	return count;
}

size_t vq_driver_reap(struct vq_driver *vq, struct vq_done *done, size_t limit)
{
	const struct driver_posted posted = driver_posted(vq);
	const struct vring ring = vq->ring;
	uint16_t ready, at = vq->last_used, id_free = vq->free_id, *next = vq->next;
	uint32_t free = vq->free;
	size_t count = 0;

	if (vq->config.packed)
		return packed_driver_reap(vq, done, limit);
	if (vq->fault.code != VQ_OK)
		return 0;
	if (vq->config.in_order) {
		count = reap_in_order(vq, done, limit);
		(void)driver_sound(vq);
		return count;
	}
	ready = waiting(vq);
	for (; count < limit && count < ready; count++) {
		uint32_t said, id = load_used(used_slot(&ring, at), &said);
		int64_t written = driver_check_used(vq, posted, at, id, said, false);
		struct vq_driver_slot *slot;

		if (UNLIKELY(written < 0))
			break;
		slot = &posted.slots[id];
		done[count] = (struct vq_done){ .token = slot->token, .written = (uint32_t)written, .head = (uint16_t)id };
		free += slot->count;
		next[slot->last] = id_free;
		id_free = (uint16_t)id;
		slot->count = 0;
		at++;
	}
	vq->last_used = at;
	vq->free_id = id_free;
	vq->free = free;
	vq->in_flight -= (uint32_t)count;
	(void)driver_sound(vq);
	return count;
}

int vq_driver_enable_call(struct vq_driver *vq)
{
	int more;

	if (vq->config.packed)
		return packed_driver_enable_call(vq);
	if (!driver_sound(vq))
		return -EPROTO;
	ring16_store(avail_flags(&vq->ring), 0, memory_order_relaxed);
	if (vq->config.event_idx)
		ring16_store(used_event(&vq->ring), vq->last_used, memory_order_relaxed);
	/* pair [D]: full fence, the wish is stored before used->idx is read again. virtio 1.2, 2.7.7.1 */
	atomic_thread_fence(memory_order_seq_cst);
	more = waiting(vq) != 0;
	return driver_sound(vq) ? more : -EPROTO;
}

void vq_driver_disable_call(struct vq_driver *vq)
{
	if (vq->config.packed) {
		packed_driver_disable_call(vq);
		return;
	}
	if (!driver_sound(vq))
		return;
	if (vq->config.event_idx) /* an index just passed comes again after 65535 more */
		ring16_store(used_event(&vq->ring), (uint16_t)(vq->last_used - 1), memory_order_relaxed);
	else
		ring16_store(avail_flags(&vq->ring), RING_NO_NOTIFY, memory_order_relaxed);
}
