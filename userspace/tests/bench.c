// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * Nanoseconds per chain for add, publish, pop, push and reap on one thread, and the same with a bare loop (bare.h): the
 * cost of the code, not of the caches. The two take turns; a figure is the median of all turns.
 *
 *   bench           a table
 *   bench --json    a list of objects: layout, kind, chain, batch, core and bare in nanoseconds
 */
#include <time.h>

#include "bare.h"

enum { NUM = 256, ROUNDS = 16384, TURNS = 15 };

struct form {
	bool packed, event_idx, indirect;
	size_t chain, batch;
};

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void core_round(struct bench *b, const struct vq_request *requests, size_t batch)
{
	static struct vq_chain chains[NUM];
	static struct vq_done done[NUM];
	static struct vq_used used[NUM];
	int error;

	CHECK(vq_driver_add_many(&b->driver, requests, batch, &error) == batch && error == 0);
	CHECK(vq_driver_publish(&b->driver) >= 0);
	CHECK(bench_pop(b, chains, batch) == batch);
	for (size_t i = 0; i < batch; i++)
		used[i] = (struct vq_used){ .written = 0, .head = chains[i].head };
	CHECK(vq_device_push(&b->device, used, batch) >= 0);
	CHECK(vq_driver_reap(&b->driver, done, batch) == batch);
}

static void bare_round(struct bare *b, const struct vq_buffer *list, size_t buffers, size_t batch, bool packed)
{
	static struct bare_chain chains[NUM];
	static struct iovec iov[NUM];

	if (packed) {
		bare_packed_add(b, list, (uint32_t)buffers, batch);
		CHECK(bare_packed_pop(b, chains, iov, batch) == batch);
		bare_packed_push(b, chains, batch);
		CHECK(bare_packed_reap(b, batch) == batch);
		return;
	}
	bare_add(b, list, (uint32_t)buffers, batch);
	CHECK(bare_pop(b, chains, iov, batch) == batch);
	bare_push(b, chains, batch);
	CHECK(bare_reap(b, batch, (uint32_t)buffers) == batch);
}

static int ascending(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static void measure(const struct form *form, double *core, double *bare)
{
	static struct bench ours, theirs;
	struct bare loop;
	struct vq_request requests[NUM];
	struct vq_buffer list[3];
	double took[2][TURNS];

	for (size_t i = 0; i < 3; i++)
		list[i] = (struct vq_buffer){ .iova = DATA_IOVA + 4096 * i, .length = 64 };
	for (size_t i = 0; i < form->batch; i++)
		requests[i] = (struct vq_request){ list, 1, (uint32_t)form->chain - 1, i };
	bench_open(&ours, NUM, form->indirect ? 4 : 0, form->event_idx, base_at(0, NUM, form->packed), form->packed);
	ours.pieces.iova = NULL; /* as engines have them */
	bench_open(&theirs, NUM, 0, false, base_at(0, NUM, form->packed), form->packed);
	bare_open(&loop, &theirs);
	for (int turn = 0; turn < 2 * TURNS; turn++) {
		double start = now();

		for (int round = 0; round < ROUNDS; round++)
			if (turn & 1)
				bare_round(&loop, list, form->chain, form->batch, form->packed);
			else
				core_round(&ours, requests, form->batch);
		took[turn & 1][turn / 2] = (now() - start) / ROUNDS / (double)form->batch;
	}
	for (int side = 0; side < 2; side++)
		qsort(took[side], TURNS, sizeof(double), ascending);
	*core = took[0][TURNS / 2];
	*bare = took[1][TURNS / 2];
	bare_close(&loop);
	bench_close(&theirs);
	bench_close(&ours);
}

int main(int count, char **arguments)
{
	bool json = count > 1 && strcmp(arguments[1], "--json") == 0;
	const char *before = "[";

	if (!json)
		printf("%-6s %-9s %-8s %5s %5s %9s %9s %6s\n", "layout", "events", "tables", "chain", "batch", "core ns",
		       "bare ns", "ratio");
	for (int mode = 0; mode < 8; mode++) {
		struct form form = { .packed = mode & 4, .event_idx = mode & 1, .indirect = mode & 2 };

		for (form.chain = 1; form.chain <= 3; form.chain += 2) {
			for (form.batch = 1; form.batch <= 32; form.batch *= 32) {
				const char *layout = form.packed ? "packed" : "split";
				const char *events = form.event_idx ? "event_idx" : "flags";
				const char *tables = form.indirect ? "indirect" : "direct";
				double core, bare;

				measure(&form, &core, &bare);
				if (json)
					printf("%s{\"layout\": \"%s\", \"events\": \"%s\", \"tables\": \"%s\", \"chain\": %zu, "
					       "\"batch\": %zu, \"core\": %.3f, \"bare\": %.3f}", before, layout, events, tables,
					       form.chain, form.batch, core, bare);
				else
					printf("%-6s %-9s %-8s %5zu %5zu %9.2f %9.2f %6.2f\n", layout, events, tables, form.chain,
					       form.batch, core, bare, core / bare);
				before = ",\n";
			}
		}
	}
	if (json)
		printf("]\n");
	return 0;
}
