// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* A turn receives a batch of frames, then sends one: a queue of the tap that comes into use is there for both. */
#include "tap_engine.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>

#include "chain.h"

enum { RX, TX, NUM_BUFFERS = 10, MOST_PIECES = 1024 /* IOV_MAX */, STEP = 8 /* buffers popped at once */ };

/* Receive buffers that were popped: those before `first` are used. */
struct hand {
	size_t first, count;
};

static struct chain_part writable(const struct vq_chain *chain)
{
	return (struct chain_part){ chain->iov + chain->readable_pieces, chain->writable_pieces };
}

static bool broken(const struct engine_ring *ring)
{
	return ring->vq && ring->vq->fault.code != VQ_OK;
}

/* A transfer failed: whether its owner has to hear of that. */
static bool fails(struct tap_engine *tap, int error)
{
	bool gone = error == EBADFD || error == EBADF || error == ENODEV;

	if (tap->failed && !gone)
		return false;
	tap->failed = true;
	tap->failure = error;
	return true;
}

static bool waiting(struct engine_ring *ring)
{
	ring->pieces->used = 0;
	if (!vq_device_pop(ring->vq, ring->chains, 1, ring->pieces))
		return false;
	engine_put_back(ring, 0, 1);
	return true;
}

/* ---- from the driver ---- */

/* Writes a frame whose pieces are more than one call takes, from memory that nobody else has. */
static __attribute__((noinline)) ssize_t write_copy(int fd, uint8_t *header, struct chain_part pieces, uint64_t skip, uint64_t length)
{
	uint8_t frame[NET_LARGEST];
	struct iovec iov[2] = { { header, NET_HEADER }, { frame, (size_t)length } };

	(void)chain_gather(pieces, skip, frame, length);
	return writev(fd, iov, 2);
}

static ssize_t write_frame(int fd, uint8_t *header, struct chain_part pieces, uint64_t skip, uint64_t length)
{
	struct iovec iov[MOST_PIECES];
	size_t count = 0, skipped = (size_t)skip;
	ssize_t done;

	iov[count++] = (struct iovec){ header, NET_HEADER };
	for (size_t i = 0; i < pieces.count && count < MOST_PIECES; i++) {
		const struct iovec *piece = &pieces.iov[i];

		if (skipped < piece->iov_len)
			iov[count++] = (struct iovec){ (uint8_t *)piece->iov_base + skipped, piece->iov_len - skipped };
		skipped -= skipped < piece->iov_len ? skipped : piece->iov_len;
	}
	do
		done = pieces.count >= MOST_PIECES ? write_copy(fd, header, pieces, skip, length) : writev(fd, iov, (int)count);
	while (done < 0 && errno == EINTR);
	return done;
}

/* Sends one frame. TURN_IDLE when the tap is full and it was not taken; TURN_ASKS when it failed in a new way. */
static int send_frame(struct tap_engine *tap, const struct vq_chain *chain)
{
	struct chain_part pieces = { chain->iov, chain->readable_pieces };
	uint8_t header[NET_HEADER] = { 0 };
	uint64_t length = chain->readable - tap->header;
	ssize_t done;

	if (chain->readable < tap->header || length > NET_LARGEST || !tap->plugged || !tap->used)
		goto drop;
	if (chain_gather(pieces, 0, header, tap->header) != tap->header || !net_header_agreed(header, length, &tap->from_driver))
		goto drop;
	errno = ENETDOWN;
	done = tap->engine.fd < 0 ? -1 : write_frame(tap->engine.fd, header, pieces, tap->header, length);
	if (done < 0 && errno == EAGAIN)
		return TURN_IDLE;
	tap->sent.frames++;
	tap->sent.large += net_header_large(header);
	if (done >= 0)
		return TURN_MOVED;
	tap->lost++;
	return fails(tap, errno) ? TURN_MOVED | TURN_ASKS : TURN_MOVED;
drop:
	tap->sent.dropped++;
	return TURN_MOVED;
}

