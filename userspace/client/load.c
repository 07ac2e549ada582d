// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * Load on a vhost-user disk: as many requests as it takes, from one thread per queue, each on a ring of the ring core.
 *
 * Rule: without --verify nothing is done per request that a driver would not do, but for a look at the clock per batch.
 */
#include <errno.h>
#include <getopt.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "client.h"
#include "virtqueue.h"

static const char usage[] =
	"Usage: vhost-blk-load [OPTIONS] SOCKET\n"
	"\n"
	"Reads from (or writes to) a vhost-user-blk back-end as fast as it goes, and prints one line of JSON.\n"
	"\n"
	"  --seconds N     how long (default 1)\n"
	"  --depth N       requests in flight in each queue, 1 to 256 (default 32)\n"
	"  --bytes N       of each request, a multiple of 512 up to 1 MiB (default 4096)\n"
	"  --queues N      1 to 64, each with a thread (default 1)\n"
	"  --write         write instead\n"
	"  --poll          look at the ring all the time instead of waiting for calls\n"
	"  --packed        a packed ring; else a split one\n"
	"  --direct        descriptors in the ring itself; else an indirect table for each request, where offered\n"
	"  --unchecked     do not look at the status of requests\n"
	"  --verify        write and read requests of random place and length up to --bytes, and compare; the disk is overwritten\n"
	"  --seed N        of places (default 1)\n"
	"\n"
	"Status: 0 all well, 1 the back-end refused, hung up or talked nonsense, 2 usage, 3 no answer in time, 4 wrong data.\n";

enum { IN = 0, OUT = 1, FLUSH = 4, SECTOR = 512, UNIT = 1 << 20, BUCKETS = 64 * 16, NUM = 256 };
enum { HEAD = 64, REAPED = 64 };

#define F_MQ (1ull << 12)
#define F_INDIRECT (1ull << 28)
#define F_EVENT_IDX (1ull << 29)
#define F_PACKED (1ull << 34)

struct options {
	double seconds;
	uint32_t depth, bytes, queues;
	uint64_t seed;
	bool write, poll, packed, direct, unchecked, verify;
};

struct slot {
	uint8_t *head, *data; /* 16 bytes of header, then the status; the data */
	uint64_t sector;
	uint32_t type, bytes;
	double posted;
};

struct queue {
	const struct options *options;
	struct memory memory;
	struct ring_place place;
	struct vq_driver vq;
	struct slot slots[NUM];
	int kick, call;
	uint64_t first, sectors; /* of the disk: this queue's part */
	uint64_t random;
	uint32_t *versions; /* --verify: what each sector was last written with, 0: never */
	bool *busy; /* --verify: units that a request is about */
	uint64_t done, writes, spent_cpu_ns;
	uint64_t latency[BUCKETS]; /* sixteen buckets for each power of two of nanoseconds */
	double elapsed, latency_sum;
	pthread_t thread;
};

void fail(enum status status, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fputs("vhost-blk-load: ", stderr);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
	va_end(arguments);
	exit(status);
}

double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static uint32_t below(struct queue *queue, uint64_t bound)
{
	queue->random ^= queue->random >> 12;
	queue->random ^= queue->random << 25;
	queue->random ^= queue->random >> 27;
	return (uint32_t)((queue->random * 2685821657736338717ull >> 33) % bound);
}

static uint64_t word(uint64_t sector, uint32_t version, uint32_t at)
{
	return ((sector << 32 | version) * 64 + at + 1) * 0x9e3779b97f4a7c15ull;
}

static void each_sector(struct queue *queue, struct slot *slot, bool check)
{
	for (uint32_t i = 0; i < slot->bytes / SECTOR; i++) {
		uint64_t sector = slot->sector + i, *words = (uint64_t *)(void *)(slot->data + i * SECTOR);
		uint32_t *version = &queue->versions[sector - queue->first];

		if (!check)
			++*version;
		else if (!*version)
			continue;
		for (uint32_t at = 0; at < SECTOR / 8; at++) {
			uint64_t expected = word(sector, *version, at);

			if (!check)
				words[at] = expected;
			else if (words[at] != expected)
				fail(WRONG_DATA, "sector %llu, byte %u: %#llx was read, %#llx was written as version %u", (unsigned long long)sector,
				     at * 8, (unsigned long long)words[at], (unsigned long long)expected, *version);
		}
	}
}

