// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* What the C tests share: a check that names its place, a seeded generator, and a ring with both ends in one area. */
#ifndef VDPA_BRIDGE_TEST_H
#define VDPA_BRIDGE_TEST_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "chain.h"
#include "guard.h"
#include "iova.h"
#include "virtqueue.h"

#define CHECK(condition)                                                                        \
	do {                                                                                    \
		if (!(condition)) {                                                             \
			fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
			abort();                                                                \
		}                                                                               \
	} while (0)

/* xorshift64*: the same sequence on every machine. */
static inline uint64_t next_random(uint64_t *state)
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return *state * UINT64_C(2685821657736338717);
}

static inline uint32_t random_below(uint64_t *state, uint32_t bound)
{
	return (uint32_t)(next_random(state) >> 33) % bound;
}

enum { RING_IOVA = 0x10000, DATA_IOVA = 0x40000000, DATA_SIZE = 1 << 20, PIECES = 2048 };

struct bench {
	struct iova_map map;
	struct vq_driver driver;
	struct vq_device device;
	uint8_t *area; /* the ring at RING_IOVA, exactly as large as its layout */
	uint8_t *data; /* DATA_SIZE bytes at DATA_IOVA */
	struct iovec iov[PIECES];
	uint64_t iova[PIECES];
	struct iova_pieces pieces;
};

static inline void bench_start(struct bench *b, uint32_t num, uint32_t table_entries, bool event_idx, uint32_t base,
			       bool packed, bool in_order)
{
	struct vq_layout layout = vq_layout(num, table_entries, packed);

	memset(b, 0, sizeof(*b));
	b->area = aligned_alloc(64, (layout.size + 63) / 64 * 64);
	b->data = malloc(DATA_SIZE);
	CHECK(b->area && b->data);
	memset(b->data, 0, DATA_SIZE);
	b->pieces = (struct iova_pieces){ .iov = b->iov, .iova = b->iova, .used = 0, .capacity = PIECES };
	iova_map_init(&b->map);
	CHECK(iova_map_add(&b->map, RING_IOVA, layout.size, b->area, IOVA_RW) == 0);
	CHECK(iova_map_add(&b->map, DATA_IOVA, DATA_SIZE, b->data, IOVA_RW) == 0);
	CHECK(vq_driver_init(&b->driver, &(struct vq_driver_config){ .area = b->area,
								     .iova = RING_IOVA,
								     .num = num,
								     .table_entries = table_entries,
								     .base = base,
								     .event_idx = event_idx,
								     .packed = packed,
								     .in_order = in_order }) == 0);
	CHECK(vq_device_init(&b->device, &(struct vq_device_config){ .map = &b->map,
								     .desc = RING_IOVA + layout.desc,
								     .avail = RING_IOVA + layout.avail,
								     .used = RING_IOVA + layout.used,
								     .num = num,
								     .base = base,
								     .event_idx = event_idx,
								     .indirect = true,
								     .packed = packed,
								     .in_order = in_order }) == 0);
}

static inline void bench_open(struct bench *b, uint32_t num, uint32_t table_entries, bool event_idx, uint32_t base,
			      bool packed)
{
	bench_start(b, num, table_entries, event_idx, base, packed, false);
}

/* A base that is valid for both ends: any 16-bit index, or any place in a packed ring, the same for both cursors. */
static inline uint32_t base_at(uint16_t index, uint32_t num, bool packed)
{
	uint32_t cursor = index % num | (index & CURSOR_WRAP);

	return packed ? cursor << 16 | cursor : index;
}

static inline void bench_close(struct bench *b)
{
	vq_device_destroy(&b->device);
	vq_driver_destroy(&b->driver);
	iova_map_destroy(&b->map);
	free(b->area);
	free(b->data);
}

static inline size_t bench_pop(struct bench *b, struct vq_chain *chains, size_t limit)
{
	b->pieces.used = 0;
	return vq_device_pop(&b->device, chains, limit, &b->pieces);
}

static inline struct chain_part readable_part(const struct vq_chain *chain)
{
	return (struct chain_part){ chain->iov, chain->readable_pieces };
}

static inline struct chain_part writable_part(const struct vq_chain *chain)
{
	return (struct chain_part){ chain->iov + chain->readable_pieces, chain->writable_pieces };
}

#endif
