/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * A doorbell: a page of a device, mapped into the driver, where one store says that a queue has work
 * (virtio 1.2, 4.1.4.4: without NOTIFICATION_DATA the 16-bit index of the queue, else 32 bits that say how far it is as well,
 * 2.9; little-endian).
 *
 * Rule of this file: the page is only written, by one aligned store per kick.
 */
#ifndef VDPA_BRIDGE_DOORBELL_H
#define VDPA_BRIDGE_DOORBELL_H

#include <stdatomic.h>
#include <stdint.h>

#include "virtqueue.h"

/* The ring's index, published before, must be seen by whoever the store wakes: the partner is the device's read of
 * the ring after the notification. Ordinary fences do not order device memory on every architecture. */
static inline void doorbell_fence(void)
{
#if defined(__aarch64__)
	__asm__ volatile("dmb oshst" ::: "memory");
#elif defined(__powerpc64__)
	__asm__ volatile("sync" ::: "memory");
#elif defined(__riscv)
	__asm__ volatile("fence w, o" ::: "memory");
#else
	atomic_thread_fence(memory_order_seq_cst);
#endif
}

static inline void doorbell_ring(void *page, uint16_t queue)
{
	doorbell_fence();
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
	queue = __builtin_bswap16(queue);
#endif
	*(volatile uint16_t *)page = queue;
}

/* With NOTIFICATION_DATA: `offset` says how far the ring is, see vq_driver_offset. */
static inline void doorbell_ring_data(void *page, uint16_t queue, uint16_t offset)
{
	uint32_t data = queue | (uint32_t)offset << 16;

	doorbell_fence();
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
	data = __builtin_bswap32(data);
#endif
	*(volatile uint32_t *)page = data;
}

/* Kicks queue number `queue`, as its driver has negotiated. */
static inline void doorbell_kick(void *page, uint16_t queue, const struct vq_driver *vq)
{
	if (vq->config.notification_data)
		doorbell_ring_data(page, queue, vq_driver_offset(vq));
	else
		doorbell_ring(page, queue);
}

#endif