/* Chooses what the slot asks for next; places that other slots are about are left alone. */
static void choose(struct queue *queue, struct slot *slot)
{
	const struct options *o = queue->options;
	uint64_t units = queue->sectors * SECTOR / UNIT;

	if (!o->verify) {
		slot->type = o->write ? OUT : IN;
		slot->bytes = o->bytes;
		slot->sector = queue->first + below(queue, queue->sectors * SECTOR / o->bytes) * (uint64_t)(o->bytes / SECTOR);
	} else {
		uint64_t unit;
		uint32_t room;

		do
			unit = below(queue, units);
		while (queue->busy[unit]);
		queue->busy[unit] = true;
		slot->bytes = SECTOR * (1 + below(queue, o->bytes / SECTOR));
		room = (UNIT - slot->bytes) / SECTOR;
		slot->sector = queue->first + unit * (UNIT / SECTOR) + (room ? below(queue, room + 1) : 0);
		slot->type = below(queue, 16) == 0 ? FLUSH : below(queue, 2) ? OUT : IN;
		if (slot->type == OUT)
			each_sector(queue, slot, false);
		else if (slot->type == IN)
			memset(slot->data, 0, slot->bytes);
	}
	memcpy(slot->head, &slot->type, sizeof(slot->type));
	memcpy(slot->head + 8, &slot->sector, sizeof(slot->sector));
	slot->head[16] = 0xff;
}

static void post(struct queue *queue, uint32_t at, double now)
{
	struct slot *slot = &queue->slots[at];
	struct vq_buffer buffers[3];
	uint64_t guest = queue->memory.guest;
	size_t readable = 1, count = 1;
	int head;

	choose(queue, slot);
	buffers[0] = (struct vq_buffer){ guest + (uint64_t)(slot->head - queue->memory.base), 16 };
	if (slot->type != FLUSH) {
		buffers[count++] = (struct vq_buffer){ guest + (uint64_t)(slot->data - queue->memory.base), slot->bytes };
		readable += slot->type == OUT;
	}
	buffers[count++] = (struct vq_buffer){ buffers[0].iova + 16, 1 };
	head = vq_driver_add(&queue->vq, buffers, readable, count - readable, at);
	if (head < 0)
		fail(WRONG_USAGE, "request %u does not fit into the ring: %s", at, strerror(-head));
	slot->posted = now;
}

static void publish(struct queue *queue)
{
	int kick = vq_driver_publish(&queue->vq);

	if (kick < 0)
		fail(WRONG_DATA, "the back-end broke the ring");
	if (kick && eventfd_write(queue->kick, 1))
		fail(WRONG_PEER, "kick: %s", strerror(errno));
}

/* Waits until something is done, the ring's way. */
static size_t await(struct queue *queue, struct vq_done *done)
{
	struct pollfd event = { .fd = queue->call, .events = POLLIN };
	double end = 0;
	eventfd_t value;

	for (uint64_t round = 0;; round++) {
		size_t count = vq_driver_reap(&queue->vq, done, REAPED);

		if (count)
			return count;
		if (queue->vq.fault.code != VQ_OK)
			fail(WRONG_DATA, "the back-end broke the ring");
		if (queue->options->poll) {
			if (round % 65536 == 65535) {
				end = end > 0 ? end : seconds() + TIMEOUT_S;
				if (seconds() > end)
					fail(NOT_COMPLETED, "nothing completed within %d s", TIMEOUT_S);
			}
			continue;
		}
		if (vq_driver_enable_call(&queue->vq))
			continue;
		if (poll(&event, 1, TIMEOUT_S * 1000) == 0)
			fail(NOT_COMPLETED, "nothing completed within %d s", TIMEOUT_S);
		if (eventfd_read(queue->call, &value) && errno != EAGAIN)
			fail(WRONG_PEER, "call: %s", strerror(errno));
		vq_driver_disable_call(&queue->vq);
	}
}

static uint32_t bucket(double elapsed)
{
	uint64_t ns = (uint64_t)(elapsed * 1e9);
	uint32_t power = ns < 16 ? 3 : 63 - (uint32_t)__builtin_clzll(ns);

	return (power - 3) * 16 + (uint32_t)(ns >> (power - 4 + (power == 3)) & 15);
}

static void finish(struct queue *queue, const struct vq_done *done, double now)
{
	struct slot *slot = &queue->slots[done->token];

	if (!queue->options->unchecked && slot->head[16])
		fail(WRONG_DATA, "type %u, sector %llu, %u bytes: status %u", slot->type, (unsigned long long)slot->sector, slot->bytes, slot->head[16]);
	if (queue->options->verify) {
		if (slot->type == IN)
			each_sector(queue, slot, true);
		queue->busy[(slot->sector - queue->first) * SECTOR / UNIT] = false;
	}
	queue->done++;
	queue->writes += slot->type == OUT;
	queue->latency_sum += now - slot->posted;
	queue->latency[bucket(now - slot->posted)]++;
}

