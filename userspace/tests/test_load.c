// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * Load generators against a device in a thread of its own, that sleeps as real ones do: a disk in memory, a NIC that sends
 * back. Then the same devices with faults, each of which must end the run with its own words.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "load_blk.h"
#include "load_net.h"
#include "test.h"

/* LATE: requests after which a faulty disk begins to be one, as every block was written. */
enum { NUM = 64, SECTORS = 512, SLICE = 20000000, LATE = 5000, HEADER = 12, STRIDE = 128 };

enum fault { HONEST, LOSE, TEAR, MISDIRECT, EMPTY_READ, REFUSE, SILENT, DROP, SWAP, HEADLESS };

struct end {
	struct bench b;
	int kick, call;
};

static struct end one, other; /* of a disk; of a NIC: transmit and receive */
static uint8_t disk[SECTORS * PATTERN_SECTOR];
static enum fault fault;
static uint64_t served;
static int stop;

static void end_open(struct end *end, uint32_t tables, bool event_idx, bool packed)
{
	bench_open(&end->b, NUM, tables, event_idx, base_at(65000, NUM, packed), packed);
	end->kick = eventfd(0, EFD_NONBLOCK);
	end->call = eventfd(0, EFD_NONBLOCK);
	CHECK(end->kick >= 0 && end->call >= 0);
}

static void end_close(struct end *end)
{
	CHECK(close(end->kick) == 0 && close(end->call) == 0);
	bench_close(&end->b);
}

static void push(struct end *end, const struct vq_used *used, size_t count)
{
	int due = vq_device_push(&end->b.device, used, count);

	CHECK(due >= 0);
	if (due)
		CHECK(eventfd_write(end->call, 1) == 0);
}

static uint32_t serve_block(const struct vq_chain *chain)
{
	struct {
		uint32_t type, reserved;
		uint64_t sector;
	} head;
	uint8_t status = 0;
	uint64_t size;
	uint8_t *at;

	CHECK(chain_gather(readable_part(chain), 0, &head, sizeof(head)) == sizeof(head));
	served++;
	size = head.type ? chain->readable - sizeof(head) : chain->writable - 1;
	CHECK(head.sector * PATTERN_SECTOR + size <= sizeof(disk) && size % PATTERN_SECTOR == 0);
	at = disk + head.sector * PATTERN_SECTOR;
	if (served > LATE && fault == REFUSE)
		status = 1;
	if (!head.type && fault != EMPTY_READ)
		CHECK(chain_scatter(writable_part(chain), 0, at, size) == size);
	if (head.type && served > LATE && served % 7 == 0) {
		if (fault == MISDIRECT) /* to the first block as well */
			CHECK(chain_gather(readable_part(chain), sizeof(head), disk, size) == size);
		size = fault == LOSE ? 0 : fault == TEAR ? size - PATTERN_SECTOR : size;
	}
	if (head.type)
		CHECK(chain_gather(readable_part(chain), sizeof(head), at, size) == size);
	CHECK(chain_scatter(writable_part(chain), chain->writable - 1, &status, 1) == 1);
	return (uint32_t)chain->writable;
}

static size_t serve_disk(void)
{
	struct vq_chain chains[NUM];
	struct vq_used used[NUM];
	size_t count = bench_pop(&one.b, chains, NUM);

	for (size_t i = 0; i < count; i++)
		used[count - 1 - i] = (struct vq_used){ serve_block(&chains[i]), chains[i].head };
	if (count && fault != SILENT)
		push(&one, used, count);
	return count;
}

/* What was sent goes into the next receive buffer. */
static size_t serve_nic(void)
{
	struct vq_chain sent[NUM], room[NUM];
	struct vq_used used[NUM];
	uint8_t frames[NUM][STRIDE];
	size_t count = bench_pop(&one.b, sent, NUM), kept = 0, back;

	for (size_t i = 0; i < count; i++) {
		used[i] = (struct vq_used){ 0, sent[i].head };
		if (fault != DROP || served++ % 10)
			CHECK(chain_gather(readable_part(&sent[i]), 0, frames[kept++], STRIDE) == sent[i].readable);
	}
	back = kept ? bench_pop(&other.b, room, kept) : 0;
	push(&one, used, count);
	for (size_t i = 0; i < back; i++) {
		size_t from = fault == SWAP && back > 1 ? i ^ 1 : i;

		chain_scatter(writable_part(&room[i]), 0, frames[from < back ? from : i], HEADER + 64);
		used[i] = (struct vq_used){ fault == HEADLESS ? HEADER - 1 : HEADER + 64, room[i].head };
	}
	push(&other, used, back);
	return count;
}

static void *device(void *serve)
{
	size_t (*turn)(void) = *(size_t (**)(void))serve;
	struct pollfd waits[2] = { { .fd = one.kick, .events = POLLIN }, { .fd = stop, .events = POLLIN } };
	eventfd_t count;

	for (;;) {
		if (turn())
			continue;
		if (vq_device_enable_kick(&one.b.device) == 1)
			continue;
		CHECK(poll(waits, 2, 20000) > 0);
		if (waits[1].revents)
			return NULL;
		CHECK(eventfd_read(one.kick, &count) == 0);
		vq_device_disable_kick(&one.b.device);
	}
}

static pthread_t begin(size_t (**serve)(void), enum fault with)
{
	pthread_t thread;

	fault = with;
	served = 0;
	stop = eventfd(0, EFD_NONBLOCK);
	CHECK(stop >= 0 && pthread_create(&thread, NULL, device, serve) == 0);
	return thread;
}

static void finish(pthread_t thread)
{
	CHECK(eventfd_write(stop, 1) == 0 && pthread_join(thread, NULL) == 0 && close(stop) == 0);
}

