// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * The other side of a packed ring does what it must not. First every fault by name, then seeded corruption of everything
 * it can write: whatever comes out, pieces stay inside mapped memory and completions name chains that were posted, once
 * each.
 */
#include <errno.h>

#include "test.h"

enum { NUM = 8 };

static struct bench b;

/* The caller's flags include the marks. */
static void raw_desc(uint32_t position, uint64_t address, uint32_t length, uint16_t id, uint16_t flags)
{
	struct packed_desc *desc = &b.driver.packed.desc[position % NUM];

	atomic_store(&desc->address, htole64(address));
	atomic_store(&desc->length, htole32(length));
	ring16_store(&desc->id, id, memory_order_relaxed);
	ring16_store(&desc->flags, flags, memory_order_release);
}

/* Available on the first lap. */
static void raw_post(uint32_t position, uint64_t address, uint32_t length, uint16_t id, uint16_t flags)
{
	raw_desc(position, address, length, id, flags | PACKED_AVAIL);
}

static void reopen(void)
{
	bench_close(&b);
	bench_open(&b, NUM, 4, false, VQ_PACKED_START, true);
}

/* The next pop finds nothing but this fault, says so in words, and the queue stays broken. */
static void expect(enum vq_fault_code code, uint32_t where, uint64_t value)
{
	struct vq_chain chains[NUM];
	char text[160];

	CHECK(bench_pop(&b, chains, NUM) == 0);
	vq_fault_describe(&b.device.fault, text, sizeof(text));
	if (b.device.fault.code != code || b.device.fault.where != where || b.device.fault.value != value) {
		fprintf(stderr, "expected fault %d: %s\n", (int)code, text);
		abort();
	}
	CHECK(strlen(text) > 20 && strlen(text) < sizeof(text) - 1 && strstr(text, "unknown") == NULL);
	CHECK(bench_pop(&b, chains, NUM) == 0 && b.pieces.used == 0);
	CHECK(vq_device_push(&b.device, NULL, 0) == -EPROTO && vq_device_enable_kick(&b.device) == -EPROTO);
	reopen();
}

