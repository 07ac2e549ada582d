// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * blk_memory: a file that lives in memory (tmpfs, a memfd), mapped, so that a transfer is a copy and no system call.
 *
 * Rule: a hole is not touched, as reading it would fill it with a page: only chunks that are known to have no holes are
 * copied from and to. Should the file become shorter, or its file system full, the guard replaces the mapping; from then on
 * nothing is copied, and the system calls that are made instead say what is wrong.
 * Synchronization: any thread; blk_memory_destroy excludes all others.
 */
#ifndef VDPA_BRIDGE_BLK_MEMORY_H
#define VDPA_BRIDGE_BLK_MEMORY_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

struct blk_memory {
	uint8_t *base;
	uint64_t size; /* whole chunks */
	uint32_t shift; /* a chunk has 2^shift bytes */
	int file;
	bool writable;
	_Atomic uint8_t *chunks; /* what is known of each */
	_Atomic uint64_t seen; /* guard events that were not about us */
	_Atomic bool lost;
};

/* For the first `size` bytes of a file, which stays open. 0 or -errno. */
int blk_memory_init(struct blk_memory *memory, int file, uint64_t size, bool writable);
void blk_memory_destroy(struct blk_memory *memory);

/* Copies all of it, or says false: then nothing counts, and it is to be done by system calls. */
bool blk_memory_copy(struct blk_memory *memory, const struct iovec *iov, uint32_t count, uint64_t offset, uint32_t length,
		     bool write);

/* Chunks may have holes again, or have them no more. */
void blk_memory_forget(struct blk_memory *memory, uint64_t offset, uint64_t length);

#endif
