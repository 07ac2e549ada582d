// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * The device's end against a driver that writes anything at any time: rings, indirect tables and buffers lie in memory that
 * the program scribbles over between calls, and that is unmapped and mapped again.
 */
#include <errno.h>

#include "fuzz.h"

enum { NUM = 8, LOW_IOVA = 0x1000, LOW_SIZE = 0x800, HIGH_IOVA = LOW_IOVA + LOW_SIZE, HIGH_SIZE = 0x200, ROOM = 24 };
/* Two regions that touch: the ring with its tables and buffers, and one that may only be read. */
enum { DESC = LOW_IOVA, AVAIL = DESC + 16 * NUM, USED = AVAIL + 64, TABLE = USED + 128 };

struct device {
	struct vq_device vq;
	struct iova_map map;
	uint8_t *low, *high;
	bool open[NUM];
	uint16_t order[NUM]; /* of the open ones, as they were popped */
	size_t count;
	uint64_t writable[NUM];
	uint64_t sum; /* of all bytes that chains let us read */
};

static void map_all(struct device *d)
{
	(void)iova_map_add(&d->map, LOW_IOVA, LOW_SIZE, d->low, IOVA_RW);
	(void)iova_map_add(&d->map, HIGH_IOVA, HIGH_SIZE, d->high, IOVA_RO);
}

/* Every byte of every piece is there, and all is counted. */
static void use_chain(struct device *d, const struct vq_chain *chain, const struct iova_pieces *pieces)
{
	uint64_t bytes[2] = { 0, 0 };

	CHECK(chain->iov + chain->readable_pieces + chain->writable_pieces <= pieces->iov + pieces->used && pieces->used <= ROOM);
	for (size_t i = 0; i < (size_t)chain->readable_pieces + chain->writable_pieces; i++) {
		const struct iovec *piece = &chain->iov[i];
		bool write = i >= chain->readable_pieces;

		CHECK(piece->iov_len > 0 && pieces->iova[piece - pieces->iov] >= LOW_IOVA);
		if (write)
			memset(piece->iov_base, 0x5a, piece->iov_len);
		for (size_t k = 0; k < piece->iov_len; k++)
			d->sum += ((const uint8_t *)piece->iov_base)[k];
		bytes[write] += piece->iov_len;
	}
	CHECK(bytes[0] == chain->readable && bytes[1] == chain->writable);
}

static void pop(struct device *d, struct program *p)
{
	struct iovec iov[ROOM];
	uint64_t iova[ROOM];
	struct vq_chain chains[NUM];
	struct iova_pieces pieces = { .iov = iov, .iova = iova, .capacity = ROOM };
	size_t count = vq_device_pop(&d->vq, chains, 1 + next_byte(p) % NUM, &pieces);

	for (size_t i = 0; i < count; i++) {
		CHECK(chains[i].head < NUM && !d->open[chains[i].head] && d->count < NUM);
		use_chain(d, &chains[i], &pieces);
		d->open[chains[i].head] = true;
		d->writable[chains[i].head] = chains[i].writable;
		d->order[d->count++] = chains[i].head;
	}
}

static void push(struct device *d, struct program *p)
{
	struct vq_used done[NUM];
	size_t count = 0, most = 1 + next_byte(p) % NUM;
	int due;

	while (count < most && d->count) {
		size_t at = next_byte(p) % d->count;
		uint16_t head = d->order[at];

		done[count++] = (struct vq_used){ (uint32_t)(next_byte(p) % (d->writable[head] + 1)), head };
		memmove(&d->order[at], &d->order[at + 1], (--d->count - at) * sizeof(d->order[0]));
		d->open[head] = false;
	}
	due = vq_device_push(&d->vq, done, count);
	CHECK(due == 0 || due == 1 || due == -EPROTO || (due == -EAGAIN && d->vq.config.wait && count));
	if (due == -EAGAIN) /* nothing was handed back */
		for (size_t i = 0; i < count; i++) {
			d->open[done[i].head] = true;
			d->order[d->count++] = done[i].head;
		}
}

static void put_back(struct device *d)
{
	int error;

	if (!d->count)
		return;
	error = vq_device_put_back(&d->vq, &d->order[d->count - 1], 1);
	if (error == 0)
		d->open[d->order[--d->count]] = false;
	else
		CHECK(error == -EINVAL);
}