static void driver_faults(void)
{
	uint64_t table = b.driver.layout.tables + RING_IOVA;

	raw_post(0, DATA_IOVA, 16, NUM, 0);
	expect(VQ_ID_RANGE, 0, NUM);
	raw_post(0, DATA_IOVA, 16, UINT16_MAX, 0);
	expect(VQ_ID_RANGE, 0, UINT16_MAX);
	for (uint32_t i = 0; i < NUM; i++)
		raw_post(i, DATA_IOVA, 16, 0, DESC_NEXT);
	expect(VQ_CHAIN_LONG, 0, NUM);
	raw_post(0, DATA_IOVA, 16, 0, DESC_NEXT);
	raw_desc(1, DATA_IOVA, 16, 0, 0); /* never made available */
	expect(VQ_CHAIN_PARTIAL, 0, 1);
	raw_post(0, DATA_IOVA, 16, 0, DESC_NEXT);
	raw_desc(1, DATA_IOVA, 16, 0, PACKED_USED); /* available, a lap too late */
	expect(VQ_CHAIN_PARTIAL, 0, 1);
	raw_post(0, DATA_IOVA, 16, 0, DESC_NEXT | DESC_WRITE);
	raw_post(1, DATA_IOVA, 16, 0, 0);
	expect(VQ_CHAIN_ORDER, 0, 1);
	raw_post(0, DATA_IOVA + DATA_SIZE - 1, 2, 0, 0);
	expect(VQ_CHAIN_UNMAPPED, 0, DATA_IOVA + DATA_SIZE - 1);
	raw_post(0, UINT64_MAX - 3, 8, 0, 0);
	expect(VQ_CHAIN_UNMAPPED, 0, UINT64_MAX - 3);
	for (uint16_t write = 0; write <= DESC_WRITE; write += DESC_WRITE) { /* the other permission does not help */
		CHECK(iova_map_add(&b.map, 0x9000, 64, b.data, write ? IOVA_RO : IOVA_WO) == 0);
		raw_post(0, 0x9000, 8, 0, write);
		expect(VQ_CHAIN_UNMAPPED, 0, 0x9000);
	}
	raw_post(0, table, 16, 0, DESC_INDIRECT | DESC_NEXT);
	expect(VQ_INDIRECT_NEXT, 0, 0);
	raw_post(0, DATA_IOVA, 16, 0, DESC_NEXT); /* legal on a split ring, not here */
	raw_post(1, table, 16, 0, DESC_INDIRECT);
	expect(VQ_INDIRECT_NEXT, 0, 0);
	for (int i = 0; i < 3; i++) {
		uint32_t sizes[] = { 0, 17, (VQ_INDIRECT_MAX + 1) * 16 };

		raw_post(0, table, sizes[i], 0, DESC_INDIRECT);
		expect(VQ_INDIRECT_SIZE, 0, sizes[i]);
	}
	raw_post(0, 0xdead0000, 32, 0, DESC_INDIRECT);
	expect(VQ_INDIRECT_UNMAPPED, 0, 0xdead0000);
	raw_desc(7, 0xdead0000, 16, 0, 0); /* the table */
	raw_post(0, RING_IOVA + 16 * 7, 16, 0, DESC_INDIRECT);
	expect(VQ_CHAIN_UNMAPPED, 0, 0xdead0000);
	raw_desc(6, DATA_IOVA, 16, 0, DESC_WRITE);
	raw_desc(7, DATA_IOVA, 16, 0, 0);
	raw_post(0, RING_IOVA + 16 * 6, 32, 0, DESC_INDIRECT);
	expect(VQ_CHAIN_ORDER, 0, 1);
	b.device.config.indirect = false;
	raw_post(0, table, 16, 0, DESC_INDIRECT);
	expect(VQ_INDIRECT_REFUSED, 0, 0);
	b.pieces.capacity = 2;
	for (uint32_t i = 0; i < 3; i++)
		raw_post(i, DATA_IOVA, 16, 0, i < 2 ? DESC_NEXT : 0);
	expect(VQ_CHAIN_PIECES, 0, 2);
	CHECK(iova_map_add(&b.map, UINT64_C(1) << 40, UINT64_C(1) << 33, b.data, IOVA_RO) == 0); /* never touched */
	raw_post(0, UINT64_C(1) << 40, UINT32_MAX, 0, DESC_NEXT);
	raw_post(1, UINT64_C(1) << 40, 2, 0, 0);
	expect(VQ_CHAIN_BYTES, 0, (UINT64_C(1) << 32) + 1);
}

/* Chains that are good beside ones that are not: the good ones are delivered. */
static void in_flight(void)
{
	struct vq_chain chains[NUM];

	raw_post(0, DATA_IOVA, 16, 4, 0);
	raw_post(1, DATA_IOVA, 16, 4, 0);
	CHECK(bench_pop(&b, chains, NUM) == 1 && chains[0].head == 4 && b.device.fault.code == VQ_ID_BUSY);
	expect(VQ_ID_BUSY, 1, 4);

	for (uint32_t i = 0; i < NUM; i++)
		raw_post(i, DATA_IOVA, 16, 5, i + 1 < NUM ? DESC_NEXT : 0);
	CHECK(bench_pop(&b, chains, NUM) == 1 && chains[0].readable == 16 * NUM && b.device.fault.code == VQ_OK);
	raw_desc(0, DATA_IOVA, 16, 1, PACKED_USED); /* the second lap, on top of the first */
	expect(VQ_RING_OVERRUN, 0, NUM + 1);

	raw_post(0, DATA_IOVA, 16, 3, 0);
	CHECK(bench_pop(&b, chains, NUM) == 1);
	CHECK(vq_device_push(&b.device, &(struct vq_used){ 0, 2 }, 1) == -EINVAL); /* not popped */
	CHECK(vq_device_push(&b.device, &(struct vq_used){ 0, NUM }, 1) == -EINVAL);
	CHECK(vq_device_push(&b.device, (struct vq_used[]){ { 0, 3 }, { 0, 3 } }, 2) == -EINVAL);
	CHECK(b.device.used_idx == (CURSOR_WRAP | 1) && b.device.in_flight == 0 && b.device.fault.code == VQ_OK);
	reopen();
}

