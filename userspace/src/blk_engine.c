// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* One turn: what completed, then a batch of new requests, each moved at once, put in flight, or left to the owner. */
#include "blk_engine.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "chain.h"

enum { SECTOR = 512, HEADER = 16, INLINE = 8, MOST_IOVECS = 1024, LONGEST = 1 << 30 };
enum { IN = 0, OUT = 1, FLUSH = 4 }; /* virtio 1.2, 5.2.6 */
enum { OK = 0, IOERR = 1 };

/*
 * Requests per turn: few where each takes long, so that the driver is told of the first soon; and few when the ring had
 * been empty, so that a driver that looks once more before it sleeps finds something.
 */
enum { BATCH = 8, BATCH_NULL = 32, BATCH_FIRST = 2 };

struct blk_request {
	enum uring_request kind;
	uint16_t head;
	uint32_t count, length, written;
	uint64_t offset;
	uint8_t *status;
	struct iovec *iov; /* the data */
	struct iovec own[INLINE];
};

/* What became of a request. */
enum outcome { DONE, STARTED, ODD };

/* Reads a request's header once; false: not plain. The pieces are ours to change. */
static bool parse(const struct blk_engine *blk, const struct vq_chain *chain, struct blk_request *r)
{
	struct iovec *pieces = chain->iov, *writable = pieces + chain->readable_pieces, *last = writable + chain->writable_pieces - 1;
	struct {
		uint32_t type, reserved;
		uint64_t sector;
	} header;
	uint64_t length, sector;

	if (!chain->writable_pieces || !chain->readable_pieces || pieces->iov_len < HEADER)
		return false;
	memcpy(&header, pieces->iov_base, HEADER);
	sector = le64toh(header.sector);
	r->status = (uint8_t *)last->iov_base + last->iov_len - 1;
	r->head = chain->head;
	r->written = 1;
	switch (le32toh(header.type)) {
	case IN:
		length = chain->writable - 1;
		last->iov_len--;
		r->kind = URING_READ;
		r->iov = writable;
		r->count = chain->writable_pieces - (last->iov_len == 0);
		r->written += (uint32_t)length;
		break;
	case OUT:
		if (blk->config.readonly)
			return false;
		length = chain->readable - HEADER;
		pieces->iov_base = (uint8_t *)pieces->iov_base + HEADER;
		pieces->iov_len -= HEADER;
		r->kind = URING_WRITE;
		r->iov = pieces + (pieces->iov_len == 0);
		r->count = chain->readable_pieces - (pieces->iov_len == 0);
		break;
	case FLUSH:
		r->kind = URING_FLUSH;
		r->iov = NULL;
		r->count = r->length = 0;
		r->offset = 0;
		return true;
	default:
		return false;
	}
	if (length == 0 || length > LONGEST || length % SECTOR || r->count > MOST_IOVECS ||
	    ((sector | length / SECTOR) & (blk->block - 1)) != 0 || sector > blk->capacity ||
	    length / SECTOR > blk->capacity - sector)
		return false;
	r->length = (uint32_t)length;
	r->offset = sector * SECTOR;
	return true;
}

static enum outcome done(const struct blk_request *r)
{
	*r->status = OK;
	return DONE;
}

/* One system call; what it returned, or -errno. */
static int64_t transfer(const struct blk_engine *blk, const struct blk_request *r, int fd, int flags)
{
	int64_t moved;

	if (r->kind == URING_READ)
		moved = r->count == 1 && !flags ? pread(fd, r->iov->iov_base, r->iov->iov_len, (off_t)r->offset) :
						  preadv2(fd, r->iov, (int)r->count, (off_t)r->offset, flags);
	else
		moved = pwritev2(fd, r->iov, (int)r->count, (off_t)r->offset, flags | (blk->stable_writes ? RWF_DSYNC : 0));
	return moved < 0 ? -errno : moved;
}

/* All of it, however long that takes; 0 or an errno. */
static int persist(const struct blk_engine *blk, const struct blk_request *r)
{
	struct chain_part part = { r->iov, r->count };
	int64_t moved;

	if (r->kind == URING_FLUSH)
		return fdatasync(blk->config.file) ? errno : 0;
	if (r->kind == URING_READ)
		moved = chain_from_file(part, blk->config.file, (int64_t)r->offset, 0, r->length);
	else
		moved = chain_to_file(part, blk->config.file, (int64_t)r->offset, 0, r->length);
	if (moved != r->length)
		return moved < 0 ? (int)-moved : EIO; /* the file became shorter */
	return r->kind == URING_WRITE && blk->stable_writes && fdatasync(blk->config.file) ? errno : 0;
}

