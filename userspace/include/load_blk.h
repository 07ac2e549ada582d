// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * load_blk: block requests (virtio 1.2, 5.2.6) on one queue, a fixed number of them in flight, as fast as they come back or
 * at a rate; with `verify`, every write carries a pattern and every read of what was written is compared.
 *
 * Rule: as in load.h. Headers, status bytes and data lie in memory of the driver, made once; a request copies nothing.
 * Latencies are nanoseconds from when a request was due - with a rate that is its time by the rate, so that a device that
 * stalls is charged for all requests it held up.
 */
#ifndef VDPA_BRIDGE_LOAD_BLK_H
#define VDPA_BRIDGE_LOAD_BLK_H

#include "load.h"
#include "pattern.h"

enum { LOAD_BLK_HEAD = 64, LOAD_BLK_STATUS = 16, LOAD_BLK_SEGMENTS = 1024 };

struct load_blk_config {
	struct load_ring ring;
	struct load_pace pace;
	uint8_t *memory; /* load_blk_memory() bytes, which the device has at `iova` */
	uint64_t iova;
	uint32_t depth; /* requests in flight, 1 to VRING_MAX_NUM */
	uint32_t block; /* bytes of each, whole sectors */
	uint32_t segment; /* most bytes of one buffer */
	uint64_t first, blocks; /* the sector from which on, and how many blocks */
	uint32_t reads; /* of 100 requests; the others are writes */
	bool random; /* where, instead of one block after the other */
	bool verify;
	uint64_t seed; /* of patterns and places; not 0 */
};

struct load_blk_slot {
	uint64_t due; /* when it should have started */
	uint64_t block;
	uint64_t generation; /* of the write, or of the one that is read; 0: not known */
	bool write;
};

struct load_blk_counts {
	uint64_t reads, writes; /* that came back */
	uint64_t compared; /* reads of what was written */
	struct histogram read_latency, write_latency;
};

struct load_blk {
	struct load_blk_config config;
	struct load_blk_counts counts;
	struct load_blk_slot *slots;
	struct vq_buffer *buffers; /* of all slots: header, data, status */
	uint32_t per_slot;
	uint32_t *idle; /* a stack of slots */
	uint32_t idle_count;
	uint64_t *generations; /* with verify, by block: of its last write that ended; 0: none */
	uint8_t *busy; /* with verify, by block: a write is under way, or reads, so many of them */
	uint64_t started, finished, cursor, written, random;
	uint64_t heard; /* when something came back last */
	bool sweeping; /* reading back what was written */
	/* after LOAD_FAILED: */
	uint64_t failed_sector;
	bool failed_write;
	uint8_t failed_status;
	struct pattern_report wrong;
};

/* Bytes of memory for `depth` requests of `block` bytes; data starts at a page. */
uint64_t load_blk_memory(uint32_t depth, uint32_t block);

/* 0, -EINVAL (sizes, or more requests than the ring has room for), -ENOMEM. The queue has nothing in flight. */
int load_blk_init(struct load_blk *load, const struct load_blk_config *config);
void load_blk_destroy(struct load_blk *load);

/* Goes on for at most `slice` nanoseconds. */
enum load_state load_blk_run(struct load_blk *load, uint64_t slice);

/* From now on, read back once each block that was written; LOAD_DONE when that is done. Nothing may be in flight. */
void load_blk_sweep(struct load_blk *load);

#endif
