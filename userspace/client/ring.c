// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * One split ring (virtio 1.2, 2.7) full of block requests (5.2.6), each of three descriptors at a place of its own.
 * Every sector holds words that follow from its number and the seed, so that what lands elsewhere, or is torn, is found.
 */
#include <errno.h>
#include <linux/virtio_ring.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "client.h"

enum { SECTOR = 512, IN = 0, OUT = 1, OK = 0, NO_STATUS = 0xff, PER_REQUEST = 3, SLOT = 64 };
enum { DESC_AT = 0, AVAIL_AT = 4096, USED_AT = 8192, SLOTS_AT = 16384, DATA_AT = 32768 };

struct head {
	uint32_t type, reserved;
	uint64_t sector;
};

struct ring {
	struct memory *memory, *data; /* of the ring and the headers, of what is transferred */
	struct workload load;
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
	uint16_t added, seen;
	uint64_t sector[RING_SIZE / PER_REQUEST];
	bool busy[RING_SIZE / PER_REQUEST];
};

struct ring_place ring_place(void)
{
	return (struct ring_place){ DESC_AT, AVAIL_AT, USED_AT };
}

size_t ring_memory(const struct workload *load)
{
	return (DATA_AT + (size_t)load->depth * load->bytes + 4095) & ~(size_t)4095;
}

static struct head *head_of(struct ring *ring, uint32_t slot)
{
	return (struct head *)(ring->memory->base + SLOTS_AT + slot * SLOT);
}

static uint8_t *status_of(struct ring *ring, uint32_t slot)
{
	return ring->memory->base + SLOTS_AT + slot * SLOT + sizeof(struct head);
}

static uint64_t *data_of(struct ring *ring, uint32_t slot)
{
	return (uint64_t *)(ring->data->base + DATA_AT + (size_t)slot * ring->load.bytes);
}

static uint64_t word(uint64_t seed, uint64_t sector, uint32_t at)
{
	return (sector * 64 + at + 1) * 0x9e3779b97f4a7c15ull ^ seed;
}

static void fill(const struct ring *ring, uint64_t *data, uint64_t sector)
{
	for (uint32_t i = 0; i < ring->load.bytes / 8; i++)
		data[i] = word(ring->load.seed, sector + i / 64, i % 64);
}

static void check(const struct ring *ring, const uint64_t *data, uint64_t sector)
{
	for (uint32_t i = 0; i < ring->load.bytes / 8; i++)
		if (data[i] != word(ring->load.seed, sector + i / 64, i % 64))
			fail(WRONG_DATA, "sector %llu, byte %u: %#llx was read, %#llx was written", (unsigned long long)sector + i / 64,
			     i % 64 * 8, (unsigned long long)data[i], (unsigned long long)word(ring->load.seed, sector + i / 64, i % 64));
}

static uint64_t guest(const struct memory *memory, const void *address)
{
	return memory->guest + (uint64_t)((const uint8_t *)address - memory->base);
}

struct ring *ring_new(struct memory *memory, const struct workload *load)
{
	struct ring *ring = calloc(1, sizeof(*ring));

	if (!ring)
		fail(WRONG_USAGE, "no memory");
	ring->memory = ring->data = memory;
	ring->load = *load;
	ring->desc = (struct vring_desc *)(memory->base + DESC_AT);
	ring->avail = (struct vring_avail *)(memory->base + AVAIL_AT);
	ring->used = (struct vring_used *)(memory->base + USED_AT);
	return ring;
}

void ring_move_data(struct ring *ring, struct memory *memory)
{
	ring->data = memory;
}

void ring_clear(struct ring *ring)
{
	memset(ring->memory->base, 0, SLOTS_AT);
	ring->added = ring->seen = 0;
}

uint16_t ring_index(const struct ring *ring)
{
	return ring->added;
}

