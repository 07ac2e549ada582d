// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* The IOVA map: its rules one by one, then against a map of single bytes. */
#include <errno.h>

#include "test.h"

static uint8_t memory[4096];

static void rules(void)
{
	struct iova_map map;

	iova_map_init(&map);
	CHECK(iova_map_add(&map, 0x1000, 0x100, memory, IOVA_RO) == 0);
	CHECK(iova_map_add(&map, 0x1100, 0x100, memory + 0x200, IOVA_RW) == 0);
	CHECK(iova_map_add(&map, 0x10ff, 1, memory, IOVA_RW) == -EEXIST);
	CHECK(iova_map_add(&map, 0xfff, 2, memory, IOVA_RW) == -EEXIST);
	CHECK(iova_map_add(&map, 0, 0x10000, memory, IOVA_RW) == -EEXIST);
	CHECK(iova_map_add(&map, 0x3000, 0, memory, IOVA_RW) == -EINVAL);
	CHECK(iova_map_add(&map, UINT64_MAX, 2, memory, IOVA_RW) == -EINVAL);
	CHECK(iova_map_add(&map, 0x3000, UINT64_MAX, memory, IOVA_RW) == -EINVAL);
	CHECK(iova_map_add(&map, 0x3000, 1, NULL, IOVA_RW) == -EINVAL);
	CHECK(iova_map_add(&map, 0x3000, 1, memory, 0) == -EINVAL);
	CHECK(iova_map_add(&map, 0x3000, 1, memory, 4) == -EINVAL);
	CHECK(iova_map_add(&map, UINT64_MAX, 1, memory, IOVA_WO) == 0);
	CHECK(map.count == 3 && map.generation == 1);

	CHECK(iova_map_remove(&map, 0x1000, 0) == -EINVAL);
	CHECK(iova_map_remove(&map, 2, UINT64_MAX) == -EINVAL);
	CHECK(iova_map_remove(&map, 0x1000, 0xff) == 0 && map.generation == 1);
	CHECK(iova_map_remove(&map, 0x1000, 0x1ff) == 1 && map.generation == 2);
	CHECK(iova_map_remove(&map, 1, UINT64_MAX) == 2 && map.count == 0 && map.generation == 3);
	iova_map_clear(&map);
	CHECK(map.generation == 3);
	iova_map_destroy(&map);
}

static void translation(void)
{
	struct iovec iov[2];
	uint64_t iova[2];
	struct iova_pieces out = { iov, iova, 0, 2 };
	struct iova_map map;
	uint8_t bytes[0x200];
	size_t hint = 17; /* any value will do */

	iova_map_init(&map);
	CHECK(iova_map_add(&map, 0x1000, 0x100, memory, IOVA_RO) == 0);
	CHECK(iova_map_add(&map, 0x1100, 0x100, memory + 0x200, IOVA_RW) == 0);
	CHECK(iova_translate(&map, &hint, 0x10f0, 0x20, IOVA_RO, &out) == 0);
	CHECK(out.used == 2 && iov[0].iov_base == memory + 0xf0 && iov[0].iov_len == 0x10 && iova[0] == 0x10f0);
	CHECK(iov[1].iov_base == memory + 0x200 && iov[1].iov_len == 0x10 && iova[1] == 0x1100);
	CHECK(iova_translate(&map, &hint, 0x1000, 1, IOVA_RO, &out) == -ENOSPC && out.used == 2);
	out.used = 1;
	CHECK(iova_translate(&map, &hint, 0x10f0, 0x20, IOVA_RO, &out) == -ENOSPC && out.used == 1);
	out.used = 0;
	CHECK(iova_translate(&map, &hint, 0x10f0, 0x20, IOVA_WO, &out) == -EFAULT && out.used == 0);
	CHECK(iova_translate(&map, &hint, 0x11f0, 0x11, IOVA_RO, &out) == -EFAULT && out.used == 0);
	CHECK(iova_translate(&map, &hint, 0xfff, 1, IOVA_RO, &out) == -EFAULT);
	CHECK(iova_translate(&map, &hint, 0x1000, UINT64_MAX, IOVA_RO, &out) == -EFAULT);
	CHECK(iova_translate(&map, &hint, 0x1000, 0, IOVA_RO, &out) == 0 && out.used == 0);
	CHECK(iova_translate(&map, &hint, 0xdead0000, 0, IOVA_RO, &out) == 0 && out.used == 0);
	CHECK(iova_contiguous(&map, &hint, 0x10f0, 0x20, IOVA_RO) == NULL);
	CHECK(iova_contiguous(&map, &hint, 0x1100, 0x100, IOVA_WO) == memory + 0x200);

	for (size_t i = 0; i < sizeof(memory); i++)
		memory[i] = (uint8_t)(i * 7);
	CHECK(iova_read(&map, 0x1000, bytes, 0x200) == 0);
	CHECK(!memcmp(bytes, memory, 0x100) && !memcmp(bytes + 0x100, memory + 0x200, 0x100));
	CHECK(iova_read(&map, 0x1000, bytes, 0x201) == -EFAULT);
	CHECK(iova_write(&map, 0x10ff, bytes, 2) == -EFAULT && memory[0xff] == (uint8_t)(0xff * 7));
	CHECK(iova_write(&map, 0x11ff, "!", 1) == 0 && memory[0x2ff] == '!');

	/* Looked up again after the region moved; refused once it is gone. */
	CHECK(iova_translate(&map, &hint, 0x1100, 0x10, IOVA_RW, &out) == 0);
	CHECK(iova_map_remove(&map, 0x1100, 0x100) == 1);
	CHECK(iova_refresh(&map, iov, iova, 1, IOVA_RW) == -EFAULT);
	CHECK(iova_map_add(&map, 0x1100, 0x100, memory + 0x800, IOVA_RW) == 0);
	CHECK(iova_refresh(&map, iov, iova, 1, IOVA_RW) == 0 && iov[0].iov_base == memory + 0x800);
	iova_map_destroy(&map);
}

