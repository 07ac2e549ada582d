// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * The two store-load races of a virtqueue, run head to head: a publish against a re-arm ([B], packed [F]), a push against
 * a re-arm ([D], packed [H]). Either side alone may miss the other; both missing each other is a lost notification. Without the full fences
 * x86 does that within these rounds.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "test.h"

enum { ROUNDS = 100000, PATIENCE = 20000 };

static struct bench b;
static atomic_uint arrived;
static _Atomic int kick_due, call_due;

/* Both threads leave within nanoseconds of each other; gives the CPU up when there is only one. */
static void meet(unsigned int *turn)
{
	unsigned int spins = 0;

	*turn += 2;
	atomic_fetch_add(&arrived, 1);
	while ((int)(atomic_load(&arrived) - *turn) < 0)
		if (++spins % PATIENCE == 0)
			sched_yield();
}

/* Shifts the start by a few instructions, each round differently. */
static void jitter(uint64_t *seed)
{
	for (volatile uint32_t i = random_below(seed, 32); i; i = i - 1)
		;
}

static void *driver_end(void *unused)
{
	unsigned int turn = 0;
	uint64_t seed = 5;
	struct vq_done done;
	int due, more;

	(void)unused;
	for (int i = 0; i < ROUNDS; i++) {
		CHECK(vq_driver_add(&b.driver, &(struct vq_buffer){ DATA_IOVA, 8 }, 1, 0, 0) >= 0);
		vq_driver_disable_call(&b.driver);
		meet(&turn);
		jitter(&seed);
		due = vq_driver_publish(&b.driver);
		atomic_store(&kick_due, due);
		meet(&turn);
		meet(&turn);
		jitter(&seed);
		more = vq_driver_enable_call(&b.driver);
		meet(&turn);
		CHECK(more == 1 || atomic_load(&call_due) == 1);
		CHECK(vq_driver_reap(&b.driver, &done, 1) == 1);
	}
	return NULL;
}

static void *device_end(void *unused)
{
	unsigned int turn = 0;
	uint64_t seed = 6;
	struct vq_chain chain;
	int due, more;

	(void)unused;
	for (int i = 0; i < ROUNDS; i++) {
		vq_device_disable_kick(&b.device);
		meet(&turn);
		jitter(&seed);
		more = vq_device_enable_kick(&b.device);
		meet(&turn);
		CHECK(more == 1 || atomic_load(&kick_due) == 1);
		CHECK(bench_pop(&b, &chain, 1) == 1);
		meet(&turn);
		jitter(&seed);
		due = vq_device_push(&b.device, &(struct vq_used){ 0, chain.head }, 1);
		atomic_store(&call_due, due);
		meet(&turn);
	}
	return NULL;
}

int main(void)
{
	for (int mode = 0; mode < 4; mode++) {
		pthread_t driver, device;

		bench_open(&b, 8, 0, mode & 1, base_at(0x8000, 8, mode & 2), mode & 2);
		atomic_store(&arrived, 0);
		CHECK(pthread_create(&device, NULL, device_end, NULL) == 0);
		CHECK(pthread_create(&driver, NULL, driver_end, NULL) == 0);
		CHECK(pthread_join(driver, NULL) == 0 && pthread_join(device, NULL) == 0);
		bench_close(&b);
	}
	return 0;
}
