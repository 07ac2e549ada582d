// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * load: what all load generators share - time, when to go on, kicks, sleeping until the device calls.
 *
 * Rule: a generator drives the driver's end of rings and knows no device's home. A call runs for a slice of time at most
 * and says how it stands; whoever calls looks after the device in between, and stops by `stopping`.
 * Synchronization: one thread per generator, to which its queues belong for as long as it lives. No call allocates, but
 * for init.
 */
#ifndef VDPA_BRIDGE_LOAD_H
#define VDPA_BRIDGE_LOAD_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "histogram.h"
#include "virtqueue.h"
#include "vq_poll.h"

enum load_state {
	LOAD_MORE, /* the slice is over */
	LOAD_DONE, /* all that was wanted came back */
	LOAD_SILENT, /* nothing came back for `patience` */
	LOAD_BROKEN, /* a ring is: see its fault */
	LOAD_FAILED, /* a request failed, or has wrong data: see the generator */
	LOAD_ERRNO, /* a system call failed, as errno says */
};

/* Nothing of it is owned. */
struct load_ring {
	struct vq_driver *vq;
	int kick, call; /* eventfds */
	void *doorbell; /* where to kick instead, or NULL */
	uint16_t index;
};

struct load_pace {
	uint64_t interval; /* nanoseconds from one to the next; 0: as fast as the device takes them */
	uint64_t next; /* when the next one is due */
	uint64_t goal; /* how many in all; 0: until stopped */
	uint64_t patience; /* nanoseconds without anything coming back, while something is with the device */
	struct vq_poll poll; /* how long to look at the ring before sleeping */
	_Atomic bool stopping; /* start nothing new */
};

static inline uint64_t load_now(void)
{
	return vq_poll_clock();
}

/* How many of at most `most` may start, of which `started` did before. */
static inline uint64_t load_due(const struct load_pace *pace, uint64_t now, uint64_t started, uint64_t most)
{
	uint64_t left = pace->goal ? pace->goal - started : UINT64_MAX;

	if (pace->stopping)
		return 0;
	most = most < left ? most : left;
	if (pace->interval) {
		uint64_t late = now >= pace->next ? (now - pace->next) / pace->interval + 1 : 0;

		most = most < late ? most : late;
	}
	return most;
}

/* Shows the device what was added, and kicks it if it waits for that. LOAD_MORE, or what went wrong. */
enum load_state load_publish(const struct load_ring *ring);

/*
 * Asks `count` rings for calls and sleeps until one comes or `until`. Returns at once when something is there already, or when it
 * is better to look again. `now` is the clock's, and is again afterwards.
 */
enum load_state load_sleep(struct load_pace *pace, const struct load_ring *rings, uint32_t count, uint64_t *now, uint64_t until);

static inline uint64_t load_random(uint64_t *state) /* xorshift64*; the state is not 0 */
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return *state * UINT64_C(2685821657736338717);
}

/* Below `bound`, without a division. */
static inline uint64_t load_below(uint64_t *state, uint64_t bound)
{
	return (uint64_t)(((unsigned __int128)load_random(state) * bound) >> 64);
}

#endif
