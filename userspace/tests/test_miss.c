// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * Queues that wait for mappings: nothing is consumed, lost or done twice, whatever is mapped and unmapped when; what no
 * mapping can cure breaks them as ever.
 */
#include <errno.h>

#include "test.h"

enum { PAGE = IOVA_PAGE, PAGES = DATA_SIZE / PAGE, NUM = 16, TABLE = 8, CHAINS = 5000 };

static struct bench b;
static bool mapped[PAGES];

/* Ring and data, nothing of it mapped; the data page by page later, and not in the order of their IOVAs. */
static void open_unmapped(uint32_t num, uint32_t tables, bool event_idx, bool packed, bool wait)
{
	struct vq_device_config config;

	bench_open(&b, num, tables, event_idx, base_at(65530, num, packed), packed);
	config = b.device.config;
	config.wait = wait;
	vq_device_destroy(&b.device);
	iova_map_clear(&b.map);
	memset(mapped, 0, sizeof(mapped));
	CHECK(vq_device_init(&b.device, &config) == (wait ? 0 : -EFAULT));
}

static void map_ring(void)
{
	CHECK(iova_map_add(&b.map, RING_IOVA, b.driver.layout.size, b.area, IOVA_RW) == 0);
}

static uint8_t *page_host(size_t page)
{
	return b.data + (page ^ 5) * PAGE;
}

static void map_page(size_t page, uint32_t perm)
{
	CHECK(iova_map_add(&b.map, DATA_IOVA + page * PAGE, PAGE, page_host(page), perm) == 0);
	mapped[page] = true;
}

static void unmap_page(size_t page)
{
	CHECK(iova_map_remove(&b.map, DATA_IOVA + page * PAGE, PAGE) == 1);
	mapped[page] = false;
}

/* Serves the misses that there are. */
static size_t answer(void)
{
	size_t count = vq_device_misses(&b.device);

	for (size_t i = 0; i < count; i++) {
		uint64_t iova = b.device.misses[i].iova;

		if (iova < DATA_IOVA) {
			if (b.map.count == 0 || b.map.regions[0].iova != RING_IOVA)
				map_ring();
		} else if (!mapped[(iova - DATA_IOVA) / PAGE]) {
			map_page((iova - DATA_IOVA) / PAGE, IOVA_RW);
		}
	}
	CHECK(vq_device_misses(&b.device) == 0);
	return count;
}

static void post(const struct vq_buffer *buffers, size_t readable, size_t writable)
{
	CHECK(vq_driver_add(&b.driver, buffers, readable, writable, 0) >= 0 && vq_driver_publish(&b.driver) >= 0);
}

static void missing(void)
{
	static uint8_t memory[4 * PAGE];
	struct iova_map map;
	uint64_t at[8];

	iova_map_init(&map);
	CHECK(iova_missing(&map, 0x1234, 0x1000, IOVA_RO, at, 8) == 2 && at[0] == 0x1234 && at[1] == 0x2000);
	CHECK(iova_missing(&map, 0x1234, 0x10000, IOVA_RO, at, 3) == 3 && at[2] == 0x3000);
	CHECK(iova_missing(&map, 0x1000, 0, IOVA_RO, at, 8) == 0);
	CHECK(iova_missing(&map, UINT64_MAX, 1, IOVA_RO, at, 8) == 1 && at[0] == UINT64_MAX);
	CHECK(iova_missing(&map, UINT64_MAX, 2, IOVA_RO, at, 8) == 0); /* wraps */
	CHECK(iova_map_add(&map, 0x2000, 0x1000, memory, IOVA_RO) == 0);
	CHECK(iova_map_add(&map, 0x3800, 0x100, memory, IOVA_RW) == 0);
	CHECK(iova_missing(&map, 0x2000, 0x1000, IOVA_RO, at, 8) == 0);
	CHECK(iova_missing(&map, 0x2ffe, 2, IOVA_RW, at, 8) == 1 && at[0] == 0x2ffe);
	CHECK(iova_missing(&map, 0x2000, 0x2000, IOVA_RO, at, 8) == 1 && at[0] == 0x3000);
	CHECK(iova_missing(&map, 0x3880, 0x1000, IOVA_WO, at, 8) == 2 && at[0] == 0x3900 && at[1] == 0x4000);
	iova_map_destroy(&map);
}

