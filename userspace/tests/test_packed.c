// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* What packed rings have of their own: the words in memory, cursors and wrap counters, event structures, bases. */
#include <errno.h>

#include "test.h"

enum { NUM = 8, AVAILABLE = PACKED_AVAIL, USED = PACKED_AVAIL | PACKED_USED };

static struct bench b;

static void open_ring(uint32_t num, bool event_idx, uint32_t base)
{
	bench_open(&b, num, 4, event_idx, base, true);
}

/* A descriptor as its bytes are, by virtio 1.2, 2.8.13. */
static bool is_desc(uint32_t position, uint64_t address, uint32_t length, uint16_t id, uint16_t flags)
{
	const uint8_t *at = b.area + 16 * position;
	uint8_t bytes[16];

	for (size_t i = 0; i < 8; i++)
		bytes[i] = (uint8_t)(address >> 8 * i);
	for (size_t i = 0; i < 4; i++)
		bytes[8 + i] = (uint8_t)(length >> 8 * i);
	bytes[12] = (uint8_t)id;
	bytes[13] = (uint8_t)(id >> 8);
	bytes[14] = (uint8_t)flags;
	bytes[15] = (uint8_t)(flags >> 8);
	return memcmp(at, bytes, 16) == 0;
}

static uint16_t flags_at(uint32_t position)
{
	return (uint16_t)(b.area[16 * position + 14] | b.area[16 * position + 15] << 8);
}

static int add(size_t readable, size_t writable, uint64_t token)
{
	struct vq_buffer buffers[NUM];

	for (size_t i = 0; i < NUM; i++)
		buffers[i] = (struct vq_buffer){ DATA_IOVA + 64 * i, 10 + (uint32_t)i };
	return vq_driver_add(&b.driver, buffers, readable, writable, token);
}

