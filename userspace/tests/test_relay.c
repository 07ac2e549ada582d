// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* A driver, a relay, a device: all pairs of formats, chains that come back in any order, ends that lie. */
#include <errno.h>

#include "relay.h"
#include "test.h"

enum { NUM = 16, ELSEWHERE = 0x7000000 };

static struct bench driver, device; /* the ring in front of the relay, and the one behind it */
static struct iova_map places;
static struct relay relay;

static void open_both(bool front, bool behind, bool event_idx, uint32_t table, uint32_t base)
{
	bench_open(&driver, NUM, 4, event_idx, base, front);
	bench_open(&device, NUM, table, event_idx, behind ? VQ_PACKED_START : 0, behind);
	iova_map_init(&places);
	CHECK(iova_map_add(&places, DATA_IOVA, DATA_SIZE, (void *)(uintptr_t)ELSEWHERE, IOVA_RW) == 0);
	CHECK(iova_map_add(&device.map, ELSEWHERE, DATA_SIZE, driver.data, IOVA_RW) == 0);
	CHECK(relay_init(&relay, &driver.device, &device.driver, &places) == 0);
}

static void close_both(void)
{
	relay_destroy(&relay);
	iova_map_destroy(&places);
	bench_close(&driver);
	bench_close(&device);
}

static int post(uint64_t token, size_t readable, size_t writable)
{
	struct vq_buffer buffers[NUM];

	for (size_t i = 0; i < readable + writable; i++)
		buffers[i] = (struct vq_buffer){ .iova = DATA_IOVA + token % 64 * 4096 + i * 256, .length = 100 };
	return vq_driver_add(&driver.driver, buffers, readable, writable, token);
}

/* Moves until nothing is left to do at once; what fell due. */
static int move(bool take)
{
	int due = 0, now;

	do {
		now = relay_move(&relay, take);
		CHECK(now >= 0);
		due |= now;
	} while (now & RELAY_AGAIN);
	return due & ~RELAY_AGAIN;
}

/* Thousands of chains whose data says which one it was, completed in random order. A token is a place for its data. */
static void traffic(bool front, bool behind, bool event_idx, uint32_t table)
{
	uint64_t state = 99, posted = 0, got = 0, stamps[64] = { 0 };
	struct vq_chain held[NUM];
	size_t count = 0;

	open_both(front, behind, event_idx, table, base_at(front ? 5 : 0xfff0, NUM, front));
	while (got < 3000) {
		struct vq_done done[NUM];
		size_t n;

		while (random_below(&state, 4)) {
			uint64_t token = random_below(&state, 64), stamp = posted + 1;

			if (stamps[token])
				break;
			memcpy(driver.data + token * 4096, &stamp, sizeof(stamp));
			if (post(token, 1 + random_below(&state, 2), 1 + random_below(&state, 3)) < 0)
				break;
			stamps[token] = stamp;
			posted++;
		}
		CHECK(vq_driver_publish(&driver.driver) >= 0);
		move(true);
		n = bench_pop(&device, held + count, NUM - count);
		for (size_t i = count; i < count + n; i++) {
			uint64_t stamp;

			CHECK(chain_gather(readable_part(&held[i]), 0, &stamp, sizeof(stamp)) == sizeof(stamp));
			CHECK(chain_scatter(writable_part(&held[i]), 0, &stamp, sizeof(stamp)) == sizeof(stamp));
			held[i].readable = stamp;
		}
		count += n;
		while (count && random_below(&state, 3)) {
			size_t which = random_below(&state, (uint32_t)count);
			struct vq_used used = { .written = 8 + (uint32_t)held[which].readable % 90, .head = held[which].head };

			CHECK(vq_device_push(&device.device, &used, 1) >= 0);
			held[which] = held[--count];
		}
		move(true);
		n = vq_driver_reap(&driver.driver, done, NUM);
		for (size_t i = 0; i < n; i++, got++) {
			uint64_t *stamp = &stamps[done[i].token], first, second;

			memcpy(&first, driver.data + done[i].token * 4096 + 256, sizeof(first));
			memcpy(&second, driver.data + done[i].token * 4096 + 512, sizeof(second));
			CHECK(*stamp && done[i].written == 8 + *stamp % 90 && (first == *stamp || second == *stamp));
			*stamp = 0;
		}
		CHECK(driver.driver.fault.code == VQ_OK && device.device.fault.code == VQ_OK);
		CHECK(relay_open(&relay) == relay.from->in_flight);
	}
	close_both();
}