/* One chain, its ring and table and buffers missing in turn; then what is taken away in between. */
static void in_turn(uint32_t tables, bool event_idx, bool packed)
{
	struct vq_buffer buffers[] = { { DATA_IOVA + 10, 100 }, { DATA_IOVA + 2 * PAGE - 8, 16 }, { DATA_IOVA + 9 * PAGE, PAGE } };
	struct vq_chain chain;
	struct vq_done done;

	open_unmapped(NUM, tables, event_idx, packed, true);
	post(buffers, 1, 2);
	CHECK(bench_pop(&b, &chain, 1) == 0 && vq_device_enable_kick(&b.device) == 0);
	vq_device_disable_kick(&b.device);
	CHECK(vq_device_push(&b.device, NULL, 0) == 0); /* nothing to hand back */
	CHECK(vq_device_misses(&b.device) == 3 && b.device.misses[0].iova == b.driver.config.iova + b.driver.layout.desc);
	CHECK(b.device.misses[0].perm == (packed ? IOVA_RW : IOVA_RO) && b.device.misses[2].perm == IOVA_WO);
	map_ring();
	CHECK(vq_device_misses(&b.device) == 0);

	/* All that the chain misses, at once; half of it does not help. */
	CHECK(bench_pop(&b, &chain, 1) == 0 && b.pieces.used == 0 && vq_device_enable_kick(&b.device) == 0);
	CHECK(vq_device_misses(&b.device) == 4);
	CHECK(b.device.misses[0].iova == DATA_IOVA + 10 && b.device.misses[0].perm == IOVA_RO);
	CHECK(b.device.misses[1].iova == DATA_IOVA + 2 * PAGE - 8 && b.device.misses[1].perm == IOVA_WO);
	CHECK(b.device.misses[2].iova == DATA_IOVA + 2 * PAGE && b.device.misses[3].iova == DATA_IOVA + 9 * PAGE);
	map_page(0, IOVA_RO);
	map_page(1, IOVA_RO); /* written to: not enough */
	CHECK(vq_device_misses(&b.device) == 3 && bench_pop(&b, &chain, 1) == 0);
	unmap_page(1);
	map_page(1, IOVA_WO);
	map_page(2, IOVA_RW);
	map_page(9, IOVA_RW);
	CHECK(vq_device_misses(&b.device) == 0 && vq_device_enable_kick(&b.device) == 1);
	CHECK(bench_pop(&b, &chain, 1) == 1 && chain.readable == 100 && chain.writable == 16 + PAGE);
	CHECK(vq_device_misses(&b.device) == 0 && vq_device_enable_kick(&b.device) == 0);

	/* The ring goes away with a chain in hand, which is handed back later. */
	CHECK(iova_map_remove(&b.map, RING_IOVA, b.driver.layout.size) == 1);
	CHECK(vq_device_push(&b.device, &(struct vq_used){ 7, chain.head }, 1) == -EAGAIN);
	CHECK(b.device.in_flight == 1 && vq_driver_reap(&b.driver, &done, 1) == 0 && vq_device_misses(&b.device) == 3);
	map_ring();
	CHECK(vq_device_push(&b.device, &(struct vq_used){ 7, chain.head }, 1) == 1);
	CHECK(vq_driver_reap(&b.driver, &done, 1) == 1 && done.written == 7 && b.device.in_flight == 0);
	bench_close(&b);
}

/* More is missing than is noted at once. */
static void many(bool packed)
{
	struct vq_buffer buffers[] = { { DATA_IOVA, 100 * PAGE }, { DATA_IOVA + 100 * PAGE, 50 * PAGE } };
	struct vq_chain chain;
	size_t rounds = 0;

	open_unmapped(NUM, TABLE, false, packed, true);
	post(buffers, 1, 1);
	while (bench_pop(&b, &chain, 1) == 0)
		CHECK(answer() <= VQ_MISSES && ++rounds < 10);
	CHECK(rounds == 1 + 3 && chain.readable == 100 * PAGE && chain.writable == 50 * PAGE);
	bench_close(&b);
}

