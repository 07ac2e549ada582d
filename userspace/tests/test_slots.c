// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* Slots on rings of either format: no slot is twice with the device, data stays with its slot, others' chains pass through. */
#include <errno.h>

#include "slots.h"

#include "test.h"

enum { NUM = 32, STRIDE = 128, FOREIGN_AT = DATA_SIZE - 64 };

/* The device's side of one batch, in any order: every chain has one buffer, at a slot, with what the driver left there. */
static size_t serve(struct bench *b, const struct vq_slots *slots, const uint32_t *lengths, uint64_t *seed, bool *with_device)
{
	struct vq_chain chains[NUM];
	struct vq_used used[NUM];
	size_t count = bench_pop(b, chains, 1 + random_below(seed, NUM));

	CHECK(b->device.fault.code == VQ_OK);
	for (size_t i = 0; i < count; i++) {
		uint64_t at = b->iova[chains[i].iov - b->iov] - DATA_IOVA, slot = at / STRIDE;
		uint8_t *data = b->data + at;

		CHECK(chains[i].readable_pieces + chains[i].writable_pieces == 1);
		used[i] = (struct vq_used){ 0, chains[i].head };
		if (at == FOREIGN_AT)
			continue;
		CHECK(at % STRIDE == 0 && slot < slots->count && with_device[slot]);
		CHECK((slots->writable ? chains[i].writable : chains[i].readable) == lengths[slot]);
		if (slots->writable) {
			memset(data, (int)slot + 1, lengths[slot]);
			used[i].written = lengths[slot];
		} else {
			CHECK(data[0] == (uint8_t)slot && data[lengths[slot] - 1] == (uint8_t)slot);
		}
	}
	for (size_t i = count; i > 1; i--) {
		size_t other = random_below(seed, (uint32_t)i);
		struct vq_used kept = used[i - 1];

		used[i - 1] = used[other];
		used[other] = kept;
	}
	CHECK(vq_device_push(&b->device, used, count) >= 0);
	return count;
}

static void rounds(bool packed, bool writable, uint32_t count, uint64_t seed)
{
	static struct bench b;
	struct vq_slots slots;
	uint32_t lengths[NUM];
	bool with_device[NUM] = { false }, foreign = false;
	uint64_t back = 0, strangers = 0;

	bench_open(&b, NUM, 0, true, base_at(65000, NUM, packed), packed);
	CHECK(vq_slots_init(&slots, &b.driver, b.data, DATA_IOVA, STRIDE, count, writable) == 0);
	while (back < 200000 || strangers < 1000) {
		struct vq_done done[NUM];
		uint32_t batch[NUM];
		size_t want = random_below(&seed, NUM), added, reaped;
		bool each = seed & 1;

		if (want > slots.idle_count)
			want = slots.idle_count;
		for (size_t i = 0; i < want; i++) {
			uint16_t slot = vq_slots_next(&slots, i);

			batch[i] = each || !i ? 1 + random_below(&seed, STRIDE) : batch[0];
			CHECK(!with_device[slot]);
			lengths[slot] = batch[i];
			if (!writable)
				memset(vq_slots_data(&slots, slot), slot, batch[i]);
		}
		added = vq_slots_room(&slots, want);
		for (size_t i = 0; i < added; i++)
			with_device[vq_slots_next(&slots, i)] = true;
		CHECK(vq_slots_add(&slots, batch, each, want) == added);
		if (!foreign && random_below(&seed, 4) == 0)
			foreign = vq_driver_add(&b.driver, &(struct vq_buffer){ DATA_IOVA + FOREIGN_AT, 64 }, 1, 0, 0) >= 0;
		CHECK(vq_driver_publish(&b.driver) >= 0);
		serve(&b, &slots, lengths, &seed, with_device);
		reaped = vq_driver_reap(&b.driver, done, NUM);
		CHECK(b.driver.fault.code == VQ_OK);
		for (size_t i = 0; i < reaped; i++) {
			int slot = vq_slots_take(&slots, &done[i]);

			if (slot < 0) {
				CHECK(foreign);
				foreign = false;
				strangers++;
				continue;
			}
			CHECK(with_device[slot] && vq_slots_next(&slots, 0) == slot);
			with_device[slot] = false;
			if (writable)
				CHECK(done[i].written == lengths[slot] && vq_slots_data(&slots, (uint16_t)slot)[lengths[slot] - 1] == slot + 1);
			back++;
		}
	}
	vq_slots_destroy(&slots);
	bench_close(&b);
}

static void refusals(bool packed)
{
	static struct bench b;
	struct vq_slots slots;
	uint32_t lengths[3] = { STRIDE, STRIDE + 1, 1 };

	bench_open(&b, 4, 0, false, base_at(0, 4, packed), packed);
	CHECK(vq_slots_init(&slots, &b.driver, b.data, DATA_IOVA, STRIDE, 0, false) == -EINVAL);
	CHECK(vq_slots_init(&slots, &b.driver, b.data, DATA_IOVA, 0, 1, false) == -EINVAL);
	CHECK(vq_slots_init(&slots, &b.driver, b.data, DATA_IOVA, STRIDE, VRING_MAX_NUM + 1, false) == -EINVAL);
	CHECK(vq_slots_init(&slots, &b.driver, b.data, DATA_IOVA, STRIDE, 8, false) == 0);
	CHECK(vq_slots_add(&slots, lengths, true, 3) == 1); /* the second does not fit */
	CHECK(vq_slots_add(&slots, &(uint32_t){ 0 }, false, 1) == 0);
	CHECK(vq_slots_add(&slots, lengths, false, 8) == 3); /* what the ring holds */
	CHECK(slots.idle_count == 4 && vq_slots_room(&slots, 8) == 0);
	b.driver.fault.code = VQ_USED_ID;
	CHECK(vq_slots_add(&slots, lengths, false, 1) == 0);
	vq_slots_destroy(&slots);
	bench_close(&b);
}

int main(void)
{
	for (int mode = 0; mode < 4; mode++) {
		rounds(mode & 1, mode & 2, NUM, 1);
		rounds(mode & 1, mode & 2, NUM / 2 - 3, 2);
	}
	refusals(false);
	refusals(true);
	puts("slots: all well");
	return 0;
}
