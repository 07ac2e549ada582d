// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* VIRTIO_F_IN_ORDER: chains given back in any order come back in theirs, by as few used entries as drivers bear. */
#include <errno.h>

#include "test.h"

enum { NUM = 16 };

static struct bench b;

static void open_ring(bool packed, uint32_t table_entries, uint32_t num)
{
	bench_start(&b, num, table_entries, true, base_at((uint16_t)(num - 3), num, packed), packed, true);
}

static int add(size_t readable, size_t writable, uint64_t token)
{
	struct vq_buffer buffers[4];

	for (size_t i = 0; i < 4; i++)
		buffers[i] = (struct vq_buffer){ DATA_IOVA + 64 * i, 10 };
	return vq_driver_add(&b.driver, buffers, readable, writable, token);
}

static size_t push(uint16_t head, uint32_t written)
{
	struct vq_done done[NUM];

	CHECK(vq_device_push(&b.device, &(struct vq_used){ written, head }, 1) >= 0);
	return vq_driver_reap(&b.driver, done, NUM);
}

/* The id in the used entry where the cursor or index `at` stands. */
static uint32_t used_id(uint16_t at, bool packed)
{
	if (packed)
		return ring16_load(&packed_at(&b.driver.packed, at)->id, memory_order_relaxed);
	return le32toh(atomic_load(&used_slot(&b.driver.ring, at)[0]));
}

/* One entry for all chains that have nothing to write, and the one behind them; the others have their own. */
static void entries(bool packed)
{
	struct vq_chain chains[6];
	struct vq_done done[6];
	struct vq_used used[6];
	uint16_t at, clear = 0xdead;

	open_ring(packed, 0, NUM);
	at = b.driver.last_used;
	for (size_t i = 0; i < 6; i++) /* out out in out in out */
		CHECK(add(1, i == 2 || i == 4, i) >= 0);
	CHECK(vq_driver_publish(&b.driver) == 1 && bench_pop(&b, chains, 6) == 6);
	for (size_t i = 0; i < 6; i++)
		used[5 - i] = (struct vq_used){ chains[i].writable ? (uint32_t)i : 0, chains[i].head };
	if (!packed)
		atomic_store(&used_slot(&b.driver.ring, (uint16_t)(at + 1))[0], htole32(clear));
	CHECK(vq_device_push(&b.device, used, 6) == 1 && b.device.in_flight == 0);
	CHECK(used_id(at, packed) == chains[2].head);
	if (!packed) /* skipped: what was there stands there still */
		CHECK(used_id((uint16_t)(at + 1), packed) == clear && used_id((uint16_t)(at + 3), packed) == chains[4].head);
	CHECK(vq_driver_reap(&b.driver, done, 1) == 1 && vq_driver_enable_call(&b.driver) == 1); /* in the middle of a batch */
	CHECK(vq_driver_reap(&b.driver, done + 1, 5) == 5 && b.driver.in_flight == 0 && b.driver.free == NUM);
	for (size_t i = 0; i < 6; i++)
		CHECK(done[i].token == i && done[i].written == (i == 2 || i == 4 ? i : 0));
	CHECK(vq_driver_enable_call(&b.driver) == 0);
	bench_close(&b);
}

static void held(bool packed)
{
	struct vq_chain chains[3];
	uint16_t heads[3];

	open_ring(packed, 0, NUM);
	for (size_t i = 0; i < 3; i++)
		CHECK(add(1, 1, i) >= 0);
	CHECK(vq_driver_publish(&b.driver) == 1 && bench_pop(&b, chains, 3) == 3);
	for (size_t i = 0; i < 3; i++)
		heads[i] = chains[i].head;
	CHECK(push(heads[2], 5) == 0 && b.device.in_flight == 3);
	CHECK(vq_device_push(&b.device, &(struct vq_used){ 5, heads[2] }, 1) == -EINVAL); /* it was given back */
	CHECK(vq_device_put_back(&b.device, heads + 2, 1) == -EINVAL);
	CHECK(push(heads[0], 3) == 1 && b.device.in_flight == 2);
	CHECK(push(heads[1], 4) == 2 && b.device.in_flight == 0);
	CHECK(b.driver.fault.code == VQ_OK && b.device.fault.code == VQ_OK);
	bench_close(&b);
}

