// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * pattern: sectors that say where they belong, which write they are of, and whether they are whole.
 *
 * Rule: every sector of 512 bytes stands for itself - its number, the generation of its write, the seed of the run, then words
 * that follow from these - so whatever a disk mixes up shows in the data alone: a sector elsewhere, an old one, half of one.
 */
#ifndef VDPA_BRIDGE_PATTERN_H
#define VDPA_BRIDGE_PATTERN_H

#include <stddef.h>
#include <stdint.h>

enum { PATTERN_SECTOR = 512 };

enum pattern_fault {
	PATTERN_GOOD,
	PATTERN_STALE, /* an earlier write of this run, whole: a later one was lost */
	PATTERN_LATER, /* a later write than the last one that ended */
	PATTERN_TORN, /* sectors of different writes */
	PATTERN_MISDIRECTED, /* whole, but it belongs elsewhere */
	PATTERN_FOREIGN, /* whole, of another run: all writes of this one were lost */
	PATTERN_BROKEN, /* none of our sectors: something else, or cut within */
};

struct pattern_report {
	enum pattern_fault fault;
	uint64_t sector; /* the first wrong one */
	uint64_t found; /* generation (STALE, LATER, TORN), sector (MISDIRECTED), or the byte in the sector (BROKEN) */
	uint64_t expected; /* generation */
};

/* Fills `bytes` (whole sectors, 8-byte aligned) as write `generation` from `sector` on. */
void pattern_fill(void *data, size_t bytes, uint64_t sector, uint64_t generation, uint64_t seed);

/* Whether that is what is there. */
struct pattern_report pattern_check(const void *data, size_t bytes, uint64_t sector, uint64_t generation, uint64_t seed);

/* One line for people, without a newline; returns what snprintf returns. */
int pattern_describe(const struct pattern_report *report, char *text, size_t size);

#endif
