// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* A turn takes a batch of sent frames, as many receive buffers as it needs, and hands both back at once. */
#include "net_engine.h"

#include <string.h>

#include "chain.h"

enum { RX, TX, GROUP = 1, NUM_BUFFERS = 10, FRAME = 60 };

static struct chain_part readable(const struct vq_chain *chain)
{
	return (struct chain_part){ chain->iov, chain->readable_pieces };
}

static struct chain_part writable(const struct vq_chain *chain)
{
	return (struct chain_part){ chain->iov + chain->readable_pieces, chain->writable_pieces };
}

/* Whether a frame comes back. Its address is read once. */
static bool accepted(const struct net_engine *net, struct chain_part frame)
{
	uint8_t to[6];

	if (!net->used || net->kind > NET_ECHO)
		return false;
	if (net->kind == NET_ECHO)
		return true;
	if (frame.count && frame.iov->iov_len >= net->header + sizeof(to))
		memcpy(to, (const uint8_t *)frame.iov->iov_base + net->header, sizeof(to));
	else if (chain_gather(frame, net->header, to, sizeof(to)) != sizeof(to))
		return false;
	return to[0] & GROUP || memcmp(to, net->mac, sizeof(to)) == 0;
}

/* One frame into one buffer; the bytes written. */
static uint32_t give(const struct net_engine *net, struct chain_part frame, struct chain_part buffer)
{
	uint64_t longest = net->kind == NET_LOOP ? NET_LONGEST : UINT32_MAX, length;

	if (frame.count == 1 && buffer.count == 1) {
		length = frame.iov->iov_len < longest ? frame.iov->iov_len : longest;
		length = buffer.iov->iov_len < length ? buffer.iov->iov_len : length;
		memmove(buffer.iov->iov_base, frame.iov->iov_base, length); /* a driver may give the same memory for both */
	} else {
		length = chain_copy(buffer, 0, frame, 0, longest);
	}
	if (net->kind == NET_ECHO && net->header > NUM_BUFFERS) { /* a receiver's header says 1: virtio 1.2, 5.1.6.4.1 */
		static const uint8_t one[2] = { 1, 0 };

		if (buffer.count && buffer.iov->iov_len >= NUM_BUFFERS + sizeof(one))
			memcpy((uint8_t *)buffer.iov->iov_base + NUM_BUFFERS, one, sizeof(one));
		else
			(void)chain_scatter(buffer, NUM_BUFFERS, one, sizeof(one));
	}
	return (uint32_t)length;
}

static bool broken(const struct engine_ring *ring)
{
	return ring->vq && ring->vq->fault.code != VQ_OK;
}

static int exchange(struct net_engine *net, struct engine_ring *rx, struct engine_ring *tx)
{
	size_t count, wanted = 0, room;
	uint16_t which[ENGINE_BATCH];

	tx->pieces->used = 0;
	count = vq_device_pop(tx->vq, tx->chains, ENGINE_BATCH, tx->pieces);
	for (size_t i = 0; i < count; i++) {
		tx->done[i] = (struct vq_used){ .written = 0, .head = tx->chains[i].head };
		which[wanted] = (uint16_t)i;
		wanted += accepted(net, readable(&tx->chains[i]));
	}
	if (wanted) {
		rx->pieces->used = 0;
		room = vq_device_pop(rx->vq, rx->chains, wanted, rx->pieces);
		for (size_t i = 0; i < room; i++)
			net->received[i] = (struct vq_used){
				.written = give(net, readable(&tx->chains[which[i]]), writable(&rx->chains[i])),
				.head = rx->chains[i].head
			};
		if (room)
			(void)engine_push(rx, net->received, room);
	}
	if (count)
		(void)engine_push(tx, tx->done, count);
	return count ? TURN_MOVED : TURN_IDLE;
}

/* To everybody, of an experimental type. */
static int fill(struct net_engine *net, struct engine_ring *rx)
{
	uint8_t frame[12 + FRAME] = { 0 }, *ethernet = frame + net->header;
	size_t count;

	memset(ethernet, 0xff, 6);
	memcpy(ethernet + 6, net->mac, 6);
	ethernet[12] = 0x88;
	ethernet[13] = 0xb5;
	if (net->header > NUM_BUFFERS)
		frame[NUM_BUFFERS] = 1;
	rx->pieces->used = 0;
	count = vq_device_pop(rx->vq, rx->chains, ENGINE_BATCH, rx->pieces);
	for (size_t i = 0; i < count; i++)
		net->received[i] = (struct vq_used){
			.written = (uint32_t)chain_scatter(writable(&rx->chains[i]), 0, frame, net->header + FRAME),
			.head = rx->chains[i].head
		};
	if (count)
		(void)engine_push(rx, net->received, count);
	return count ? TURN_MOVED : TURN_IDLE;
}

static int net_turn(struct engine *engine)
{
	struct net_engine *net = (struct net_engine *)engine;
	struct engine_ring *rx = &engine->rings[RX], *tx = &engine->rings[TX];
	int turn = TURN_IDLE;

	if (rx->vq && tx->vq)
		turn |= exchange(net, rx, tx);
	if (rx->vq && tx->vq && net->used && net->kind == NET_SOURCE)
		turn |= fill(net, rx);
	return turn | (broken(rx) || broken(tx) ? TURN_ASKS : 0);
}

/* Receive buffers alone start nothing, but where they are filled. */
static int net_arm(struct engine *engine)
{
	const struct net_engine *net = (struct net_engine *)engine;

	if (!engine->rings[RX].vq || !engine->rings[TX].vq)
		return 0;
	return net->kind == NET_SOURCE ? engine_arm(engine) : vq_device_enable_kick(engine->rings[TX].vq);
}

static const struct engine_ops operations = { .turn = net_turn, .arm = net_arm, .disarm = engine_disarm };

void net_engine_init(struct net_engine *net, enum net_kind kind)
{
	memset(net, 0, sizeof(*net));
	net->engine = (struct engine){ .ops = &operations, .fd = -1 };
	net->kind = kind;
}
