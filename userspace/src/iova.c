// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* The IOVA map: binary search over sorted regions, with the caller's last hit tried first. */
#include "iova.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "guard.h"

void iova_map_init(struct iova_map *map)
{
	memset(map, 0, sizeof(*map));
	map->generation = 1;
}

void iova_map_destroy(struct iova_map *map)
{
	free(map->regions);
	iova_map_init(map);
}

/* Index of the first region that ends at or after iova; count when there is none. */
static size_t lower_bound(const struct iova_map *map, uint64_t iova)
{
	size_t low = 0, high = map->count;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (map->regions[middle].last < iova)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

int iova_map_add(struct iova_map *map, uint64_t iova, uint64_t size, void *host, uint32_t perm)
{
	uint64_t last = iova + (size - 1);
	uintptr_t start = (uintptr_t)host;
	size_t at;

	if (size == 0 || last < iova || start == 0 || start + (size - 1) < start || perm < IOVA_RO || perm > IOVA_RW)
		return -EINVAL;
	at = lower_bound(map, iova);
	if (at < map->count && map->regions[at].iova <= last)
		return -EEXIST;
	if (map->count == map->capacity) {
		size_t capacity = map->capacity ? map->capacity * 2 : 8;
		struct iova_region *grown = realloc(map->regions, capacity * sizeof(*grown));

		if (!grown)
			return -ENOMEM;
		map->regions = grown;
		map->capacity = capacity;
	}
	memmove(&map->regions[at + 1], &map->regions[at], (map->count - at) * sizeof(*map->regions));
	map->regions[at] = (struct iova_region){ .iova = iova, .last = last, .host = host, .perm = perm };
	map->count++;
	return 0;
}

long iova_map_remove(struct iova_map *map, uint64_t iova, uint64_t size)
{
	uint64_t last = iova + (size - 1);
	size_t kept = 0, removed;

	if (size == 0 || last < iova)
		return -EINVAL;
	for (size_t i = 0; i < map->count; i++) {
		const struct iova_region *region = &map->regions[i];

		if (region->iova < iova || region->last > last)
			map->regions[kept++] = *region;
	}
	removed = map->count - kept;
	map->count = kept;
	map->generation += removed != 0;
	return (long)removed;
}

void iova_map_clear(struct iova_map *map)
{
	map->generation += map->count != 0;
	map->count = 0;
}

static const struct iova_region *find(const struct iova_map *map, size_t *hint, uint64_t iova)
{
	size_t at = *hint;

	if (at >= map->count || iova < map->regions[at].iova || iova > map->regions[at].last) {
		at = lower_bound(map, iova);
		if (at == map->count || iova < map->regions[at].iova)
			return NULL;
		*hint = at;
	}
	return &map->regions[at];
}

int iova_translate_slow(const struct iova_map *map, size_t *hint, uint64_t iova, uint64_t length, uint32_t perm,
			struct iova_pieces *out)
{
	size_t used = out->used;

	if (length == 0)
		return 0;
	if (iova + (length - 1) < iova)
		return -EFAULT;
	for (;;) {
		const struct iova_region *region = find(map, hint, iova);
		uint64_t here;

		if (!region || (region->perm & perm) != perm)
			return -EFAULT;
		if (used == out->capacity)
			return -ENOSPC;
		here = region->last - iova; /* bytes after this one: cannot overflow */
		if (here > length - 1)
			here = length - 1;
		out->iov[used].iov_base = region->host + (iova - region->iova);
		out->iov[used].iov_len = (size_t)here + 1;
		if (out->iova)
			out->iova[used] = iova;
		used++;
		length -= here + 1;
		if (length == 0)
			break;
		iova += here + 1;
	}
	out->used = used;
	return 0;
}

void *iova_contiguous(const struct iova_map *map, size_t *hint, uint64_t iova, uint64_t length, uint32_t perm)
{
	struct iovec iov;
	struct iova_pieces one = { .iov = &iov, .capacity = 1 };

	if (length == 0 || iova_translate(map, hint, iova, length, perm, &one))
		return NULL;
	return iov.iov_base;
}

size_t iova_missing(const struct iova_map *map, uint64_t iova, uint64_t length, uint32_t perm, uint64_t *at,
		    size_t capacity)
{
	uint64_t last = iova + (length - 1);
	size_t hint = 0, count = 0;

	if (length == 0 || last < iova)
		return 0;
	while (count < capacity) {
		const struct iova_region *region = find(map, &hint, iova);
		uint64_t end;

		if (region && (region->perm & perm) == perm) {
			end = region->last;
		} else {
			at[count++] = iova;
			end = iova | (IOVA_PAGE - 1);
		}
		if (end >= last)
			break;
		iova = end + 1;
	}
	return count;
}

int iova_refresh(const struct iova_map *map, struct iovec *iov, const uint64_t *iova, size_t count, uint32_t perm)
{
	size_t hint = 0;

	for (size_t i = 0; i < count; i++) {
		void *host = iova_contiguous(map, &hint, iova[i], iov[i].iov_len, perm);

		if (!host)
			return -EFAULT;
		iov[i].iov_base = host;
	}
	return 0;
}

/* Walks a range twice: first to know that every byte is there, then to copy. */
static int copy(const struct iova_map *map, uint64_t iova, uint8_t *to, const uint8_t *from, uint64_t length)
{
	uint32_t perm = to ? IOVA_RO : IOVA_WO;
	size_t hint = 0;

	if (length == 0)
		return 0;
	if (iova + (length - 1) < iova)
		return -EFAULT;
	for (int pass = 0; pass < 2; pass++) {
		uint64_t at = iova, left = length, done = 0;

		for (;;) {
			const struct iova_region *region = find(map, &hint, at);
			uint64_t here;

			if (!region || !(region->perm & perm))
				return -EFAULT;
			here = region->last - at;
			if (here > left - 1)
				here = left - 1;
			if (pass && to)
				memcpy(to + done, region->host + (at - region->iova), (size_t)here + 1);
			else if (pass)
				memcpy(region->host + (at - region->iova), from + done, (size_t)here + 1);
			done += here + 1;
			left -= here + 1;
			if (left == 0)
				break;
			at += here + 1;
		}
	}
	return 0;
}

int iova_read(const struct iova_map *map, uint64_t iova, void *to, uint64_t length)
{
	return copy(map, iova, to, NULL, length);
}

int iova_write(const struct iova_map *map, uint64_t iova, const void *from, uint64_t length)
{
	return copy(map, iova, NULL, from, length);
}

bool iova_map_poisoned(const struct iova_map *map)
{
	for (size_t i = 0; i < map->count; i++) {
		const struct iova_region *region = &map->regions[i];

		if (guard_poisoned_range(region->host, region->last - region->iova + 1))
			return true;
	}
	return false;
}