static int transmit(struct tap_engine *tap, struct engine_ring *tx)
{
	int turn = TURN_MOVED;
	size_t count, i;

	tap->blocked = false;
	tx->pieces->used = 0;
	count = vq_device_pop(tx->vq, tx->chains, ENGINE_BATCH, tx->pieces);
	if (!count)
		return TURN_IDLE;
	if (tap->fresh && tap->engine.fd < 0) {
		engine_put_back(tx, 0, count);
		return TURN_ASKS;
	}
	for (i = 0; i < count && turn == TURN_MOVED; i++) {
		turn = send_frame(tap, &tx->chains[i]);
		if (turn == TURN_IDLE)
			break;
		tx->done[i] = (struct vq_used){ .written = 0, .head = tx->chains[i].head };
	}
	tap->blocked = turn == TURN_IDLE;
	if (i)
		(void)engine_push(tx, tx->done, i);
	if (i < count)
		engine_put_back(tx, i, count - i);
	return i ? TURN_MOVED | turn : turn;
}

/* ---- to the driver ---- */

/* Pops until there is room for `bytes`, or no more to be had; how much there is. */
static uint64_t take(struct engine_ring *rx, struct hand *hand, uint64_t bytes)
{
	uint64_t room = 0;

	for (size_t i = hand->first; i < hand->count; i++)
		room += rx->chains[i].writable;
	while (room < bytes && hand->count < ENGINE_BATCH) {
		size_t left = ENGINE_BATCH - hand->count;
		size_t got = vq_device_pop(rx->vq, rx->chains + hand->count, left < STEP ? left : STEP, rx->pieces);

		for (size_t i = 0; i < got; i++)
			room += rx->chains[hand->count + i].writable;
		hand->count += got;
		if (!got)
			break;
	}
	return room;
}

static void give_back(struct engine_ring *rx, struct hand *hand)
{
	if (hand->count > hand->first)
		engine_put_back(rx, hand->first, hand->count - hand->first);
	hand->count = hand->first;
}

/* How many buffers in hand a packet of so many bytes takes; 0: more than there are. */
static size_t buffers_for(const struct engine_ring *rx, const struct hand *hand, uint64_t size)
{
	uint64_t room = 0;

	for (size_t i = hand->first; i < hand->count; i++) {
		room += rx->chains[i].writable;
		if (room >= size)
			return i - hand->first + 1;
	}
	return 0;
}

/* Puts bytes into `count` chains, `offset` bytes behind the beginning of the first one. */
static void spread(const struct engine_ring *rx, size_t first, size_t count, uint64_t offset, const uint8_t *from, uint64_t length)
{
	for (size_t i = first; i < first + count && length; i++) {
		const struct vq_chain *chain = &rx->chains[i];
		uint64_t here;

		if (offset >= chain->writable) {
			offset -= chain->writable;
			continue;
		}
		here = chain_scatter(writable(chain), offset, from, length);
		offset = 0;
		from += here;
		length -= here;
	}
}

/* What one read goes into. */
struct layout {
	struct iovec iov[MOST_PIECES];
	size_t count;
	uint64_t direct; /* bytes of the frame that lie in buffers in hand; others are in the engine's memory, as far behind its beginning */
};

/* Behind `header`, buffers in hand up to `reach` bytes of the frame (all of one, unless they merge), and the engine's memory. */
static void lay_out(struct tap_engine *tap, const struct engine_ring *rx, const struct hand *hand, uint8_t *header, struct layout *to)
{
	size_t skip = tap->header, end = tap->merge ? hand->count : hand->first + 1;

	to->iov[0] = (struct iovec){ header, NET_HEADER };
	to->count = 1;
	to->direct = 0;
	for (size_t i = hand->first; tap->plugged && i < end && (i == hand->first || to->direct < tap->reach); i++) {
		struct chain_part part = writable(&rx->chains[i]);

		for (size_t k = 0; k < part.count && to->count < MOST_PIECES - 1 && to->direct <= NET_LARGEST; k++) {
			size_t length = part.iov[k].iov_len;

			if (skip < length) {
				to->iov[to->count++] = (struct iovec){ (uint8_t *)part.iov[k].iov_base + skip, length - skip };
				to->direct += length - skip;
			}
			skip -= skip < length ? skip : length;
		}
	}
	if (to->direct <= NET_LARGEST)
		to->iov[to->count++] = (struct iovec){ tap->frame + to->direct, NET_LARGEST + 1 - (size_t)to->direct };
}

/*
 * The frame that waits, over as many buffers as it takes. They are counted, put back and popped again: what is written into the
 * first one says how many they are. False when they are too few.
 */