static void *run(void *argument)
{
	struct queue *queue = argument;
	struct vq_done done[REAPED];
	struct timespec cpu;
	double start = seconds(), now = start, end = start + queue->options->seconds;

	vq_driver_disable_call(&queue->vq);
	for (uint32_t at = 0; at < queue->options->depth; at++)
		post(queue, at, now);
	publish(queue);
	while (queue->vq.in_flight) {
		size_t count = await(queue, done);

		now = seconds();
		for (size_t i = 0; i < count; i++)
			finish(queue, &done[i], now);
		if (now >= end)
			continue;
		for (size_t i = 0; i < count; i++)
			post(queue, (uint32_t)done[i].token, now);
		publish(queue);
	}
	queue->elapsed = now - start;
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &cpu);
	queue->spent_cpu_ns = (uint64_t)cpu.tv_sec * 1000000000 + (uint64_t)cpu.tv_nsec;
	return NULL;
}

static void prepare(struct queue *queue, const struct options *options, uint32_t index, bool event_idx, bool indirect)
{
	struct vq_layout layout = vq_layout(NUM, indirect ? 3 : 0, options->packed);
	size_t heads = (layout.size + 4095) & ~(size_t)4095, data = heads + NUM * HEAD;
	int error;

	queue->options = options;
	queue->memory = (struct memory){ .guest = GUEST_ADDRESS + ((uint64_t)index << 32), .size = data + (size_t)options->depth * options->bytes };
	queue->memory.size = (queue->memory.size + 4095) & ~(size_t)4095;
	queue->memory.fd = memfd_create("load", MFD_CLOEXEC);
	if (queue->memory.fd < 0 || ftruncate(queue->memory.fd, (off_t)queue->memory.size))
		fail(WRONG_USAGE, "%zu bytes of memory: %s", queue->memory.size, strerror(errno));
	queue->memory.base = mmap(NULL, queue->memory.size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, queue->memory.fd, 0);
	if (queue->memory.base == MAP_FAILED)
		fail(WRONG_USAGE, "%zu bytes of memory: %s", queue->memory.size, strerror(errno));
	queue->place = (struct ring_place){ layout.desc, layout.avail, layout.used };
	error = vq_driver_init(&queue->vq, &(struct vq_driver_config){ .area = queue->memory.base,
									.iova = queue->memory.guest,
									.num = NUM,
									.table_entries = indirect ? 3 : 0,
									.base = options->packed ? VQ_PACKED_START : 0,
									.event_idx = event_idx,
									.packed = options->packed });
	if (error)
		fail(WRONG_USAGE, "ring: %s", strerror(-error));
	for (uint32_t i = 0; i < options->depth; i++)
		queue->slots[i] = (struct slot){ .head = queue->memory.base + heads + i * HEAD, .data = queue->memory.base + data + (size_t)i * options->bytes };
	queue->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	queue->call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (queue->kick < 0 || queue->call < 0)
		fail(WRONG_USAGE, "eventfd: %s", strerror(errno));
}

static void share_out(struct queue *queue, const struct device *device, uint32_t index)
{
	const struct options *o = queue->options;
	uint64_t units = device->sectors / (UNIT / SECTOR) / o->queues;

	queue->sectors = units * (UNIT / SECTOR);
	queue->first = index * queue->sectors;
	queue->random = (o->seed * 1000 + index + 1) * 0x9e3779b97f4a7c15ull;
	if (units == 0 || (o->verify && units <= o->depth))
		fail(WRONG_USAGE, "a disk of %llu sectors is too small", (unsigned long long)device->sectors);
	if (o->verify) {
		queue->versions = calloc(queue->sectors, sizeof(*queue->versions));
		queue->busy = calloc(units, sizeof(*queue->busy));
		if (!queue->versions || !queue->busy)
			fail(WRONG_USAGE, "no memory");
	}
}

/* Nanoseconds below which a share of all requests took. */
static double percentile(const struct queue *queues, uint32_t count, uint64_t total, double share)
{
	uint64_t seen = 0;

	for (uint32_t i = 0; i < BUCKETS; i++) {
		for (uint32_t q = 0; q < count; q++)
			seen += queues[q].latency[i];
		if ((double)seen >= share * (double)total && seen)
			return (double)((16ull + i % 16 + 1) << (i / 16)) / 2;
	}
	return 0;
}

