// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* The clock is read once in a while: a look at a ring takes a few nanoseconds, the clock several times as many. */
#include "vq_poll.h"

#include <time.h>

#include "device_end.h"

enum { LOOKS = 32, LEAST = 8 /* of the budget: where a window grows from */ };

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline void relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

/* Whether there is something that was not looked at. Only a hint: what follows reads it in its own order. */
static bool changed(const struct vq_device *vq)
{
	if (vq->config.packed)
		return marked(ring16_load(&packed_at(&vq->packed, vq->looked)->flags, memory_order_relaxed),
			      available_mark(vq->looked));
	return ring16_load(avail_idx(&vq->ring), memory_order_relaxed) != vq->looked;
}

static void widen(struct vq_poll *poll)
{
	uint64_t least = poll->budget / LEAST, wide = poll->window > least ? 2 * poll->window : 2 * least;

	poll->window = wide < poll->budget ? wide : poll->budget;
}

/* Spins through the window; whether one of the queues changed. */
static bool spin(const struct vq_poll *poll, struct vq_device *const *queues, size_t count)
{
	uint64_t end = now() + poll->window;

	do {
		for (int look = 0; look < LOOKS; look++) {
			for (size_t i = 0; i < count; i++)
				if (changed(queues[i]))
					return true;
			relax();
		}
	} while (now() < end);
	return false;
}

uint64_t vq_poll_look(struct vq_poll *poll, struct vq_device *const *queues, size_t count)
{
	struct vq_device *idle[VQ_POLL_MAX];
	uint64_t due = 0, bits[VQ_POLL_MAX];
	size_t watched = 0;
	bool found;

	for (size_t i = 0; i < count && i < VQ_POLL_MAX; i++) {
		if (!device_usable(queues[i]) || changed(queues[i]))
			continue;
		bits[watched] = UINT64_C(1) << i;
		idle[watched++] = queues[i];
	}
	if (!watched || !poll->window)
		return 0;
	for (size_t i = 0; i < watched; i++)
		vq_device_disable_kick(idle[i]);
	found = spin(poll, idle, watched);
	for (size_t i = 0; i < watched; i++)
		if (vq_device_enable_kick(idle[i]))
			due |= bits[i];
	if (found)
		widen(poll);
	else
		poll->window /= 2;
	return due;
}

void vq_poll_slept(struct vq_poll *poll, uint64_t nanoseconds)
{
	if (nanoseconds < poll->budget)
		widen(poll);
}
