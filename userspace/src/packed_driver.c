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

static void describe(struct packed_desc *at, uint64_t address, uint32_t length, uint16_t id)
{
	atomic_store_explicit(&at->address, htole64(address), memory_order_relaxed);
	atomic_store_explicit(&at->length, htole32(length), memory_order_relaxed);
	ring16_store(&at->id, id, memory_order_relaxed);
}

/* The flags of the descriptor at next_avail, which then moves on; the batch's first ones are kept for later. */
static void mark(struct vq_driver *vq, uint16_t flags)
{
	struct packed_desc *desc = packed_at(&vq->packed, vq->next_avail);

	flags |= available_mark(vq->next_avail);
	if (vq->batch++) {
		ring16_store(&desc->flags, flags, memory_order_relaxed);
	} else {
		vq->withheld = desc;
		vq->withheld_flags = flags;
	}
	vq->next_avail = cursor_advance(vq->next_avail, 1, vq->packed.num);
}

/* One descriptor for a table that has all the buffers; NEXT has no meaning in it. virtio 1.2, 2.8.7 and 2.8.19 */
static void add_table(struct vq_driver *vq, uint16_t id, const struct vq_buffer *buffers, size_t readable, size_t count)
{
	uint64_t offset = driver_table(vq, id);
	struct packed_desc *table = (void *)((uint8_t *)vq->config.area + offset);

	for (size_t i = 0; i < count; i++) {
		describe(&table[i], buffers[i].iova, buffers[i].length, 0);
		ring16_store(&table[i].flags, i < readable ? 0 : DESC_WRITE, memory_order_relaxed);
	}
	describe(packed_at(&vq->packed, vq->next_avail), vq->config.iova + offset, (uint32_t)(VRING_DESC_SIZE * count), id);
	mark(vq, DESC_INDIRECT);
}

int packed_driver_add(struct vq_driver *vq, const struct vq_buffer *buffers, size_t readable, size_t writable,
		      uint64_t token)
{
	size_t count = readable + writable;
	uint16_t needed, id = vq->free_head;
	uint64_t bytes;
	int error = driver_admit(vq, buffers, readable, count, &needed, &bytes);

	if (error)
		return error;
	if (needed < count) {
		add_table(vq, id, buffers, readable, count);
	} else {
		for (size_t i = 0; i < count; i++) {
			uint16_t flags = (uint16_t)((i < readable ? 0 : DESC_WRITE) | (i + 1 < count ? DESC_NEXT : 0));

			describe(packed_at(&vq->packed, vq->next_avail), buffers[i].iova, buffers[i].length, id);
			mark(vq, flags);
		}
	}
	vq->free_head = vq->slots[id].next;
	driver_post(vq, id, needed, bytes, token);
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
	vq->published = vq->added;
	/* pair [F]: full fence, the flags are stored before the device's wish is read. virtio 1.2, 2.8.21.2 */
	atomic_thread_fence(memory_order_seq_cst);
	due = event_asks(event_load(vq->packed.device_event), vq->next_avail, moved, vq->packed.num, vq->config.event_idx);
	return driver_sound(vq) ? due : -EPROTO;
}

static bool used(const struct vq_driver *vq, uint16_t *flags)
{
	/* pair [G]: acquire, sees what the device stored before these flags. virtio 1.2, 2.8.22 */
	*flags = ring16_load(&packed_at(&vq->packed, vq->last_used)->flags, memory_order_acquire);
	return marked(*flags, used_mark(vq->last_used));
}

/*
 * Bytes written, by a used descriptor's length. Without WRITE it is reserved (virtio 1.2, 2.8.4): DPDK's vhost leaves the
 * available length there, but QEMU never sets WRITE. So it counts whenever it can be true, and is checked with WRITE.
 */
static uint32_t written_by(const struct vq_driver *vq, uint16_t id, uint16_t flags, uint32_t length)
{
	bool impossible = id < vq->packed.num && length > vq->slots[id].writable;

	return impossible && !(flags & DESC_WRITE) && !vq->config.overstated ? 0 : length;
}

size_t packed_driver_reap(struct vq_driver *vq, struct vq_done *done, size_t limit)
{
	size_t count = 0;
	uint16_t flags;

	if (vq->fault.code != VQ_OK)
		return 0;
	while (count < limit && used(vq, &flags)) {
		struct packed_desc *entry = packed_at(&vq->packed, vq->last_used);
		uint16_t id = ring16_load(&entry->id, memory_order_relaxed);
		uint32_t length = le32toh(atomic_load_explicit(&entry->length, memory_order_relaxed));
		uint32_t written = written_by(vq, id, flags, length);
		struct vq_driver_slot *slot = driver_check_used(vq, cursor_position(vq->last_used), id, &written);

		if (!slot)
			break;
		vq->last_used = cursor_advance(vq->last_used, slot->count, vq->packed.num);
		driver_release(vq, slot, id, id);
		done[count++] = (struct vq_done){ .token = slot->token, .written = written, .head = id };
	}
	(void)driver_sound(vq);
	return count;
}

int packed_driver_enable_call(struct vq_driver *vq)
{
	uint16_t flags;
	int more;

	if (!driver_sound(vq))
		return -EPROTO;
	event_store(vq->packed.driver_event, vq->config.event_idx ? event_value(EVENT_DESC, vq->last_used) :
								    event_value(EVENT_ENABLE, 0));
	/* pair [H]: full fence, the wish is stored before the flags are read again. virtio 1.2, 2.8.22 */
	atomic_thread_fence(memory_order_seq_cst);
	more = used(vq, &flags);
	return driver_sound(vq) ? more : -EPROTO;
}

void packed_driver_disable_call(struct vq_driver *vq)
{
	if (driver_sound(vq))
		event_store(vq->packed.driver_event, event_value(EVENT_DISABLE, 0));
}