/* Each end is told when the other did something, and neither for nothing. */
static void notifications(bool event_idx)
{
	struct vq_chain chain;

	open_both(false, false, event_idx, 4, 0);
	CHECK(move(true) == 0);
	CHECK(post(1, 1, 1) >= 0 && vq_driver_publish(&driver.driver) == 1);
	CHECK(move(true) == RELAY_KICK && move(true) == 0);
	CHECK(bench_pop(&device, &chain, 1) == 1);
	CHECK(vq_device_push(&device.device, &(struct vq_used){ 1, chain.head }, 1) == 1);
	CHECK(move(true) == (RELAY_MOVED | RELAY_CALL) && move(true) == 0);
	CHECK(vq_driver_reap(&driver.driver, &(struct vq_done){ 0 }, 1) == 1);
	close_both();
}

/* Without indirect tables behind it the relay has no room for all that a driver posts: what is left waits, in order. */
static void full(bool behind)
{
	struct vq_chain chains[NUM];
	uint64_t got = 0;

	open_both(false, behind, false, 0, 0);
	for (uint64_t token = 0; token < NUM; token++)
		CHECK(post(token, 1, 3) >= 0);
	CHECK(vq_driver_publish(&driver.driver) >= 0);
	while (got < NUM) {
		struct vq_done done[NUM];
		size_t n, reaped;

		move(true);
		n = bench_pop(&device, chains, NUM);
		CHECK(n == NUM / 4);
		for (size_t i = 0; i < n; i++)
			CHECK(vq_device_push(&device.device, &(struct vq_used){ 7, chains[i].head }, 1) >= 0);
		move(true);
		reaped = vq_driver_reap(&driver.driver, done, NUM);
		CHECK(reaped == n);
		for (size_t i = 0; i < n; i++)
			CHECK(done[i].token == got++ && done[i].written == 7);
	}
	close_both();
}

/* Where a ring goes on: behind what was handed back, as long as nothing before that is open. */
static void bases(bool front, uint16_t start)
{
	uint32_t first = base_at(start, NUM, front), base, expected;
	uint32_t each = 2; /* entries of a chain: no table for it in front */
	struct vq_chain chains[NUM];

	bench_open(&driver, NUM, 0, false, first, front);
	bench_open(&device, NUM, 0, false, 0, false);
	iova_map_init(&places);
	CHECK(iova_map_add(&places, DATA_IOVA, DATA_SIZE, (void *)(uintptr_t)ELSEWHERE, IOVA_RW) == 0);
	CHECK(iova_map_add(&device.map, ELSEWHERE, DATA_SIZE, driver.data, IOVA_RW) == 0);
	CHECK(relay_init(&relay, &driver.device, &device.driver, &places) == 0);
	CHECK(relay_base(&relay, &base) && base == first);
	for (uint64_t token = 0; token < 6; token++)
		CHECK(post(token, 1, 1) >= 0);
	CHECK(vq_driver_publish(&driver.driver) >= 0);
	move(true);
	CHECK(relay_open(&relay) == 6 && relay_base(&relay, &base) && base == first);
	CHECK(bench_pop(&device, chains, 6) == 6);
	CHECK(vq_device_push(&device.device, &(struct vq_used){ 1, chains[0].head }, 1) >= 0);
	CHECK(vq_device_push(&device.device, &(struct vq_used){ 1, chains[1].head }, 1) >= 0);
	CHECK(move(false) & RELAY_MOVED && relay_base(&relay, &base) && relay_open(&relay) == 4);
	if (front) {
		uint16_t cursor = cursor_advance((uint16_t)first, 2 * each, NUM);

		expected = (uint32_t)cursor << 16 | cursor;
	} else {
		expected = (uint16_t)(first + 2);
	}
	CHECK(base == expected);
	CHECK(vq_device_push(&device.device, &(struct vq_used){ 1, chains[3].head }, 1) >= 0);
	CHECK(move(false) & RELAY_MOVED && !relay_base(&relay, &base)); /* the third is open */
	CHECK(vq_device_push(&device.device, &(struct vq_used){ 1, chains[2].head }, 1) >= 0);
	CHECK(move(false) & RELAY_MOVED && relay_base(&relay, &base));
	close_both();
}