static bool deliver_late(struct tap_engine *tap, struct engine_ring *rx, size_t *done)
{
	uint64_t size = tap->header + tap->late, room = 0, offset = 0;
	struct vq_used *heads = rx->done + *done;
	size_t popped = 0, wanted = 0, got;
	uint16_t back[ENGINE_BATCH];

	while (room < size) {
		rx->pieces->used = 0;
		got = vq_device_pop(rx->vq, rx->chains, ENGINE_BATCH, rx->pieces);
		if (!got)
			break;
		for (size_t i = 0; i < got; i++) {
			heads[popped++].head = rx->chains[i].head;
			wanted += room < size;
			room += rx->chains[i].writable;
		}
	}
	while (popped) {
		size_t some = popped < ENGINE_BATCH ? popped : ENGINE_BATCH;

		popped -= some;
		for (size_t i = 0; i < some; i++)
			back[i] = heads[popped + i].head;
		(void)vq_device_put_back(rx->vq, back, some);
	}
	if (room < size)
		return false;
	tap->late_header[NUM_BUFFERS] = (uint8_t)wanted;
	tap->late_header[NUM_BUFFERS + 1] = (uint8_t)(wanted >> 8);
	for (size_t left = wanted; left; left -= got) {
		rx->pieces->used = 0;
		got = vq_device_pop(rx->vq, rx->chains, left < ENGINE_BATCH ? left : ENGINE_BATCH, rx->pieces);
		if (!got) /* the ring is broken by now */
			break;
		for (size_t i = 0; i < got; i++) {
			const struct vq_chain *chain = &rx->chains[i];
			struct chain_part part = writable(chain);
			uint64_t here = chain->writable < size - offset ? chain->writable : size - offset, top = 0;

			if (offset < tap->header)
				top = chain_scatter(part, 0, tap->late_header + offset,
						    here < tap->header - offset ? here : tap->header - offset);
			if (here > top)
				(void)chain_scatter(part, top, tap->frame + (offset + top - tap->header), here - top);
			rx->done[(*done)++] = (struct vq_used){ .written = (uint32_t)here, .head = chain->head };
			offset += here;
		}
	}
	tap->received.frames++;
	tap->received.large += net_header_large(tap->late_header);
	tap->late = 0;
	return true;
}

/* A packet that is there, partly in buffers in hand, goes to the driver. False when it has to wait for more of them. */
static bool deliver(struct tap_engine *tap, struct engine_ring *rx, struct hand *hand, uint8_t *header, const struct layout *laid,
		    uint64_t length, size_t *done)
{
	uint64_t size = tap->header + length, offset = 0;
	size_t count = buffers_for(rx, hand, size);

	tap->reach = length;
	if (!tap->merge && count != 1) { /* it fits no buffer that a driver without MRG_RXBUF should have given */
		tap->received.dropped++;
		return true;
	}
	if (!count) {
		(void)chain_gather((struct chain_part){ laid->iov + 1, laid->count - 1 }, 0, tap->frame,
				   length < laid->direct ? length : laid->direct);
		memcpy(tap->late_header, header, NET_HEADER);
		tap->late = length;
		give_back(rx, hand);
		if (!deliver_late(tap, rx, done))
			return false;
		*hand = (struct hand){ .first = 0 };
		rx->pieces->used = 0;
		return true;
	}
	if (length > laid->direct)
		spread(rx, hand->first, count, tap->header + laid->direct, tap->frame + laid->direct, length - laid->direct);
	header[NUM_BUFFERS] = (uint8_t)count;
	spread(rx, hand->first, count, 0, header, tap->header);
	for (size_t end = hand->first + count; hand->first < end; hand->first++) {
		const struct vq_chain *chain = &rx->chains[hand->first];
		uint64_t here = chain->writable < size - offset ? chain->writable : size - offset;

		rx->done[(*done)++] = (struct vq_used){ .written = (uint32_t)here, .head = chain->head };
		offset += here;
	}
	tap->received.frames++;
	tap->received.large += net_header_large(header);
	return true;
}

