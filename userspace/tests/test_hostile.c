// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * The other side of a split ring does what it must not. First every fault by name, then seeded corruption of everything it can write:
 * whatever comes out, pieces stay inside mapped memory and completions name chains that were posted, once each.
 */
#include <errno.h>

#include "test.h"

enum { NUM = 8 };

static struct bench b;

static void raw_desc(uint32_t index, uint64_t address, uint32_t length, uint16_t flags, uint16_t next)
{
	desc_store(&b.driver.ring.desc[2 * index], (struct vring_desc_value){ address, length, flags, next });
}

/* Makes `head` available behind the driver's back. */
static void raw_post(uint16_t head)
{
	uint16_t index = ring16_load(avail_idx(&b.driver.ring), memory_order_relaxed);

	ring16_store(avail_slot(&b.driver.ring, index), head, memory_order_relaxed);
	ring16_store(avail_idx(&b.driver.ring), (uint16_t)(index + 1), memory_order_release);
}

/* The next pop finds nothing but this fault, says so in words, and the queue stays broken. */
static void expect(enum vq_fault_code code, uint32_t where, uint64_t value)
{
	struct vq_chain chains[NUM];
	char text[160];

	CHECK(bench_pop(&b, chains, NUM) == 0);
	if (b.device.fault.code != code || b.device.fault.where != where || b.device.fault.value != value) {
		vq_fault_describe(&b.device.fault, text, sizeof(text));
		fprintf(stderr, "expected fault %d: %s\n", (int)code, text);
		abort();
	}
	CHECK((size_t)vq_fault_describe(&b.device.fault, text, sizeof(text)) < sizeof(text) && strlen(text) > 20);
	CHECK(strstr(text, "unknown") == NULL);
	CHECK(bench_pop(&b, chains, NUM) == 0 && b.pieces.used == 0);
	CHECK(vq_device_push(&b.device, NULL, 0) == -EPROTO && vq_device_enable_kick(&b.device) == -EPROTO);
	bench_close(&b);
	bench_open(&b, NUM, 4, false, 0, false);
}