/* Ids in any order, a table cut by a border between regions, and flags and ids in it that mean nothing. */
static void unusual_but_legal(void)
{
	struct vq_chain chains[NUM];
	uint8_t halves[2][64];
	uint64_t table[4];

	table[0] = htole64(DATA_IOVA);
	table[1] = htole64(5 | UINT64_C(0xffff) << 32 | (uint64_t)(DESC_INDIRECT | PACKED_USED) << 48);
	table[2] = htole64(DATA_IOVA);
	table[3] = htole64(6 | UINT64_C(0x1234) << 32 | (uint64_t)(DESC_NEXT | DESC_WRITE) << 48);
	memcpy(halves[0] + 56, table, 8); /* the border cuts the first descriptor */
	memcpy(halves[1], (uint8_t *)table + 8, 24);
	CHECK(iova_map_add(&b.map, 0x8000, 64, halves[0], IOVA_RO) == 0);
	CHECK(iova_map_add(&b.map, 0x8040, 64, halves[1], IOVA_RO) == 0);
	raw_post(0, DATA_IOVA, 3, 99, DESC_NEXT); /* the id counts in the last descriptor alone */
	raw_post(1, DATA_IOVA, 4, 7, 0);
	raw_post(2, 0x8038, 32, 2, DESC_INDIRECT | DESC_WRITE); /* WRITE means nothing on a table */
	CHECK(bench_pop(&b, chains, NUM) == 2 && chains[0].head == 7 && chains[0].readable == 7);
	CHECK(chains[1].head == 2 && chains[1].readable == 5 && chains[1].writable == 6);
	reopen();
}

static void expect_driver(enum vq_fault_code code, uint32_t where, uint64_t value)
{
	struct vq_done done[NUM];
	char text[160];

	CHECK(vq_driver_reap(&b.driver, done, NUM) == 0);
	CHECK(b.driver.fault.code == code && b.driver.fault.where == where && b.driver.fault.value == value);
	CHECK(vq_fault_describe(&b.driver.fault, text, sizeof(text)) > 20 && strstr(text, "unknown") == NULL);
	CHECK(vq_driver_publish(&b.driver) == -EPROTO && vq_driver_enable_call(&b.driver) == -EPROTO);
	CHECK(vq_driver_add(&b.driver, &(struct vq_buffer){ DATA_IOVA, 8 }, 1, 0, 0) == -EPROTO);
	CHECK(vq_driver_reap(&b.driver, done, NUM) == 0);
	reopen();
	for (int i = 0; i < 3; i++) {
		struct vq_buffer pair[2] = { { DATA_IOVA, 8 }, { DATA_IOVA + 64, 8 } };

		CHECK(vq_driver_add(&b.driver, pair, 1, 1, 0) == i);
		if (i == 1)
			CHECK(vq_driver_publish(&b.driver) == 1); /* ids 0 and 1 are posted, id 2 only added */
	}
}

static void raw_used(uint32_t position, uint16_t id, uint32_t length)
{
	raw_desc(position, 0, length, id, PACKED_AVAIL | PACKED_USED | DESC_WRITE);
}

