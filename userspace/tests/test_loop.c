// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* Loops, their engines and whoever wants them at rest, each in a thread of its own. */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "engine.h"
#include "load.h"
#include "test.h"

enum { NUM = 64, LANES = 3, ROUNDS = 300, PER_ROUND = 40, ODD = 97 };

/* An engine that gives chains back, but for every ODD-th token, which is its owner's. */
struct lane {
	struct engine engine;
	struct bench bench;
	struct vq_chain chains[ENGINE_BATCH];
	struct vq_used done[NUM];
	int kick, call;
	uint64_t asked, sent;
	uint64_t random[2]; /* of engine and driver; 0: no pauses */
	struct loop loop;
	struct gate *gate;
	pthread_t server, driver;
};

static pthread_mutex_t turns = PTHREAD_MUTEX_INITIALIZER; /* one holder at a time */

static void hold(struct gate *gate)
{
	pthread_mutex_lock(&turns);
	gate_hold(gate);
}

static void release(struct gate *gate)
{
	gate_release(gate);
	pthread_mutex_unlock(&turns);
}

static uint64_t token_of(const struct vq_chain *chain)
{
	uint64_t token = 0;

	CHECK(chain_gather(readable_part(chain), 0, &token, sizeof(token)) == sizeof(token));
	return token;
}

/* Up to some 30 us, mostly nothing. */
static void pause_at_random(uint64_t *random)
{
	uint64_t end;

	if (!*random || load_below(random, 4))
		return;
	for (end = load_now() + load_below(random, 30000); load_now() < end;)
		;
}

static int turn(struct engine *engine)
{
	struct lane *lane = (struct lane *)engine;
	struct engine_ring *ring = &engine->rings[0];
	size_t count, i;

	if (!ring->vq)
		return TURN_IDLE;
	pause_at_random(&lane->random[0]);
	ring->pieces->used = 0;
	count = vq_device_pop(ring->vq, ring->chains, 7, ring->pieces);
	for (i = 0; i < count && token_of(&ring->chains[i]) % ODD; i++)
		ring->done[i] = (struct vq_used){ .written = 0, .head = ring->chains[i].head };
	CHECK(engine_push(ring, ring->done, i));
	if (i == count)
		return count ? TURN_MOVED : TURN_IDLE;
	engine_put_back(ring, i, count - i);
	return TURN_MOVED | TURN_ASKS;
}

static const struct engine_ops operations = { .turn = turn, .arm = engine_arm, .disarm = engine_disarm };

static void *serve(void *argument)
{
	struct lane *lane = argument;
	struct engine *asks;

	while ((asks = loop_run(&lane->loop))) {
		struct vq_chain chain;
		struct vq_used used;
		int due = 0;

		hold(lane->gate);
		if (lane->engine.rings[0].vq && bench_pop(&lane->bench, &chain, 1) == 1) {
			CHECK(token_of(&chain) % ODD == 0);
			used = (struct vq_used){ .written = 0, .head = chain.head };
			due = vq_device_push(&lane->bench.device, &used, 1);
			lane->asked++;
		}
		CHECK(due >= 0);
		loop_look(&lane->loop, asks);
		release(lane->gate);
		if (due)
			CHECK(eventfd_write(lane->call, 1) == 0);
	}
	return NULL;
}

