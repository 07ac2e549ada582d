// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * The driver's end of a split virtqueue. Partners of the barriers here are in device.c (or in the peer's device).
 * The device may write all of the area, descriptors included, so free list and chain lengths are kept privately.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "guard.h"
#include "virtqueue.h"

static uint64_t align(uint64_t value, uint64_t to)
{
	return (value + to - 1) / to * to;
}

struct vq_layout vq_layout(uint32_t num, uint32_t table_entries)
{
	enum { LINE = 64 };
	struct vq_layout layout = { .desc = 0 };

	layout.avail = (uint64_t)VRING_DESC_SIZE * num;
	layout.used = align(layout.avail + vring_avail_size(num, true), LINE);
	layout.tables = align(layout.used + vring_used_size(num, true), LINE);
	layout.size = layout.tables + (uint64_t)VRING_DESC_SIZE * num * table_entries;
	return layout;
}

static void set_fault(struct vq_driver *vq, enum vq_fault_code code, uint32_t where, uint64_t value)
{
	vq->fault = (struct vq_fault){ .code = code, .where = where, .value = value };
}

static bool sound(struct vq_driver *vq)
{
	uint64_t now = guard_events();

	if (now != vq->guard_seen) {
		vq->guard_seen = now;
		if (guard_poisoned_range(vq->config.area, vq->layout.size))
			set_fault(vq, VQ_POISONED, 0, 0);
	}
	return vq->fault.code == VQ_OK;
}

