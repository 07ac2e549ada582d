// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * packed: the packed ring's memory (virtio 1.2, 2.8), shared by the driver's and the device's end.
 *
 * Rule: as in vring.h, one atomic access of the field's size, little-endian; ordering is the callers' business.
 * A cursor is a place in the ring and its lap: position in bits 0-14, wrap counter in bit 15. Event structures and
 * vring bases have the same form.
 */
#ifndef VDPA_BRIDGE_PACKED_H
#define VDPA_BRIDGE_PACKED_H

#include "vring.h"

/* A descriptor's flags beside DESC_*, virtio 1.2, 2.8.1. */
enum { PACKED_AVAIL = 1 << 7, PACKED_USED = 1 << 15 };

/* Values of an event structure's flags, virtio 1.2, 2.8.10; 3 is reserved. */
enum { EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC };

enum { CURSOR_POSITION = 0x7fff, CURSOR_WRAP = 0x8000 };

enum { PACKED_EVENT_SIZE = 4, PACKED_EVENT_ALIGN = 4 }; /* virtio 1.2, 2.8.10.1 */

struct packed_desc {
	_Atomic uint64_t address;
	union {
		struct {
			_Atomic uint32_t length;
			_Atomic uint16_t id;
			_Atomic uint16_t flags;
		};
		_Atomic uint64_t second; /* all three, where their order does not matter */
	};
};

struct packed_second {
	uint32_t length;
	uint16_t id;
	uint16_t flags;
};

_Static_assert(sizeof(struct packed_desc) == VRING_DESC_SIZE, "virtio 1.2, 2.8.13");

struct packed_ring {
	struct packed_desc *desc;
	_Atomic uint32_t *driver_event; /* written by the driver: when it wants calls */
	_Atomic uint32_t *device_event; /* written by the device: when it wants kicks */
	uint32_t num; /* not always a power of 2 */
};

static inline bool packed_num_valid(uint32_t num)
{
	return num && num <= VRING_MAX_NUM;
}

static inline uint16_t cursor_position(uint16_t cursor)
{
	return cursor & CURSOR_POSITION;
}

/* `count` is at most `num`. */
static inline uint16_t cursor_advance(uint16_t cursor, uint32_t count, uint32_t num)
{
	uint32_t position = cursor_position(cursor) + count;

	if (position < num)
		return (uint16_t)((cursor & CURSOR_WRAP) | position);
	return (uint16_t)((~cursor & CURSOR_WRAP) | (position - num));
}

/* The reverse. */
static inline uint16_t cursor_retreat(uint16_t cursor, uint32_t count, uint32_t num)
{
	uint32_t position = cursor_position(cursor);

	if (position >= count)
		return (uint16_t)((cursor & CURSOR_WRAP) | (position - count));
	return (uint16_t)((~cursor & CURSOR_WRAP) | (position + num - count));
}

/* By one. */
static inline uint16_t cursor_next(uint16_t cursor, uint32_t num)
{
	return __builtin_expect(cursor_position(cursor) + 1u < num, 1) ? (uint16_t)(cursor + 1) :
									 (uint16_t)(~cursor & CURSOR_WRAP);
}

static inline struct packed_desc *packed_at(const struct packed_ring *ring, uint16_t cursor)
{
	return &ring->desc[cursor_position(cursor)];
}

static inline struct packed_second second_value(uint64_t second)
{
	second = le64toh(second);
	return (struct packed_second){ (uint32_t)second, (uint16_t)(second >> 32), (uint16_t)(second >> 48) };
}

static inline struct packed_second second_load(struct packed_desc *desc)
{
	return second_value(atomic_load_explicit(&desc->second, memory_order_relaxed));
}

static inline uint64_t address_load(struct packed_desc *desc)
{
	return le64toh(atomic_load_explicit(&desc->address, memory_order_relaxed));
}

static inline void address_store(struct packed_desc *desc, uint64_t address)
{
	atomic_store_explicit(&desc->address, htole64(address), memory_order_relaxed);
}