static void driver_faults(void)
{
	uint64_t table = b.driver.layout.tables + RING_IOVA;

	ring16_store(avail_idx(&b.driver.ring), NUM + 1, memory_order_release);
	expect(VQ_AVAIL_JUMP, 0, NUM + 1);
	raw_post(NUM);
	expect(VQ_HEAD_RANGE, 0, NUM);
	raw_desc(2, DATA_IOVA, 16, DESC_NEXT, NUM);
	raw_post(2);
	expect(VQ_NEXT_RANGE, 2, NUM);
	raw_desc(2, DATA_IOVA, 16, DESC_NEXT, 3);
	raw_desc(3, DATA_IOVA, 16, DESC_NEXT, 2);
	raw_post(2);
	expect(VQ_CHAIN_LONG, 2, NUM);
	raw_desc(0, DATA_IOVA, 16, DESC_NEXT | DESC_WRITE, 1);
	raw_desc(1, DATA_IOVA, 16, 0, 0);
	raw_post(0);
	expect(VQ_CHAIN_ORDER, 0, 1);
	raw_desc(5, DATA_IOVA + DATA_SIZE - 1, 2, 0, 0);
	raw_post(5);
	expect(VQ_CHAIN_UNMAPPED, 5, DATA_IOVA + DATA_SIZE - 1);
	raw_desc(5, UINT64_MAX - 3, 8, 0, 0);
	raw_post(5);
	expect(VQ_CHAIN_UNMAPPED, 5, UINT64_MAX - 3);
	for (uint16_t write = 0; write <= DESC_WRITE; write += DESC_WRITE) { /* the other permission does not help */
		CHECK(iova_map_add(&b.map, 0x9000, 64, b.data, write ? IOVA_RO : IOVA_WO) == 0);
		raw_desc(5, 0x9000, 8, write, 0);
		raw_post(5);
		expect(VQ_CHAIN_UNMAPPED, 5, 0x9000);
	}
	raw_desc(6, table, 16, DESC_INDIRECT | DESC_NEXT, 0);
	raw_post(6);
	expect(VQ_INDIRECT_NEXT, 6, 0);
	for (int i = 0; i < 3; i++) {
		uint32_t sizes[] = { 0, 17, (VQ_INDIRECT_MAX + 1) * 16 };

		raw_desc(6, table, sizes[i], DESC_INDIRECT, 0);
		raw_post(6);
		expect(VQ_INDIRECT_SIZE, 6, sizes[i]);
	}
	raw_desc(6, 0xdead0000, 32, DESC_INDIRECT, 0);
	raw_post(6);
	expect(VQ_INDIRECT_UNMAPPED, 6, 0xdead0000);
	raw_desc(6, RING_IOVA + 16 * 7, 16, DESC_INDIRECT, 0); /* the table is descriptor 7 */
	raw_desc(7, RING_IOVA, 16, DESC_INDIRECT, 0);
	raw_post(6);
	expect(VQ_INDIRECT_NESTED, 6, 0);
	raw_desc(6, RING_IOVA + 16 * 7, 16, DESC_INDIRECT, 0);
	raw_desc(7, DATA_IOVA, 16, DESC_NEXT, 1); /* next is outside a table of one */
	raw_post(6);
	expect(VQ_NEXT_RANGE, 0, 1);
	raw_desc(6, RING_IOVA + 16 * 7, 16, DESC_INDIRECT, 0);
	raw_desc(7, DATA_IOVA, 16, DESC_NEXT, 0); /* a loop inside the table */
	raw_post(6);
	expect(VQ_CHAIN_LONG, 6, 1);
	b.device.config.indirect = false;
	raw_desc(6, table, 16, DESC_INDIRECT, 0);
	raw_post(6);
	expect(VQ_INDIRECT_REFUSED, 6, 0);
	b.pieces.capacity = 2;
	raw_desc(0, DATA_IOVA, 16, DESC_NEXT, 1);
	raw_desc(1, DATA_IOVA, 16, DESC_NEXT, 2);
	raw_desc(2, DATA_IOVA, 16, 0, 0);
	raw_post(0);
	expect(VQ_CHAIN_PIECES, 0, 2);
	CHECK(iova_map_add(&b.map, UINT64_C(1) << 40, UINT64_C(1) << 33, b.data, IOVA_RO) == 0); /* never touched */
	raw_desc(0, UINT64_C(1) << 40, UINT32_MAX, DESC_NEXT, 1);
	raw_desc(1, UINT64_C(1) << 40, 2, 0, 0);
	raw_post(0);
	expect(VQ_CHAIN_BYTES, 0, (UINT64_C(1) << 32) + 1);
}

static void head_twice(void)
{
	struct vq_chain chains[NUM];

	raw_desc(4, DATA_IOVA, 16, 0, 0);
	raw_post(4);
	raw_post(4);
	CHECK(bench_pop(&b, chains, NUM) == 1 && chains[0].head == 4); /* the good one is delivered */
	CHECK(b.device.fault.code == VQ_HEAD_BUSY);
	expect(VQ_HEAD_BUSY, 1, 4);
}

