// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* The loop: turns while there is work, a look around for a while, sleep. */
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "engine.h"

enum { EVENTS = 32, LOOK_OUT = 64 };

#define WAKE UINT64_MAX

bool engine_push(struct engine_ring *ring, const struct vq_used *done, size_t count)
{
	int due = vq_device_push(ring->vq, done, count);

	ring->due |= due > 0;
	return due >= 0;
}

void engine_put_back(struct engine_ring *ring, size_t first, size_t count)
{
	uint16_t heads[ENGINE_BATCH];

	for (size_t i = 0; i < count; i++)
		heads[i] = ring->chains[first + i].head;
	(void)vq_device_put_back(ring->vq, heads, count); /* they are in flight, just popped */
}

int engine_arm(struct engine *engine)
{
	int more = 0;

	for (size_t i = 0; i < ENGINE_RINGS; i++) {
		int result = engine->rings[i].vq ? vq_device_enable_kick(engine->rings[i].vq) : 0;

		if (result < 0)
			return result;
		more |= result;
	}
	return more;
}

void engine_disarm(struct engine *engine)
{
	for (size_t i = 0; i < ENGINE_RINGS; i++)
		if (engine->rings[i].vq)
			vq_device_disable_kick(engine->rings[i].vq);
}

static int watch(struct loop *loop, int fd, uint32_t events, uint64_t data)
{
	struct epoll_event event = { .events = events, .data = { .u64 = data } };

	return epoll_ctl(loop->epoll, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

int loop_init(struct loop *loop, struct gate *gate, uint64_t budget)
{
	int error;

	memset(loop, 0, sizeof(*loop));
	loop->gate = gate;
	loop->poll = vq_poll_begin(budget);
	loop->epoll = epoll_create1(EPOLL_CLOEXEC);
	loop->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	error = loop->epoll < 0 || loop->wake < 0 ? -errno : watch(loop, loop->wake, EPOLLIN | EPOLLET, WAKE);
	gate_join(gate, &loop->member);
	if (error)
		loop_destroy(loop);
	return error;
}

void loop_destroy(struct loop *loop)
{
	gate_quit(loop->gate, &loop->member);
	if (loop->epoll >= 0)
		close(loop->epoll);
	if (loop->wake >= 0)
		close(loop->wake);
}

static uint32_t slot_of(const struct loop *loop, const struct engine *engine)
{
	uint32_t at = 0;

	while (at < loop->count && loop->engines[at] != engine)
		at++;
	return at;
}

static uint32_t events_of(const struct engine *engine)
{
	return EPOLLIN | EPOLLET | (engine->writes ? (uint32_t)EPOLLOUT : 0);
}

int loop_add(struct loop *loop, struct engine *engine)
{
	uint32_t at = slot_of(loop, NULL);
	int error;

	if (at == LOOP_ENGINES)
		return -ENOSPC;
	error = engine->fd < 0 ? 0 : watch(loop, engine->fd, events_of(engine), at);
	if (error)
		return error;
	loop->engines[at] = engine;
	loop->count += at == loop->count;
	loop_look(loop, engine);
	return 0;
}

void loop_remove(struct loop *loop, struct engine *engine)
{
	uint32_t at = slot_of(loop, engine);

	if (at == loop->count)
		return;
	if (engine->fd >= 0)
		loop_unwatch(loop, engine->fd);
	loop->engines[at] = NULL;
}

int loop_refit(struct loop *loop, struct engine *engine, int fd)
{
	uint32_t at = slot_of(loop, engine);

	if (at != loop->count && engine->fd >= 0)
		loop_unwatch(loop, engine->fd);
	engine->fd = fd;
	return at == loop->count || fd < 0 ? 0 : watch(loop, fd, events_of(engine), at);
}

int loop_watch(struct loop *loop, struct engine *engine, int kick)
{
	return watch(loop, kick, EPOLLIN | EPOLLET, slot_of(loop, engine));
}

void loop_unwatch(struct loop *loop, int kick)
{
	(void)epoll_ctl(loop->epoll, EPOLL_CTL_DEL, kick, NULL);
}

/* From now on the loop looks at it, without being told. */
static void heat(struct engine *engine)
{
	if (engine->hot)
		return;
	engine->ops->disarm(engine);
	engine->hot = true;
}

void loop_look(struct loop *loop, struct engine *engine)
{
	uint64_t one = 1;

	if (engine) {
		engine->asks = false;
		heat(engine);
	}
	(void)!write(loop->wake, &one, sizeof(one)); /* full: there is an event waiting */
}

/* Makes hot what events belong to; whether there was any. */
static bool take(struct loop *loop, const struct epoll_event *events, int count)
{
	bool found = false;

	for (int i = 0; i < count; i++) {
		uint64_t slot = events[i].data.u64;
		struct engine *engine = slot < loop->count ? loop->engines[slot] : NULL;

		/* An event of an engine that has gone is taken for one of its successor's, which looks once in vain. */
		if (slot == WAKE) {
			uint64_t value;

			(void)!read(loop->wake, &value, sizeof(value));
		} else if (engine && !engine->asks) {
			heat(engine);
			found = true;
		}
	}
	return found;
}

/* Takes events that are there already. */
static void look_out(struct loop *loop)
{
	struct epoll_event events[EVENTS];

	(void)take(loop, events, epoll_wait(loop->epoll, events, EVENTS, 0));
}

/* Waits for events. Outside of the gate when it may: nothing is in flight. */
static void rest(struct loop *loop, bool outside)
{
	struct epoll_event events[EVENTS];
	uint64_t began = vq_poll_clock(), slept;
	int count;

	if (outside)
		gate_leave(loop->gate);
	count = epoll_wait(loop->epoll, events, EVENTS, -1);
	slept = vq_poll_clock() - began;
	if (outside)
		gate_enter(loop->gate);
	if (take(loop, events, count))
		vq_poll_slept(&loop->poll, slept);
}

static void signal_due(struct loop *loop, struct engine *engine)
{
	for (size_t i = 0; i < ENGINE_RINGS; i++) {
		struct engine_ring *ring = &engine->rings[i];

		if (ring->due && ring->call >= 0)
			gate_signal(&loop->member, ring->call);
		ring->due = false;
	}
}

/* Steps aside for whoever wants the gate. */
static void step_aside(struct loop *loop)
{
	for (uint32_t i = 0; i < loop->count; i++) {
		struct engine *engine = loop->engines[i];

		if (engine && engine->in_flight) {
			engine->ops->drain(engine);
			signal_due(loop, engine);
		}
	}
	gate_leave(loop->gate);
	gate_enter(loop->gate);
}

/* What a round over all engines found. */
struct round {
	struct engine *asks;
	bool hot, cold, moved, in_flight;
};

static struct round turn_all(struct loop *loop)
{
	struct round round = { .asks = NULL };

	for (uint32_t i = 0; i < loop->count && !round.asks; i++) {
		struct engine *engine = loop->engines[i];
		int result;

		if (!engine)
			continue;
		if (!engine->hot) {
			round.cold = true;
			round.in_flight |= engine->in_flight != 0;
			continue;
		}
		result = engine->ops->turn(engine);
		signal_due(loop, engine);
		round.hot = true;
		round.moved |= (result & TURN_MOVED) != 0;
		round.in_flight |= engine->in_flight != 0;
		if (result & TURN_ASKS)
			round.asks = engine;
	}
	return round;
}

/* Lets hot engines wait for events, unless there is work already. */
static struct round cool(struct loop *loop)
{
	struct round round = { .asks = NULL };

	for (uint32_t i = 0; i < loop->count && !round.asks; i++) {
		struct engine *engine = loop->engines[i];
		int more;

		if (!engine)
			continue;
		round.in_flight |= engine->in_flight != 0;
		if (!engine->hot)
			continue;
		engine->hot = false;
		more = engine->ops->arm(engine);
		if (more < 0) {
			round.asks = engine;
		} else if (more) {
			heat(engine);
			round.hot = true;
		}
	}
	return round;
}

struct engine *loop_run(struct loop *loop)
{
	struct engine *asks = NULL;
	uint32_t turns = 0;
	bool worked = false;

	gate_enter(loop->gate);
	while (!loop->closing) {
		struct round round = { .asks = NULL };

		if (gate_wanted(loop->gate)) {
			step_aside(loop);
			continue;
		}
		if (!loop->paused)
			round = turn_all(loop);
		if ((asks = round.asks))
			break;
		if (round.moved) {
			vq_poll_found(&loop->poll);
			worked = true;
		} else if (round.hot && !(worked && vq_poll_again(&loop->poll, vq_poll_clock()))) {
			round = cool(loop);
			if ((asks = round.asks))
				break;
		}
		if (!round.hot) {
			rest(loop, !round.in_flight);
			worked = false;
		} else if (round.cold && ++turns % LOOK_OUT == 0) {
			look_out(loop);
		}
	}
	if (asks) {
		asks->hot = false;
		asks->asks = true;
	}
	gate_leave(loop->gate);
	return asks;
}