static void device_faults(void)
{
	struct vq_done done[NUM];

	raw_used(0, 0, 0);
	expect_driver(VQ_USED_NOT_POSTED, 0, 0); /* nothing was posted at all */
	raw_used(0, NUM, 0);
	expect_driver(VQ_USED_ID, 0, NUM);
	raw_used(0, UINT16_MAX, 0);
	expect_driver(VQ_USED_ID, 0, UINT16_MAX);
	raw_used(0, 2, 0);
	expect_driver(VQ_USED_NOT_POSTED, 0, 2);
	raw_used(0, 5, 0);
	expect_driver(VQ_USED_NOT_POSTED, 0, 5);
	raw_used(0, 0, 9);
	expect_driver(VQ_USED_LENGTH, 0, 9);
	raw_used(0, 1, 8);
	raw_used(1, 1, 8);
	CHECK(vq_driver_reap(&b.driver, done, NUM) == 1 && done[0].head == 1 && done[0].written == 8);
	expect_driver(VQ_USED_NOT_POSTED, 1, 1); /* twice */
	reopen();
}

static bool inside(const struct iovec *iov, const uint8_t *start, size_t size)
{
	const uint8_t *at = iov->iov_base;

	return at >= start && iov->iov_len <= size && at + iov->iov_len <= start + size;
}

/* Changes something the driver owns: mostly what the device reads next, with the right mark; sometimes any byte. */
static void corrupt_driver(uint64_t *seed)
{
	uint16_t cursor = b.device.next_avail;
	uint32_t count = 1 + random_below(seed, NUM + 1);

	switch (random_below(seed, 6)) {
	case 0:
		raw_desc(cursor_position(cursor), DATA_IOVA + random_below(seed, DATA_SIZE + 64), random_below(seed, 5000),
			 (uint16_t)random_below(seed, NUM + 1), (uint16_t)random_below(seed, 8) | available_mark(cursor));
		break;
	case 1: /* several at once: long chains, or more of them than the ring holds */
		for (uint32_t chained = random_below(seed, 2); count; count--) {
			raw_desc(cursor_position(cursor), DATA_IOVA, 16, (uint16_t)random_below(seed, NUM),
				 (chained ? DESC_NEXT : 0) | available_mark(cursor));
			cursor = cursor_advance(cursor, 1, NUM);
		}
		break;
	case 2:
		raw_desc(cursor_position(cursor), RING_IOVA + 16 * random_below(seed, NUM), 16 * random_below(seed, 6),
			 (uint16_t)random_below(seed, NUM), DESC_INDIRECT | available_mark(cursor));
		break;
	case 3:
		raw_desc(random_below(seed, NUM), next_random(seed), (uint32_t)next_random(seed),
			 (uint16_t)next_random(seed), (uint16_t)next_random(seed));
		break;
	case 4:
		b.area[random_below(seed, (uint32_t)b.driver.layout.size)] ^= (uint8_t)(1u << random_below(seed, 8));
		break;
	default:
		event_store(b.driver.packed.driver_event, (uint32_t)next_random(seed));
	}
}

static void corrupt_device(uint64_t *seed)
{
	uint16_t cursor = b.driver.last_used;

	switch (random_below(seed, 4)) {
	case 0:
		raw_desc(cursor_position(cursor), 0, random_below(seed, 80), (uint16_t)random_below(seed, NUM + 1),
			 used_mark(cursor) | (uint16_t)(random_below(seed, 2) * DESC_WRITE));
		break;
	case 1:
		raw_desc(random_below(seed, NUM), next_random(seed), (uint32_t)next_random(seed),
			 (uint16_t)next_random(seed), (uint16_t)next_random(seed));
		break;
	case 2:
		b.area[random_below(seed, (uint32_t)b.driver.layout.size)] ^= (uint8_t)(1u << random_below(seed, 8));
		break;
	default:
		event_store(b.driver.packed.device_event, (uint32_t)next_random(seed));
	}
}

/* Returns the fault the attacked end ended with, so that main can see that all of them were reached. */
static enum vq_fault_code chaos(uint64_t seed, bool from_driver)
{
	bool posted[NUM] = { false };
	struct vq_used held[NUM];
	size_t holding = 0;