int vq_driver_init(struct vq_driver *vq, const struct vq_driver_config *config)
{
	uint8_t *area = config->area;

	memset(vq, 0, sizeof(*vq));
	if (!vring_num_valid(config->num) || config->table_entries > VQ_INDIRECT_MAX ||
	    (uintptr_t)area % VRING_DESC_ALIGN || config->iova % VRING_DESC_ALIGN || !area)
		return -EINVAL;
	vq->config = *config;
	vq->layout = vq_layout(config->num, config->table_entries);
	vq->slots = calloc(config->num, sizeof(*vq->slots));
	if (!vq->slots)
		return -ENOMEM;
	for (uint32_t i = 0; i < config->num; i++)
		vq->slots[i].next = (uint16_t)(i + 1);
	vq->free = config->num;
	vq->added = vq->published = vq->last_used = config->base;
	vq->ring = (struct vring){ .desc = (void *)(area + vq->layout.desc),
				   .avail = (void *)(area + vq->layout.avail),
				   .used = (void *)(area + vq->layout.used),
				   .num = config->num };
	memset(area, 0, vq->layout.size);
	ring16_store(avail_idx(&vq->ring), config->base, memory_order_relaxed);
	ring16_store(used_idx(&vq->ring), config->base, memory_order_relaxed);
	if (config->event_idx)
		ring16_store(used_event(&vq->ring), config->base, memory_order_relaxed);
	(void)sound(vq);
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
	uint64_t offset = vq->layout.tables + (uint64_t)VRING_DESC_SIZE * head * vq->config.table_entries;
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
	bool indirect = count > 1 && count <= vq->config.table_entries;
	uint16_t needed = indirect ? 1 : (uint16_t)count, head = vq->free_head, last = head;
	uint64_t bytes = 0, total = 0;

	if (vq->fault.code != VQ_OK)
		return -EPROTO;
	if (count == 0 || (!indirect && count > vq->ring.num))
		return -EINVAL;
	for (size_t i = 0; i < count; i++) {
		if (buffers[i].length == 0)
			return -EINVAL;
		total += buffers[i].length;
		bytes += i < readable ? 0 : buffers[i].length;
	}
	if (total > UINT64_C(1) << 32) /* virtio 1.2, 2.7.5.2 */
		return -EINVAL;
	if (needed > vq->free)
		return -ENOSPC;
	if (indirect) {
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
	vq->free -= needed;
	vq->slots[head].token = token;
	vq->slots[head].writable = bytes;
	vq->slots[head].count = needed;
	vq->slots[head].position = vq->added;
	ring16_store(avail_slot(&vq->ring, vq->added), head, memory_order_relaxed);
	vq->added++;
	vq->in_flight++;
	return head;
}

int vq_driver_publish(struct vq_driver *vq)
{
	uint16_t before = vq->published, event;
	bool due;

	if (!sound(vq))
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
	return sound(vq) ? due : -EPROTO;
}

/* Completions that wait; 0 with a fault when the index is impossible. */
static uint16_t waiting(struct vq_driver *vq)
{
	/* pair [C]: acquire, sees the entries and data stored before the device's idx. virtio 1.2, 2.7.14 */
	uint16_t now = ring16_load(used_idx(&vq->ring), memory_order_acquire);
	uint16_t count = (uint16_t)(now - vq->last_used);

	if (count > (uint16_t)(vq->published - vq->last_used)) {
		set_fault(vq, VQ_USED_JUMP, vq->last_used, now);
		return 0;
	}
	return count;
}

/* The slot a used entry completes, or NULL with a fault. */
static struct vq_driver_slot *check_used(struct vq_driver *vq, uint32_t id, uint32_t written)
{
	struct vq_driver_slot *slot;

	if (id >= vq->ring.num) {
		set_fault(vq, VQ_USED_ID, vq->last_used, id);
		return NULL;
	}
	slot = &vq->slots[id];
	if (slot->count == 0 || (uint16_t)(vq->published - slot->position - 1) >= VRING_MAX_NUM) {
		set_fault(vq, VQ_USED_NOT_POSTED, vq->last_used, id);
		return NULL;
	}
	if (written > slot->writable) {
		set_fault(vq, VQ_USED_LENGTH, id, written);
		return NULL;
	}
	return slot;
}

size_t vq_driver_reap(struct vq_driver *vq, struct vq_done *done, size_t limit)
{
	size_t count = 0;
	uint16_t ready;

	if (vq->fault.code != VQ_OK)
		return 0;
	ready = waiting(vq);
	while (count < limit && count < ready) {
		_Atomic uint32_t *entry = used_slot(&vq->ring, vq->last_used);
		uint32_t id = le32toh(atomic_load_explicit(&entry[0], memory_order_relaxed));
		uint32_t written = le32toh(atomic_load_explicit(&entry[1], memory_order_relaxed));
		struct vq_driver_slot *slot = check_used(vq, id, written);
		uint16_t last = (uint16_t)id;

		if (!slot)
			break;
		for (uint16_t i = 1; i < slot->count; i++)
			last = vq->slots[last].next;
		vq->slots[last].next = vq->free_head;
		vq->free_head = (uint16_t)id;
		vq->free += slot->count;
		slot->count = 0;
		done[count++] = (struct vq_done){ .token = slot->token, .written = written, .head = (uint16_t)id };
		vq->last_used++;
		vq->in_flight--;
	}
	(void)sound(vq);
	return count;
}

int vq_driver_enable_call(struct vq_driver *vq)
{
	int more;

	if (!sound(vq))
		return -EPROTO;
	ring16_store(avail_flags(&vq->ring), 0, memory_order_relaxed);
	if (vq->config.event_idx)
		ring16_store(used_event(&vq->ring), vq->last_used, memory_order_relaxed);
	/* pair [D]: full fence, the wish is stored before used->idx is read again. virtio 1.2, 2.7.7.1 */
	atomic_thread_fence(memory_order_seq_cst);
	more = waiting(vq) != 0;
	return sound(vq) ? more : -EPROTO;
}

void vq_driver_disable_call(struct vq_driver *vq)
{
	if (!sound(vq))
		return;
	if (vq->config.event_idx) /* an index just passed comes again after 65535 more */
		ring16_store(used_event(&vq->ring), (uint16_t)(vq->last_used - 1), memory_order_relaxed);
	else
		ring16_store(avail_flags(&vq->ring), RING_NO_NOTIFY, memory_order_relaxed);
}
