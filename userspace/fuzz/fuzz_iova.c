// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* The IOVA map against an array that says for each address of a small space where it is. */
#include <errno.h>

#include "fuzz.h"

enum { SPACE = 256, PIECES_MAX = 5 };

struct place {
	uint8_t *host; /* NULL: not mapped */
	uint32_t perm;
	uint16_t region; /* which of those added it belongs to */
};

struct space {
	struct iova_map map;
	struct place at[SPACE];
	uint64_t base; /* of the addresses: the space may end at 2^64 - 1 */
	uint8_t memory[SPACE];
	uint16_t added;
};

static void add(struct space *s, struct program *p)
{
	uint32_t start = next_byte(p), size = next_byte(p), perm = next_byte(p) % 5, host = next_byte(p);
	bool fits = size && start + size <= SPACE && perm >= IOVA_RO && perm <= IOVA_RW, free = true;
	int error;

	if (host + size > SPACE)
		return;
	if (start + size > SPACE && s->base + start + size > s->base)
		return; /* it would lie behind the space, where nothing is known */
	for (uint32_t i = start; i < start + size && i < SPACE; i++)
		free &= !s->at[i].host;
	error = iova_map_add(&s->map, s->base + start, size, s->memory + host, perm);
	CHECK(error == (!fits ? -EINVAL : free ? 0 : -EEXIST));
	if (error)
		return;
	s->added++;
	for (uint32_t i = 0; i < size; i++)
		s->at[start + i] = (struct place){ s->memory + host + i, perm, s->added };
}

static void remove_some(struct space *s, struct program *p)
{
	uint32_t start = next_byte(p), size = next_byte(p);
	long removed, expected = 0;

	if (!size || start + size > SPACE)
		return;
	removed = iova_map_remove(&s->map, s->base + start, size);
	for (uint32_t i = start; i < start + size; i++) {
		uint16_t region = s->at[i].region;
		bool inside = s->at[i].host != NULL;

		for (uint32_t k = 0; k < SPACE; k++)
			inside &= !s->at[k].host || s->at[k].region != region || (k >= start && k < start + size);
		if (!inside)
			continue;
		expected++;
		for (uint32_t k = 0; k < SPACE; k++)
			if (s->at[k].region == region)
				s->at[k] = (struct place){ .host = NULL };
	}
	CHECK(removed == expected);
}

static void translate(struct space *s, struct program *p, size_t *hint)
{
	struct iovec iov[PIECES_MAX];
	uint64_t iova[PIECES_MAX], missing[8], want;
	struct iova_pieces out = { .iov = iov, .iova = iova, .capacity = next_byte(p) % (PIECES_MAX + 1) };
	uint32_t start = next_byte(p), length = next_byte(p), perm = 1 + next_byte(p) % 3, runs = 0, at = start;
	bool there = true;
	int error;

	for (uint32_t i = start; i < start + length; i++) {
		bool here = i < SPACE && s->at[i].host && (s->at[i].perm & perm) == perm;

		there &= here;
		runs += here && (i == start || !s->at[i - 1].host || s->at[i].region != s->at[i - 1].region);
	}
	error = iova_translate(&s->map, hint, s->base + start, length, perm, &out);
	if (error == 0) {
		CHECK(there && out.used == runs);
		for (size_t i = 0; i < out.used; i++) {
			CHECK(iova[i] == s->base + at && iov[i].iov_base == s->at[at].host);
			at += (uint32_t)iov[i].iov_len;
		}
		CHECK(at == start + length || length == 0);
		CHECK(iova_refresh(&s->map, iov, iova, out.used, perm) == 0);
	} else {
		CHECK(out.used == 0 && (error == -EFAULT ? !there : error == -ENOSPC && runs > out.capacity));
	}
	want = iova_missing(&s->map, s->base + start, length, perm, missing, 8);
	CHECK(length == 0 || s->base + start + (length - 1) < s->base + start || (want == 0) == there);
}

static void copy(struct space *s, struct program *p)
{
	uint32_t start = next_byte(p), length = next_byte(p);
	uint8_t bytes[SPACE];
	bool there = true;
	int error;

	for (uint32_t i = start; i < start + length; i++)
		there &= i < SPACE && s->at[i].host && (s->at[i].perm & IOVA_RO);
	error = iova_read(&s->map, s->base + start, bytes, length);
	CHECK(error == (there ? 0 : -EFAULT));
	for (uint32_t i = 0; there && i < length; i++)
		CHECK(bytes[i] == *s->at[start + i].host);
	memset(bytes, next_byte(p), sizeof(bytes));
	error = iova_write(&s->map, s->base + start, bytes, length);
	CHECK(error == 0 || error == -EFAULT);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct program p = { data, data + size };
	static struct space s;
	size_t hint = 0;

	memset(&s, 0, sizeof(s));
	s.base = next_byte(&p) & 1 ? UINT64_MAX - (SPACE - 1) : 0;
	iova_map_init(&s.map);
	while (!at_end(&p)) {
		switch (next_byte(&p) % 6) {
		case 0:
		case 1:
			add(&s, &p);
			break;
		case 2:
			remove_some(&s, &p);
			break;
		case 3:
		case 4:
			translate(&s, &p, &hint);
			break;
		default:
			copy(&s, &p);
		}
	}
	iova_map_destroy(&s.map);
	return 0;
}
