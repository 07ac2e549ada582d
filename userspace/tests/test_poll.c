// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* Looking at rings instead of sleeping: what is found, what is left alone, and how the window follows. */
#include <pthread.h>
#include <time.h>

#include "test.h"
#include "vq_poll.h"

enum { NUM = 8, BUDGET = 2000000 };

static struct bench one, other;

static void post(struct bench *b)
{
	CHECK(vq_driver_add(&b->driver, &(struct vq_buffer){ DATA_IOVA, 8 }, 1, 0, 0) >= 0 && vq_driver_publish(&b->driver) >= 0);
}

static void serve(struct bench *b)
{
	struct vq_chain chain;
	struct vq_done done;

	CHECK(bench_pop(b, &chain, 1) == 1 && vq_device_push(&b->device, &(struct vq_used){ 0, chain.head }, 1) >= 0);
	CHECK(vq_driver_reap(&b->driver, &done, 1) == 1);
}

static void *later(void *b)
{
	nanosleep(&(struct timespec){ .tv_nsec = 200000 }, NULL);
	post(b);
	return NULL;
}

static void look(bool packed, bool event_idx)
{
	struct vq_device *queues[2] = { &one.device, &other.device };
	struct vq_poll poll = vq_poll_begin(BUDGET);
	pthread_t thread;
	bool late;

	bench_open(&one, NUM, 0, event_idx, base_at(NUM - 1, NUM, packed), packed);
	bench_open(&other, NUM, 0, event_idx, base_at(0, NUM, packed), packed);
	CHECK(vq_poll_look(&poll, queues, 2) == 0 && poll.window == BUDGET / 2);
	post(&one);
	CHECK(vq_device_enable_kick(&one.device) == 1);
	CHECK(vq_poll_look(&poll, queues, 2) == 0 && poll.window == BUDGET / 4); /* it was there before */
	serve(&one);
	CHECK(vq_device_enable_kick(&one.device) == 0);
	do { /* a machine that is busy may take longer than the budget */
		poll.window = BUDGET;
		CHECK(pthread_create(&thread, NULL, later, &other) == 0);
		late = vq_poll_look(&poll, queues, 2) == 0;
		CHECK(pthread_join(thread, NULL) == 0);
		CHECK(late || poll.window == BUDGET);
		CHECK(vq_device_enable_kick(&other.device) == 1);
		serve(&other);
		CHECK(vq_device_enable_kick(&other.device) == 0);
	} while (late);
	post(&one); /* kicks are asked for again afterwards */
	serve(&one);
	CHECK(vq_device_enable_kick(&one.device) == 0);
	poll.window = 0;
	CHECK(vq_poll_look(&poll, queues, 2) == 0);
	vq_poll_slept(&poll, BUDGET);
	CHECK(poll.window == 0);
	vq_poll_slept(&poll, BUDGET - 1);
	CHECK(poll.window == BUDGET / 4);
	for (int i = 0; i < 5; i++)
		vq_poll_slept(&poll, 1);
	CHECK(poll.window == BUDGET);
	CHECK(vq_driver_add(&one.driver, &(struct vq_buffer){ DATA_IOVA, 8 }, 1, 0, 0) >= 0);
	poll.window = 1;
	(void)vq_poll_look(&poll, queues, 2);
	CHECK(vq_driver_publish(&one.driver) == 1);
	bench_close(&one);
	bench_close(&other);
}

int main(void)
{
	for (int mode = 0; mode < 4; mode++)
		look(mode & 1, mode & 2);
	return 0;
}
