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
	struct gate gate = { .awaiting = 0 };
	pthread_t thread;
	bool late;

	bench_open(&one, NUM, 0, event_idx, base_at(NUM - 1, NUM, packed), packed);
	bench_open(&other, NUM, 0, event_idx, base_at(0, NUM, packed), packed);
	CHECK(vq_poll_look(&poll, &gate, queues, 2) == 0 && poll.window == BUDGET / 2);
	post(&one);
	CHECK(vq_device_enable_kick(&one.device) == 1);
	CHECK(vq_poll_look(&poll, &gate, queues, 2) == 0 && poll.window == BUDGET / 2); /* left out */
	vq_poll_slept(&poll, BUDGET);
	vq_poll_slept(&poll, BUDGET);
	CHECK(vq_poll_look(&poll, &gate, queues, 2) == 0 && poll.window == BUDGET / 4); /* it was there before */
	serve(&one);
	CHECK(vq_device_enable_kick(&one.device) == 0);
	do { /* a machine that is busy may take longer than the budget */
		poll = vq_poll_begin(BUDGET);
		CHECK(pthread_create(&thread, NULL, later, &other) == 0);
		late = vq_poll_look(&poll, &gate, queues, 2) == 0;
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
	CHECK(vq_poll_look(&poll, &gate, queues, 2) == 0);
	vq_poll_slept(&poll, BUDGET);
	CHECK(poll.window == 0);
	vq_poll_slept(&poll, BUDGET - 1);
	CHECK(poll.window == 10000);
	for (int i = 0; i < 9; i++)
		vq_poll_slept(&poll, 1);
	CHECK(poll.window == BUDGET);
	CHECK(vq_driver_add(&one.driver, &(struct vq_buffer){ DATA_IOVA, 8 }, 1, 0, 0) >= 0);
	poll.window = 1;
	(void)vq_poll_look(&poll, &gate, queues, 2);
	CHECK(vq_driver_publish(&one.driver) == 1);
	bench_close(&one);
	bench_close(&other);
}

/* Who looks by turns of its own: the window follows what comes, and looks in vain are tried less and less. */
static void turns(void)
{
	struct vq_poll poll = vq_poll_begin(50000), always = vq_poll_begin(VQ_POLL_ALWAYS), never = vq_poll_begin(0);
	uint64_t now = 1000, looked = 0;

	CHECK(vq_poll_again(&poll, now) && vq_poll_again(&poll, now + 49999));
	vq_poll_found(&poll);
	CHECK(poll.window == 50000 && !poll.since);
	vq_poll_found(&poll); /* a turn right after the one before says nothing */
	CHECK(vq_poll_again(&poll, now) && !vq_poll_again(&poll, now + 50000) && poll.window == 25000 && poll.rest == 2);
	CHECK(!vq_poll_again(&poll, now));
	vq_poll_slept(&poll, 1000000);
	vq_poll_slept(&poll, 1000000);
	CHECK(vq_poll_again(&poll, now));
	vq_poll_found(&poll);
	CHECK(poll.window == 50000 && !poll.vain && !poll.rest);
	/* A driver on the same CPU comes as soon as we sleep, and never before. */
	for (int sleeps = 0; sleeps < 10000; sleeps++) {
		uint64_t began = now;

		while (vq_poll_again(&poll, now))
			now += 100;
		looked += now - began;
		vq_poll_slept(&poll, 15000);
	}
	CHECK(looked > 0 && looked < 10000 * 15000 / 100);
	for (int i = 0; i < 100; i++) { /* nothing for a long time: no more looks */
		while (vq_poll_again(&poll, now))
			now += 100;
		vq_poll_slept(&poll, 1000000000);
	}
	CHECK(poll.window == 0);
	for (int i = 0; i < 300; i++) /* then it pays again */
		vq_poll_slept(&poll, 15000);
	CHECK(poll.window == 50000);
	CHECK(vq_poll_again(&always, 1) && vq_poll_again(&always, UINT64_MAX - 1));
	vq_poll_found(&always);
	CHECK(always.window == VQ_POLL_ALWAYS && !vq_poll_again(&never, 1));
	vq_poll_slept(&never, 0);
	CHECK(never.window == 0);
}

/* Somebody who waits for the gate ends a look, which does not count as one in vain. */
static void *await_later(void *gate)
{
	nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
	gate_await(gate, true);
	return NULL;
}

static void called_off(void)
{
	struct vq_device *queues[] = { &one.device };
	struct vq_poll poll = vq_poll_begin(UINT64_C(60000000000));
	struct gate gate = { .awaiting = 0 };
	uint64_t began = vq_poll_clock();
	pthread_t thread;

	bench_open(&one, NUM, 0, true, 0, false);
	CHECK(pthread_create(&thread, NULL, await_later, &gate) == 0);
	CHECK(vq_poll_look(&poll, &gate, queues, 1) == 0 && poll.window == poll.budget && poll.rest == 0);
	CHECK(pthread_join(thread, NULL) == 0);
	CHECK(vq_poll_clock() - began < UINT64_C(20000000000));
	gate_await(&gate, false);
	CHECK(!gate_awaited(&gate));
	bench_close(&one);
}

int main(void)
{
	turns();
	called_off();
	for (int mode = 0; mode < 4; mode++)
		look(mode & 1, mode & 2);
	return 0;
}
