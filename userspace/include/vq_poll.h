// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * vq_poll: looking at a device's rings for a while before sleeping, as a wake-up costs far more than a look.
 *
 * Rule: never longer than the budget, and less the less it helps: the window halves each time nothing came in it, and doubles
 * when something did, or came so soon after going to sleep that it would have.
 */
#ifndef VDPA_BRIDGE_VQ_POLL_H
#define VDPA_BRIDGE_VQ_POLL_H

#include "virtqueue.h"

enum { VQ_POLL_MAX = 64 }; /* queues; others are not looked at */

struct vq_poll {
	uint64_t budget; /* nanoseconds */
	uint64_t window; /* of it, for the next time */
};

static inline struct vq_poll vq_poll_begin(uint64_t budget)
{
	return (struct vq_poll){ .budget = budget, .window = budget };
}

/*
 * Spins until one of the queues has a chain. All have kicks enabled before and after; those that hold chains already, which
 * their device has left there, are not looked at. A bit for each queue to be looked at now, because of a chain or a fault.
 */
uint64_t vq_poll_look(struct vq_poll *poll, struct vq_device *const *queues, size_t count);

/* A kick came after sleeping so long. */
void vq_poll_slept(struct vq_poll *poll, uint64_t nanoseconds);

#endif
