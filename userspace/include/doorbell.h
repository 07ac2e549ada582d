/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * A doorbell: a page of a device, mapped into the driver, where one store says that a queue has work
 * (virtio 1.2, 4.1.4.4: without NOTIFICATION_DATA the 16-bit index of the queue, little-endian).
 *
 * Rule of this file: the page is only written, by aligned 16-bit stores.
 */
#ifndef VDPA_BRIDGE_DOORBELL_H
#define VDPA_BRIDGE_DOORBELL_H

#include <stdatomic.h>
#include <stdint.h>

/* The ring's index, published before, must be seen by whoever the store wakes: the partner is the device's read of
 * the ring after the notification. Ordinary fences do not order device memory on every architecture. */
static inline void doorbell_ring(void *page, uint16_t queue)
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
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
	queue = __builtin_bswap16(queue);
#endif
	*(volatile uint16_t *)page = queue;
}

#endif
