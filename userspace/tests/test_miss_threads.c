// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * A driver, a device that waits for mappings, and a third thread that answers its misses and unmaps what it likes, ring
 * included. Under one lock of the device's side, as a map and the queues on it always are; the driver takes none.
 * A queue that is not woken shows as a sleep that outlasts its timeout.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "test.h"

enum { NUM = 16, CHAINS = 20000, SLOTS = 64, TIMEOUT_MS = 5000 };

static struct bench b;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int kick, call, missed;
static bool mapped[SLOTS], ring_mapped; /* under the lock, as is the map */
static atomic_bool done;

static void notify(int fd)
{
	uint64_t one = 1;

	CHECK(write(fd, &one, sizeof(one)) == sizeof(one));
}

static bool wait_for(int fd, int milliseconds)
{
	struct pollfd wait = { .fd = fd, .events = POLLIN };
	uint64_t count;

	return poll(&wait, 1, milliseconds) == 1 && read(fd, &count, sizeof(count)) == sizeof(count);
}

/* One batch; whether there was one. */
static bool serve(uint64_t *served)
{
	struct vq_chain chains[NUM];
	struct vq_used used[NUM];
	size_t count = bench_pop(&b, chains, NUM);
	int pushed;

	for (size_t i = 0; i < count; i++) {
		uint64_t number;

		CHECK(chain_gather(readable_part(&chains[i]), 0, &number, 8) == 8 && number == *served + i);
		number = ~number;
		CHECK(chain_scatter(writable_part(&chains[i]), 0, &number, 8) == 8);
		used[i] = (struct vq_used){ 8, chains[i].head };
	}
	*served += count;
	pushed = vq_device_push(&b.device, used, count);
	CHECK(pushed >= 0);
	if (pushed == 1)
		notify(call);
	return count != 0;
}

static void *device_end(void *unused)
{
	uint64_t served = 0;

	(void)unused;
	while (served < CHAINS) {
		bool more;

		pthread_mutex_lock(&lock);
		vq_device_disable_kick(&b.device);
		more = serve(&served) || vq_device_enable_kick(&b.device) == 1;
		CHECK(b.device.fault.code == VQ_OK);
		if (!more && vq_device_misses(&b.device))
			notify(missed);
		pthread_mutex_unlock(&lock);
		if (!more && served < CHAINS)
			CHECK(wait_for(kick, TIMEOUT_MS));
	}
	return NULL;
}

static void map(uint64_t iova)
{
	size_t slot = (iova - DATA_IOVA) / IOVA_PAGE;

	if (iova < DATA_IOVA) {
		if (!ring_mapped)
			CHECK(iova_map_add(&b.map, RING_IOVA, b.driver.layout.size, b.area, IOVA_RW) == 0);
		ring_mapped = true;
	} else if (!mapped[slot]) {
		CHECK(iova_map_add(&b.map, DATA_IOVA + slot * IOVA_PAGE, IOVA_PAGE, b.data + slot * IOVA_PAGE, IOVA_RW) == 0);
		mapped[slot] = true;
	}
}

static void *translator(void *unused)
{
	uint64_t seed = 99;

	(void)unused;
	while (!atomic_load(&done)) {
		bool asked = wait_for(missed, 1);

		pthread_mutex_lock(&lock);
		if (asked) {
			for (size_t i = vq_device_misses(&b.device); i--;)
				map(b.device.misses[i].iova);
			notify(kick);
		}
		for (size_t slot = random_below(&seed, 8); slot < SLOTS && random_below(&seed, 2); slot += 3) {
			if (mapped[slot])
				CHECK(iova_map_remove(&b.map, DATA_IOVA + slot * IOVA_PAGE, IOVA_PAGE) == 1);
			mapped[slot] = false;
		}
		if (ring_mapped && !random_below(&seed, 8)) {
			CHECK(iova_map_remove(&b.map, RING_IOVA, b.driver.layout.size) == 1);
			ring_mapped = false;
			notify(kick);
		}
		pthread_mutex_unlock(&lock);
	}
	return NULL;
}

static void drive(void)
{
	uint64_t added = 0, reaped = 0;

	while (reaped < CHAINS) {
		struct vq_done finished[NUM];
		size_t count;
		int due;

		while (added < CHAINS && added - reaped < SLOTS) {
			uint64_t offset = added % SLOTS * IOVA_PAGE;
			struct vq_buffer buffers[] = { { DATA_IOVA + offset, 8 }, { DATA_IOVA + offset + 64, 8 } };

			memcpy(b.data + offset, &added, 8);
			if (vq_driver_add(&b.driver, buffers, 1, 1, added) < 0)
				break;
			added++;
		}
		due = vq_driver_publish(&b.driver);
		CHECK(due >= 0);
		if (due)
			notify(kick);
		count = vq_driver_reap(&b.driver, finished, NUM);
		for (size_t i = 0; i < count; i++, reaped++) {
			uint64_t answer;

			memcpy(&answer, b.data + finished[i].token % SLOTS * IOVA_PAGE + 64, 8);
			CHECK(finished[i].token == reaped && answer == ~reaped);
		}
		if (count == 0 && vq_driver_enable_call(&b.driver) == 0)
			CHECK(wait_for(call, TIMEOUT_MS));
	}
}

static void run(uint32_t tables, bool event_idx, bool packed)
{
	struct vq_device_config config;
	pthread_t device, third;

	bench_open(&b, NUM, tables, event_idx, base_at(0, NUM, packed), packed);
	config = b.device.config;
	config.wait = true;
	vq_device_destroy(&b.device);
	iova_map_clear(&b.map);
	memset(mapped, 0, sizeof(mapped));
	ring_mapped = false;
	CHECK(vq_device_init(&b.device, &config) == 0);
	kick = eventfd(0, EFD_CLOEXEC);
	call = eventfd(0, EFD_CLOEXEC);
	missed = eventfd(0, EFD_CLOEXEC);
	CHECK(kick >= 0 && call >= 0 && missed >= 0);
	atomic_store(&done, false);
	CHECK(pthread_create(&device, NULL, device_end, NULL) == 0);
	CHECK(pthread_create(&third, NULL, translator, NULL) == 0);
	drive();
	CHECK(pthread_join(device, NULL) == 0);
	atomic_store(&done, true);
	CHECK(pthread_join(third, NULL) == 0);
	close(kick);
	close(call);
	close(missed);
	bench_close(&b);
}

int main(void)
{
	for (int mode = 0; mode < 8; mode++)
		run(mode & 1 ? 4 : 0, mode & 2, mode & 4);
	return 0;
}
