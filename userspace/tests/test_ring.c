// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* Both ends on one ring of either format, one thread: data, tokens, index wrap-around, notification decisions. */
#include <errno.h>

#include "test.h"

/* A long run past the 16-bit indices: random chains, completed out of order, all data and tokens checked. */
static void long_run(uint64_t seed, uint32_t num, uint32_t table_entries, bool event_idx, bool packed)
{
	enum { MOST = 8 };
	static struct bench b;
	struct vq_chain chains[64], held[64];
	uint8_t bytes[64 * 16];
	size_t waiting = 0;
	uint64_t added = 0, reaped = 0;
	uint8_t seen[64] = { 0 };

	bench_open(&b, num, table_entries, event_idx, base_at((uint16_t)next_random(&seed), num, packed), packed);
	while (reaped < 70000) {
		uint32_t most = num < MOST ? num : MOST;
		struct vq_buffer buffers[MOST];
		struct vq_used used[64];
		struct vq_done done[64];
		size_t count, pushed = 0;

		for (uint32_t tries = random_below(&seed, 6); tries; tries--) {
			size_t readable = 1 + random_below(&seed, most), writable = random_below(&seed, most);
			uint64_t token = added % 64;
			uint32_t block = (uint32_t)token * (MOST * 2 * 64);
			int head;

			if (readable + writable > most)
				writable = most - readable;
			if (seen[token]) /* that token's memory is still in use */
				break;
			for (size_t i = 0; i < readable + writable; i++) {
				uint32_t at = block + (uint32_t)i * 64;

				buffers[i] = (struct vq_buffer){ DATA_IOVA + at, 1 + random_below(&seed, 64) };
				memset(b.data + at, (int)(token + i), 64);
			}
			head = vq_driver_add(&b.driver, buffers, readable, writable, token);
			CHECK(head >= 0 || head == -ENOSPC);
			if (head < 0)
				break;
			seen[token] = 1;
			added++;
		}
		CHECK(vq_driver_publish(&b.driver) >= 0);
		count = bench_pop(&b, chains, 64 - waiting);
		for (size_t i = 0; i < count; i++) {
			uint64_t size = chain_gather(readable_part(&chains[i]), 0, bytes, sizeof(bytes));
			uint8_t token = bytes[0];

			CHECK(size == chains[i].readable && seen[token] == 1);
			memset(bytes, 0x80 | token, sizeof(bytes));
			size = chain_scatter(writable_part(&chains[i]), 0, bytes, sizeof(bytes));
			CHECK(size == chains[i].writable);
			held[waiting++] = chains[i];
		}
		while (waiting && random_below(&seed, 4)) { /* any order */
			size_t pick = random_below(&seed, (uint32_t)waiting);

			used[pushed++] = (struct vq_used){ (uint32_t)held[pick].writable, held[pick].head };
			held[pick] = held[--waiting];
		}
		CHECK(vq_device_push(&b.device, used, pushed) >= 0);
		count = vq_driver_reap(&b.driver, done, 64);
		CHECK(count == pushed);
		for (size_t i = 0; i < count; i++) {
			CHECK(done[i].token < 64 && seen[done[i].token] == 1);
			seen[done[i].token] = 0;
		}
		reaped += count;
		CHECK(b.driver.in_flight == added - reaped && b.device.in_flight == waiting);
	}
	CHECK(b.driver.fault.code == VQ_OK && b.device.fault.code == VQ_OK);
	bench_close(&b);
}

/* Adds one chain of one buffer and publishes it; whether a kick is due. */
static int post(struct bench *b)
{
	CHECK(vq_driver_add(&b->driver, &(struct vq_buffer){ DATA_IOVA, 8 }, 0, 1, 0) >= 0);
	return vq_driver_publish(&b->driver);
}

static int serve(struct bench *b)
{
	struct vq_chain chain;

	CHECK(bench_pop(b, &chain, 1) == 1);
	return vq_device_push(&b->device, &(struct vq_used){ 8, chain.head }, 1);
}

static void notifications(bool event_idx, bool packed)
{
	static struct bench b;
	struct vq_done done[8];

	bench_open(&b, 8, 0, event_idx, base_at(65534, 8, packed), packed);
	CHECK(vq_driver_publish(&b.driver) == 0); /* nothing added: nothing to kick for */
	CHECK(post(&b) == 1); /* a fresh device is armed */
	CHECK(post(&b) == !event_idx); /* the event was passed once; flags ask every time */
	CHECK(vq_device_enable_kick(&b.device) == 1); /* two are waiting: no sleep */
	CHECK(serve(&b) == 1);
	CHECK(serve(&b) == !event_idx); /* the driver asked for the first completion */
	CHECK(vq_device_enable_kick(&b.device) == 0);
	CHECK(vq_driver_enable_call(&b.driver) == 1 && vq_driver_reap(&b.driver, done, 8) == 2);
	CHECK(vq_driver_enable_call(&b.driver) == 0);
	vq_device_disable_kick(&b.device);
	CHECK(post(&b) == 0 && post(&b) == 0);
	CHECK(vq_device_enable_kick(&b.device) == 1);
	CHECK(serve(&b) == 1);
	vq_driver_disable_call(&b.driver);
	CHECK(serve(&b) == 0);
	CHECK(vq_driver_enable_call(&b.driver) == 1 && vq_driver_reap(&b.driver, done, 8) == 2);
	CHECK(vq_device_push(&b.device, NULL, 0) == 0);
	bench_close(&b);
}

