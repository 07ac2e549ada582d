// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* The device's end: setting up, and memory that is not there, alike in both formats. */
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
	if (config->in_order) {
		vq->order = calloc(config->num, sizeof(*vq->order));
		vq->held = calloc(config->num, sizeof(*vq->held));
	}
	if (!vq->busy || !vq->table || (config->in_order && (!vq->order || !vq->held))) {
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
	free(vq->order);
	free(vq->held);
	vq->busy = NULL;
	vq->table = NULL;
	vq->order = NULL;
	vq->held = NULL;
}

uint32_t vq_device_base(const struct vq_device *vq)
{
	return vq->config.packed ? (uint32_t)vq->used_idx << 16 | vq->next_avail : vq->next_avail;
}

bool device_open_table(struct vq_device *vq, uint16_t head, uint64_t address, uint32_t length)
{
	uint32_t most = vq->config.num > VQ_INDIRECT_MAX ? vq->config.num : VQ_INDIRECT_MAX;
	struct iovec iov;
	struct iova_pieces one = { .iov = &iov, .capacity = 1 };

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

int device_append(struct vq_device *vq, struct iova_pieces *pieces, uint16_t head, uint64_t address, uint32_t length,
		  uint32_t perm)
{
	int error = iova_translate(vq->config.map, &vq->hint, address, length, perm, pieces);

	if (error == -EFAULT)
		error = device_miss(vq, VQ_CHAIN_UNMAPPED, head, address, length, perm) ? 0 : -EPROTO;
	return error;
}

int vq_device_put_back(struct vq_device *vq, const uint16_t *heads, size_t count)
{
	uint32_t entries = 0;
	size_t i;

	for (i = 0; i < count && heads[i] < vq->config.num && vq->busy[heads[i]]; i++) {
		if (vq->config.in_order && vq->held[heads[i]].done)
			return -EINVAL;
		entries += vq->busy[heads[i]];
	}
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