/* Chains before an indirect descriptor are allowed (virtio 1.2, 2.7.5.3.2), and a table split over regions too. */
static void unusual_but_legal(void)
{
	struct vq_chain chains[NUM];
	uint8_t halves[2][64];
	_Atomic uint64_t table[4];

	raw_desc(0, DATA_IOVA, 16, DESC_NEXT, 1);
	raw_desc(1, RING_IOVA + 16 * 6, 32, DESC_INDIRECT, 0);
	raw_desc(6, DATA_IOVA + 64, 8, DESC_NEXT, 1);
	raw_desc(7, DATA_IOVA + 128, 4, DESC_WRITE, 0);
	raw_post(0);
	CHECK(bench_pop(&b, chains, NUM) == 1 && chains[0].readable == 24 && chains[0].writable == 4);

	desc_store(&table[0], (struct vring_desc_value){ DATA_IOVA, 5, DESC_NEXT, 1 });
	desc_store(&table[2], (struct vring_desc_value){ DATA_IOVA, 6, DESC_WRITE, 0 });
	memcpy(halves[0] + 56, table, 8); /* the border cuts the first descriptor */
	memcpy(halves[1], (uint8_t *)table + 8, 24);
	CHECK(iova_map_add(&b.map, 0x8000, 64, halves[0], IOVA_RO) == 0);
	CHECK(iova_map_add(&b.map, 0x8040, 64, halves[1], IOVA_RO) == 0);
	raw_desc(3, 0x8038, 32, DESC_INDIRECT | DESC_WRITE, 0); /* WRITE means nothing on a table */
	raw_post(3);
	CHECK(bench_pop(&b, chains, NUM) == 1 && chains[0].readable == 5 && chains[0].writable == 6);
	bench_close(&b);
	bench_open(&b, NUM, 4, false, 0, false);
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
	bench_close(&b);
	bench_open(&b, NUM, 4, false, 0, false);
	for (int i = 0; i < 2; i++) {
		struct vq_buffer pair[2] = { { DATA_IOVA, 8 }, { DATA_IOVA + 64, 8 } };

		CHECK(vq_driver_add(&b.driver, pair, 1, 1, 0) == i);
		if (i == 0)
			CHECK(vq_driver_publish(&b.driver) == 1); /* head 0 is posted, head 1 only added */
	}
}

static void raw_used(uint32_t id, uint32_t length, uint16_t index)
{
	_Atomic uint32_t *slot = used_slot(&b.driver.ring, 0);

	atomic_store(&slot[0], htole32(id));
	atomic_store(&slot[1], htole32(length));
	ring16_store(used_idx(&b.driver.ring), index, memory_order_release);
}

static void device_faults(void)
{
	raw_used(0, 0, 1);
	expect_driver(VQ_USED_JUMP, 0, 1); /* nothing was posted at all */
	raw_used(0, 0, 2);
	expect_driver(VQ_USED_JUMP, 0, 2);
	raw_used(NUM, 0, 1);
	expect_driver(VQ_USED_ID, 0, NUM);
	raw_used(UINT32_MAX, 0, 1);
	expect_driver(VQ_USED_ID, 0, UINT32_MAX);
	raw_used(1, 0, 1);
	expect_driver(VQ_USED_NOT_POSTED, 0, 1);
	raw_used(3, 0, 1);
	expect_driver(VQ_USED_NOT_POSTED, 0, 3);
	raw_used(0, 9, 1);
	expect_driver(VQ_USED_LENGTH, 0, 9);
	bench_close(&b);
	bench_open(&b, NUM, 4, false, 0, false);
}

static bool inside(const struct iovec *iov, const uint8_t *start, size_t size)
{
	const uint8_t *at = iov->iov_base;

	return at >= start && iov->iov_len <= size && at + iov->iov_len <= start + size;
}

/* Flips something the driver owns: mostly the fields that steer the walk, sometimes any byte. */
static void corrupt_driver(uint64_t *seed)
{
	struct vring *ring = &b.driver.ring;
	uint32_t index = random_below(seed, NUM);

	switch (random_below(seed, 6)) {
	case 0:
		ring16_store(avail_slot(ring, (uint16_t)index), (uint16_t)random_below(seed, NUM + 1), memory_order_relaxed);
		break;
	case 1:
		raw_desc(index, DATA_IOVA + random_below(seed, DATA_SIZE + 64), random_below(seed, 5000),
			 (uint16_t)random_below(seed, 8), (uint16_t)random_below(seed, NUM + 1));
		break;
	case 2:
		raw_desc(index, RING_IOVA + 16 * random_below(seed, NUM), 16 * random_below(seed, 6), DESC_INDIRECT, 0);
		break;
	case 3:
		raw_desc(index, next_random(seed), (uint32_t)next_random(seed), (uint16_t)next_random(seed),
			 (uint16_t)next_random(seed));
		break;
	case 4:
		b.area[random_below(seed, (uint32_t)b.driver.layout.size)] ^= (uint8_t)(1u << random_below(seed, 8));
		break;
	default:
		ring16_store(avail_idx(ring), (uint16_t)(b.device.next_avail + random_below(seed, NUM + 2)),
			     memory_order_release);
	}
}

