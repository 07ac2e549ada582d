// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* The clock is read once in a while: a look at a ring takes a few nanoseconds, the clock several times as many. */
#include "vq_poll.h"

#include <time.h>

#include "device_end.h"

enum { LOOKS = 32, LEAST_NS = 10000 /* a window that is worth it */, MOST_VAIN = 8 };

uint64_t vq_poll_clock(void)
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
	uint64_t wide = poll->window < LEAST_NS ? LEAST_NS : poll->window;

	wide = poll->window && wide <= UINT64_MAX / 2 ? 2 * wide : wide;
	poll->window = wide < poll->budget ? wide : poll->budget;
}

static void missed(struct vq_poll *poll)
{
	poll->window /= 2;
	if (poll->window < LEAST_NS)
		poll->window = 0;
	poll->vain += poll->vain < MOST_VAIN;
	poll->rest = 1u << poll->vain;
}

void vq_poll_came(struct vq_poll *poll)
{
	poll->since = 0;
	poll->vain = poll->rest = 0;
	widen(poll);
}

bool vq_poll_again(struct vq_poll *poll, uint64_t now)
{
	uint64_t quiet = poll->since ? now - poll->since : 0;

	if (poll->rest || !poll->window)
		return false;
	poll->since = now - quiet;
	if (quiet < poll->window)
		return true;
	poll->since = 0;
	missed(poll);
	return false;
}

void vq_poll_slept(struct vq_poll *poll, uint64_t nanoseconds)
{
	if (poll->rest)
		poll->rest--;
	else if (nanoseconds < poll->budget)
		widen(poll);
}

enum outcome { VAIN, FOUND, CALLED_OFF };

/* Spins through the window. */
static enum outcome spin(const struct vq_poll *poll, const struct gate *gate, struct vq_device *const *queues, size_t count)
{
	uint64_t began = vq_poll_clock();

	do {
		for (int look = 0; look < LOOKS; look++) {
			for (size_t i = 0; i < count; i++)
				if (changed(queues[i]))
					return FOUND;
			if (gate_awaited(gate))
				return CALLED_OFF;
			relax();
		}
	} while (vq_poll_clock() - began < poll->window);
	return VAIN;
}

uint64_t vq_poll_look(struct vq_poll *poll, const struct gate *gate, struct vq_device *const *queues, size_t count)
{
	struct vq_device *idle[VQ_POLL_MAX];
	uint64_t due = 0, bits[VQ_POLL_MAX];
	enum outcome outcome;
	size_t watched = 0;

	for (size_t i = 0; i < count && i < VQ_POLL_MAX; i++) {
		if (!device_usable(queues[i]) || changed(queues[i]))
			continue;
		bits[watched] = UINT64_C(1) << i;
		idle[watched++] = queues[i];
	}
	if (!watched || !poll->window || poll->rest)
		return 0;
	for (size_t i = 0; i < watched; i++)
		vq_device_disable_kick(idle[i]);
	outcome = spin(poll, gate, idle, watched);
	for (size_t i = 0; i < watched; i++)
		if (vq_device_enable_kick(idle[i]))
			due |= bits[i];
	if (due) /* it may have come at the very end */
		vq_poll_came(poll);
	else if (outcome == VAIN)
		missed(poll);
	return due;
}
