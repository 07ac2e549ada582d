// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * A driver thread and a device thread on one ring, sleeping on eventfds as real ones do. Data is checked on both sides
 * with plain loads, so ThreadSanitizer sees whether the ring alone orders them; a notification that is lost shows as a
 * sleep that outlasts its timeout, with work waiting.
 */
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "test.h"

enum { NUM = 64, CHAINS = 60000, SLOTS = 64, BYTES = 48, TIMEOUT_MS = 5000 };

static struct bench b;
static int kick, call;
static unsigned int kicks, calls; /* each written by its sender, read after both threads ended */

static void notify(int fd)
{
	uint64_t one = 1;

	CHECK(write(fd, &one, sizeof(one)) == sizeof(one));
}

static void sleep_on(int fd)
{
	struct pollfd wait = { .fd = fd, .events = POLLIN };
	uint64_t count;

	CHECK(poll(&wait, 1, TIMEOUT_MS) == 1); /* else a notification was lost */
	CHECK(read(fd, &count, sizeof(count)) == sizeof(count));
}

static uint8_t answer_byte(uint64_t number, size_t i)
{
	return (uint8_t)(number * 13 + i * 11 + 1);
}

static uint8_t request_byte(uint64_t number, size_t i)
{
	return (uint8_t)(number * 31 + i * 7);
}

static void *device_end(void *unused)
{
	uint64_t served = 0, seed = 77;
	struct vq_chain chains[NUM];
	struct vq_used used[NUM];

	(void)unused;
	while (served < CHAINS) {
		size_t count = bench_pop(&b, chains, 1 + random_below(&seed, NUM));

		CHECK(b.device.fault.code == VQ_OK);
		if (count == 0) {
			int more = vq_device_enable_kick(&b.device);

			CHECK(more >= 0);
			if (!more)
				sleep_on(kick);
			vq_device_disable_kick(&b.device);
			continue;
		}
		for (size_t i = 0; i < count; i++) {
			uint8_t request[2 * BYTES], answer[BYTES];
			uint64_t number = served + i;

			CHECK(chain_gather(readable_part(&chains[i]), 0, request, sizeof(request)) == chains[i].readable);
			for (size_t k = 0; k < chains[i].readable; k++)
				CHECK(request[k] == request_byte(number, k));
			for (size_t k = 0; k < BYTES; k++)
				answer[k] = answer_byte(number, k);
			CHECK(chain_scatter(writable_part(&chains[i]), 0, answer, BYTES) == chains[i].writable);
			used[i] = (struct vq_used){ (uint32_t)chains[i].writable, chains[i].head };
		}
		for (size_t i = 0; i < count / 2; i++) { /* last first: completions need no order */
			struct vq_used swapped = used[i];

			used[i] = used[count - 1 - i];
			used[count - 1 - i] = swapped;
		}
		served += count;
		switch (vq_device_push(&b.device, used, count)) {
		case 1:
			notify(call);
			calls++;
			break;
		case 0:
			break;
		default:
			CHECK(!"push refused");
		}
	}
	return NULL;
}

/* Adds request `number`, if there is a free slot of memory and descriptors for it. */
static bool add(uint64_t number, bool *busy, uint64_t *owner)
{
	size_t slot = number % SLOTS, readable = 1 + number % 2;
	uint8_t *memory = b.data + slot * 4 * BYTES;
	uint64_t at = DATA_IOVA + slot * 4 * BYTES;
	struct vq_buffer buffers[3];

	if (busy[slot] || b.driver.free < 3)
		return false;
	for (size_t i = 0; i < readable; i++)
		buffers[i] = (struct vq_buffer){ at + i * BYTES, BYTES };
	buffers[readable] = (struct vq_buffer){ at + 2 * BYTES, BYTES };
	for (size_t i = 0; i < readable * BYTES; i++)
		memory[i] = request_byte(number, i);
	memset(memory + 2 * BYTES, 0, BYTES);
	busy[slot] = true;
	owner[slot] = number;
	CHECK(vq_driver_add(&b.driver, buffers, readable, 1, slot) >= 0);
	return true;
}

static void *driver_end(void *unused)
{
	uint64_t sent = 0, completed = 0, seed = 99, owner[SLOTS];
	bool busy[SLOTS] = { false };

	(void)unused;
	while (completed < CHAINS) {
		struct vq_done done[NUM];
		size_t count;

		for (uint32_t burst = 1 + random_below(&seed, NUM); burst && sent < CHAINS; burst--)
			sent += add(sent, busy, owner);
		switch (vq_driver_publish(&b.driver)) {
		case 1:
			notify(kick);
			kicks++;
			break;
		case 0:
			break;
		default:
			CHECK(!"publish refused");
		}
		count = vq_driver_reap(&b.driver, done, NUM);
		CHECK(b.driver.fault.code == VQ_OK);
		for (size_t i = 0; i < count; i++) {
			uint64_t slot = done[i].token;
			const uint8_t *answer = b.data + slot * 4 * BYTES + 2 * BYTES;

			CHECK(slot < SLOTS && busy[slot] && done[i].written == BYTES);
			for (size_t k = 0; k < BYTES; k++)
				CHECK(answer[k] == answer_byte(owner[slot], k));
			busy[slot] = false;
		}
		completed += count;
		if (count == 0 && completed < CHAINS) {
			int more = vq_driver_enable_call(&b.driver);

			CHECK(more >= 0);
			if (!more)
				sleep_on(call);
			vq_driver_disable_call(&b.driver);
		}
	}
	return NULL;
}

static void run(bool event_idx, bool indirect, bool packed)
{
	pthread_t driver, device;

	bench_open(&b, NUM, indirect ? 3 : 0, event_idx, base_at(65000, NUM, packed), packed);
	kick = eventfd(0, EFD_CLOEXEC);
	call = eventfd(0, EFD_CLOEXEC);
	kicks = calls = 0;
	CHECK(kick >= 0 && call >= 0);
	CHECK(pthread_create(&device, NULL, device_end, NULL) == 0);
	CHECK(pthread_create(&driver, NULL, driver_end, NULL) == 0);
	CHECK(pthread_join(driver, NULL) == 0 && pthread_join(device, NULL) == 0);
	CHECK(b.driver.in_flight == 0 && b.device.in_flight == 0 && b.driver.free == NUM);
	CHECK(kicks > 0 && calls > 0 && kicks <= CHAINS && calls <= CHAINS);
	printf("%s %s%s: %d chains, %u kicks, %u calls\n", packed ? "packed" : "split", event_idx ? "event_idx" : "flags",
	       indirect ? " indirect" : "", CHAINS, kicks, calls);
	CHECK(close(kick) == 0 && close(call) == 0);
	bench_close(&b);
}

int main(void)
{
	for (int mode = 0; mode < 8; mode++)
		run(mode & 1, mode & 2, mode & 4);
	return 0;
}