	bench_open(&b, NUM, 3, seed & 1, base_at((uint16_t)next_random(&seed), NUM, true), true);
	for (int round = 0; round < 40; round++) {
		struct vq_buffer buffers[4];
		struct vq_chain chains[NUM];
		struct vq_done done[NUM];
		size_t count;
		int id;

		for (size_t i = 0; i < 4; i++)
			buffers[i] = (struct vq_buffer){ DATA_IOVA + 64 * i, 1 + random_below(&seed, 64) };
		id = vq_driver_add(&b.driver, buffers, 1 + random_below(&seed, 3), random_below(&seed, 2), 0);
		if (id >= 0) {
			CHECK(id < NUM && !posted[id]); /* no id is given out twice */
			posted[id] = true;
			b.driver.slots[id].token = (uint64_t)id;
		}
		if (random_below(&seed, 4))
			(void)vq_driver_publish(&b.driver);
		if (random_below(&seed, 3) == 0)
			from_driver ? corrupt_driver(&seed) : corrupt_device(&seed);
		count = bench_pop(&b, chains, NUM - holding);
		for (size_t i = 0; i < count; i++) {
			struct chain_part parts[2] = { readable_part(&chains[i]), writable_part(&chains[i]) };

			CHECK(chain_bytes(parts[0]) == chains[i].readable && chain_bytes(parts[1]) == chains[i].writable);
			for (int p = 0; p < 2; p++)
				for (size_t k = 0; k < parts[p].count; k++)
					CHECK(inside(&parts[p].iov[k], b.data, DATA_SIZE) ||
					      inside(&parts[p].iov[k], b.area, b.driver.layout.size));
			CHECK(chains[i].head < NUM);
			for (size_t k = 0; k < holding; k++)
				CHECK(held[k].head != chains[i].head);
			held[holding++] = (struct vq_used){ 0, chains[i].head };
		}
		CHECK(b.device.in_flight <= NUM && b.device.taken <= NUM && b.device.in_flight <= b.device.taken);
		if (random_below(&seed, 3)) {
			(void)vq_device_push(&b.device, held, holding);
			holding = 0;
		}
		(void)vq_device_enable_kick(&b.device);
		count = vq_driver_reap(&b.driver, done, NUM);
		for (size_t i = 0; i < count; i++) {
			CHECK(done[i].token < NUM && posted[done[i].token]);
			posted[done[i].token] = false;
		}
		(void)vq_driver_enable_call(&b.driver);
		CHECK(b.driver.free <= NUM && b.driver.in_flight <= NUM);
		CHECK(cursor_position(b.device.next_avail) < NUM && cursor_position(b.device.used_idx) < NUM);
		CHECK(cursor_position(b.driver.next_avail) < NUM && cursor_position(b.driver.last_used) < NUM);
	}
	bench_close(&b);
	return from_driver ? b.device.fault.code : b.driver.fault.code;
}

int main(void)
{
	static const enum vq_fault_code reachable[] = {
		VQ_OK,		  VQ_CHAIN_LONG,   VQ_CHAIN_ORDER,	 VQ_CHAIN_UNMAPPED, VQ_CHAIN_PARTIAL,
		VQ_INDIRECT_NEXT, VQ_INDIRECT_SIZE, VQ_INDIRECT_UNMAPPED, VQ_ID_RANGE,	    VQ_ID_BUSY,
		VQ_RING_OVERRUN,  VQ_USED_ID,	   VQ_USED_NOT_POSTED,	 VQ_USED_LENGTH,
	};
	unsigned int reached[VQ_POISONED + 1] = { 0 };

	bench_open(&b, NUM, 4, false, VQ_PACKED_START, true);
	driver_faults();
	in_flight();
	unusual_but_legal();
	device_faults();
	bench_close(&b);
	for (uint64_t seed = 1; seed <= 30000; seed++)
		reached[chaos(seed * 48271, seed % 4 != 0)]++;
	for (size_t i = 0; i < sizeof(reachable) / sizeof(reachable[0]); i++)
		CHECK(reached[reachable[i]] > 0);
	return 0;
}
