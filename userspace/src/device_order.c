// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * VIRTIO_F_IN_ORDER at the device's end, for both layouts (virtio 1.2, 2.7.9 and 2.8.8). Whoever serves the chains may
 * give them back in any order: those that come too early are held until the ones before them are there.
 *
 * A used entry stands for all chains up to the one it names, and those that it skips count as used completely. Drivers in
 * the field nevertheless look for the length of every chain that was there to be written (DPDK 22.11, receive queues), so
 * only chains without room to write are skipped: what was written into them is 0 by any reading.
 */
#include "device_end.h"

static uint32_t place(const struct vq_device *vq, uint32_t behind_oldest)
{
	uint32_t at = vq->oldest + behind_oldest;

	return at < vq->config.num ? at : at - vq->config.num;
}

void device_note_order(struct vq_device *vq, const struct vq_chain *chains, size_t count)
{
	if (vq->config.in_order) {
		for (size_t i = 0; i < count; i++) {
			vq->order[place(vq, vq->in_flight + (uint32_t)i)] = chains[i].head;
			vq->held[chains[i].head] = (struct vq_held){ .silent = chains[i].writable == 0 };
		}
	}
	vq->in_flight += (uint32_t)count;
}

size_t device_hold(struct vq_device *vq, const struct vq_used *done, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		uint16_t head = done[i].head;

		if (head >= vq->config.num || !vq->busy[head] || vq->held[head].done)
			return i;
		vq->held[head].done = true;
		vq->held[head].written = done[i].written;
	}
	return count;
}

uint32_t device_release(struct vq_device *vq, struct vq_used *entry, uint32_t *entries)
{
	uint32_t chains = 0;

	*entries = 0;
	while (chains < vq->in_flight) {
		uint16_t head = vq->order[place(vq, chains)];
		const struct vq_held *held = &vq->held[head];

		if (!held->done)
			break;
		*entry = (struct vq_used){ .written = held->written, .head = head };
		*entries += vq->busy[head];
		vq->busy[head] = 0;
		chains++;
		if (!held->silent)
			break;
	}
	vq->oldest = (uint16_t)place(vq, chains);
	vq->in_flight -= chains;
	return chains;
}