static void words(void)
{
	struct vq_chain chains[NUM];
	struct vq_done done[NUM];

	bench_open(&b, NUM, 0, false, VQ_PACKED_START, true);
	CHECK(b.driver.layout.avail == 128 && b.driver.layout.used == 192 && b.driver.layout.size == 256);
	CHECK(add(1, 0, 100) == 0 && add(1, 2, 101) == 1);
	/* All is there but the flags of the batch's first descriptor: nothing is available. */
	CHECK(is_desc(0, DATA_IOVA, 10, 0, 0) && is_desc(1, DATA_IOVA, 10, 1, AVAILABLE | DESC_NEXT));
	CHECK(is_desc(2, DATA_IOVA + 64, 11, 1, AVAILABLE | DESC_NEXT | DESC_WRITE));
	CHECK(is_desc(3, DATA_IOVA + 128, 12, 1, AVAILABLE | DESC_WRITE));
	CHECK(bench_pop(&b, chains, NUM) == 0 && vq_device_enable_kick(&b.device) == 0);
	CHECK(vq_driver_publish(&b.driver) == 1 && is_desc(0, DATA_IOVA, 10, 0, AVAILABLE));
	CHECK(add(0, 2, 102) == 2 && flags_at(4) == 0 && vq_driver_publish(&b.driver) == 1);
	CHECK(bench_pop(&b, chains, NUM) == 3 && bench_pop(&b, chains + 3, 1) == 0);
	CHECK(chains[0].head == 0 && chains[1].head == 1 && chains[1].writable == 23 && chains[2].writable == 21);
	CHECK(b.device.in_flight == 3 && b.device.taken == 6 && b.driver.free == 2);

	/* Completed as 2, 0, 1: each used descriptor lies behind the whole length of the one before it. */
	CHECK(vq_device_push(&b.device, (struct vq_used[]){ { 21, 2 }, { 0, 0 } }, 2) == 1);
	CHECK(is_desc(0, DATA_IOVA, 21, 2, USED | DESC_WRITE) && is_desc(2, DATA_IOVA + 64, 0, 0, USED));
	CHECK(flags_at(1) == (AVAILABLE | DESC_NEXT) && flags_at(3) == (AVAILABLE | DESC_WRITE)); /* passed over */
	CHECK(vq_device_push(&b.device, (struct vq_used[]){ { 5, 1 } }, 1) == 1);
	CHECK(is_desc(3, DATA_IOVA + 128, 5, 1, USED | DESC_WRITE) && b.device.used_idx == (CURSOR_WRAP | 6));
	CHECK(vq_driver_reap(&b.driver, done, NUM) == 3 && b.driver.free == NUM && b.driver.in_flight == 0);
	CHECK(done[0].token == 102 && done[0].written == 21 && done[1].token == 100 && done[2].token == 101);
	CHECK(b.device.in_flight == 0 && b.device.taken == 0);

	/* A chain around the end: the marks change with the lap, inside the chain. */
	CHECK(add(4, 0, 103) == 1 && vq_driver_publish(&b.driver) == 1);
	CHECK(flags_at(6) == (AVAILABLE | DESC_NEXT) && flags_at(7) == (AVAILABLE | DESC_NEXT));
	CHECK(flags_at(0) == (PACKED_USED | DESC_NEXT) && flags_at(1) == PACKED_USED);
	CHECK(bench_pop(&b, chains, NUM) == 1 && chains[0].readable == 46 && b.device.next_avail == 2);
	CHECK(vq_device_push(&b.device, &(struct vq_used){ 0, 1 }, 1) == 1 && flags_at(6) == USED);
	CHECK(b.device.used_idx == 2 && vq_driver_reap(&b.driver, done, 1) == 1 && b.driver.last_used == 2);
	CHECK(add(1, 0, 104) == 1 && vq_driver_publish(&b.driver) == 1 && flags_at(2) == PACKED_USED);
	CHECK(bench_pop(&b, chains, NUM) == 1);
	CHECK(vq_device_push(&b.device, &(struct vq_used){ 0, 1 }, 1) == 1 && flags_at(2) == 0);
	bench_close(&b);

	open_ring(NUM, false, VQ_PACKED_START);
	CHECK(add(2, 1, 0) == 0 && vq_driver_publish(&b.driver) == 1);
	CHECK(is_desc(0, RING_IOVA + b.driver.layout.tables, 48, 0, AVAILABLE | DESC_INDIRECT) && flags_at(1) == 0);
	CHECK(is_desc((uint32_t)b.driver.layout.tables / 16 + 1, DATA_IOVA + 64, 11, 0, 0));
	CHECK(is_desc((uint32_t)b.driver.layout.tables / 16 + 2, DATA_IOVA + 128, 12, 0, DESC_WRITE));
	CHECK(bench_pop(&b, chains, 1) == 1 && chains[0].readable == 21 && chains[0].writable == 12);
	CHECK(vq_device_push(&b.device, &(struct vq_used){ 9, 0 }, 1) == 1);
	CHECK(vq_driver_reap(&b.driver, done, 1) == 1 && done[0].written == 9);
	for (uint32_t length = 12; length <= 13; length++) { /* without WRITE, it counts as far as it can be true */
		CHECK(add(2, 1, 0) == 0 && vq_driver_publish(&b.driver) == 1 && bench_pop(&b, chains, 1) == 1);
		CHECK(vq_device_push(&b.device, &(struct vq_used){ length, 0 }, 1) == 1);
		ring16_store(&b.driver.packed.desc[length - 11].flags, USED, memory_order_relaxed);
		CHECK(vq_driver_reap(&b.driver, done, 1) == 1 && done[0].written == (length == 12 ? 12 : 0));
	}
	CHECK(b.driver.fault.code == VQ_OK);
	bench_close(&b);
}

/* cursor_advance and event_asks against one step at a time, for every cursor, distance and event of small rings. */
static void arithmetic(void)
{
	uint32_t nums[] = { 1, 2, 3, 7, 8, VRING_MAX_NUM };
	uint64_t seed = 4242;

	for (size_t n = 0; n < sizeof(nums) / sizeof(nums[0]); n++) {
		uint32_t num = nums[n], few = num < 10 ? num : 4;

		for (uint32_t start = 0; start < 2 * few; start++) {
			uint16_t before = (uint16_t)((num < 10 ? start / 2 : random_below(&seed, num)) | (start % 2) << 15);
			uint16_t cursor = before;
			static bool passed[65536];

			memset(passed, 0, sizeof(passed));
			for (uint32_t moved = 1; moved <= num; moved++) {
				passed[cursor] = true;
				if (cursor_position(cursor) + 1u == num)
					cursor = (uint16_t)(~cursor & CURSOR_WRAP);
				else
					cursor++;
				CHECK(cursor_advance(before, moved, num) == cursor);
				for (uint32_t k = 0; k < 2 * few; k++) {
					uint16_t at = (uint16_t)((num < 10 ? k / 2 : random_below(&seed, num)) | (k % 2) << 15);

					CHECK(event_asks(event_value(EVENT_DESC, at), cursor, moved, num, true) == passed[at]);
					CHECK(event_asks(event_value(EVENT_DESC, at), cursor, moved, num, false));
					CHECK(event_asks(event_value(EVENT_ENABLE, at), cursor, moved, num, true));
					CHECK(event_asks(event_value(3, at), cursor, moved, num, true)); /* reserved */
					CHECK(!event_asks(event_value(EVENT_DISABLE, at), cursor, moved, num, true));
				}
			}
			CHECK(cursor == (before ^ CURSOR_WRAP));
		}
	}
}

