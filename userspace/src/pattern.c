// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* A sector's words: number, generation, seed, then what mixes the three with the word's own place. */
#include "pattern.h"

#include <endian.h>
#include <inttypes.h>
#include <stdio.h>

enum { WORDS = PATTERN_SECTOR / 8, NUMBER = 0, GENERATION = 1, SEED = 2, FIRST = 3 };

/* Odd, so that no two places of a sector have the same word; the mixing is that of splitmix64. */
#define STEP UINT64_C(0x9e3779b97f4a7c15)

static uint64_t start_of(uint64_t sector, uint64_t generation, uint64_t seed)
{
	uint64_t mixed = sector * STEP ^ generation * UINT64_C(0xbf58476d1ce4e5b9) ^ seed;

	mixed = (mixed ^ mixed >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	return mixed ^ mixed >> 31;
}

void pattern_fill(void *data, size_t bytes, uint64_t sector, uint64_t generation, uint64_t seed)
{
	uint64_t *words = data;

	for (; bytes; bytes -= PATTERN_SECTOR, words += WORDS, sector++) {
		uint64_t mixed = start_of(sector, generation, seed);

		words[NUMBER] = htole64(sector);
		words[GENERATION] = htole64(generation);
		words[SEED] = htole64(seed);
		for (uint32_t i = FIRST; i < WORDS; i++)
			words[i] = htole64(mixed + i * STEP);
	}
}

/* The first word that does not follow from those before it, or WORDS. */
static uint32_t whole_until(const uint64_t *words)
{
	uint64_t mixed = start_of(le64toh(words[NUMBER]), le64toh(words[GENERATION]), le64toh(words[SEED]));
	uint32_t i = FIRST;

	while (i < WORDS && words[i] == htole64(mixed + i * STEP))
		i++;
	return i;
}

static struct pattern_report look(const uint64_t *words, uint64_t sector, uint64_t generation, uint64_t seed)
{
	struct pattern_report report = { .sector = sector, .expected = generation };
	uint32_t until = whole_until(words);

	if (until < WORDS) {
		report.fault = PATTERN_BROKEN;
		report.found = until == FIRST ? 0 : 8 * (uint64_t)until;
	} else if (le64toh(words[SEED]) != seed) {
		report.fault = PATTERN_FOREIGN;
	} else if (le64toh(words[NUMBER]) != sector) {
		report.fault = PATTERN_MISDIRECTED;
		report.found = le64toh(words[NUMBER]);
	} else if (le64toh(words[GENERATION]) != generation) {
		report.found = le64toh(words[GENERATION]);
		report.fault = report.found < generation ? PATTERN_STALE : PATTERN_LATER;
	}
	return report;
}

struct pattern_report pattern_check(const void *data, size_t bytes, uint64_t sector, uint64_t generation, uint64_t seed)
{
	const uint64_t *words = data;
	struct pattern_report first = { .fault = PATTERN_GOOD };
	size_t wrong = 0, sectors = bytes / PATTERN_SECTOR;

	for (size_t i = 0; i < sectors; i++) {
		struct pattern_report report = look(words + i * WORDS, sector + i, generation, seed);

		if (report.fault != PATTERN_GOOD && !wrong++)
			first = report;
	}
	if (wrong && wrong < sectors && first.fault != PATTERN_MISDIRECTED && first.fault != PATTERN_BROKEN)
		first.fault = PATTERN_TORN;
	return first;
}

int pattern_describe(const struct pattern_report *report, char *text, size_t size)
{
	uint64_t sector = report->sector, found = report->found, expected = report->expected;

	switch (report->fault) {
	case PATTERN_GOOD:
		return snprintf(text, size, "as it was written");
	case PATTERN_STALE:
		return snprintf(text, size, "sector %" PRIu64 " has write %" PRIu64 ", the last one was %" PRIu64 ": a write was lost",
				sector, found, expected);
	case PATTERN_LATER:
		return snprintf(text, size, "sector %" PRIu64 " has write %" PRIu64 ", the last one was %" PRIu64, sector, found,
				expected);
	case PATTERN_TORN:
		return snprintf(text, size, "from sector %" PRIu64 " on there is another write than %" PRIu64 ": it is torn", sector,
				expected);
	case PATTERN_MISDIRECTED:
		return snprintf(text, size, "sector %" PRIu64 " has what was written to sector %" PRIu64, sector, found);
	case PATTERN_FOREIGN:
		return snprintf(text, size, "sector %" PRIu64 " has data of another run: write %" PRIu64 " was lost", sector, expected);
	default:
		return snprintf(text, size, "sector %" PRIu64 " is not what any write left there, from byte %" PRIu64 " on", sector,
				found);
	}
}