static enum outcome at_once(const struct blk_engine *blk, const struct blk_request *r)
{
	return persist(blk, r) ? ODD : done(r);
}

/* Puts it in flight. */
static enum outcome start(struct blk_engine *blk, const struct blk_request *r)
{
	uint16_t slot;
	struct blk_request *kept;

	if (blk->uring.fd < 0)
		return at_once(blk, r);
	slot = blk->idle[blk->idle_count - 1];
	kept = &blk->requests[slot];
	*kept = *r;
	kept->iov = kept->own;
	if (r->count > INLINE && !(kept->iov = malloc(r->count * sizeof(*kept->iov)))) /* long requests only */
		return at_once(blk, r);
	if (r->count) /* a flush has no data */
		memcpy(kept->iov, r->iov, r->count * sizeof(*kept->iov));
	uring_add(&blk->uring, r->kind, kept->iov, r->count, r->offset, blk->stable_writes, slot);
	blk->idle_count--;
	blk->engine.in_flight++;
	return STARTED;
}

static bool aligned(const struct blk_engine *blk, const struct blk_request *r)
{
	uint64_t bits = r->offset;

	for (uint32_t i = 0; i < r->count; i++)
		bits |= (uintptr_t)r->iov[i].iov_base | r->iov[i].iov_len;
	return !(bits & (blk->config.align - 1));
}

static enum outcome through_cache(struct blk_engine *blk, const struct blk_request *r)
{
	int64_t moved;

	if (r->kind == URING_FLUSH || (r->kind == URING_WRITE && blk->waits_for_writes))
		return start(blk, r);
	moved = transfer(blk, r, blk->config.file, RWF_NOWAIT);
	if (moved == r->length)
		return done(r);
	if (moved == -EOPNOTSUPP && r->kind == URING_WRITE)
		blk->waits_for_writes = true;
	return start(blk, r);
}

static enum outcome in_memory(struct blk_engine *blk, const struct blk_request *r)
{
	struct blk_memory *memory = blk->config.memory;

	if (r->kind == URING_FLUSH)
		return done(r);
	if (memory && blk_memory_copy(memory, r->iov, r->count, r->offset, r->length, r->kind == URING_WRITE))
		return done(r);
	return transfer(blk, r, blk->config.file, 0) == r->length ? done(r) : ODD;
}

static enum outcome forget(const struct blk_request *r)
{
	if (r->kind == URING_READ)
		for (uint32_t i = 0; i < r->count; i++)
			memset(r->iov[i].iov_base, 0, r->iov[i].iov_len);
	return done(r);
}

static enum outcome serve(struct blk_engine *blk, const struct vq_chain *chain, struct vq_used *used)
{
	struct blk_request request;
	enum outcome outcome = ODD;

	if (!parse(blk, chain, &request))
		return ODD;
	*used = (struct vq_used){ .written = request.written, .head = request.head };
	switch (blk->config.medium) {
	case BLK_NULL:
		outcome = forget(&request);
		break;
	case BLK_RESIDENT:
		outcome = in_memory(blk, &request);
		break;
	case BLK_CACHED:
		outcome = through_cache(blk, &request);
		break;
	case BLK_DIRECT:
		outcome = aligned(blk, &request) ? start(blk, &request) : at_once(blk, &request);
		break;
	}
	return outcome;
}

/* A request ends with what its transfer returned. */
static struct vq_used finish(struct blk_engine *blk, uint64_t slot, int32_t result)
{
	struct blk_request *r = &blk->requests[slot];
	int error = result == (int32_t)r->length ? 0 : persist(blk, r); /* cut short, or refused: once more, all of it */

	if (error && !blk->failure)
		blk->failure = error;
	*r->status = error ? IOERR : OK;
	if (r->iov != r->own)
		free(r->iov);
	blk->idle[blk->idle_count++] = (uint16_t)slot;
	blk->engine.in_flight--;
	return (struct vq_used){ .written = error ? 1 : r->written, .head = r->head };
}