/* A chain of nothing is handed back by the relay itself, as no device can be told of it. */
static void nothing_in_it(void)
{
	struct vq_done done;

	open_both(false, false, false, 0, 0);
	CHECK(post(1, 1, 0) == 0);
	memset(driver.area + driver.driver.layout.desc + 8, 0, 4); /* its length */
	CHECK(vq_driver_publish(&driver.driver) == 1);
	CHECK(move(true) == (RELAY_MOVED | RELAY_CALL));
	CHECK(vq_driver_reap(&driver.driver, &done, 1) == 1 && done.token == 1 && done.written == 0);
	close_both();
}

/* What a driver does wrong is said of its ring, and nothing of it reaches the device. */
static void bad_driver(void)
{
	struct vq_chain chain;
	struct vq_buffer nowhere = { .iova = 0x10, .length = 64 }, outside = { .iova = DATA_IOVA, .length = 64 };

	open_both(false, false, false, 4, 0);
	CHECK(vq_driver_add(&driver.driver, &nowhere, 1, 0, 1) >= 0 && vq_driver_publish(&driver.driver) == 1);
	CHECK(relay_move(&relay, true) == -EPROTO && driver.device.fault.code == VQ_CHAIN_UNMAPPED);
	CHECK(relay_move(&relay, true) == -EPROTO && bench_pop(&device, &chain, 1) == 0);
	close_both();

	open_both(false, false, false, 4, 0); /* memory that the device does not have any more */
	iova_map_clear(&places);
	CHECK(vq_driver_add(&driver.driver, &outside, 1, 0, 1) >= 0 && vq_driver_publish(&driver.driver) == 1);
	CHECK(relay_move(&relay, true) == -EPROTO && driver.device.fault.code == VQ_CHAIN_UNMAPPED);
	CHECK(bench_pop(&device, &chain, 1) == 0);
	close_both();
}

/* A table longer than any chain that the device's ring can hold. */
static void long_chain(void)
{
	struct vq_buffer buffers[3 * NUM];

	bench_open(&driver, NUM, 3 * NUM, false, 0, false);
	bench_open(&device, NUM, 4, false, 0, false);
	iova_map_init(&places);
	CHECK(iova_map_add(&places, DATA_IOVA, DATA_SIZE, (void *)(uintptr_t)ELSEWHERE, IOVA_RW) == 0);
	CHECK(relay_init(&relay, &driver.device, &device.driver, &places) == 0);
	for (size_t i = 0; i < 3 * NUM; i++)
		buffers[i] = (struct vq_buffer){ .iova = DATA_IOVA + i, .length = 1 };
	CHECK(vq_driver_add(&driver.driver, buffers, NUM, 0, 1) >= 0 && vq_driver_publish(&driver.driver) == 1);
	CHECK(move(true) == RELAY_KICK);
	CHECK(vq_driver_add(&driver.driver, buffers, 3 * NUM, 0, 2) >= 0 && vq_driver_publish(&driver.driver) >= 0);
	CHECK(relay_move(&relay, true) == -EPROTO && driver.device.fault.code == VQ_CHAIN_LONG);
	close_both();
}

/* What a device does wrong is said of the ring behind, and the driver sees nothing of it. */
static void bad_device(void)
{
	struct vq_done done;
	uint8_t *used;

	open_both(false, false, false, 4, 0);
	CHECK(post(1, 1, 1) >= 0 && vq_driver_publish(&driver.driver) == 1 && move(true) == RELAY_KICK);
	used = device.area + device.driver.layout.used;
	used[4] = 5; /* an id that was not posted */
	used[2] = 1;
	CHECK(relay_move(&relay, true) == -EPROTO && device.driver.fault.code == VQ_USED_NOT_POSTED);
	CHECK(driver.device.fault.code == VQ_OK && vq_driver_reap(&driver.driver, &done, 1) == 0);
	close_both();
}

static void sizes(void)
{
	bench_open(&driver, 2 * NUM, 0, false, 0, false);
	bench_open(&device, NUM, 0, false, 0, false);
	iova_map_init(&places);
	CHECK(relay_init(&relay, &driver.device, &device.driver, &places) == -EINVAL);
	close_both();
}

int main(void)
{
	for (int format = 0; format < 4; format++) {
		traffic(format & 1, format & 2, false, 4);
		traffic(format & 1, format & 2, true, 4);
		traffic(format & 1, format & 2, true, 0);
	}
	notifications(false);
	notifications(true);
	full(false);
	full(true);
	for (uint16_t start = 0; start < NUM; start++) {
		bases(false, (uint16_t)(start - 2));
		bases(true, start);
		bases(true, (uint16_t)(start | CURSOR_WRAP));
	}
	nothing_in_it();
	bad_driver();
	long_chain();
	bad_device();
	sizes();
	return 0;
}
