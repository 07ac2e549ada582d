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
	if (!vq->slots)
		return -ENOMEM;
	for (uint32_t i = 0; i < config->num; i++)
		vq->slots[i].next = (uint16_t)(i + 1);
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
	vq->slots = NULL;
}

static struct vring_desc_value describe(const struct vq_buffer *buffer, bool write, bool last, uint16_t next)
{
	return (struct vring_desc_value){ .address = buffer->iova,
					  .length = buffer->length,
					  .flags = (uint16_t)((write ? DESC_WRITE : 0) | (last ? 0 : DESC_NEXT)),
					  .next = last ? 0 : next };
}

/* Fills the table that belongs to a head; that head's descriptor then stands for the whole chain. */
static void add_table(struct vq_driver *vq, uint16_t head, const struct vq_buffer *buffers, size_t readable, size_t count)
{
	uint64_t offset = driver_table(vq, head);
	_Atomic uint64_t *table = (void *)((uint8_t *)vq->config.area + offset);

	for (size_t i = 0; i < count; i++)
		desc_store(&table[2 * i], describe(&buffers[i], i >= readable, i + 1 == count, (uint16_t)(i + 1)));
	desc_store(&vq->ring.desc[2 * head],
		   (struct vring_desc_value){ .address = vq->config.iova + offset,
					      .length = (uint32_t)(VRING_DESC_SIZE * count),
					      .flags = DESC_INDIRECT });
}

int vq_driver_add(struct vq_driver *vq, const struct vq_buffer *buffers, size_t readable, size_t writable, uint64_t token)
{
	size_t count = readable + writable;
	uint16_t needed, head = vq->free_head, last = head;
	uint64_t bytes;
	int error;

	if (vq->config.packed)
		return packed_driver_add(vq, buffers, readable, writable, token);
	error = driver_admit(vq, buffers, readable, count, &needed, &bytes);
	if (error)
		return error;
	if (needed < count) {
		add_table(vq, head, buffers, readable, count);
	} else {
		for (size_t i = 0; i < count; i++) {
			uint16_t index = i ? vq->slots[last].next : head;

			last = index;
			desc_store(&vq->ring.desc[2 * index],
				   describe(&buffers[i], i >= readable, i + 1 == count, vq->slots[index].next));
		}
	}
	vq->free_head = vq->slots[last].next;
	ring16_store(avail_slot(&vq->ring, vq->added), head, memory_order_relaxed);
	driver_post(vq, head, needed, bytes, token);
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
static uint16_t waiting(struct vq_driver *vq)
{
	/* pair [C]: acquire, sees the entries and data stored before the device's idx. virtio 1.2, 2.7.14 */
	uint16_t now = ring16_load(used_idx(&vq->ring), memory_order_acquire);
	uint16_t count = (uint16_t)(now - vq->last_used);

	if (count > (uint16_t)(vq->published - vq->last_used)) {
		driver_fault(vq, VQ_USED_JUMP, vq->last_used, now);
		return 0;
	}
	return count;
}

size_t vq_driver_reap(struct vq_driver *vq, struct vq_done *done, size_t limit)
{
	size_t count = 0;
	uint16_t ready;

	if (vq->config.packed)
		return packed_driver_reap(vq, done, limit);
	if (vq->fault.code != VQ_OK)
		return 0;
	ready = waiting(vq);
	while (count < limit && count < ready) {
		_Atomic uint32_t *entry = used_slot(&vq->ring, vq->last_used);
		uint32_t id = le32toh(atomic_load_explicit(&entry[0], memory_order_relaxed));
		uint32_t written = le32toh(atomic_load_explicit(&entry[1], memory_order_relaxed));
		struct vq_driver_slot *slot = driver_check_used(vq, vq->last_used, id, &written);
		uint16_t last = (uint16_t)id;

		if (!slot)
			break;
		for (uint16_t i = 1; i < slot->count; i++)
			last = vq->slots[last].next;
		driver_release(vq, slot, (uint16_t)id, last);
		done[count++] = (struct vq_done){ .token = slot->token, .written = written, .head = (uint16_t)id };
		vq->last_used++;
	}
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
