// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* Nanoseconds per chain for add, publish, pop, push and reap on one thread: the cost of the code, not of the caches. */
#include <time.h>

#include "test.h"

enum { NUM = 256, ROUNDS = 20000, RUNS = 7 };

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static double run(struct bench *b, size_t buffers, size_t batch)
{
	struct vq_chain chains[NUM];
	struct vq_done done[NUM];
	struct vq_used used[NUM];
	struct vq_buffer list[3];
	double start = now();

	for (size_t i = 0; i < 3; i++)
		list[i] = (struct vq_buffer){ .iova = DATA_IOVA + 4096 * i, .length = 64 };
	for (int round = 0; round < ROUNDS; round++) {
		for (size_t i = 0; i < batch; i++)
			CHECK(vq_driver_add(&b->driver, list, 1, buffers - 1, i) >= 0);
		CHECK(vq_driver_publish(&b->driver) >= 0);
		CHECK(bench_pop(b, chains, batch) == batch);
		for (size_t i = 0; i < batch; i++)
			used[i] = (struct vq_used){ .written = 0, .head = chains[i].head };
		CHECK(vq_device_push(&b->device, used, batch) >= 0);
		CHECK(vq_driver_reap(&b->driver, done, batch) == batch);
	}
	return (now() - start) / ROUNDS / (double)batch;
}

int main(void)
{
	static struct bench b;

	for (int mode = 0; mode < 8; mode++) {
		for (size_t buffers = 1; buffers <= 3; buffers += 2) {
			for (size_t batch = 1; batch <= 32; batch *= 32) {
				double best = 1e9;

				bench_open(&b, NUM, mode & 2 ? 4 : 0, mode & 1, base_at(0, NUM, mode & 4), mode & 4);
				for (int i = 0; i < RUNS; i++) {
					double once = run(&b, buffers, batch);

					best = once < best ? once : best;
				}
				printf("%-6s %-9s %-8s chain of %zu, batch %2zu: %6.2f ns\n", mode & 4 ? "packed" : "split",
				       mode & 1 ? "event_idx" : "flags", mode & 2 ? "indirect" : "direct", buffers, batch, best);
				bench_close(&b);
			}
		}
	}
	return 0;
}