/* Whether the driver is to get a frame. */
static bool wanted(struct tap_engine *tap, uint8_t *header, const struct layout *laid, uint64_t length)
{
	uint8_t top[NET_TOP] = { 0 };

	if (!net_header_agreed(header, length, &tap->to_driver) || !tap->plugged) {
		tap->received.dropped++;
		return false;
	}
	if (tap->filter.promisc)
		return true;
	(void)chain_gather((struct chain_part){ laid->iov + 1, laid->count - 1 }, 0, top, length < NET_TOP ? length : NET_TOP);
	return net_filter_accepts(&tap->filter, top);
}

/* Reads up to a batch; *done counts buffers to be handed back. */
static int read_frames(struct tap_engine *tap, struct engine_ring *rx, size_t *done)
{
	struct hand hand = { .first = 0 };
	int turn = TURN_IDLE;
	struct layout laid;

	rx->pieces->used = 0;
	for (int i = 0; i < ENGINE_BATCH; i++) {
		uint64_t reach = tap->header + (tap->merge ? tap->reach : 0), room = take(rx, &hand, reach);
		uint8_t header[NET_HEADER];
		ssize_t got;

		tap->starved = hand.first == hand.count;
		if (tap->starved || (hand.first && tap->merge && room < reach)) /* a fresh hand will have room for more */
			break;
		lay_out(tap, rx, &hand, header, &laid);
		do
			got = readv(tap->engine.fd, laid.iov, (int)laid.count);
		while (got < 0 && errno == EINTR);
		if (got < 0) { /* EIO: the interface is down */
			if ((errno == EBADFD || errno == EBADF || errno == ENODEV) && fails(tap, errno))
				turn |= TURN_ASKS;
			break;
		}
		turn |= TURN_MOVED;
		if (got < NET_HEADER + NET_SHORTEST || got > NET_HEADER + NET_LARGEST)
			continue;
		if (wanted(tap, header, &laid, (uint64_t)got - NET_HEADER) &&
		    !deliver(tap, rx, &hand, header, &laid, (uint64_t)got - NET_HEADER, done)) {
			tap->starved = true;
			break;
		}
	}
	give_back(rx, &hand);
	return turn;
}

static int receive(struct tap_engine *tap, struct engine_ring *rx)
{
	int turn = TURN_IDLE;
	size_t done = 0;

	if (tap->fresh || tap->engine.fd < 0) {
		tap->starved = !waiting(rx);
		return tap->starved ? TURN_IDLE : TURN_ASKS;
	}
	tap->starved = tap->late && !deliver_late(tap, rx, &done);
	if (!tap->starved && !done)
		turn = read_frames(tap, rx, &done);
	if (done) {
		(void)engine_push(rx, rx->done, done);
		turn |= TURN_MOVED;
	}
	return turn;
}

static int tap_turn(struct engine *engine)
{
	struct tap_engine *tap = (struct tap_engine *)engine;
	struct engine_ring *rx = &engine->rings[RX], *tx = &engine->rings[TX];
	int turn = TURN_IDLE;

	if (rx->vq && tap->used && !tap->gone)
		turn |= receive(tap, rx);
	if (tx->vq && !(turn & TURN_ASKS))
		turn |= transmit(tap, tx);
	return turn | (broken(rx) || broken(tx) ? TURN_ASKS : 0);
}

/* Receive buffers start something only where they were too few; a full tap says itself when it is not any more. */
static int tap_arm(struct engine *engine)
{
	struct tap_engine *tap = (struct tap_engine *)engine;
	struct engine_ring *rx = &engine->rings[RX], *tx = &engine->rings[TX];
	int more = 0, result = 0;

	if (tx->vq && !tap->blocked)
		more = vq_device_enable_kick(tx->vq);
	if (more >= 0 && rx->vq && tap->used && !tap->gone && tap->starved)
		result = vq_device_enable_kick(rx->vq);
	return more < 0 || result < 0 ? -1 : more | result;
}

static const struct engine_ops operations = { .turn = tap_turn, .arm = tap_arm, .disarm = engine_disarm };

void tap_engine_init(struct tap_engine *tap)
{
	memset(tap, 0, sizeof(*tap));
	tap->engine = (struct engine){ .ops = &operations, .fd = -1, .writes = true };
	tap->fresh = true;
}

void tap_engine_forget(struct tap_engine *tap)
{
	tap->late = 0;
	tap->blocked = false;
}