static void breaking(bool packed)
{
	struct vq_buffer wraps[] = { { DATA_IOVA, 8 }, { UINT64_MAX - 3, 8 } }, plain = { DATA_IOVA + 8, 8 };
	struct vq_chain chain;
	char text[160];

	open_unmapped(NUM, 0, false, packed, false);
	bench_close(&b);

	/* No mapping can serve a range that wraps, whatever else is missing. */
	open_unmapped(NUM, 0, false, packed, true);
	map_ring();
	post(wraps, 2, 0);
	CHECK(bench_pop(&b, &chain, 1) == 0 && b.device.fault.code == VQ_CHAIN_UNMAPPED);
	CHECK(vq_device_misses(&b.device) == 0);
	bench_close(&b);

	/* Refused: the fault of a queue that does not wait, with the address that was refused. */
	open_unmapped(NUM, 0, false, packed, true);
	vq_device_refuse(&b.device, RING_IOVA);
	CHECK(b.device.fault.code == VQ_RING_UNMAPPED && bench_pop(&b, &chain, 1) == 0 && vq_device_misses(&b.device) == 0);
	CHECK(vq_device_enable_kick(&b.device) == -EPROTO && vq_device_push(&b.device, NULL, 0) == -EPROTO);
	bench_close(&b);
	open_unmapped(NUM, 0, false, packed, true);
	map_ring();
	post(&plain, 0, 1);
	CHECK(bench_pop(&b, &chain, 1) == 0);
	vq_device_refuse(&b.device, DATA_IOVA + 8);
	CHECK(b.device.fault.code == VQ_CHAIN_UNMAPPED && b.device.fault.value == DATA_IOVA + 8);
	CHECK(vq_fault_describe(&b.device.fault, text, sizeof(text)) > 0 && strstr(text, "0x40000008 is not mapped"));
	bench_close(&b);

	/* An area in two pieces is mapped, and of no use. */
	open_unmapped(NUM, 0, false, packed, true);
	CHECK(iova_map_add(&b.map, RING_IOVA, 64, b.data, IOVA_RW) == 0);
	CHECK(iova_map_add(&b.map, RING_IOVA + 64, PAGE, b.data + PAGE, IOVA_RW) == 0);
	CHECK(bench_pop(&b, &chain, 1) == 0 && b.device.fault.code == VQ_RING_UNMAPPED);
	bench_close(&b);
}

/* Random chains over random pages, all of it mapped only when asked for, and unmapped at random. */
static void random_run(uint64_t seed, uint32_t tables, bool event_idx, bool packed)
{
	uint64_t added = 0, served = 0, reaped = 0, waits = 0;

	open_unmapped(NUM, tables, event_idx, packed, true);
	while (reaped < CHAINS) {
		struct vq_chain chains[NUM];
		struct vq_done done[NUM];
		size_t count;

		while (added - reaped < NUM && random_below(&seed, 3)) {
			struct vq_buffer buffers[2];
			size_t page = added % (PAGES / 4) * 4;
			uint64_t at = DATA_IOVA + page * PAGE + PAGE - 4;

			buffers[0] = (struct vq_buffer){ at, 8 }; /* over a page's end */
			buffers[1] = (struct vq_buffer){ at + 2 * PAGE, 8 };
			memset(page_host(page) + PAGE - 4, (int)added, 4);
			memset(page_host(page + 1), (int)added, 4);
			if (vq_driver_add(&b.driver, buffers, 1, 1, added) < 0)
				break;
			added++;
		}
		CHECK(vq_driver_publish(&b.driver) >= 0);
		count = bench_pop(&b, chains, 1 + random_below(&seed, NUM));
		if (count == 0 && answer()) {
			waits++;
			continue;
		}
		for (size_t i = 0; i < count; i++, served++) {
			uint8_t bytes[8], due = (uint8_t)served;

			CHECK(chain_gather(readable_part(&chains[i]), 0, bytes, 8) == 8);
			for (size_t k = 0; k < 8; k++)
				CHECK(bytes[k] == due);
			CHECK(chain_scatter(writable_part(&chains[i]), 0, bytes, 8) == 8);
		}
		if (!random_below(&seed, 4) && count && b.map.regions[0].iova == RING_IOVA)
			CHECK(iova_map_remove(&b.map, RING_IOVA, b.driver.layout.size) == 1);
		for (size_t i = 0; i < count; i++) {
			struct vq_used used = { 8, chains[i].head };
			int pushed = vq_device_push(&b.device, &used, 1);

			CHECK(pushed >= 0 || pushed == -EAGAIN);
			if (pushed < 0) {
				CHECK(answer() == 3);
				CHECK(vq_device_push(&b.device, &used, 1) >= 0);
			}
		}
		for (size_t page = random_below(&seed, 8); page < PAGES; page += 1 + random_below(&seed, 16))
			if (mapped[page])
				unmap_page(page);
		count = vq_driver_reap(&b.driver, done, NUM);
		for (size_t i = 0; i < count; i++, reaped++)
			CHECK(done[i].token == reaped && done[i].written == 8);
		CHECK(b.device.fault.code == VQ_OK && b.driver.fault.code == VQ_OK);
	}
	CHECK(waits > 100);
	bench_close(&b);
}

int main(void)
{
	missing();
	for (int packed = 0; packed < 2; packed++) {
		for (int event_idx = 0; event_idx < 2; event_idx++) {
			in_turn(0, event_idx, packed);
			random_run(5, 0, event_idx, packed);
			random_run(6, TABLE, event_idx, packed);
		}
		many(packed);
		breaking(packed);
	}
	return 0;
}