/* Random regions over a space of 256 addresses, and the same kept as one entry per address. */
static void model(uint64_t seed)
{
	uint8_t *truth[256] = { 0 };
	uint32_t perm[256] = { 0 };
	struct iovec iov[256];
	uint64_t iova[256];
	struct iova_map map;
	size_t hint = 0;

	iova_map_init(&map);
	for (int round = 0; round < 3000; round++) {
		uint32_t start = random_below(&seed, 256), size = 1 + random_below(&seed, 32);
		uint32_t wanted = 1 + random_below(&seed, 3), action = random_below(&seed, 8);
		uint8_t *host = memory + random_below(&seed, 4000);
		struct iova_pieces out = { iov, iova, 0, 256 };
		bool free_range = true, mapped = start + size <= 256;
		uint32_t at = 0;

		if (start + size > 256 && action < 6)
			continue;
		for (uint32_t i = start; i < start + size && i < 256; i++) {
			free_range = free_range && !truth[i];
			mapped = mapped && truth[i] && (perm[i] & wanted) == wanted;
		}
		if (action < 2) {
			CHECK(iova_map_add(&map, start, size, host, wanted) == (free_range ? 0 : -EEXIST));
			for (uint32_t i = 0; free_range && i < size; i++) {
				truth[start + i] = host + i;
				perm[start + i] = wanted;
			}
		} else if (action == 2) {
			size_t before = map.count;
			long removed = iova_map_remove(&map, start, size);

			CHECK(removed >= 0 && before - map.count == (size_t)removed);
			memset(truth, 0, sizeof(truth));
			for (size_t r = 0; r < map.count; r++) {
				const struct iova_region *region = &map.regions[r];

				CHECK(region->iova < start || region->last >= start + size);
				for (uint64_t i = region->iova; i <= region->last; i++)
					truth[i] = region->host + (i - region->iova);
			}
		} else {
			CHECK(iova_translate(&map, &hint, start, size, wanted, &out) == (mapped ? 0 : -EFAULT));
			for (size_t p = 0; p < out.used; p++)
				for (size_t i = 0; i < iov[p].iov_len; i++, at++)
					CHECK((uint8_t *)iov[p].iov_base + i == truth[start + at]);
			CHECK(at == (mapped ? size : 0));
		}
	}
	iova_map_destroy(&map);
}

int main(void)
{
	rules();
	translation();
	for (uint64_t seed = 1; seed <= 20; seed++)
		model(seed * 7919);
	return 0;
}
