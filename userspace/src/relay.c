// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* Nothing here touches a ring or its data: both ends do, with their own barriers. */
#include "relay.h"

#include <stdlib.h>

#include "device_end.h"

enum { ROUND = 256 }; /* chains each way before other rings have their turn */

int relay_init(struct relay *relay, struct vq_device *from, struct vq_driver *to, const struct iova_map *places)
{
	size_t most = from->config.num > VQ_INDIRECT_MAX ? from->config.num : VQ_INDIRECT_MAX;

	memset(relay, 0, sizeof(*relay));
	if (to->config.num < from->config.num)
		return -EINVAL;
	relay->from = from;
	relay->to = to;
	relay->places = places;
	relay->pieces.capacity = 2 * most; /* a chain of any length, though some of its buffers lie across two regions */
	relay->pieces.iov = calloc(relay->pieces.capacity, sizeof(*relay->pieces.iov));
	relay->pieces.iova = calloc(relay->pieces.capacity, sizeof(*relay->pieces.iova));
	relay->buffers = calloc(relay->pieces.capacity, sizeof(*relay->buffers));
	relay->order = calloc(from->config.num, sizeof(*relay->order));
	if (relay->pieces.iov && relay->pieces.iova && relay->buffers && relay->order)
		return 0;
	relay_destroy(relay);
	return -ENOMEM;
}

void relay_destroy(struct relay *relay)
{
	free(relay->pieces.iov);
	free(relay->pieces.iova);
	free(relay->buffers);
	free(relay->order);
	memset(relay, 0, sizeof(*relay));
}

/* Hands chains back; a set of relay_due or -EPROTO. */
static int give_back(struct relay *relay, const struct vq_used *done, size_t count)
{
	int due;

	if (!count)
		return 0;
	for (size_t i = 0; i < count; i++) {
		uint64_t end = relay->order[done[i].head] + 1;

		relay->furthest = end > relay->furthest ? end : relay->furthest;
	}
	due = vq_device_push(relay->from, done, count);
	if (due < 0)
		return -EPROTO;
	relay->pushed += count;
	return RELAY_MOVED | (due ? RELAY_CALL : 0);
}

static int take_back(struct relay *relay)
{
	struct vq_done done[RELAY_BATCH];
	struct vq_used used[RELAY_BATCH];
	int due = 0;

	for (size_t round = 0; round < ROUND; round += RELAY_BATCH) {
		size_t count = vq_driver_reap(relay->to, done, RELAY_BATCH);
		int more;

		for (size_t i = 0; i < count; i++)
			used[i] = (struct vq_used){ .written = done[i].written, .head = (uint16_t)done[i].token };
		more = give_back(relay, used, count);
		if (more < 0 || relay->to->fault.code != VQ_OK)
			return -EPROTO;
		due |= more;
		if (count < RELAY_BATCH)
			break;
	}
	return due;
}

/* The buffers of a chain as the device has them. */
static bool relocate(struct relay *relay, const struct vq_chain *chain, size_t count)
{
	struct iovec iov;

	for (size_t i = 0; i < count; i++) {
		const struct iovec *piece = &chain->iov[i];
		struct iova_pieces one = { .iov = &iov, .capacity = 1 };
		uint64_t at = relay->pieces.iova[piece - relay->pieces.iov];

		if (iova_translate(relay->places, &relay->hint, at, piece->iov_len,
				   i < chain->readable_pieces ? IOVA_RO : IOVA_WO, &one))
			return device_fault(relay->from, VQ_CHAIN_UNMAPPED, chain->head, at);
		relay->buffers[i] = (struct vq_buffer){ .iova = (uintptr_t)iov.iov_base, .length = (uint32_t)iov.iov_len };
	}
	return true;
}

/* Posts the chain in hand. RELAY_AGAIN: done; 0: the device's ring is full; or another relay_due, or -EPROTO. */
static int post(struct relay *relay)
{
	const struct vq_chain *chain = &relay->chains[relay->at];
	size_t count = (size_t)chain->readable_pieces + chain->writable_pieces;
	int due = RELAY_AGAIN, head;

	if (!count) { /* nothing in it that a device could be told of */
		int given = give_back(relay, &(struct vq_used){ .written = 0, .head = chain->head }, 1);

		if (given < 0)
			return given;
		due |= given;
	} else {
		if (!relocate(relay, chain, count))
			return -EPROTO;
		head = vq_driver_add(relay->to, relay->buffers, chain->readable_pieces, chain->writable_pieces, chain->head);
		if (head == -ENOSPC)
			return 0;
		if (head == -EINVAL)
			device_fault(relay->from, VQ_CHAIN_LONG, chain->head, relay->to->config.num);
		if (head < 0)
			return -EPROTO;
	}
	relay->at++;
	return due;
}

/* Fills the hand; how many chains there are. */
static size_t pop(struct relay *relay)
{
	relay->pieces.used = relay->at = 0;
	relay->count = vq_device_pop(relay->from, relay->chains, RELAY_BATCH, &relay->pieces);
	for (size_t i = 0; i < relay->count; i++)
		relay->order[relay->chains[i].head] = relay->popped++;
	return relay->count;
}

/* A set of relay_due or -EPROTO; *full when the device's ring has no room for what is in hand. */
static int take(struct relay *relay, bool *full)
{
	int due = 0, error = 0, kick;

	for (size_t posted = 0; posted < ROUND && !*full; posted++) {
		int result;

		if (relay->at == relay->count && !pop(relay))
			break;
		result = post(relay);
		if (result < 0) {
			error = result;
			break;
		}
		*full = !result;
		due |= result & ~RELAY_AGAIN;
	}
	kick = vq_driver_publish(relay->to);
	if (error || kick < 0 || relay->from->fault.code != VQ_OK)
		return -EPROTO;
	return due | (kick ? RELAY_KICK : 0);
}

int relay_move(struct relay *relay, bool taking)
{
	bool full = false;
	int back, forth = 0, more;

	vq_driver_disable_call(relay->to);
	back = take_back(relay);
	if (back < 0)
		return back;
	if (taking) {
		vq_device_disable_kick(relay->from);
		forth = take(relay, &full);
		if (forth < 0)
			return forth;
		if (!full) { /* else the device's next call comes first */
			more = relay->at < relay->count ? 1 : vq_device_enable_kick(relay->from);
			if (more < 0)
				return more;
			forth |= more ? RELAY_AGAIN : 0;
		}
	}
	more = vq_driver_enable_call(relay->to);
	if (more < 0)
		return more;
	return back | forth | (more ? RELAY_AGAIN : 0);
}

uint64_t relay_open(const struct relay *relay)
{
	return relay->popped - relay->pushed;
}

bool relay_base(const struct relay *relay, uint32_t *base)
{
	const struct vq_device *from = relay->from;
	uint32_t num = from->config.num;
	uint16_t cursor = from->next_avail;

	if (!from->config.packed) {
		*base = (uint16_t)(cursor - from->in_flight);
	} else { /* two laps less what is taken: backwards by what is taken */
		cursor = cursor_advance(cursor_advance(cursor, num, num), num - from->taken, num);
		*base = (uint32_t)from->used_idx << 16 | cursor;
	}
	return relay->furthest == relay->pushed;
}