/* Too few chains go back and wait for more; kicks are asked for what comes behind them. */
static void put_back(uint32_t num, bool event_idx, bool packed)
{
	static struct bench b;
	struct vq_buffer pair[2] = { { DATA_IOVA, 8 }, { DATA_IOVA + 8, 8 } };
	struct vq_chain chains[4];
	struct vq_done done[4];
	uint16_t heads[4];

	bench_open(&b, num, 0, event_idx, base_at((uint16_t)(num - 2), num, packed), packed);
	for (unsigned int round = 0; round < 3 * num; round++) {
		uint32_t base = vq_device_base(&b.device);

		CHECK(vq_driver_add(&b.driver, pair, 1, 1, round) >= 0 && post(&b) >= 0);
		CHECK(bench_pop(&b, chains, 4) == 2 && chains[0].readable == 8 && chains[1].readable == 0);
		heads[0] = chains[0].head;
		heads[1] = chains[1].head;
		CHECK(vq_device_put_back(&b.device, heads, 2) == 0 && b.device.in_flight == 0);
		CHECK(vq_device_put_back(&b.device, heads, 1) == -EINVAL);
		CHECK(vq_device_base(&b.device) == base && b.device.taken == 0);
		CHECK(vq_device_enable_kick(&b.device) == 0);
		CHECK(post(&b) == 1); /* the kick that was asked for */
		CHECK(vq_device_enable_kick(&b.device) == 1);
		CHECK(bench_pop(&b, chains, 4) == 3);
		for (size_t i = 0; i < 2; i++)
			CHECK(chains[i].head == heads[i]);
		CHECK(vq_device_put_back(&b.device, &chains[2].head, 1) == 0 && b.device.in_flight == 2);
		for (size_t i = 0; i < 2; i++)
			CHECK(vq_device_push(&b.device, &(struct vq_used){ 8, chains[i].head }, 1) >= 0);
		CHECK(vq_device_enable_kick(&b.device) == 0); /* the third lies there still, known */
		CHECK(bench_pop(&b, chains, 4) == 1 && vq_device_push(&b.device, &(struct vq_used){ 8, chains[0].head }, 1) >= 0);
		CHECK(vq_driver_reap(&b.driver, done, 4) == 3 && done[0].token == round && done[2].token == 0);
	}
	bench_close(&b);
}

static void limits(bool packed)
{
	static struct bench b;
	struct vq_buffer buffers[9], big[2] = { { DATA_IOVA, UINT32_MAX }, { DATA_IOVA, 2 } };
	struct vq_chain chains[8];

	for (size_t i = 0; i < 9; i++)
		buffers[i] = (struct vq_buffer){ DATA_IOVA + i * 16, 16 };
	bench_open(&b, 8, 0, false, base_at(0, 8, packed), packed);
	CHECK(vq_driver_add(&b.driver, buffers, 0, 0, 0) == -EINVAL);
	CHECK(vq_driver_add(&b.driver, buffers, 9, 0, 0) == -EINVAL);
	CHECK(vq_driver_add(&b.driver, big, 1, 1, 0) == -EINVAL);
	CHECK(vq_driver_add(&b.driver, &(struct vq_buffer){ DATA_IOVA, 0 }, 1, 0, 0) == -EINVAL);
	CHECK(vq_driver_add(&b.driver, buffers, 4, 4, 0) >= 0 && b.driver.free == 0);
	CHECK(vq_driver_add(&b.driver, buffers, 1, 0, 0) == -ENOSPC);
	CHECK(vq_driver_publish(&b.driver) == 1);
	CHECK(bench_pop(&b, chains, 8) == 1 && chains[0].readable == 64 && chains[0].writable == 64);
	CHECK(vq_device_push(&b.device, (struct vq_used[]){ { 0, chains[0].head }, { 0, chains[0].head } }, 2) == -EINVAL);
	CHECK(b.device.used_idx == (packed ? CURSOR_WRAP : 1) && b.device.in_flight == 0);
	bench_close(&b);

	/* One descriptor per chain, tables longer than the ring, and pieces that fill up: the rest stays for the next pop. */
	bench_open(&b, 4, 9, false, base_at(0, 4, packed), packed);
	for (int i = 0; i < 4; i++)
		CHECK(vq_driver_add(&b.driver, buffers, 5, 4, 0) >= 0);
	CHECK(vq_driver_publish(&b.driver) == 1);
	b.pieces.capacity = 20;
	CHECK(bench_pop(&b, chains, 8) == 2 && bench_pop(&b, chains, 8) == 2 && bench_pop(&b, chains, 8) == 0);
	CHECK(b.device.fault.code == VQ_OK);
	bench_close(&b);
}