static void corrupt_device(uint64_t *seed)
{
	_Atomic uint32_t *slot = used_slot(&b.driver.ring, (uint16_t)random_below(seed, NUM));

	switch (random_below(seed, 4)) {
	case 0:
		atomic_store(&slot[0], htole32(random_below(seed, NUM + 1)));
		break;
	case 1:
		atomic_store(&slot[1], htole32(random_below(seed, 10)));
		break;
	case 2:
		b.area[random_below(seed, (uint32_t)b.driver.layout.size)] ^= (uint8_t)(1u << random_below(seed, 8));
		break;
	default:
		ring16_store(used_idx(&b.driver.ring), (uint16_t)(b.driver.last_used + random_below(seed, NUM + 1)),
			     memory_order_release);
	}
}

/* Returns the fault the device's end ended with, so that main can see that all of them were reached. */
static enum vq_fault_code chaos(uint64_t seed, bool from_driver)
{
	bool posted[NUM] = { false };

	bench_open(&b, NUM, 4, seed & 1, (uint16_t)next_random(&seed), false);
	for (int round = 0; round < 40; round++) {
		struct vq_buffer buffers[4];
		struct vq_chain chains[NUM];
		struct vq_used used[NUM];
		struct vq_done done[NUM];
		size_t count;
		int head;

		for (size_t i = 0; i < 4; i++)
			buffers[i] = (struct vq_buffer){ DATA_IOVA + 64 * i, 1 + random_below(&seed, 64) };
		head = vq_driver_add(&b.driver, buffers, 1 + random_below(&seed, 3), random_below(&seed, 2), 0);
		if (head >= 0) {
			CHECK(!posted[head]); /* no descriptor is given out twice */
			posted[head] = true;
			b.driver.slots[head].token = (uint64_t)head;
		}
		(void)vq_driver_publish(&b.driver);
		if (random_below(&seed, 3) == 0)
			from_driver ? corrupt_driver(&seed) : corrupt_device(&seed);
		count = bench_pop(&b, chains, NUM);
		for (size_t i = 0; i < count; i++) {
			struct chain_part parts[2] = { readable_part(&chains[i]), writable_part(&chains[i]) };

			CHECK(chain_bytes(parts[0]) == chains[i].readable && chain_bytes(parts[1]) == chains[i].writable);
			for (int p = 0; p < 2; p++)
				for (size_t k = 0; k < parts[p].count; k++)
					CHECK(inside(&parts[p].iov[k], b.data, DATA_SIZE) ||
					      inside(&parts[p].iov[k], b.area, b.driver.layout.size));
			used[i] = (struct vq_used){ 0, chains[i].head };
		}
		(void)vq_device_push(&b.device, used, count);
		(void)vq_device_enable_kick(&b.device);
		count = vq_driver_reap(&b.driver, done, NUM);
		for (size_t i = 0; i < count; i++) {
			CHECK(done[i].token < NUM && posted[done[i].token]);
			posted[done[i].token] = false;
		}
		CHECK(b.driver.free <= NUM && b.device.in_flight <= NUM);
	}
	bench_close(&b);
	return from_driver ? b.device.fault.code : b.driver.fault.code;
}

int main(void)
{
	unsigned int reached[VQ_POISONED + 1] = { 0 };

	bench_open(&b, NUM, 4, false, 0, false);
	driver_faults();
	head_twice();
	unusual_but_legal();
	device_faults();
	bench_close(&b);
	for (uint64_t seed = 1; seed <= 20000; seed++)
		reached[chaos(seed * 48271, seed % 4 != 0)]++;
	for (int code = VQ_AVAIL_JUMP; code <= VQ_INDIRECT_UNMAPPED; code++)
		if (code != VQ_CHAIN_PIECES && code != VQ_INDIRECT_REFUSED && code != VQ_CHAIN_BYTES)
			CHECK(reached[code] > 0);
	for (int code = VQ_USED_JUMP; code <= VQ_USED_LENGTH; code++)
		CHECK(reached[code] > 0);
	return 0;
}
