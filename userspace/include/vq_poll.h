// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * vq_poll: looking for work for a while before sleeping, as a wake-up costs far more than a look.
 *
 * Rule: never longer than the budget, and less the less it helps: the window halves each time nothing came in it, and is left
 * out for 2, 4, 8 ... sleeps (whoever shares the CPU can bring nothing meanwhile); it doubles when something did come, or came
 * so soon after going to sleep that it would have.
 */
#ifndef VDPA_BRIDGE_VQ_POLL_H
#define VDPA_BRIDGE_VQ_POLL_H

#include "gate.h"
#include "virtqueue.h"

enum { VQ_POLL_MAX = 64 }; /* queues; others are not looked at */

#define VQ_POLL_ALWAYS UINT64_MAX /* a budget: never sleep */

struct vq_poll {
	uint64_t budget; /* nanoseconds */
	uint64_t window; /* of it, for the next time */
	uint64_t since; /* when looking began, or 0 */
	uint32_t vain; /* how often in a row nothing came */
	uint32_t rest; /* sleeps before looking is tried again */
};

static inline struct vq_poll vq_poll_begin(uint64_t budget)
{
	return (struct vq_poll){ .budget = budget, .window = budget };
}

/* For who looks by turns of its own: this one brought nothing, by the clock. Whether to look again; else sleep, or whatever else. */
bool vq_poll_again(struct vq_poll *poll, uint64_t now);

/* Nanoseconds of the clock in question. */
uint64_t vq_poll_clock(void);

/* What came after a look in vain; see vq_poll_found. */
void vq_poll_came(struct vq_poll *poll);

/* This turn brought something. */
static inline void vq_poll_found(struct vq_poll *poll)
{
	if (poll->since)
		vq_poll_came(poll);
}

/* Work came after sleeping so long. */
void vq_poll_slept(struct vq_poll *poll, uint64_t nanoseconds);

/*
 * For who has nothing but rings to look at, and holds the gate: spins until one of the queues has a chain, somebody waits for the
 * gate, or the window is over. All have kicks enabled before and after; those that hold chains already, which their device
 * has left there, are not looked at. A bit for each queue to be looked at now, because of a chain or a fault.
 */
uint64_t vq_poll_look(struct vq_poll *poll, const struct gate *gate, struct vq_device *const *queues, size_t count);

#endif
