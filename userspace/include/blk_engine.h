// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * blk_engine: reads, writes and flushes of one queue of a disk (virtio 1.2, 5.2.6) on a file.
 *
 * Rule: data goes between the file and the driver's memory without a copy of ours. What the page cache has, or memory is
 * the file, is moved at once; what would wait for a medium goes through io_uring where there is one. A request that is
 * not plain, or fails at once, stays in the ring for the owner, who has the last word on statuses.
 * A flush begins when it is taken, and whatever was handed back before that is in the file by then.
 */
#ifndef VDPA_BRIDGE_BLK_ENGINE_H
#define VDPA_BRIDGE_BLK_ENGINE_H

#include "blk_memory.h"
#include "engine.h"
#include "uring.h"

enum blk_medium {
	BLK_CACHED, /* a file whose pages may have to be read first */
	BLK_RESIDENT, /* memory: a memfd, tmpfs; nothing to wait for, nothing to flush */
	BLK_DIRECT, /* past the page cache */
	BLK_NULL, /* none: reads give zeroes, writes are forgotten */
};

struct blk_config {
	enum blk_medium medium;
	int file;
	int direct; /* BLK_DIRECT: the same file, opened with O_DIRECT; unaligned requests take `file` */
	uint32_t align; /* BLK_DIRECT: of addresses, lengths and offsets; a power of 2 */
	struct blk_memory *memory; /* BLK_RESIDENT: the file, mapped, or NULL; outlives the engine */
	bool readonly;
	bool uring; /* try io_uring */
	uint32_t depth; /* requests in flight at most, 1 to 32768 */
};

struct blk_request; /* one in flight */

struct blk_engine {
	struct engine engine;
	struct blk_config config;
	uint64_t capacity; /* sectors; the owner's, as are the next two */
	uint32_t block; /* sectors of a logical block, a power of 2; requests that cut one are the model's to refuse */
	bool stable_writes; /* the driver does not know of FLUSH, or wants no cache */
	bool waits_for_writes; /* the file system cannot say whether a write would wait */
	size_t batch; /* requests of the next turn at most */
	int failure; /* errno of the first request that failed in flight */
	struct uring uring;
	struct blk_request *requests;
	uint16_t *idle; /* indices of requests that are not in flight */
	uint32_t idle_count;
};

/* 0 or -ENOMEM; without io_uring where there is none. */
int blk_engine_init(struct blk_engine *blk, const struct blk_config *config);
void blk_engine_destroy(struct blk_engine *blk);

#endif
