// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* The ends of a generator's loop that talk to the kernel. */
#include "load.h"

#include <errno.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "doorbell.h"

enum { MOST_RINGS = 2 };

enum load_state load_publish(const struct load_ring *ring)
{
	int due = vq_driver_publish(ring->vq);

	if (due < 0)
		return LOAD_BROKEN;
	if (!due)
		return LOAD_MORE;
	if (ring->doorbell)
		doorbell_kick(ring->doorbell, ring->index, ring->vq);
	else if (eventfd_write(ring->kick, 1) && errno != EAGAIN) /* a full counter is a kick that waits */
		return LOAD_ERRNO;
	return LOAD_MORE;
}

static enum load_state sleep_until(struct load_pace *pace, const struct load_ring *rings, uint32_t count, uint64_t now, uint64_t until)
{
	struct pollfd waits[MOST_RINGS];
	bool more = false;
	struct timespec left;
	eventfd_t value;
	int called;

	for (uint32_t i = 0; i < count; i++) {
		int waiting = vq_driver_enable_call(rings[i].vq);

		if (waiting < 0)
			return LOAD_BROKEN;
		more |= waiting;
		waits[i] = (struct pollfd){ .fd = rings[i].call, .events = POLLIN };
	}
	if (!more && until > now) {
		left = (struct timespec){ (time_t)((until - now) / 1000000000u), (long)((until - now) % 1000000000u) };
		called = ppoll(waits, count, &left, NULL);
		if (called < 0 && errno != EINTR)
			return LOAD_ERRNO;
		if (called > 0)
			vq_poll_slept(&pace->poll, load_now() - now);
		for (uint32_t i = 0; i < count; i++)
			if (waits[i].revents && eventfd_read(waits[i].fd, &value) && errno != EAGAIN)
				return LOAD_ERRNO;
	}
	for (uint32_t i = 0; i < count; i++)
		vq_driver_disable_call(rings[i].vq);
	return LOAD_MORE;
}

enum load_state load_sleep(struct load_pace *pace, const struct load_ring *rings, uint32_t count, uint64_t *now, uint64_t until)
{
	enum load_state state;

	if (vq_poll_again(&pace->poll, *now))
		return LOAD_MORE;
	state = sleep_until(pace, rings, count, *now, until);
	*now = load_now();
	return state;
}