/* Random chains, given back in random order; every one comes back in its place, with its length. */
static void shuffled(bool packed, uint32_t table_entries, uint32_t num)
{
	struct vq_used open[NUM];
	uint32_t written[NUM];
	struct vq_done done[NUM];
	struct vq_chain chain;
	uint64_t seed = 77, added = 0, reaped = 0;
	size_t count = 0, more;

	open_ring(packed, table_entries, num);
	while (reaped < 5000) {
		uint32_t ins = random_below(&seed, 3), outs = random_below(&seed, 3);

		switch (random_below(&seed, 4)) {
		case 0:
			if (ins + outs && added - reaped < NUM && add(ins, outs, added) >= 0)
				added++;
			CHECK(vq_driver_publish(&b.driver) >= 0);
			break;
		case 1:
			if (count < NUM && bench_pop(&b, &chain, 1) == 1) {
				open[count++] = (struct vq_used){ random_below(&seed, (uint32_t)chain.writable + 1), chain.head };
				written[chain.head] = open[count - 1].written;
			}
			break;
		case 2:
			if (count) {
				size_t at = random_below(&seed, (uint32_t)count);

				CHECK(vq_device_push(&b.device, &open[at], 1) >= 0);
				open[at] = open[--count];
			}
			break;
		default:
			more = vq_driver_reap(&b.driver, done, 1 + random_below(&seed, NUM));
			for (size_t i = 0; i < more; i++)
				CHECK(done[i].token == reaped++ && done[i].written == written[done[i].head]);
		}
		CHECK(b.driver.fault.code == VQ_OK && b.device.fault.code == VQ_OK);
		CHECK(b.driver.free + (packed ? b.device.taken : 0) <= num && b.driver.in_flight == added - reaped);
	}
	bench_close(&b);
}

/* A device's entry must name one of the chains that the used index has passed. */
static void hostile(bool packed)
{
	struct vq_chain chains[4];
	struct vq_done done[4];

	for (uint32_t lie = 0; lie < 4; lie++) {
		uint32_t id;

		open_ring(packed, 0, NUM);
		for (size_t i = 0; i < 4; i++)
			CHECK(add(1, 0, i) >= 0);
		CHECK(vq_driver_publish(&b.driver) == 1 && bench_pop(&b, chains, 4) == 4);
		CHECK(vq_device_push(&b.device, &(struct vq_used){ 0, chains[0].head }, 1) >= 0);
		id = (uint32_t[]){ NUM, NUM - 1, chains[1].head, 0xffff }[lie];
		if (packed)
			ring16_store(&packed_at(&b.driver.packed, b.driver.last_used)->id, (uint16_t)id, memory_order_relaxed);
		else
			atomic_store(&used_slot(&b.driver.ring, b.driver.last_used)[0], htole32(id));
		if (packed && lie == 2) { /* nothing else on a packed ring says how far the device is */
			CHECK(vq_driver_reap(&b.driver, done, 4) == 2);
		} else {
			CHECK(vq_driver_reap(&b.driver, done, 4) == 0);
			CHECK(b.driver.fault.code == (lie == 1 ? VQ_USED_NOT_POSTED : lie == 2 ? VQ_USED_ORDER : VQ_USED_ID));
		}
		bench_close(&b);
	}
}

int main(void)
{
	for (int packed = 0; packed < 2; packed++) {
		entries(packed);
		held(packed);
		shuffled(packed, 0, NUM);
		shuffled(packed, 4, NUM);
		shuffled(packed, 0, 4);
		hostile(packed);
	}
	shuffled(true, 0, 7);
	shuffled(true, 4, 13);
	return 0;
}