/* The ring's memory moves to another place, then goes away. */
static void remapped(bool packed)
{
	static struct bench b;
	struct vq_layout layout = vq_layout(8, 0, packed);
	struct vq_chain chain;
	uint8_t *elsewhere = malloc(layout.size);

	bench_open(&b, 8, 0, true, base_at(0, 8, packed), packed);
	CHECK(post(&b) == 1);
	memcpy(elsewhere, b.area, layout.size);
	CHECK(iova_map_remove(&b.map, RING_IOVA, layout.size) == 1);
	CHECK(iova_map_add(&b.map, RING_IOVA, layout.size, elsewhere, IOVA_RW) == 0);
	memset(b.area, 0xff, layout.size);
	CHECK(bench_pop(&b, &chain, 1) == 1);
	iova_map_clear(&b.map);
	free(elsewhere);
	CHECK(vq_device_push(&b.device, &(struct vq_used){ 0, chain.head }, 1) == -EPROTO);
	CHECK(b.device.fault.code == VQ_RING_UNMAPPED && bench_pop(&b, &chain, 1) == 0);
	CHECK(vq_device_enable_kick(&b.device) == -EPROTO);
	bench_close(&b);
}

static void refused(void)
{
	static uint8_t area[4096] __attribute__((aligned(64)));
	struct vq_driver_config driver = { .area = area, .iova = 0, .num = 8 };
	struct vq_device_config device = { .desc = 0, .avail = 256, .used = 512, .num = 8 };
	struct iova_map map;
	struct vq_driver vr;
	struct vq_device vq;

	for (uint32_t num = 0; num < 70000; num += num < 40 ? 1 : 997) {
		bool power = num && (num & (num - 1)) == 0;

		CHECK(vring_num_valid(num) == (power && num <= 32768));
	}
	driver.num = 6;
	CHECK(vq_driver_init(&vr, &driver) == -EINVAL);
	driver.num = 8;
	driver.area = area + 8;
	CHECK(vq_driver_init(&vr, &driver) == -EINVAL);
	driver.area = area;
	driver.iova = 8;
	CHECK(vq_driver_init(&vr, &driver) == -EINVAL);

	iova_map_init(&map);
	device.map = &map;
	CHECK(vq_device_init(&vq, &device) == -EFAULT && vq.fault.code == VQ_RING_UNMAPPED);
	CHECK(iova_map_add(&map, 0, 512, area, IOVA_RO) == 0);
	CHECK(iova_map_add(&map, 512, 512, area + 512, IOVA_RO) == 0);
	CHECK(vq_device_init(&vq, &device) == -EFAULT && vq.fault.value == 512); /* used ring not writable */
	device.avail = 504;
	CHECK(iova_map_remove(&map, 512, 512) == 1 && iova_map_add(&map, 512, 512, area + 1024, IOVA_RW) == 0);
	CHECK(vq_device_init(&vq, &device) == -EFAULT && vq.fault.value == 504); /* in two pieces */
	for (int i = 0; i < 3; i++) {
		struct vq_device_config odd = device;

		*(i == 0 ? &odd.desc : i == 1 ? &odd.avail : &odd.used) += i == 0 ? 8 : i == 1 ? 1 : 2;
		CHECK(vq_device_init(&vq, &odd) == -EINVAL);
	}
	device.avail = 256;
	CHECK(vq_device_init(&vq, &device) == 0);
	vq_device_destroy(&vq);
	device.avail = 512 - (4 + 2 * 8); /* up to the region's end: no room for the event index */
	CHECK(vq_device_init(&vq, &device) == 0);
	vq_device_destroy(&vq);
	device.event_idx = true;
	CHECK(vq_device_init(&vq, &device) == -EFAULT);
	iova_map_destroy(&map);
}

int main(void)
{
	for (int mode = 0; mode < 4; mode++) {
		long_run(11, 64, 0, mode & 1, mode & 2);
		long_run(12, 8, 0, mode & 1, mode & 2);
		long_run(13, 16, 8, mode & 1, mode & 2);
		long_run(14, 1, 4, mode & 1, mode & 2);
		notifications(mode & 1, mode & 2);
		put_back(4, mode & 1, mode & 2);
		put_back(8, mode & 1, mode & 2);
	}
	for (int event_idx = 0; event_idx < 2; event_idx++) { /* sizes that a packed ring alone may have */
		long_run(15, 7, 0, event_idx, true);
		long_run(16, 48, 8, event_idx, true);
	}
	for (int packed = 0; packed < 2; packed++) {
		limits(packed);
		remapped(packed);
	}
	refused();
	return 0;
}
