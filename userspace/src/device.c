// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * The device's end: setting up, and the split format; packed_device.c has the other. Partners of the barriers here are
 * in driver.c (or in the peer's driver): [A] avail->idx, [B] asking for kicks, [C] used->idx, [D] asking for calls.
 */
#include <stdlib.h>

#include "device_end.h"

static uint64_t avail_align(const struct vq_device_config *c)
{
	return c->packed ? PACKED_EVENT_ALIGN : VRING_AVAIL_ALIGN;
}

static uint64_t used_align(const struct vq_device_config *c)
{
	return c->packed ? PACKED_EVENT_ALIGN : VRING_USED_ALIGN;
}

bool device_miss(struct vq_device *vq, enum vq_fault_code code, uint32_t where, uint64_t iova, uint64_t length,
		 uint32_t perm)
{
	uint64_t at[VQ_MISSES];
	size_t room = VQ_MISSES - vq->missing, count;

	if (!vq->config.wait)
		return device_fault(vq, code, where, iova);
	if (room == 0)
		return true;
	count = iova_missing(vq->config.map, iova, length, perm, at, room);
	if (count == 0) /* it wraps, or is mapped in too many pieces */
		return device_fault(vq, code, where, iova);
	for (size_t i = 0; i < count; i++)
		vq->misses[vq->missing++] = (struct vq_miss){ .iova = at[i], .perm = perm };
	vq->missed = (struct vq_fault){ .code = code, .where = where, .value = iova };
	return true;
}

bool device_look_up(struct vq_device *vq)
{
	const struct vq_device_config *c = &vq->config;
	const struct {
		uint64_t iova, size, align;
		uint32_t perm;
	} areas[] = {
		{ c->desc, (uint64_t)VRING_DESC_SIZE * c->num, 8, c->packed ? IOVA_RW : IOVA_RO },
		{ c->avail, c->packed ? PACKED_EVENT_SIZE : vring_avail_size(c->num, c->event_idx), avail_align(c), IOVA_RO },
		{ c->used, c->packed ? PACKED_EVENT_SIZE : vring_used_size(c->num, c->event_idx), used_align(c), IOVA_WO },
	};
	void *at[3];
	bool lost = false;

	for (size_t i = 0; i < 3; i++) {
		at[i] = iova_contiguous(c->map, &vq->hint, areas[i].iova, areas[i].size, areas[i].perm);
		if ((uintptr_t)at[i] % areas[i].align)
			return device_fault(vq, VQ_RING_UNMAPPED, 0, areas[i].iova);
		if (at[i])
			continue;
		if (!lost)
			vq->missing = 0; /* what the next chain misses comes after the ring */
		lost = true;
		if (!device_miss(vq, VQ_RING_UNMAPPED, 0, areas[i].iova, areas[i].size, areas[i].perm))
			return false;
	}
	vq->generation = lost ? 0 : c->map->generation; /* a map's is never 0 */
	if (lost)
		return false;
	if (c->packed)
		vq->packed = (struct packed_ring){ .desc = at[0], .driver_event = at[1], .device_event = at[2], .num = c->num };
	else
		vq->ring = (struct vring){ .desc = at[0], .avail = at[1], .used = at[2], .num = c->num };
	if (!vq->found && !c->packed)
		vq->used_idx = ring16_load(used_idx(&vq->ring), memory_order_relaxed);
	vq->found = true;
	return true;
}

bool vq_num_valid(uint32_t num, bool packed)
{
	return packed ? packed_num_valid(num) : vring_num_valid(num);
}

bool vq_base_valid(uint32_t num, uint32_t base, bool packed)
{
	if (!packed)
		return base <= UINT16_MAX;
	return cursor_position((uint16_t)base) < num && cursor_position((uint16_t)(base >> 16)) < num;
}

int vq_device_init(struct vq_device *vq, const struct vq_device_config *config)
{
	uint32_t entries = config->num > VQ_INDIRECT_MAX ? config->num : VQ_INDIRECT_MAX;

	memset(vq, 0, sizeof(*vq));
	if (!vq_num_valid(config->num, config->packed) || !vq_base_valid(config->num, config->base, config->packed) ||
	    config->desc % VRING_DESC_ALIGN || config->avail % avail_align(config) || config->used % used_align(config))
		return -EINVAL;
	vq->config = *config;
	if (config->packed)
		vq->used_idx = (uint16_t)(config->base >> 16);
	if (!device_look_up(vq) && vq->fault.code != VQ_OK)
		return -EFAULT;
	vq->busy = calloc(config->num, sizeof(*vq->busy));
	vq->table = malloc((size_t)entries * VRING_DESC_SIZE);
	if (!vq->busy || !vq->table) {
		vq_device_destroy(vq);
		return -ENOMEM;
	}
	vq->next_avail = vq->looked = vq->avail_seen = (uint16_t)config->base;
	vq->call_always = true;
	(void)vq_device_enable_kick(vq);
	return 0;
}

void vq_device_destroy(struct vq_device *vq)
{
	free(vq->busy);
	free(vq->table);
	vq->busy = NULL;
	vq->table = NULL;
}

uint32_t vq_device_base(const struct vq_device *vq)
{
	return vq->config.packed ? (uint32_t)vq->used_idx << 16 | vq->next_avail : vq->next_avail;
}

/* Chains that wait, after reading avail->idx once; 0 with a fault when the index is impossible. */
static uint16_t waiting(struct vq_device *vq)
{
	uint16_t count;

	/* pair [A]: acquire, sees the ring entries and descriptors stored before the driver's idx. virtio 1.2, 2.7.13.3 */
	vq->avail_seen = ring16_load(avail_idx(&vq->ring), memory_order_acquire);
	count = (uint16_t)(vq->avail_seen - vq->next_avail);
	if (count > vq->ring.num) {
		device_fault(vq, VQ_AVAIL_JUMP, vq->next_avail, vq->avail_seen);
		return 0;
	}
	return count;
}

bool device_open_table(struct vq_device *vq, uint16_t head, uint64_t address, uint32_t length)
{
	uint32_t most = vq->config.num > VQ_INDIRECT_MAX ? vq->config.num : VQ_INDIRECT_MAX;
	struct iovec iov;
	uint64_t at;
	struct iova_pieces one = { .iov = &iov, .iova = &at, .used = 0, .capacity = 1 };

	if (length == 0 || length % VRING_DESC_SIZE || length / VRING_DESC_SIZE > most)
		return device_fault(vq, VQ_INDIRECT_SIZE, head, length);
	if (iova_translate(vq->config.map, &vq->table_hint, address, length, IOVA_RO, &one) == 0)
		memcpy(vq->table, iov.iov_base, length);
	else if (iova_read(vq->config.map, address, vq->table, length)) {
		(void)device_miss(vq, VQ_INDIRECT_UNMAPPED, head, address, length, IOVA_RO);
		return false;
	}
	return true;
}

/* Reads every descriptor of a chain once. False: a fault is set, or *full, or its table is missing. */
static bool walk(struct vq_device *vq, struct vq_chain *chain, struct iova_pieces *pieces, bool *full)
{
	uint32_t limit = vq->ring.num, index = chain->head;
	bool inside = false;

	for (uint32_t step = 0;; step++) {
		struct vring_desc_value desc;

		if (step == limit)
			return device_fault(vq, VQ_CHAIN_LONG, chain->head, limit);
		desc = inside ? desc_value(vq->table[2 * index], vq->table[2 * index + 1]) :
				vring_desc_load(&vq->ring, index);
		if (desc.flags & DESC_INDIRECT) {
			if (inside) /* virtio 1.2, 2.7.5.3.1 */
				return device_fault(vq, VQ_INDIRECT_NESTED, chain->head, 0);
			if (!vq->config.indirect)
				return device_fault(vq, VQ_INDIRECT_REFUSED, chain->head, 0);
			if (desc.flags & DESC_NEXT) /* virtio 1.2, 2.7.5.3.1 */
				return device_fault(vq, VQ_INDIRECT_NEXT, chain->head, 0);
			if (!device_open_table(vq, chain->head, desc.address, desc.length))
				return false;
			inside = true;
			limit = desc.length / VRING_DESC_SIZE;
			index = 0;
			step = UINT32_MAX; /* the table counts from 0 again */
			continue;
		}
		if (!device_append(vq, chain, desc.address, desc.length, desc.flags & DESC_WRITE, step, pieces, full))
			return false;
		if (!(desc.flags & DESC_NEXT))
			return true;
		if (desc.next >= limit)
			return device_fault(vq, VQ_NEXT_RANGE, index, desc.next);
		index = desc.next;
	}
}

size_t vq_device_pop(struct vq_device *vq, struct vq_chain *chains, size_t limit, struct iova_pieces *pieces)
{
	size_t count = 0;
	uint32_t ready;
	uint16_t next = vq->next_avail;

	if (vq->config.packed)
		return packed_device_pop(vq, chains, limit, pieces);
	vq->missing = 0;
	if (!device_usable(vq))
		return 0;
	ready = (uint16_t)(vq->avail_seen - vq->next_avail);
	if (ready < limit)
		ready = waiting(vq);
	while (count < limit && count < ready) {
		uint16_t head = ring16_load(avail_slot(&vq->ring, next), memory_order_relaxed);
		struct vq_chain *chain = &chains[count]; /* built in place: a copy would wait for its own stores */
		bool full = false;

		if (head >= vq->ring.num) {
			device_fault(vq, VQ_HEAD_RANGE, next, head);
			break;
		}
		if (vq->busy[head]) {
			device_fault(vq, VQ_HEAD_BUSY, next, head);
			break;
		}
		*chain = (struct vq_chain){ .first = pieces->used, .head = head };
		if (!walk(vq, chain, pieces, &full) || vq->missing) {
			pieces->used = chain->first;
			if (full && chain->first == 0)
				device_fault(vq, VQ_CHAIN_PIECES, head, pieces->capacity);
			break;
		}
		vq->busy[head] = 1;
		next++;
		count++;
	}
	vq->next_avail = vq->looked = next;
	vq->in_flight += (uint32_t)count;
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

int vq_device_push(struct vq_device *vq, const struct vq_used *done, size_t count)
{
	uint16_t before = vq->used_idx;
	size_t i;
	bool due = false;

	if (vq->config.packed)
		return packed_device_push(vq, done, count);
	if (!device_usable(vq))
		return device_unusable(vq, count ? -EAGAIN : 0);
	for (i = 0; i < count; i++) {
		uint16_t head = done[i].head;
		_Atomic uint32_t *slot = used_slot(&vq->ring, (uint16_t)(before + i));

		if (head >= vq->ring.num || !vq->busy[head])
			break;
		vq->busy[head] = 0;
		atomic_store_explicit(&slot[0], htole32(head), memory_order_relaxed);
		atomic_store_explicit(&slot[1], htole32(done[i].written), memory_order_relaxed);
	}
	if (i) {
		vq->used_idx = (uint16_t)(before + i);
		vq->in_flight -= (uint32_t)i;
		/* pair [C]: release, entries and the data written before are visible with the index. virtio 1.2, 2.7.8.2 */
		ring16_store(used_idx(&vq->ring), vq->used_idx, memory_order_release);
		due = call_due(vq, before);
	}
	if (!device_sound(vq))
		return -EPROTO;
	return i < count ? -EINVAL : due;
}

int vq_device_put_back(struct vq_device *vq, const uint16_t *heads, size_t count)
{
	uint32_t entries = 0;
	size_t i;

	for (i = 0; i < count && heads[i] < vq->config.num && vq->busy[heads[i]]; i++)
		entries += vq->busy[heads[i]];
	if (i < count || count > vq->in_flight)
		return -EINVAL;
	for (i = 0; i < count; i++)
		vq->busy[heads[i]] = 0;
	vq->in_flight -= (uint32_t)count;
	if (vq->config.packed) {
		vq->next_avail = cursor_retreat(vq->next_avail, entries, vq->config.num);
		vq->taken -= entries;
	} else {
		vq->next_avail = (uint16_t)(vq->next_avail - count);
	}
	return 0;
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

size_t vq_device_misses(struct vq_device *vq)
{
	uint32_t left = 0;
	uint64_t at;

	for (uint32_t i = 0; i < vq->missing; i++)
		if (iova_missing(vq->config.map, vq->misses[i].iova, 1, vq->misses[i].perm, &at, 1))
			vq->misses[left++] = vq->misses[i];
	vq->missing = left;
	return vq->fault.code == VQ_OK ? left : 0;
}

void vq_device_refuse(struct vq_device *vq, uint64_t iova)
{
	if (vq->missing && vq->fault.code == VQ_OK) {
		vq->fault = vq->missed;
		vq->fault.value = iova;
	}
}
