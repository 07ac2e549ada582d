// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* What is done with a histogram once it is full; filling it is in the header. */
#include "histogram.h"

#include <string.h>

void histogram_clear(struct histogram *histogram)
{
	memset(histogram, 0, sizeof(*histogram));
	histogram->least = UINT64_MAX;
}

void histogram_merge(struct histogram *into, const struct histogram *from)
{
	into->count += from->count;
	into->sum += from->sum;
	into->least = from->least < into->least ? from->least : into->least;
	into->most = from->most > into->most ? from->most : into->most;
	for (uint32_t i = 0; i < HISTOGRAM_BUCKETS; i++)
		into->buckets[i] += from->buckets[i];
}

/* The largest value in a bucket. */
static uint64_t end_of(uint32_t bucket)
{
	uint32_t shift = bucket < 2 * HISTOGRAM_HALF ? 0 : bucket / HISTOGRAM_HALF - 1;
	uint64_t upper = bucket - shift * HISTOGRAM_HALF;

	return (upper << shift) + ((UINT64_C(1) << shift) - 1);
}

uint64_t histogram_quantile(const struct histogram *histogram, double part)
{
	double exact = part * (double)histogram->count;
	uint64_t wanted = (uint64_t)exact, seen = 0;

	wanted += (double)wanted < exact || !wanted;
	for (uint32_t i = 0; i < HISTOGRAM_BUCKETS; i++) {
		seen += histogram->buckets[i];
		if (seen >= wanted)
			return end_of(i) < histogram->most ? end_of(i) : histogram->most;
	}
	return histogram->count ? histogram->most : 0;
}