/* Offers chains in bursts, and waits for each burst by call. */
static void *drive(void *argument)
{
	struct lane *lane = argument;
	struct vq_driver *vq = &lane->bench.driver;
	uint64_t token = 0, back = 0, random = lane->random[1];

	for (int round = 0; round < ROUNDS; round++) {
		uint64_t end = token + (random ? 1 + load_below(&random, PER_ROUND) : PER_ROUND);
		struct vq_done done[NUM];

		for (; token < end; token++) {
			struct vq_buffer buffer = { .iova = DATA_IOVA + token % NUM * 64, .length = 8 };

			memcpy(lane->bench.data + token % NUM * 64, &token, sizeof(token));
			CHECK(vq_driver_add(vq, &buffer, 1, 0, token) >= 0);
		}
		pause_at_random(&random);
		if (vq_driver_publish(vq))
			CHECK(eventfd_write(lane->kick, 1) == 0);
		while (back < token) {
			size_t count = vq_driver_reap(vq, done, NUM);
			eventfd_t value;

			CHECK(vq->fault.code == VQ_OK);
			back += count;
			if (!count && !vq_driver_enable_call(vq))
				CHECK(eventfd_read(lane->call, &value) == 0);
		}
	}
	lane->sent = token;
	return NULL;
}

/* `seed`: both sides pause at random. */
static void lanes(bool packed, bool event_idx, uint64_t budget, uint64_t seed)
{
	static struct lane lane[LANES];
	struct gate gate;
	struct timespec pause = { .tv_nsec = 50000 };

	CHECK(gate_init(&gate) == 0);
	for (size_t i = 0; i < LANES; i++) {
		memset(&lane[i], 0, sizeof(lane[i]));
		lane[i].engine = (struct engine){ .ops = &operations, .fd = -1 };
		lane[i].gate = &gate;
		lane[i].random[0] = lane[i].random[1] = seed ? seed + i : 0;
		bench_open(&lane[i].bench, NUM, 0, event_idx, base_at(0, NUM, packed), packed);
		lane[i].kick = eventfd(0, EFD_CLOEXEC);
		lane[i].call = eventfd(0, EFD_CLOEXEC);
		hold(&gate);
		CHECK(loop_init(&lane[i].loop, &gate, budget) == 0);
		lane[i].engine.rings[0] = (struct engine_ring){ .vq = &lane[i].bench.device,
								.chains = lane[i].chains,
								.done = lane[i].done,
								.pieces = &lane[i].bench.pieces,
								.call = lane[i].call };
		CHECK(loop_add(&lane[i].loop, &lane[i].engine) == 0);
		CHECK(loop_watch(&lane[i].loop, &lane[i].engine, lane[i].kick) == 0);
		release(&gate);
	}
	for (size_t i = 0; i < LANES; i++) {
		CHECK(pthread_create(&lane[i].server, NULL, serve, &lane[i]) == 0);
		CHECK(pthread_create(&lane[i].driver, NULL, drive, &lane[i]) == 0);
	}
	for (int visit = 0; visit < 500; visit++) { /* at rest whenever we look, and some rings are away for a while */
		struct engine_ring *ring = &lane[visit % LANES].engine.rings[0];
		struct vq_device *away = &lane[visit % LANES].bench.device;

		hold(&gate);
		for (size_t i = 0; i < LANES; i++)
			CHECK(lane[i].bench.device.in_flight == 0 && lane[i].engine.in_flight == 0);
		ring->vq = NULL;
		release(&gate);
		nanosleep(&pause, NULL);
		hold(&gate);
		ring->vq = away;
		loop_look(&lane[visit % LANES].loop, &lane[visit % LANES].engine);
		release(&gate);
	}
	for (size_t i = 0; i < LANES; i++)
		CHECK(pthread_join(lane[i].driver, NULL) == 0);
	for (size_t i = 0; i < LANES; i++) {
		hold(&gate);
		lane[i].loop.closing = true;
		loop_look(&lane[i].loop, NULL);
		release(&gate);
		CHECK(pthread_join(lane[i].server, NULL) == 0);
		CHECK(lane[i].asked == (lane[i].sent + ODD - 1) / ODD && lane[i].bench.device.in_flight == 0);
		hold(&gate);
		loop_remove(&lane[i].loop, &lane[i].engine);
		loop_destroy(&lane[i].loop);
		release(&gate);
		bench_close(&lane[i].bench);
		close(lane[i].kick);
		close(lane[i].call);
	}
	gate_destroy(&gate);
}