static void report(const struct queue *queues, const struct options *o)
{
	uint64_t done = 0, writes = 0, cpu = 0;
	double elapsed = 0, latency = 0;

	for (uint32_t i = 0; i < o->queues; i++) {
		done += queues[i].done;
		writes += queues[i].writes;
		cpu += queues[i].spent_cpu_ns;
		latency += queues[i].latency_sum;
		elapsed = queues[i].elapsed > elapsed ? queues[i].elapsed : elapsed;
	}
	printf("{\"requests\": %llu, \"writes\": %llu, \"seconds\": %.4f, \"iops\": %.1f, \"mean_us\": %.3f, \"p50_us\": %.3f, \"p99_us\": %.3f, "
	       "\"cpu\": %.3f}\n",
	       (unsigned long long)done, (unsigned long long)writes, elapsed, (double)done / elapsed, latency / (double)done * 1e6,
	       percentile(queues, o->queues, done, 0.5) / 1e3, percentile(queues, o->queues, done, 0.99) / 1e3, (double)cpu * 1e-9 / elapsed);
}

static double number(const char *text, double least, double most)
{
	char *end;
	double value = strtod(text, &end);

	if (*end || end == text || value < least || value > most)
		fail(WRONG_USAGE, "%s is not a number from %g to %g", text, least, most);
	return value;
}

int main(int argc, char **argv)
{
	enum { SECONDS = 1, DEPTH, BYTES, QUEUES, WRITE, POLL, PACKED, DIRECT, UNCHECKED, VERIFY, SEED, HELP };
	static const struct option names[] = {
		{ "seconds", required_argument, NULL, SECONDS }, { "depth", required_argument, NULL, DEPTH },
		{ "bytes", required_argument, NULL, BYTES },	 { "queues", required_argument, NULL, QUEUES },
		{ "write", no_argument, NULL, WRITE },		 { "poll", no_argument, NULL, POLL },
		{ "packed", no_argument, NULL, PACKED },	 { "direct", no_argument, NULL, DIRECT },
		{ "unchecked", no_argument, NULL, UNCHECKED },	 { "verify", no_argument, NULL, VERIFY },
		{ "seed", required_argument, NULL, SEED },	 { "help", no_argument, NULL, HELP },
		{ 0 },
	};
	struct options o = { .seconds = 1, .depth = 32, .bytes = 4096, .queues = 1, .seed = 1 };
	struct device device = { .fd = -1 };
	struct queue *queues;
	int option;

	while ((option = getopt_long(argc, argv, "", names, NULL)) != -1) {
		switch (option) {
		case SECONDS: o.seconds = number(optarg, 0.001, 3600); break;
		case DEPTH: o.depth = (uint32_t)number(optarg, 1, NUM); break;
		case BYTES: o.bytes = (uint32_t)number(optarg, SECTOR, UNIT); break;
		case QUEUES: o.queues = (uint32_t)number(optarg, 1, 64); break;
		case SEED: o.seed = (uint64_t)number(optarg, 0, 1e15); break;
		case WRITE: o.write = true; break;
		case POLL: o.poll = true; break;
		case PACKED: o.packed = true; break;
		case DIRECT: o.direct = true; break;
		case UNCHECKED: o.unchecked = true; break;
		case VERIFY: o.verify = true; break;
		case HELP: fputs(usage, stdout); return 0;
		default: fputs(usage, stderr); return WRONG_USAGE;
		}
	}
	if (optind + 1 != argc || o.bytes % SECTOR) {
		fputs(usage, stderr);
		return WRONG_USAGE;
	}
	device.path = argv[optind];
	device.wanted = F_EVENT_IDX | (o.queues > 1 ? F_MQ : 0) | (o.direct ? 0 : F_INDIRECT) | (o.packed ? F_PACKED : 0);
	device.call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	queues = calloc(o.queues, sizeof(*queues));
	if (!queues)
		fail(WRONG_USAGE, "no memory");
	user_connect(&device);
	user_negotiate(&device);
	if (o.packed && !(device.features & F_PACKED))
		fail(WRONG_USAGE, "%s offers no packed rings", device.path);
	if (!(device.features & F_INDIRECT) && o.depth > NUM / 3)
		fail(WRONG_USAGE, "without indirect tables at most %d requests are in flight", NUM / 3);
	for (uint32_t i = 0; i < o.queues; i++) {
		prepare(&queues[i], &o, i, device.features & F_EVENT_IDX, device.features & F_INDIRECT);
		share_out(&queues[i], &device, i);
		user_add_memory(&device, &queues[i].memory, i ? &queues[i - 1].memory : NULL);
	}
	for (uint32_t i = 0; i < o.queues; i++)
		user_start_queue(&device, &queues[i].memory, &queues[i].place, i, NUM, o.packed ? VQ_PACKED_START : 0, queues[i].kick, queues[i].call);
	for (uint32_t i = 0; i < o.queues; i++)
		if (pthread_create(&queues[i].thread, NULL, run, &queues[i]))
			fail(WRONG_USAGE, "no thread");
	for (uint32_t i = 0; i < o.queues; i++)
		pthread_join(queues[i].thread, NULL);
	report(queues, &o);
	return 0;
}