static inline void second_store(struct packed_desc *desc, struct packed_second value)
{
	uint64_t second = value.length | (uint64_t)value.id << 32 | (uint64_t)value.flags << 48;

	atomic_store_explicit(&desc->second, htole64(second), memory_order_relaxed);
}

/* The same without the flags, for a descriptor that is not to be seen yet. */
static inline void second_store_unmarked(struct packed_desc *desc, uint32_t length, uint16_t id)
{
	atomic_store_explicit(&desc->length, htole32(length), memory_order_relaxed);
	atomic_store_explicit(&desc->id, htole16(id), memory_order_relaxed);
}

/* What marks a descriptor as available, and as used, on a cursor's lap. */
static inline uint16_t available_mark(uint16_t cursor)
{
	return cursor & CURSOR_WRAP ? PACKED_AVAIL : PACKED_USED;
}

static inline uint16_t used_mark(uint16_t cursor)
{
	return cursor & CURSOR_WRAP ? PACKED_AVAIL | PACKED_USED : 0;
}

static inline bool marked(uint16_t flags, uint16_t mark)
{
	return (flags & (PACKED_AVAIL | PACKED_USED)) == mark;
}

/* A cursor as loops hold it: the position, and what marks a descriptor there, as available or as used. */
struct packed_spot {
	uint32_t position, mark;
};

static inline struct packed_spot packed_spot(uint16_t cursor, uint16_t mark)
{
	return (struct packed_spot){ cursor_position(cursor), mark };
}

static inline uint16_t spot_cursor(struct packed_spot spot)
{
	return (uint16_t)(spot.position | (spot.mark & PACKED_AVAIL ? CURSOR_WRAP : 0));
}

static inline struct packed_desc *spot_desc(const struct packed_ring *ring, struct packed_spot spot)
{
	return &ring->desc[spot.position];
}

static inline struct packed_spot spot_advance(struct packed_spot spot, uint32_t count, uint32_t num)
{
	spot.position += count;
	if (UNLIKELY(spot.position >= num)) {
		spot.position -= num;
		spot.mark ^= PACKED_AVAIL | PACKED_USED; /* both kinds of mark differ so from one lap to the next */
	}
	return spot;
}

/*
 * By as many as the last time, most often: *usual. Where a chain ends is read from memory, and the next one
 * begins there; a guess that the processor checks in the background lets it look at both at once.
 */
static inline struct packed_spot spot_skip(struct packed_spot spot, uint32_t count, uint32_t *usual, uint32_t num)
{
	uint32_t guess = *usual, compared = *usual;

	/* Else the compiler knows that count is the same, and waits for it. */
	__asm__ volatile("" : "+r"(guess));
	__asm__ volatile("" : "+r"(compared));
	if (UNLIKELY(count != compared))
		guess = *usual = count;
	return spot_advance(spot, guess, num);
}

static inline uint32_t event_value(uint32_t flags, uint16_t cursor)
{
	return flags << 16 | cursor;
}

/* Offset, wrap counter and flags by one access, so that they belong together. */
static inline uint32_t event_load(_Atomic uint32_t *event)
{
	return le32toh(atomic_load_explicit(event, memory_order_relaxed));
}

static inline void event_store(_Atomic uint32_t *event, uint32_t value)
{
	atomic_store_explicit(event, htole32(value), memory_order_relaxed);
}

/*
 * Whether an event structure asks to be told of the last `moved` descriptors, which brought the cursor to `after`:
 * virtio 1.2, 2.8.10. EVENT_DESC without EVENT_IDX and the reserved value get an event too many rather than none.
 */
static inline bool event_asks(uint32_t event, uint16_t after, uint32_t moved, uint32_t num, bool event_idx)
{
	uint32_t flags = event >> 16 & 3, to = cursor_position(after), at = cursor_position((uint16_t)event);

	if (flags != EVENT_DESC || !event_idx)
		return flags != EVENT_DISABLE;
	if ((event ^ after) & CURSOR_WRAP) /* on the lap before */
		at -= num;
	return passes_event((uint16_t)at, (uint16_t)to, (uint16_t)(to - moved));
}

#endif