/* The usual things, said in few bytes: a chain of direct or indirect descriptors becomes available. */
static void offer(struct device *d, struct program *p)
{
	uint8_t shape = next_byte(p), count = (shape & 3) + 1;
	uint16_t at = next_byte(p) % NUM, cursor = d->vq.next_avail, idx;
	bool packed = d->vq.config.packed, table = shape & 4;
	uint8_t *desc = table ? d->low + (TABLE - LOW_IOVA) : d->low;

	for (uint8_t i = 0; i < count; i++) {
		uint16_t index = table ? i : (packed ? cursor_position(cursor_advance(cursor, i, NUM)) : (uint16_t)((at + i) % NUM));
		uint16_t flags = (uint16_t)((i + 1 < count ? DESC_NEXT : 0) | (i >= (shape >> 4 & 3) ? DESC_WRITE : 0));
		uint64_t address = LOW_IOVA + 0x400 + (uint64_t)next_word(p) % (LOW_SIZE + HIGH_SIZE - 0x400);
		uint32_t length = next_byte(p);
		uint16_t tail[2] = { packed ? at : flags, packed ? flags : (uint16_t)(table ? i + 1 : (at + i + 1) % NUM) };

		if (packed && !table)
			tail[1] |= available_mark(cursor_advance(cursor, i, NUM));
		memcpy(desc + 16 * index, &address, 8);
		memcpy(desc + 16 * index + 8, &length, 4);
		memcpy(desc + 16 * index + 12, tail, 4);
	}
	if (table) {
		uint64_t address = TABLE;
		uint32_t length = 16u * count;
		uint16_t position = packed ? cursor_position(cursor) : at;
		uint16_t tail[2] = { packed ? at : DESC_INDIRECT, packed ? (uint16_t)(DESC_INDIRECT | available_mark(cursor)) : 0 };

		memcpy(d->low + 16 * position, &address, 8);
		memcpy(d->low + 16 * position + 8, &length, 4);
		memcpy(d->low + 16 * position + 12, tail, 4);
	}
	if (packed)
		return;
	memcpy(&idx, d->low + (AVAIL - LOW_IOVA) + 2, 2);
	memcpy(d->low + (AVAIL - LOW_IOVA) + 4 + 2 * (idx % NUM), &at, 2);
	idx++;
	memcpy(d->low + (AVAIL - LOW_IOVA) + 2, &idx, 2);
}

static void step(struct device *d, struct program *p)
{
	char text[200];

	switch (next_byte(p) % 12) {
	case 0:
	case 1:
		scribble(p, d->low, LOW_SIZE);
		break;
	case 2:
	case 3:
	case 4:
		offer(d, p);
		break;
	case 5:
	case 6:
		pop(d, p);
		break;
	case 7:
		push(d, p);
		break;
	case 8:
		put_back(d);
		break;
	case 9:
		if (vq_device_enable_kick(&d->vq) < 0)
			CHECK(d->vq.fault.code != VQ_OK);
		vq_device_disable_kick(&d->vq);
		break;
	case 10:
		CHECK(iova_map_remove(&d->map, next_byte(p) & 1 ? LOW_IOVA : HIGH_IOVA, next_byte(p) & 1 ? LOW_SIZE : HIGH_SIZE) >= 0);
		break;
	default:
		if (vq_device_misses(&d->vq) && next_byte(p) & 1)
			vq_device_refuse(&d->vq, d->vq.misses[0].iova);
		map_all(d);
	}
	CHECK(vq_fault_describe(&d->vq.fault, text, sizeof(text)) > 0);
	if (d->vq.fault.code == VQ_OK)
		CHECK(d->vq.in_flight <= NUM && d->vq.in_flight >= d->count);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct program p = { data, data + size };
	static struct device d;
	uint8_t form = next_byte(&p);
	bool packed = form & 1;

	memset(&d, 0, sizeof(d));
	d.low = aligned_alloc(64, LOW_SIZE);
	d.high = aligned_alloc(64, HIGH_SIZE);
	CHECK(d.low && d.high);
	memset(d.low, 0, LOW_SIZE);
	memset(d.high, 0, HIGH_SIZE);
	iova_map_init(&d.map);
	map_all(&d);
	CHECK(vq_device_init(&d.vq, &(struct vq_device_config){ .map = &d.map,
								.desc = DESC,
								.avail = AVAIL,
								.used = USED,
								.num = NUM,
								.base = packed ? VQ_PACKED_START : 0,
								.event_idx = form & 2,
								.indirect = form & 4,
								.packed = packed,
								.wait = form & 8,
								.in_order = form & 16 }) == 0);
	while (!at_end(&p))
		step(&d, &p);
	vq_device_destroy(&d.vq);
	iova_map_destroy(&d.map);
	free(d.low);
	free(d.high);
	return 0;
}
