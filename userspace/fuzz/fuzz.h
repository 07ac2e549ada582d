// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * What the fuzz targets share: a program is a string of bytes, taken one after the other; an end of them is a string of
 * zeros. A check that fails aborts, as does a sanitizer.
 */
#ifndef VDPA_BRIDGE_FUZZ_H
#define VDPA_BRIDGE_FUZZ_H

#include "../tests/test.h"

struct program {
	const uint8_t *at, *end;
};

static inline uint8_t next_byte(struct program *p)
{
	return p->at < p->end ? *p->at++ : 0;
}

static inline uint16_t next_word(struct program *p)
{
	uint8_t low = next_byte(p);

	return (uint16_t)(low | next_byte(p) << 8);
}

static inline bool at_end(const struct program *p)
{
	return p->at == p->end;
}

/* Up to 15 bytes of the program go over memory, as the other side would write them at any time. */
static inline void scribble(struct program *p, uint8_t *memory, size_t size)
{
	size_t at = next_word(p) % size, count = next_byte(p) & 15;

	for (size_t i = 0; i < count; i++)
		memory[(at + i) % size] = next_byte(p);
}

/* What libFuzzer calls for each program. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