static void *signal_once(void *argument)
{
	struct loop *loop = argument;

	gate_enter(loop->gate);
	gate_signal(&loop->member, loop->wake); /* any eventfd that is full */
	gate_leave(loop->gate);
	return NULL;
}

/* A driver that fills the counter of its call eventfd keeps nobody waiting for long. */
static void full_counter(void)
{
	struct gate gate;
	struct loop loop;
	struct timespec pause = { .tv_nsec = 20000000 };
	pthread_t thread;

	CHECK(gate_init(&gate) == 0);
	hold(&gate);
	CHECK(loop_init(&loop, &gate, 0) == 0);
	close(loop.wake);
	loop.wake = eventfd(0, EFD_CLOEXEC);
	CHECK(eventfd_write(loop.wake, UINT64_MAX - 1) == 0);
	release(&gate);
	CHECK(pthread_create(&thread, NULL, signal_once, &loop) == 0);
	nanosleep(&pause, NULL);
	hold(&gate);
	CHECK(gate.inside == 0);
	loop_destroy(&loop);
	release(&gate);
	CHECK(pthread_join(thread, NULL) == 0);
	gate_destroy(&gate);
}

/* A loop that looks for a minute lets holders in at once, and ends when it is told to. */
static void prompt(void)
{
	static struct lane lane;
	struct vq_driver *vq = &lane.bench.driver;
	struct vq_done done;
	struct gate gate;
	uint64_t began;

	CHECK(gate_init(&gate) == 0);
	lane = (struct lane){ .engine = { .ops = &operations, .fd = -1 }, .gate = &gate, .call = -1 };
	bench_open(&lane.bench, NUM, 0, true, 0, false);
	lane.kick = eventfd(0, EFD_CLOEXEC);
	hold(&gate);
	CHECK(loop_init(&lane.loop, &gate, UINT64_C(60000000000)) == 0);
	lane.engine.rings[0] = (struct engine_ring){
		.vq = &lane.bench.device, .chains = lane.chains, .done = lane.done, .pieces = &lane.bench.pieces, .call = -1
	};
	CHECK(loop_add(&lane.loop, &lane.engine) == 0 && loop_watch(&lane.loop, &lane.engine, lane.kick) == 0);
	release(&gate);
	CHECK(pthread_create(&lane.server, NULL, serve, &lane) == 0);
	memset(lane.bench.data, 1, 8); /* a token that is no multiple of ODD */
	for (int round = 0; round < 20; round++) {
		CHECK(vq_driver_add(vq, &(struct vq_buffer){ DATA_IOVA, 8 }, 1, 0, 0) >= 0);
		if (vq_driver_publish(vq)) {
			CHECK(round == 0);
			CHECK(eventfd_write(lane.kick, 1) == 0);
		}
		while (!vq_driver_reap(vq, &done, 1))
			sched_yield();
	}
	began = load_now();
	for (int visit = 0; visit < 20; visit++) {
		hold(&gate);
		release(&gate);
	}
	hold(&gate);
	CHECK(lane.engine.hot && lane.loop.poll.since);
	lane.loop.closing = true;
	release(&gate);
	CHECK(pthread_join(lane.server, NULL) == 0);
	CHECK(load_now() - began < UINT64_C(20000000000));
	hold(&gate);
	loop_remove(&lane.loop, &lane.engine);
	loop_destroy(&lane.loop);
	release(&gate);
	bench_close(&lane.bench);
	close(lane.kick);
	gate_destroy(&gate);
}

int main(void)
{
	full_counter();
	prompt();
	for (int mode = 0; mode < 4; mode++) {
		lanes(mode & 1, mode & 2, 50000, 0);
		lanes(mode & 1, mode & 2, 20000, UINT64_C(0x9e3779b97f4a7c15));
		lanes(mode & 1, mode & 2, 0, UINT64_C(0x9e3779b97f4a7c15));
	}
	return 0;
}