static struct load_ring ring_of(struct end *end)
{
	return (struct load_ring){ .vq = &end->b.driver, .kick = end->kick, .call = end->call };
}

static enum load_state run_blk(struct load_blk *load)
{
	enum load_state state;

	while ((state = load_blk_run(load, SLICE)) == LOAD_MORE)
		;
	return state;
}

enum way { EVENTS, POLL, BUDGET };

static const uint64_t budgets[] = { 0, VQ_POLL_ALWAYS, 50000 };

static void disks(bool packed, bool indirect, enum way way, enum fault with, enum load_state ends, enum pattern_fault wrong)
{
	static size_t (*serve)(void) = serve_disk;
	static struct load_blk load;
	struct load_blk_config config = { .depth = 8, .block = 2048, .segment = 1024, .blocks = SECTORS / 4, .reads = 50, .random = true,
					  .verify = true, .seed = 7, .iova = DATA_IOVA,
					  .pace = { .goal = 20000, .patience = 300000000, .poll = vq_poll_begin(budgets[way]) } };
	enum load_state state;
	pthread_t thread;

	end_open(&one, indirect ? 8 : 0, way, packed);
	memset(disk, 0, sizeof(disk));
	config.ring = ring_of(&one);
	config.memory = one.b.data;
	CHECK(load_blk_memory(config.depth, config.block) <= DATA_SIZE);
	CHECK(load_blk_init(&load, &config) == 0);
	thread = begin(&serve, with);
	state = run_blk(&load);
	if (state == LOAD_DONE) {
		CHECK(load.started == 20000 && load.finished == 20000 && load.counts.reads + load.counts.writes == 20000);
		CHECK(load.counts.read_latency.count == load.counts.reads && load.counts.write_latency.count == load.counts.writes);
		load.counts.compared = 0;
		load_blk_sweep(&load);
		state = run_blk(&load);
	}
	CHECK(state == ends && load.wrong.fault == wrong);
	if (ends == LOAD_DONE)
		CHECK(load.counts.compared == SECTORS / 4);
	if (with == REFUSE)
		CHECK(load.failed_status == 1);
	finish(thread);
	load_blk_destroy(&load);
	end_close(&one);
}

static void nics(bool packed, enum way way, enum fault with, enum load_state ends)
{
	static size_t (*serve)(void) = serve_nic;
	static struct load_net load;
	static struct vq_slots out, in;
	struct load_net_config config = { .mode = LOAD_NET_ECHO, .header = HEADER, .frame = 64, .room = STRIDE, .batch = 16, .window = 32,
					  .linger = 500000000, .seed = 9, .outgoing = &out, .incoming = &in,
					  .pace = { .goal = 20000, .patience = 2000000000, .poll = vq_poll_begin(budgets[way]) } };
	uint32_t room = STRIDE;
	enum load_state state;
	pthread_t thread;

	end_open(&one, 0, !way, packed);
	end_open(&other, 0, !way, packed);
	CHECK(vq_slots_init(&out, &one.b.driver, one.b.data, DATA_IOVA, STRIDE, 32, false) == 0);
	CHECK(vq_slots_init(&in, &other.b.driver, other.b.data, DATA_IOVA, STRIDE, NUM, true) == 0);
	CHECK(vq_slots_add(&in, &room, false, NUM) == NUM && vq_driver_publish(&other.b.driver) >= 0);
	config.sender = ring_of(&one);
	config.receiver = ring_of(&other);
	if (with == DROP)
		config.pace.goal = 200;
	CHECK(load_net_init(&load, &config) == 0);
	thread = begin(&serve, with);
	while ((state = load_net_run(&load, SLICE)) == LOAD_MORE)
		;
	finish(thread);
	CHECK(state == ends);
	if (ends == LOAD_DONE) {
		uint64_t lost = with == DROP ? config.pace.goal / 10 : 0;

		CHECK(load.counts.sent == config.pace.goal && load.counts.lost == lost && load.counts.foreign == 0);
		CHECK(load.counts.ours == config.pace.goal - lost && load.counts.latency.count == load.counts.ours);
		CHECK(with == SWAP ? load.counts.reordered > 0 : load.counts.reordered == 0);
	} else {
		CHECK(load.headless == HEADER - 1);
	}
	vq_slots_destroy(&out);
	vq_slots_destroy(&in);
	end_close(&one);
	end_close(&other);
}

int main(void)
{
	for (int mode = 0; mode < 12; mode++)
		disks(mode & 1, mode & 2, mode / 4, HONEST, LOAD_DONE, PATTERN_GOOD);
	for (int packed = 0; packed < 2; packed++) {
		disks(packed, true, EVENTS, LOSE, LOAD_FAILED, PATTERN_STALE);
		disks(packed, true, EVENTS, TEAR, LOAD_FAILED, PATTERN_TORN);
		disks(packed, true, EVENTS, MISDIRECT, LOAD_FAILED, PATTERN_MISDIRECTED);
		disks(packed, true, EVENTS, EMPTY_READ, LOAD_FAILED, PATTERN_BROKEN);
		disks(packed, true, EVENTS, REFUSE, LOAD_FAILED, PATTERN_GOOD);
		disks(packed, true, packed ? BUDGET : POLL, SILENT, LOAD_SILENT, PATTERN_GOOD);
		for (enum way way = EVENTS; way <= BUDGET; way++) {
			nics(packed, way, HONEST, LOAD_DONE);
			nics(packed, way, SWAP, LOAD_DONE);
			nics(packed, way, DROP, LOAD_DONE);
		}
		nics(packed, EVENTS, HEADLESS, LOAD_FAILED);
	}
	puts("load: all well");
	return 0;
}
