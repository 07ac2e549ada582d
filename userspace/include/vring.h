// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * vring: the split ring's memory (virtio 1.2, 2.7), shared by the driver's and the device's end.
 *
 * Rule: memory the other side can write is reached through these accessors alone. Each is one atomic access of the
 * field's size, so nothing is read twice and no half-written word is ever seen; all fields are little-endian.
 * Ordering is the callers' business: they pass it, and name the partner.
 */
#ifndef VDPA_BRIDGE_VRING_H
#define VDPA_BRIDGE_VRING_H

#include <endian.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* What hardly ever happens, and code that is only for that. */
#define UNLIKELY(condition) __builtin_expect(!!(condition), 0)
#define LIKELY(condition) __builtin_expect(!!(condition), 1)
#define INLINED __attribute__((always_inline)) static inline
#define APART __attribute__((noinline)) static
#define COLD __attribute__((cold, noinline))

enum {
	VRING_MAX_NUM = 32768,
	VRING_DESC_SIZE = 16,
	VRING_DESC_ALIGN = 16, /* virtio 1.2, 2.7 */
	VRING_AVAIL_ALIGN = 2,
	VRING_USED_ALIGN = 4,
};

/* Descriptor flags, virtio 1.2, 2.7.5. */
enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4 };

/* avail->flags and used->flags without VIRTIO_F_EVENT_IDX: do not notify me. virtio 1.2, 2.7.6 and 2.7.8. */
enum { RING_NO_NOTIFY = 1 };

struct vring {
	_Atomic uint64_t *desc; /* two words each: address; length, flags, next */
	_Atomic uint16_t *avail; /* flags, idx, ring[num], used_event */
	_Atomic uint16_t *used; /* flags, idx, {u32 id, u32 len}[num], avail_event */
	uint32_t num; /* a power of 2 */
};

struct vring_desc_value {
	uint64_t address;
	uint32_t length;
	uint16_t flags;
	uint16_t next;
};

/* The event index at the end exists only with VIRTIO_F_EVENT_IDX; a driver may end its memory before it. */
static inline uint64_t vring_avail_size(uint32_t num, bool event_idx)
{
	return 4 + 2 * (uint64_t)num + (event_idx ? 2 : 0);
}

static inline uint64_t vring_used_size(uint32_t num, bool event_idx)
{
	return 4 + 8 * (uint64_t)num + (event_idx ? 2 : 0);
}

static inline bool vring_num_valid(uint32_t num)
{
	return num && num <= VRING_MAX_NUM && (num & (num - 1)) == 0;
}

static inline struct vring_desc_value desc_value(uint64_t first, uint64_t second)
{
	second = le64toh(second);
	return (struct vring_desc_value){ .address = le64toh(first),
					  .length = (uint32_t)second,
					  .flags = (uint16_t)(second >> 32),
					  .next = (uint16_t)(second >> 48) };
}

/* The words of a descriptor one by one, for who needs little of the second. */
static inline uint64_t desc_first(const struct vring *ring, uint32_t index)
{
	return le64toh(atomic_load_explicit(&ring->desc[2 * (size_t)index], memory_order_relaxed));
}

static inline uint64_t desc_second(const struct vring *ring, uint32_t index)
{
	return le64toh(atomic_load_explicit(&ring->desc[2 * (size_t)index + 1], memory_order_relaxed));
}

static inline struct vring_desc_value vring_desc_load(const struct vring *ring, uint32_t index)
{
	return desc_value(atomic_load_explicit(&ring->desc[2 * index], memory_order_relaxed),
			  atomic_load_explicit(&ring->desc[2 * index + 1], memory_order_relaxed));
}

static inline void desc_store(_Atomic uint64_t *at, struct vring_desc_value value)
{
	uint64_t second = value.length | (uint64_t)value.flags << 32 | (uint64_t)value.next << 48;

	atomic_store_explicit(&at[0], htole64(value.address), memory_order_relaxed);
	atomic_store_explicit(&at[1], htole64(second), memory_order_relaxed);
}

static inline uint16_t ring16_load(_Atomic uint16_t *field, memory_order order)
{
	return le16toh(atomic_load_explicit(field, order));
}

static inline void ring16_store(_Atomic uint16_t *field, uint16_t value, memory_order order)
{
	atomic_store_explicit(field, htole16(value), order);
}

static inline _Atomic uint16_t *avail_flags(const struct vring *ring)
{
	return &ring->avail[0];
}

static inline _Atomic uint16_t *avail_idx(const struct vring *ring)
{
	return &ring->avail[1];
}

static inline _Atomic uint16_t *avail_slot(const struct vring *ring, uint16_t index)
{
	return &ring->avail[2 + (index & (ring->num - 1))];
}

static inline _Atomic uint16_t *used_event(const struct vring *ring)
{
	return &ring->avail[2 + ring->num];
}

static inline _Atomic uint16_t *used_flags(const struct vring *ring)
{
	return &ring->used[0];
}

static inline _Atomic uint16_t *used_idx(const struct vring *ring)
{
	return &ring->used[1];
}

static inline _Atomic uint16_t *avail_event(const struct vring *ring)
{
	return &ring->used[2 + 4 * ring->num];
}

static inline _Atomic uint32_t *used_slot(const struct vring *ring, uint16_t index)
{
	return (_Atomic uint32_t *)(void *)&ring->used[2 + 4 * (index & (ring->num - 1))];
}

/* Whether an index moving from `before` to `after` went past `event`: virtio 1.2, 2.7.7.1 and 2.7.10.1. */
static inline bool passes_event(uint16_t event, uint16_t after, uint16_t before)
{
	return (uint16_t)(after - event - 1) < (uint16_t)(after - before);
}

#endif