/* Hands back what completed; a set of enum engine_turn. */
static int reap(struct blk_engine *blk)
{
	struct engine_ring *ring = &blk->engine.rings[0];
	int before = blk->failure;
	size_t count = 0;
	uint64_t slot;
	int32_t result;

	while (uring_reap(&blk->uring, &slot, &result))
		ring->done[count++] = finish(blk, slot, result);
	if (!count)
		return TURN_IDLE;
	return TURN_MOVED | (engine_push(ring, ring->done, count) && blk->failure == before ? 0 : TURN_ASKS);
}

/* Submits what was added; what the kernel does not take is done by hand. */
static int submit(struct blk_engine *blk, uint32_t wait)
{
	struct engine_ring *ring = &blk->engine.rings[0];
	size_t count = 0;
	uint64_t slot;

	if (uring_submit(&blk->uring, wait) == 0)
		return TURN_IDLE;
	while (uring_take_back(&blk->uring, &slot))
		ring->done[count++] = finish(blk, slot, -EAGAIN);
	return engine_push(ring, ring->done, count) ? TURN_MOVED : TURN_ASKS;
}

static int blk_turn(struct engine *engine)
{
	struct blk_engine *blk = (struct blk_engine *)engine;
	struct engine_ring *ring = &engine->rings[0];
	size_t most = blk->config.medium == BLK_NULL ? BATCH_NULL : BATCH, limit = blk->batch, count, ready = 0, i;
	int turn = engine->in_flight ? reap(blk) : TURN_IDLE;

	if (!ring->vq)
		return TURN_IDLE;
	if (blk->uring.fd >= 0 && blk->idle_count < limit)
		limit = blk->idle_count;
	ring->pieces->used = 0;
	count = limit ? vq_device_pop(ring->vq, ring->chains, limit, ring->pieces) : 0;
	blk->batch = count < limit ? BATCH_FIRST : limit < most ? 2 * limit : most;
	for (i = 0; i < count; i++) {
		enum outcome outcome = serve(blk, &ring->chains[i], &ring->done[ready]);

		if (outcome == ODD)
			break;
		ready += outcome == DONE;
	}
	if (ready && !engine_push(ring, ring->done, ready))
		turn |= TURN_ASKS;
	if (blk->uring.added)
		turn |= submit(blk, 0);
	if (i < count) {
		engine_put_back(ring, i, count - i);
		turn |= TURN_ASKS;
	}
	if (ring->vq->fault.code != VQ_OK)
		turn |= TURN_ASKS;
	return turn | (i ? TURN_MOVED : 0);
}

static int blk_arm(struct engine *engine)
{
	int more = engine_arm(engine);

	if (engine->in_flight && uring_ready(&((struct blk_engine *)engine)->uring))
		return 1;
	return more;
}

static void blk_drain(struct engine *engine)
{
	struct blk_engine *blk = (struct blk_engine *)engine;

	while (engine->in_flight) {
		(void)submit(blk, 1);
		(void)reap(blk);
	}
}

static const struct engine_ops operations = {
	.turn = blk_turn,
	.arm = blk_arm,
	.disarm = engine_disarm,
	.drain = blk_drain,
};

int blk_engine_init(struct blk_engine *blk, const struct blk_config *config)
{
	int file = config->medium == BLK_DIRECT ? config->direct : config->file;

	memset(blk, 0, sizeof(*blk));
	blk->engine = (struct engine){ .ops = &operations, .fd = -1 };
	blk->config = *config;
	blk->uring.fd = -1;
	blk->batch = BATCH_FIRST;
	if (!config->uring || config->medium == BLK_RESIDENT || config->medium == BLK_NULL)
		return 0;
	blk->idle_count = config->depth;
	blk->idle = calloc(config->depth, sizeof(*blk->idle));
	blk->requests = calloc(config->depth, sizeof(*blk->requests));
	if (!blk->idle || !blk->requests) {
		blk_engine_destroy(blk);
		return -ENOMEM;
	}
	for (uint32_t i = 0; i < config->depth; i++)
		blk->idle[i] = (uint16_t)i;
	if (uring_open(&blk->uring, config->depth, file) == 0)
		blk->engine.fd = blk->uring.fd;
	return 0;
}

void blk_engine_destroy(struct blk_engine *blk)
{
	uring_close(&blk->uring);
	free(blk->requests);
	free(blk->idle);
	blk->requests = NULL;
	blk->idle = NULL;
}
