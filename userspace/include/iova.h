// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * iova: which memory a device may touch, and where this process has it.
 *
 * Rule: nothing outside this file turns an IOVA into a pointer. A translation is good for as long as the map's
 * generation stays the same; whoever keeps one keeps the generation beside it and looks again when it moved.
 * Synchronization: readers may run in parallel; a change excludes them, and that is the caller's business.
 */
#ifndef VDPA_BRIDGE_IOVA_H
#define VDPA_BRIDGE_IOVA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* As the device sees it; the values of VHOST_ACCESS_* in <linux/vhost_types.h>. */
enum iova_perm { IOVA_RO = 1, IOVA_WO = 2, IOVA_RW = 3 };

struct iova_region {
	uint64_t iova;
	uint64_t last; /* inclusive, so that a region may end at 2^64 - 1 */
	uint8_t *host;
	uint32_t perm;
};

struct iova_map {
	struct iova_region *regions; /* sorted, disjoint */
	size_t count;
	size_t capacity;
	uint64_t generation; /* moves when a translation may have become wrong: on removal */
};

/* A run of pieces, in two parallel arrays so that the iovecs can go to readv() as they are. */
struct iova_pieces {
	struct iovec *iov;
	uint64_t *iova; /* for who looks pieces up again (iova_refresh), or NULL */
	size_t used;
	size_t capacity;
};

void iova_map_init(struct iova_map *map);
void iova_map_destroy(struct iova_map *map);

/* 0, or -EEXIST (overlap), -EINVAL (empty, wraps, bad perm), -ENOMEM. */
int iova_map_add(struct iova_map *map, uint64_t iova, uint64_t size, void *host, uint32_t perm);

/* Removes the regions that lie wholly inside; returns how many, or -EINVAL (empty, wraps). */
long iova_map_remove(struct iova_map *map, uint64_t iova, uint64_t size);
void iova_map_clear(struct iova_map *map);

/*
 * Appends [iova, iova + length) to `out`, one piece per region it runs through. 0, -EFAULT (a byte is unmapped or
 * lacks the permission), -ENOSPC (more pieces than capacity);
 * `out` is unchanged then, and for length 0. `hint` holds the last
 * hit between calls: one per user, so that readers share nothing they write.
 */
int iova_translate_slow(const struct iova_map *map, size_t *hint, uint64_t iova, uint64_t length, uint32_t perm,
			struct iova_pieces *out);

/* The region hit last, as a loop holds it in registers. */
struct iova_view {
	uint64_t iova;
	uint64_t size; /* 0: of no region */
	uint8_t *host;
};

/* `hint` is used when its region has the permission. */
static inline struct iova_view iova_view(const struct iova_map *map, size_t hint, uint32_t perm)
{
	const struct iova_region *region;

	if (hint >= map->count || (map->regions[hint].perm & perm) != perm)
		return (struct iova_view){ .size = 0 };
	region = &map->regions[hint];
	return (struct iova_view){ region->iova, region->last - region->iova + 1, region->host };
}

/* Whether all of a range lies in the view, which it does not when it is empty; `offset` is from where the view begins, and
 * of any size for a range that begins elsewhere. */
static inline bool iova_covers(const struct iova_view *view, uint64_t offset, uint64_t length)
{
	uint64_t last = offset + length - 1; /* less than offset for nothing, or when it wraps */

	return last < view->size && last >= offset;
}

static inline int iova_translate(const struct iova_map *map, size_t *hint, uint64_t iova, uint64_t length,
				 uint32_t perm, struct iova_pieces *out)
{
	const struct iova_view view = iova_view(map, *hint, perm);
	uint64_t offset = iova - view.iova;

	if (out->used < out->capacity && iova_covers(&view, offset, length)) { /* the common case */
		out->iov[out->used] = (struct iovec){ view.host + offset, (size_t)length };
		if (out->iova)
			out->iova[out->used] = iova;
		out->used++;
		return 0;
	}
	return iova_translate_slow(map, hint, iova, length, perm, out);
}

/* The same for a range that must be in one piece of memory; NULL when it is not. */
void *iova_contiguous(const struct iova_map *map, size_t *hint, uint64_t iova, uint64_t length, uint32_t perm);

enum { IOVA_PAGE = 4096 }; /* the granule that mappings are asked for in */

/*
 * Where the range is unmapped or lacks the permission: the first such byte of each page, at most `capacity` of them. How
 * many there are; none in a range that wraps, which no mapping could serve.
 */
size_t iova_missing(const struct iova_map *map, uint64_t iova, uint64_t length, uint32_t perm, uint64_t *at,
		    size_t capacity);

/* Looks pieces up again after the map changed, each still in one region; 0 or -EFAULT (then some may be stale). */
int iova_refresh(const struct iova_map *map, struct iovec *iov, const uint64_t *iova, size_t count, uint32_t perm);

/* Copies out of and into the map; 0 or -EFAULT, in which case nothing was copied. */
int iova_read(const struct iova_map *map, uint64_t iova, void *to, uint64_t length);
int iova_write(const struct iova_map *map, uint64_t iova, const void *from, uint64_t length);

/* Whether a region lies in a mapping that the guard had to replace. */
bool iova_map_poisoned(const struct iova_map *map);

#endif
