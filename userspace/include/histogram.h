// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * histogram: how often each value was seen, in buckets whose width grows with the value: exact below 64, and within 1/32 of
 * it from there on, for every 64-bit value. Recording is a shift and an addition.
 */
#ifndef VDPA_BRIDGE_HISTOGRAM_H
#define VDPA_BRIDGE_HISTOGRAM_H

#include <stdint.h>

enum { HISTOGRAM_HALF = 32, HISTOGRAM_BUCKETS = 60 * HISTOGRAM_HALF };

/* All zero but `least`: histogram_clear. */
struct histogram {
	uint64_t count, sum, least, most;
	uint64_t buckets[HISTOGRAM_BUCKETS];
};

void histogram_clear(struct histogram *histogram);

/* Values of a bucket have the same upper six bits: by how much they are shifted, and these. */
static inline uint32_t histogram_bucket(uint64_t value)
{
	uint32_t shift = value < 2 * HISTOGRAM_HALF ? 0 : (uint32_t)(58 - __builtin_clzll(value));

	return shift * HISTOGRAM_HALF + (uint32_t)(value >> shift);
}

static inline void histogram_add(struct histogram *histogram, uint64_t value)
{
	histogram->count++;
	histogram->sum += value;
	histogram->least = value < histogram->least ? value : histogram->least;
	histogram->most = value > histogram->most ? value : histogram->most;
	histogram->buckets[histogram_bucket(value)]++;
}

void histogram_merge(struct histogram *into, const struct histogram *from);

/* The least value that at least the share `part` (0 to 1) of all values does not exceed, rounded up to its bucket's end. */
uint64_t histogram_quantile(const struct histogram *histogram, double part);

#endif