static void post(struct ring *ring, uint32_t slot, uint64_t sector, bool write)
{
	struct vring_desc *desc = &ring->desc[slot * PER_REQUEST];
	uint16_t first = (uint16_t)(slot * PER_REQUEST);

	*head_of(ring, slot) = (struct head){ .type = write ? OUT : IN, .sector = sector };
	*status_of(ring, slot) = NO_STATUS;
	if (write)
		fill(ring, data_of(ring, slot), sector);
	else
		memset(data_of(ring, slot), 0, ring->load.bytes);
	desc[0] = (struct vring_desc){ guest(ring->memory, head_of(ring, slot)), sizeof(struct head), VRING_DESC_F_NEXT, (uint16_t)(first + 1) };
	desc[1] = (struct vring_desc){ guest(ring->data, data_of(ring, slot)), ring->load.bytes,
				       (uint16_t)(VRING_DESC_F_NEXT | (write ? 0 : VRING_DESC_F_WRITE)), (uint16_t)(first + 2) };
	desc[2] = (struct vring_desc){ guest(ring->memory, status_of(ring, slot)), 1, VRING_DESC_F_WRITE, 0 };
	ring->avail->ring[ring->added % RING_SIZE] = first;
	ring->sector[slot] = sector;
	ring->busy[slot] = true;
	ring->added++;
}

/* Let the device see what was posted. The fence is for the device's: it clears NO_NOTIFY, then looks at the index again. */
static void publish(struct ring *ring, const struct device *device)
{
	atomic_store_explicit((_Atomic uint16_t *)&ring->avail->idx, ring->added, memory_order_release);
	atomic_thread_fence(memory_order_seq_cst);
	if (!(atomic_load_explicit((_Atomic uint16_t *)&ring->used->flags, memory_order_relaxed) & VRING_USED_F_NO_NOTIFY) &&
	    eventfd_write(device->kick, 1))
		fail(WRONG_PEER, "kick: %s", strerror(errno));
}

static uint16_t used_index(const struct ring *ring)
{
	return atomic_load_explicit((_Atomic uint16_t *)&ring->used->idx, memory_order_acquire);
}

static void await(struct ring *ring, const struct device *device)
{
	struct pollfd event = { .fd = device->call, .events = POLLIN };
	eventfd_t count;

	while (used_index(ring) == ring->seen) {
		int ready = poll(&event, 1, TIMEOUT_S * 1000);

		if (ready == 0)
			fail(NOT_COMPLETED, "no request completed within %d s: %u posted, %u seen, used index %u", TIMEOUT_S, ring->added,
			     ring->seen, used_index(ring));
		if (ready > 0 && eventfd_read(device->call, &count) && errno != EAGAIN)
			fail(WRONG_PEER, "call: %s", strerror(errno));
	}
}

static uint32_t finish(struct ring *ring, bool write)
{
	struct vring_used_elem done = ring->used->ring[ring->seen++ % RING_SIZE];
	uint32_t slot = done.id / PER_REQUEST;

	if (done.id % PER_REQUEST || slot >= ring->load.depth || !ring->busy[slot])
		fail(WRONG_DATA, "the device gives descriptor %u back, which it does not have", done.id);
	ring->busy[slot] = false;
	if (*status_of(ring, slot) != OK)
		fail(WRONG_DATA, "%s of sector %llu: status %u", write ? "write" : "read", (unsigned long long)ring->sector[slot],
		     *status_of(ring, slot));
	if (!write)
		check(ring, data_of(ring, slot), ring->sector[slot]);
	return slot;
}

double ring_run(struct ring *ring, struct device *device, bool write)
{
	const struct workload *load = &ring->load;
	uint64_t span = device->sectors / (load->bytes / SECTOR);
	uint64_t posted = 0, finished = 0;
	uint32_t idle[RING_SIZE / PER_REQUEST], count = load->depth;
	double start = seconds();

	if (!span)
		fail(WRONG_USAGE, "a disk of %llu sectors has no room for a request", (unsigned long long)device->sectors);
	for (uint32_t i = 0; i < count; i++)
		idle[i] = i;
	while (finished < load->requests) {
		uint64_t before = posted;

		while (count && posted < load->requests) {
			post(ring, idle[--count], posted % span * (load->bytes / SECTOR), write);
			posted++;
		}
		if (posted != before)
			publish(ring, device);
		await(ring, device);
		while (used_index(ring) != ring->seen) {
			idle[count++] = finish(ring, write);
			finished++;
		}
	}
	return seconds() - start;
}
