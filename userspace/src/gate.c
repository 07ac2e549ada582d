// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * Both sides say what they do before they look at what the other one does, all sequentially consistent, so at least one
 * of them sees the other: [P] a loop that enters and a holder, [Q] a loop that waits aside and a release.
 */
#include "gate.h"

#include <errno.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { STUCK_NS = 50000000 }; /* how long a holder waits before it drains what a loop may be stuck in */

int gate_init(struct gate *gate)
{
	pthread_condattr_t attributes;
	int error;

	*gate = (struct gate){ .members = NULL };
	error = pthread_condattr_init(&attributes);
	if (error)
		return -error;
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_mutex_init(&gate->lock, NULL);
	error = pthread_cond_init(&gate->changed, &attributes);
	pthread_condattr_destroy(&attributes);
	return -error;
}

void gate_destroy(struct gate *gate)
{
	pthread_cond_destroy(&gate->changed);
	pthread_mutex_destroy(&gate->lock);
}

void gate_join(struct gate *gate, struct gate_member *member)
{
	atomic_init(&member->writing, -1);
	member->next = gate->members;
	gate->members = member;
}

void gate_quit(struct gate *gate, struct gate_member *member)
{
	struct gate_member **at = &gate->members;

	while (*at && *at != member)
		at = &(*at)->next;
	if (*at)
		*at = member->next;
}

static void wake_all(struct gate *gate)
{
	pthread_mutex_lock(&gate->lock);
	pthread_cond_broadcast(&gate->changed);
	pthread_mutex_unlock(&gate->lock);
}

void gate_leave(struct gate *gate)
{
	atomic_fetch_sub(&gate->inside, 1); /* pair [P] */
	if (atomic_load(&gate->wanted))
		wake_all(gate);
}

void gate_enter(struct gate *gate)
{
	for (;;) {
		atomic_fetch_add(&gate->inside, 1); /* pair [P] */
		if (!atomic_load(&gate->wanted))
			return;
		gate_leave(gate);
		pthread_mutex_lock(&gate->lock);
		atomic_fetch_add(&gate->aside, 1); /* pair [Q] */
		while (atomic_load(&gate->wanted))
			pthread_cond_wait(&gate->changed, &gate->lock);
		atomic_fetch_sub(&gate->aside, 1);
		pthread_mutex_unlock(&gate->lock);
	}
}

void gate_signal(struct gate_member *member, int eventfd)
{
	uint64_t one = 1;

	atomic_store_explicit(&member->writing, eventfd, memory_order_relaxed);
	while (write(eventfd, &one, sizeof(one)) < 0 && errno == EINTR)
		; /* EAGAIN: its owner made it non-blocking, and there is an event waiting */
	atomic_store_explicit(&member->writing, -1, memory_order_relaxed);
}

/* Reads what keeps a loop from going on; never waits itself, whoever else reads. The fds stay open while loops are inside. */
static void drain(struct gate *gate)
{
	for (struct gate_member *member = gate->members; member; member = member->next) {
		int fd = atomic_load_explicit(&member->writing, memory_order_relaxed);
		uint64_t count;
		struct iovec iov = { .iov_base = &count, .iov_len = sizeof(count) };

		if (fd >= 0 && preadv2(fd, &iov, 1, -1, RWF_NOWAIT) < 0)
			continue;
	}
}

bool gate_try(struct gate *gate)
{
	atomic_store(&gate->wanted, 1); /* pair [P] */
	return atomic_load(&gate->inside) == 0;
}

void gate_hold(struct gate *gate)
{
	struct timespec until;

	if (gate_try(gate))
		return;
	pthread_mutex_lock(&gate->lock);
	while (atomic_load(&gate->inside)) {
		clock_gettime(CLOCK_MONOTONIC, &until);
		until.tv_nsec += STUCK_NS;
		if (until.tv_nsec >= 1000000000) {
			until.tv_nsec -= 1000000000;
			until.tv_sec++;
		}
		if (pthread_cond_timedwait(&gate->changed, &gate->lock, &until) == ETIMEDOUT)
			drain(gate);
	}
	pthread_mutex_unlock(&gate->lock);
}

void gate_release(struct gate *gate)
{
	atomic_store(&gate->wanted, 0); /* pair [Q] */
	if (atomic_load(&gate->aside))
		wake_all(gate);
}