static uint32_t word(uint64_t offset)
{
	const uint8_t *at = b.area + offset;

	return at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

/* The event structures as their bytes are: offset and wrap in the first half, flags in the second. */
static void events(void)
{
	struct vq_chain chain;
	struct vq_done done;

	for (uint32_t event_idx = 0; event_idx < 2; event_idx++) {
		uint64_t driver, device;

		open_ring(NUM, event_idx, base_at(0x8006, NUM, true));
		driver = b.driver.layout.avail;
		device = b.driver.layout.used;
		CHECK(word(driver) == (event_idx ? 0x28006 : 0) && word(device) == word(driver));
		vq_device_disable_kick(&b.device);
		vq_driver_disable_call(&b.driver);
		CHECK(word(driver) == 0x10000 && word(device) == 0x10000);
		for (int i = 0; i < 3; i++) { /* the device goes round the end, the driver's reaping does not */
			CHECK(add(1, 0, 0) >= 0 && vq_driver_publish(&b.driver) == 0 && bench_pop(&b, &chain, 1) == 1);
			CHECK(vq_device_push(&b.device, &(struct vq_used){ 0, chain.head }, 1) == 0);
		}
		CHECK(vq_device_enable_kick(&b.device) == 0 && word(device) == (event_idx ? 0x20001 : 0));
		CHECK(vq_driver_enable_call(&b.driver) == 1 && word(driver) == (event_idx ? 0x28006 : 0));
		CHECK(add(1, 0, 0) >= 0 && vq_driver_publish(&b.driver) == 1);
		bench_close(&b);
	}

	/* While chains are in flight, the device waits for the next one to come, the driver for the next to come back. */
	open_ring(NUM, true, VQ_PACKED_START);
	CHECK(add(1, 0, 0) >= 0 && add(1, 0, 1) >= 0 && vq_driver_publish(&b.driver) == 1);
	CHECK(bench_pop(&b, &chain, 1) == 1 && vq_device_enable_kick(&b.device) == 1 && word(b.driver.layout.used) == 0x28001);
	CHECK(bench_pop(&b, &chain, 1) == 1 && vq_device_enable_kick(&b.device) == 0);
	CHECK(add(1, 0, 2) >= 0 && vq_driver_publish(&b.driver) == 1);
	CHECK(vq_driver_enable_call(&b.driver) == 0 && word(b.driver.layout.avail) == 0x28000);
	CHECK(vq_device_push(&b.device, &(struct vq_used){ 0, 1 }, 1) == 1);
	CHECK(vq_driver_reap(&b.driver, &done, 1) == 1 && done.token == 1 && vq_driver_enable_call(&b.driver) == 0);
	CHECK(word(b.driver.layout.avail) == 0x28001 && vq_device_push(&b.device, &(struct vq_used){ 0, 0 }, 1) == 1);
	bench_close(&b);

	/* An event for a place in the middle of a batch, and one behind it. */
	open_ring(NUM, true, VQ_PACKED_START);
	CHECK(vq_device_enable_kick(&b.device) == 0);
	event_store(b.device.packed.device_event, event_value(EVENT_DESC, CURSOR_WRAP | 1));
	CHECK(add(1, 0, 0) >= 0 && vq_driver_publish(&b.driver) == 0);
	CHECK(add(1, 0, 0) >= 0 && add(1, 0, 0) >= 0 && vq_driver_publish(&b.driver) == 1);
	CHECK(add(1, 0, 0) >= 0 && vq_driver_publish(&b.driver) == 0);
	bench_close(&b);
}

/* Whatever its base, a new ring has nothing available or used on it; the next device goes on where one left off. */
static void bases(void)
{
	struct vq_device_config again;
	struct vq_chain chain;
	struct vq_done done;

	for (uint32_t cursor = 0; cursor < 2 * NUM; cursor++) {
		uint32_t base = base_at((uint16_t)(cursor / 2 | (cursor % 2) << 15), NUM, true);

		open_ring(NUM, cursor & 4, base);
		CHECK(vq_device_base(&b.device) == base && b.device.used_idx == base >> 16);
		for (uint32_t i = 0; i < 3 * NUM; i++) {
			CHECK(bench_pop(&b, &chain, 1) == 0 && vq_driver_reap(&b.driver, &done, 1) == 0);
			CHECK(vq_driver_enable_call(&b.driver) == 0 && vq_device_enable_kick(&b.device) == 0);
			CHECK(add(1, 0, i) >= 0 && bench_pop(&b, &chain, 1) == 0 && vq_driver_reap(&b.driver, &done, 1) == 0);
			CHECK(vq_driver_publish(&b.driver) == 1 && bench_pop(&b, &chain, 1) == 1);
			CHECK(vq_device_push(&b.device, &(struct vq_used){ 0, chain.head }, 1) == 1);
			if (i % 3 == 0) {
				again = b.device.config;
				again.base = vq_device_base(&b.device);
				vq_device_destroy(&b.device);
				CHECK(vq_device_init(&b.device, &again) == 0);
			}
			CHECK(vq_driver_reap(&b.driver, &done, 1) == 1 && done.token == i);
		}
		bench_close(&b);
	}

	/* Chains that the last device took and never handed back: available cursor ahead of the used one. */
	open_ring(NUM, true, VQ_PACKED_START);
	CHECK(add(1, 0, 7) == 0 && add(2, 0, 8) == 1 && vq_driver_publish(&b.driver) == 1);
	CHECK(bench_pop(&b, &chain, 1) == 1 && vq_device_base(&b.device) == (UINT32_C(0x8000) << 16 | 0x8001));
	CHECK(vq_device_push(&b.device, &(struct vq_used){ 0, 0 }, 1) == 1);
	vq_driver_disable_call(&b.driver);
	CHECK(bench_pop(&b, &chain, 1) == 1 && vq_device_base(&b.device) == (UINT32_C(0x8001) << 16 | 0x8002));
	again = b.device.config;
	again.base = UINT32_C(0x8001) << 16 | 0x8001; /* as a frontend that resubmits does */
	vq_device_destroy(&b.device);
	CHECK(vq_device_init(&b.device, &again) == 0 && bench_pop(&b, &chain, 1) == 1 && chain.head == 1);
	CHECK(vq_device_push(&b.device, &(struct vq_used){ 0, 1 }, 1) == 0);
	CHECK(vq_driver_reap(&b.driver, &done, 1) == 1 && vq_driver_reap(&b.driver, &done, 1) == 1 && done.token == 8);
	bench_close(&b);

	CHECK(vq_base_valid(NUM, 0x00078007, true) && !vq_base_valid(NUM, 0x80008008, true));
	CHECK(!vq_base_valid(NUM, 0x80088000, true) && vq_base_valid(NUM, 0xffff, false) && !vq_base_valid(NUM, 0x10000, false));
}

/* A device that missed the driver's wish before its time calls once, whatever event the driver is waiting for. */
static void first_call(void)
{
	struct vq_chain chain;

	open_ring(NUM, true, VQ_PACKED_START);
	event_store(b.driver.packed.driver_event, event_value(EVENT_DESC, CURSOR_WRAP | 5));
	for (int i = 0; i < 2; i++) {
		CHECK(add(1, 0, 0) >= 0 && vq_driver_publish(&b.driver) == !i && bench_pop(&b, &chain, 1) == 1);
		CHECK(vq_device_push(&b.device, &(struct vq_used){ 0, chain.head }, 1) == !i);
	}
	bench_close(&b);
}

/* The largest ring, twice around, in batches that do not divide it. */
static void largest(void)
{
	enum { BATCH = 1000 };
	static struct vq_chain chains[BATCH];
	static struct vq_done done[BATCH];
	static struct vq_used used[BATCH];

	open_ring(VRING_MAX_NUM, true, VQ_PACKED_START);
	for (int round = 0; round < 70; round++) {
		bool due = round == 0 || round == 65; /* cursors come back after two laps, to an event of long ago */

		for (uint64_t i = 0; i < BATCH; i++)
			CHECK(add(1, 0, i) >= 0);
		CHECK(vq_driver_publish(&b.driver) == due && bench_pop(&b, chains, BATCH) == BATCH);
		for (uint64_t i = 0; i < BATCH; i++)
			used[i] = (struct vq_used){ 0, chains[i].head };
		CHECK(vq_device_push(&b.device, used, BATCH) == due);
		CHECK(vq_driver_reap(&b.driver, done, BATCH) == BATCH && done[BATCH - 1].token == BATCH - 1);
	}
	CHECK(b.device.next_avail == (CURSOR_WRAP | (70 * BATCH - 2 * VRING_MAX_NUM)));
	while (b.driver.free)
		CHECK(add(1, 0, 0) >= 0);
	CHECK(add(1, 0, 0) == -ENOSPC && b.driver.next_avail == (b.device.next_avail ^ CURSOR_WRAP));
	CHECK(vq_driver_publish(&b.driver) == 0);
	for (uint32_t popped = 0; popped < VRING_MAX_NUM;) {
		size_t count = bench_pop(&b, chains, BATCH);

		CHECK(count > 0);
		popped += (uint32_t)count;
	}
	CHECK(bench_pop(&b, chains, 1) == 0 && b.device.fault.code == VQ_OK && b.device.in_flight == VRING_MAX_NUM);
	bench_close(&b);
}

static void refused(void)
{
	static uint8_t area[4096] __attribute__((aligned(64)));
	struct vq_driver_config driver = { .area = area, .num = 6, .base = VQ_PACKED_START, .packed = true };
	struct vq_device_config device = { .desc = 0, .avail = 256, .used = 512, .num = 6, .base = VQ_PACKED_START };
	struct iova_map map;
	struct vq_driver vr;
	struct vq_device vq;

	CHECK(vq_driver_init(&vr, &driver) == 0);
	vq_driver_destroy(&vr);
	driver.base = UINT32_C(0x8001) << 16 | 0x8000; /* nothing can be in flight yet */
	CHECK(vq_driver_init(&vr, &driver) == -EINVAL);
	driver.base = UINT32_C(0x8006) << 16 | 0x8006;
	CHECK(vq_driver_init(&vr, &driver) == -EINVAL);
	driver.base = VQ_PACKED_START;
	for (uint32_t num = 0; num <= VRING_MAX_NUM + 1; num += VRING_MAX_NUM + 1) {
		driver.num = num;
		CHECK(vq_driver_init(&vr, &driver) == -EINVAL && !vq_num_valid(num, true));
	}

	iova_map_init(&map);
	device.map = &map;
	CHECK(vq_device_init(&vq, &device) == -EINVAL); /* 6 is no size, and the base no index, of a split ring */
	device.packed = true;
	CHECK(iova_map_add(&map, 0, 256, area, IOVA_RO) == 0 && iova_map_add(&map, 256, 256, area + 256, IOVA_RO) == 0);
	CHECK(iova_map_add(&map, 512, 4, area + 512, IOVA_WO) == 0);
	CHECK(vq_device_init(&vq, &device) == -EFAULT && vq.fault.value == 0); /* used descriptors are written */
	CHECK(iova_map_remove(&map, 0, 256) == 1 && iova_map_add(&map, 0, 6 * 16, area, IOVA_RW) == 0);
	CHECK(vq_device_init(&vq, &device) == 0);
	vq_device_destroy(&vq);
	for (int i = 0; i < 3; i++) {
		struct vq_device_config odd = device;

		*(i == 0 ? &odd.desc : i == 1 ? &odd.avail : &odd.used) += i == 0 ? 8 : 2;
		CHECK(vq_device_init(&vq, &odd) == -EINVAL);
	}
	device.num = 7; /* one descriptor more than is mapped */
	CHECK(vq_device_init(&vq, &device) == -EFAULT && vq.fault.value == 0);
	device.num = 6;
	device.used = 516;
	CHECK(vq_device_init(&vq, &device) == -EFAULT && vq.fault.value == 516);
	iova_map_destroy(&map);
}

int main(void)
{
	words();
	arithmetic();
	events();
	bases();
	first_call();
	largest();
	refused();
	return 0;
}
