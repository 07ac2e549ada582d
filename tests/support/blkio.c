// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//
// A client by libblkio: writes blocks that say what and where they are, on every queue, and reads them back by another.
// Usage: blkio DRIVER PATH QUEUES [poll]. Prints one line and exits 0, or says what went wrong and exits 1.

#include <blkio.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { DEPTH = 16, SLOTS = 96, MOST = 256 << 10 };

static void __attribute__((noreturn, format(printf, 1, 2))) fail(const char *format, ...)
{
	va_list words;

	va_start(words, format);
	vfprintf(stderr, format, words);
	fputc('\n', stderr);
	exit(1);
}

#define TRY(call) do { if ((call) < 0) fail("%s: %s", #call, blkio_get_error_msg()); } while (0)

// Bytes of slot SLOT, whose sizes are of all kinds, in generation GENERATION.
static size_t size_of(unsigned slot)
{
	return slot % 3 == 0 ? 512 : slot % 3 == 1 ? 4096 * (1 + slot % 7) : MOST;
}

static void fill(uint8_t *data, unsigned slot, unsigned generation)
{
	for (size_t at = 0; at < size_of(slot); at += 8) {
		uint64_t word = ((uint64_t)generation << 56) ^ ((uint64_t)slot << 32) ^ (at * 0x9e3779b97f4a7c15u);

		memcpy(data + at, &word, 8);
	}
}

// Wait for COUNT requests of a queue.
static void finish(struct blkioq *queue, int count)
{
	while (count > 0) {
		struct blkio_completion done[DEPTH];
		struct timespec timeout = { .tv_sec = 20 };
		int got = blkioq_do_io(queue, done, 1, count < DEPTH ? count : DEPTH, &timeout);

		if (got < 0)
			fail("no end of %d requests: %s", count, blkio_get_error_msg());
		for (int at = 0; at < got; at++)
			if (done[at].ret)
				fail("request %ld: %s", (long)(intptr_t)done[at].user_data, done[at].error_msg ? done[at].error_msg : strerror(-done[at].ret));
		count -= got;
	}
}

static unsigned long requests;

static void pass(struct blkioq *queue, uint8_t *memory, int write, unsigned generation)
{
	static uint8_t expected[MOST];
	int flying = 0;

	for (unsigned slot = 0; slot < SLOTS; slot++) {
		uint8_t *buffer = memory + (size_t)(slot % DEPTH) * MOST;

		if (write) {
			fill(buffer, slot, generation);
			blkioq_write(queue, (uint64_t)slot * MOST, buffer, size_of(slot), (void *)(intptr_t)slot, slot % 5 ? 0 : BLKIO_REQ_FUA);
		} else {
			memset(buffer, 0xaa, size_of(slot));
			blkioq_read(queue, (uint64_t)slot * MOST, buffer, size_of(slot), (void *)(intptr_t)slot, 0);
		}
		requests++;
		if (++flying < DEPTH && slot + 1 < SLOTS)
			continue;
		finish(queue, flying);
		for (unsigned back = slot + 1 - flying; !write && back <= slot; back++) {
			fill(expected, back, generation);
			if (memcmp(memory + (size_t)(back % DEPTH) * MOST, expected, size_of(back)))
				fail("slot %u has other data than was written", back);
		}
		flying = 0;
	}
	blkioq_flush(queue, NULL, 0);
	finish(queue, 1);
}

int main(int argc, char **argv)
{
	struct blkio *device;
	struct blkio_mem_region first, second;
	int queues = argc > 3 ? atoi(argv[3]) : 1, polled = argc > 4, most;
	uint64_t capacity;

	TRY(blkio_create(argv[1], &device));
	TRY(blkio_set_str(device, "path", argv[2]));
	TRY(blkio_connect(device));
	TRY(blkio_get_uint64(device, "capacity", &capacity));
	if (capacity < (uint64_t)SLOTS * MOST)
		fail("the disk has %llu bytes", (unsigned long long)capacity);
	TRY(blkio_get_int(device, "max-queues", &most));
	if (most < queues)
		fail("at most %d queues", most);
	TRY(blkio_set_int(device, "num-queues", polled ? 0 : queues));
	TRY(blkio_set_int(device, "num-poll-queues", polled ? queues : 0));
	TRY(blkio_start(device));
	TRY(blkio_alloc_mem_region(device, &first, (size_t)DEPTH * MOST));
	TRY(blkio_map_mem_region(device, &first));
	for (int at = 0; at < queues; at++) {
		struct blkioq *mine = polled ? blkio_get_poll_queue(device, at) : blkio_get_queue(device, at);
		struct blkioq *other = polled ? blkio_get_poll_queue(device, (at + 1) % queues) : blkio_get_queue(device, (at + 1) % queues);

		pass(mine, first.addr, 1, 2 * at + 1);
		pass(other, first.addr, 0, 2 * at + 1);
		// More memory while rings run, and less again.
		TRY(blkio_alloc_mem_region(device, &second, (size_t)DEPTH * MOST));
		TRY(blkio_map_mem_region(device, &second));
		pass(mine, second.addr, 1, 2 * at + 2);
		pass(other, second.addr, 0, 2 * at + 2);
		blkio_unmap_mem_region(device, &second);
		blkio_free_mem_region(device, &second);
		blkioq_write_zeroes(mine, 0, 4096, NULL, 0);
		blkioq_discard(mine, MOST, MOST, NULL, 0);
		finish(mine, 2);
		blkioq_read(mine, 0, first.addr, 4096, NULL, 0);
		finish(mine, 1);
		for (int byte = 0; byte < 4096; byte++)
			if (((uint8_t *)first.addr)[byte])
				fail("byte %d is not zero", byte);
	}
	blkio_destroy(&device);
	printf("%lu requests verified\n", requests);
	return 0;
}
