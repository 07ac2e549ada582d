// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* Copies where there are pages. What is known of chunks is a hint: being wrong costs memory or time, never data. */
#include "blk_memory.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "guard.h"

#ifndef MADV_POPULATE_READ /* Linux 5.14 */
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

enum { UNKNOWN, WHOLE, HOLES };
enum { SMALLEST = 16, STEP = 1 << SMALLEST, MOST_CHUNKS = 1 << 16, PAGE = 4096 };

int blk_memory_init(struct blk_memory *memory, int file, uint64_t size, bool writable)
{
	int error;

	*memory = (struct blk_memory){ .file = file, .writable = writable, .shift = SMALLEST };
	while (size >> memory->shift > MOST_CHUNKS)
		memory->shift++;
	memory->size = size >> memory->shift << memory->shift;
	if (!memory->size)
		return -EINVAL;
	memory->chunks = calloc(memory->size >> memory->shift, 1);
	if (!memory->chunks)
		return -ENOMEM;
	memory->base = mmap(NULL, memory->size, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, file, 0);
	error = memory->base == MAP_FAILED ? -errno : guard_add(memory->base, memory->size);
	if (error) {
		if (memory->base != MAP_FAILED)
			munmap(memory->base, memory->size);
		free((void *)memory->chunks);
		memory->chunks = NULL;
		return error;
	}
	atomic_store(&memory->seen, guard_events());
	return 0;
}

void blk_memory_destroy(struct blk_memory *memory)
{
	if (!memory->chunks)
		return;
	(void)guard_remove(memory->base);
	munmap(memory->base, memory->size);
	free((void *)memory->chunks);
	memory->chunks = NULL;
}

/* Looks for holes, and has the pages mapped if there are none. (SEEK_HOLE would look through all of the file.) */
static uint8_t explore(struct blk_memory *memory, uint64_t chunk)
{
	uint64_t bytes = UINT64_C(1) << memory->shift;
	uint8_t *start = memory->base + (chunk << memory->shift), found = WHOLE;

	for (uint64_t at = 0; at < bytes && found == WHOLE; at += STEP) {
		unsigned char there[STEP / PAGE] = { 0 };

		if (mincore(start + at, STEP, there) || memchr(there, 0, sizeof(there)))
			found = HOLES;
	}
	if (found == WHOLE) /* or fault by fault, where the kernel does not know this */
		(void)madvise(start, bytes, memory->writable ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
	atomic_store_explicit(&memory->chunks[chunk], found, memory_order_relaxed);
	return found;
}

/* A write by system call may fill holes. */
static bool whole(struct blk_memory *memory, uint64_t offset, uint32_t length, bool write)
{
	for (uint64_t chunk = offset >> memory->shift; chunk <= (offset + length - 1) >> memory->shift; chunk++) {
		uint8_t known = atomic_load_explicit(&memory->chunks[chunk], memory_order_relaxed);

		if (known == UNKNOWN)
			known = explore(memory, chunk);
		if (known == WHOLE)
			continue;
		if (write)
			blk_memory_forget(memory, offset, length);
		return false;
	}
	return true;
}

/* Whether the mapping is the file still, after it was used. */
static bool sound(struct blk_memory *memory)
{
	uint64_t now = guard_events();

	if (now == atomic_load_explicit(&memory->seen, memory_order_relaxed))
		return true;
	if (guard_poisoned(memory->base)) {
		atomic_store(&memory->lost, true);
		return false;
	}
	atomic_store_explicit(&memory->seen, now, memory_order_relaxed);
	return true;
}

bool blk_memory_copy(struct blk_memory *memory, const struct iovec *iov, uint32_t count, uint64_t offset, uint32_t length,
		     bool write)
{
	uint8_t *at = memory->base + offset;

	if (atomic_load_explicit(&memory->lost, memory_order_relaxed) || offset > memory->size ||
	    length > memory->size - offset || !whole(memory, offset, length, write))
		return false;
	for (uint32_t i = 0; i < count; at += iov[i].iov_len, i++) {
		if (write)
			memcpy(at, iov[i].iov_base, iov[i].iov_len);
		else
			memcpy(iov[i].iov_base, at, iov[i].iov_len);
	}
	return sound(memory);
}

void blk_memory_forget(struct blk_memory *memory, uint64_t offset, uint64_t length)
{
	if (offset >= memory->size || !length)
		return;
	if (length > memory->size - offset)
		length = memory->size - offset;
	for (uint64_t chunk = offset >> memory->shift; chunk <= (offset + length - 1) >> memory->shift; chunk++)
		atomic_store_explicit(&memory->chunks[chunk], UNKNOWN, memory_order_relaxed);
}
