// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* Requests of every shape on every medium; transfers that wait; what a flush covers. */
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "blk_engine.h"
#include "test.h"

enum { NUM = 32, SECTORS = 64, IN = 0, OUT = 1, FLUSH = 4, GET_ID = 8 };
enum { HEAD_AT = 0, STATUS_AT = 0x800, DATA_AT = 0x1000, STEP = 0x2000 };

/* What the engine asked of the file, in order; and what it is told instead of the truth. */
static char calls[64];
static size_t called;
static int refusal, write_flags;

static int refused(char what)
{
	if (called < sizeof(calls) - 1)
		calls[called++] = what;
	errno = refusal;
	return refusal;
}

ssize_t preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
	return flags & RWF_NOWAIT && refused('r') ? -1 : preadv(fd, iov, count, offset);
}

ssize_t pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
	write_flags = flags;
	if (flags & RWF_NOWAIT && refusal)
		return refused('w') ? -1 : 0;
	if (called < sizeof(calls) - 1)
		calls[called++] = 'W';
	return pwritev(fd, iov, count, offset);
}

int fdatasync(int fd)
{
	(void)fd;
	if (called < sizeof(calls) - 1)
		calls[called++] = 'S';
	return 0;
}

static void called_was(const char *expected)
{
	CHECK(called == strlen(expected) && memcmp(calls, expected, called) == 0);
	called = 0;
}

struct disk {
	struct bench bench;
	struct blk_engine blk;
	struct vq_chain chains[ENGINE_BATCH];
	struct vq_used done[NUM];
};

static void open_disk(struct disk *d, const struct blk_config *config, bool packed, uint32_t table)
{
	memset(d, 0, sizeof(*d));
	bench_open(&d->bench, NUM, table, true, base_at(3, NUM, packed), packed);
	CHECK(blk_engine_init(&d->blk, config) == 0);
	d->blk.capacity = SECTORS;
	d->blk.block = 1;
	d->blk.engine.rings[0] = (struct engine_ring){
		.vq = &d->bench.device, .chains = d->chains, .done = d->done, .pieces = &d->bench.pieces, .call = -1
	};
}

static void close_disk(struct disk *d)
{
	if (d->blk.engine.in_flight)
		d->blk.engine.ops->drain(&d->blk.engine);
	blk_engine_destroy(&d->blk);
	bench_close(&d->bench);
}

static uint8_t *at(struct disk *d, uint64_t token, uint64_t offset)
{
	return d->bench.data + token * STEP + offset;
}

static void post(struct disk *d, uint64_t token, uint32_t type, uint64_t sector, uint32_t bytes, uint32_t cut)
{
	uint64_t iova = DATA_IOVA + token * STEP;
	struct vq_buffer buffers[4] = { { iova + HEAD_AT, 16 } };
	size_t count = 1, readable;

	memcpy(at(d, token, HEAD_AT), &type, 4);
	memcpy(at(d, token, HEAD_AT + 8), &sector, 8);
	*at(d, token, STATUS_AT) = 0xff;
	if (cut && cut < bytes) { /* the data in two buffers */
		buffers[count++] = (struct vq_buffer){ iova + DATA_AT, cut };
		buffers[count++] = (struct vq_buffer){ iova + DATA_AT + cut, bytes - cut };
	} else if (bytes) {
		buffers[count++] = (struct vq_buffer){ iova + DATA_AT, bytes };
	}
	readable = type == OUT ? count : 1;
	buffers[count++] = (struct vq_buffer){ iova + STATUS_AT, 1 };
	CHECK(vq_driver_add(&d->bench.driver, buffers, readable, count - readable, token) >= 0);
	CHECK(vq_driver_publish(&d->bench.driver) >= 0);
}

static int turn(struct disk *d)
{
	return d->blk.engine.ops->turn(&d->blk.engine);
}

/* One completion: its token, and how much was written; turns until there is one. */
static uint64_t completed(struct disk *d, uint32_t written)
{
	struct vq_done done;

	for (int round = 0; vq_driver_reap(&d->bench.driver, &done, 1) == 0; round++) {
		CHECK(round < 50000);
		CHECK(!(turn(d) & TURN_ASKS));
		if (round > 100)
			usleep(100);
	}
	CHECK(done.written == written && *at(d, done.token, STATUS_AT) == 0);
	return done.token;
}

static int file_of(const char *directory, int flags)
{
	char path[64], data[512];
	int fd;

	snprintf(path, sizeof(path), "%s/blk-engine-XXXXXX", directory);
	fd = directory[0] ? mkostemp(path, O_CLOEXEC | flags) : memfd_create("disk", MFD_CLOEXEC);
	CHECK(fd >= 0 && (!directory[0] || unlink(path) == 0));
	for (int i = 0; i < SECTORS; i++) {
		memset(data, i + 1, sizeof(data));
		CHECK(pwrite(fd, data, sizeof(data), i * 512) == sizeof(data));
	}
	return fd;
}

/* Reads and writes, whole and cut, on any medium. */
static void transfers(const struct blk_config *config, bool packed, uint32_t table)
{
	static struct disk d;
	uint8_t sector[1024];

	open_disk(&d, config, packed, table);
	for (uint64_t round = 0; round < 3 * NUM; round++) {
		uint64_t token = round % 8;
		uint32_t cut = round % 3 ? 0 : 100;

		post(&d, token, IN, round % 60, 1024, cut);
		CHECK(completed(&d, 1025) == token);
		memset(sector, config->medium == BLK_NULL ? 0 : (int)(round % 60) + 1, 512);
		memset(sector + 512, config->medium == BLK_NULL ? 0 : (int)(round % 60) + 2, 512);
		CHECK(memcmp(at(&d, token, DATA_AT), sector, 1024) == 0);
		post(&d, token, OUT, round % 60, 1024, cut);
		CHECK(completed(&d, 1) == token);
		post(&d, token, FLUSH, 0, 0, 0);
		CHECK(completed(&d, 1) == token);
	}
	if (config->medium != BLK_NULL) {
		CHECK(pread(config->file, sector, 512, 512 * 59) == 512 && sector[0] == 60 && sector[511] == 60);
	}
	close_disk(&d);
}

/* What is not plain stays in the ring, with all that comes behind it, and the owner is asked. */
static void odd_ones(const struct blk_config *config, bool packed)
{
	static const struct {
		uint32_t type;
		uint64_t sector;
		uint32_t bytes;
	} odd[] = { { GET_ID, 0, 20 }, { IN, SECTORS, 512 }, { IN, 0, 511 }, { OUT, SECTORS - 1, 1024 }, { IN, UINT64_MAX, 512 }, { IN, 0, 0 }, { 99, 0, 512 } };
	static struct disk d;
	struct vq_chain chain;

	open_disk(&d, config, packed, 4);
	for (size_t i = 0; i < sizeof(odd) / sizeof(*odd); i++) {
		post(&d, 0, IN, 1, 512, 0);
		post(&d, 1, odd[i].type, odd[i].sector, odd[i].bytes, 0);
		while (!(turn(&d) & TURN_ASKS))
			;
		post(&d, 2, IN, 2, 512, 0);
		CHECK(turn(&d) & TURN_ASKS);
		CHECK(d.blk.engine.in_flight == 0 && d.bench.device.in_flight == 0);
		CHECK(bench_pop(&d.bench, &chain, 1) == 1 && chain.readable >= 16);
		CHECK(vq_device_push(&d.bench.device, &(struct vq_used){ 0, chain.head }, 1) >= 0);
		*at(&d, 1, STATUS_AT) = 0;
		CHECK(completed(&d, 513) == 0 && completed(&d, 0) == 1 && completed(&d, 513) == 2);
	}
	close_disk(&d);
}

/* A file that has become shorter: the owner says what that means, unless the request was in flight. */
static void short_file(void)
{
	static struct disk d;
	struct blk_config config = { .medium = BLK_RESIDENT, .file = file_of("", 0), .depth = 8 };

	CHECK(ftruncate(config.file, 512) == 0);
	open_disk(&d, &config, false, 4);
	post(&d, 0, IN, 1, 512, 0);
	CHECK(turn(&d) & TURN_ASKS && d.bench.device.in_flight == 0);
	close_disk(&d);
	config.medium = BLK_CACHED;
	config.uring = true;
	open_disk(&d, &config, false, 4);
	post(&d, 0, IN, 1, 512, 0);
	if (d.blk.uring.fd >= 0) {
		struct vq_done done;
		int asks = 0;

		for (int round = 0; !asks && round < 50000; round++, usleep(100))
			asks = turn(&d) & TURN_ASKS;
		CHECK(asks && d.blk.failure == EIO);
		CHECK(vq_driver_reap(&d.bench.driver, &done, 1) == 1 && done.written == 1 && *at(&d, 0, STATUS_AT) == 1);
	}
	close_disk(&d);
	close(config.file);
}

/* A mapped file: reads leave holes alone, writes fill them, and one that becomes shorter is asked by system calls. */
static void mapped(void)
{
	static struct disk d;
	struct blk_memory memory;
	struct blk_config config = { .medium = BLK_RESIDENT, .file = memfd_create("disk", MFD_CLOEXEC), .memory = &memory, .depth = 8 };
	enum { CHUNK = 1 << 16 };
	static char data[2 * CHUNK];
	struct stat before, after;

	memset(data, 7, sizeof(data));
	CHECK(ftruncate(config.file, 4 * CHUNK) == 0 && pwrite(config.file, data, sizeof(data), CHUNK) == sizeof(data));
	CHECK(blk_memory_init(&memory, config.file, 4 * CHUNK + 512, true) == 0 && memory.size == 4 * CHUNK);
	open_disk(&d, &config, false, 4);
	d.blk.capacity = 4 * CHUNK / 512 + 1;
	CHECK(fstat(config.file, &before) == 0);
	for (uint64_t i = 0; i < 4; i++) {
		post(&d, 0, IN, (i + 1) * CHUNK / 512 - 1, i == 3 ? 512 : 1024, 0); /* across two chunks */
		CHECK(completed(&d, i == 3 ? 513 : 1025) == 0);
		CHECK(*at(&d, 0, DATA_AT) == (i == 1 || i == 2 ? 7 : 0));
	}
	CHECK(fstat(config.file, &after) == 0 && before.st_blocks == after.st_blocks);
	memset(at(&d, 0, DATA_AT), 9, 4096);
	for (uint64_t i = 0; i < CHUNK / 4096; i++) { /* the first chunk becomes whole */
		post(&d, 0, OUT, i * 8, 4096, 0);
		CHECK(completed(&d, 1) == 0);
	}
	post(&d, 1, IN, 8, 512, 100);
	CHECK(completed(&d, 513) == 1 && *at(&d, 1, DATA_AT) == 9 && *at(&d, 1, DATA_AT + 511) == 9 && memory.chunks[0] == 1);
	CHECK(fallocate(config.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, CHUNK) == 0);
	blk_memory_forget(&memory, 0, UINT64_MAX);
	post(&d, 1, IN, 8, 512, 0);
	CHECK(completed(&d, 513) == 1 && *at(&d, 1, DATA_AT) == 0 && memory.chunks[0] == 2);
	CHECK(ftruncate(config.file, CHUNK) == 0);
	post(&d, 1, IN, 8, 512, 0);
	CHECK(completed(&d, 513) == 1);
	memory.chunks[1] = 1; /* as if it had become shorter just after a look */
	post(&d, 1, IN, CHUNK / 512, 512, 0);
	CHECK(turn(&d) & TURN_ASKS && memory.lost && d.bench.device.in_flight == 0);
	close_disk(&d);
	blk_memory_destroy(&memory);
	close(config.file);
}

/* What would wait is not waited for in the loop; who cannot say whether it would is asked once. */
static void waits(void)
{
	static struct disk d;
	struct blk_config config = { .medium = BLK_CACHED, .file = file_of("", 0), .depth = 8, .uring = true };

	open_disk(&d, &config, false, 4);
	called = 0;
	refusal = EAGAIN;
	post(&d, 0, IN, 7, 512, 0);
	CHECK(completed(&d, 513) == 0 && *at(&d, 0, DATA_AT) == 8);
	called_was("r");
	refusal = EOPNOTSUPP;
	for (int i = 0; i < 2; i++) {
		post(&d, 0, OUT, 7, 512, 0);
		CHECK(completed(&d, 1) == 0);
	}
	called_was("w");
	refusal = 0;
	close_disk(&d);
	close(config.file);
}

/* A flush is asked for after what was handed back before, and with no FLUSH each write is stable. */
static void order(void)
{
	static struct disk d;
	struct blk_config config = { .medium = BLK_CACHED, .file = file_of("", 0), .depth = 8 };

	open_disk(&d, &config, false, 4);
	called = 0;
	post(&d, 0, OUT, 1, 512, 0);
	CHECK(completed(&d, 1) == 0);
	post(&d, 1, FLUSH, 0, 0, 0);
	post(&d, 2, OUT, 2, 512, 0);
	CHECK(completed(&d, 1) == 1 && completed(&d, 1) == 2);
	called_was("WSW");
	CHECK(!(write_flags & RWF_DSYNC));
	d.blk.stable_writes = true;
	post(&d, 0, OUT, 1, 512, 0);
	CHECK(completed(&d, 1) == 0 && write_flags & RWF_DSYNC);
	close_disk(&d);
	close(config.file);
}

/* A completion that is a long time coming: the ring goes on, and rest means that it came. */
static void late(void)
{
	static struct disk d;
	int ends[2], turns = 0;
	struct blk_config config = { .medium = BLK_CACHED, .depth = 8, .uring = true };
	char data[512];

	CHECK(pipe2(ends, O_CLOEXEC) == 0);
	config.file = ends[0]; /* preadv refuses a pipe, io_uring waits for it */
	open_disk(&d, &config, false, 4);
	if (d.blk.uring.fd >= 0) {
		post(&d, 0, IN, 0, 512, 0);
		for (; turns < 100; turns++)
			CHECK(!(turn(&d) & TURN_ASKS));
		CHECK(d.blk.engine.in_flight == 1 && d.blk.engine.ops->arm(&d.blk.engine) == 0);
		memset(data, 0x5a, sizeof(data));
		CHECK(write(ends[1], data, sizeof(data)) == sizeof(data));
		d.blk.engine.ops->drain(&d.blk.engine);
		CHECK(d.blk.engine.in_flight == 0 && d.bench.device.in_flight == 0 && d.blk.engine.rings[0].due);
		CHECK(completed(&d, 513) == 0 && *at(&d, 0, DATA_AT) == 0x5a);
	}
	close_disk(&d);
	close(ends[0]);
	close(ends[1]);
}

int main(void)
{
	struct blk_config memory = { .medium = BLK_RESIDENT, .file = file_of("", 0), .depth = 16 };
	struct blk_config cached = { .medium = BLK_CACHED, .file = file_of("/tmp", 0), .depth = 16, .uring = true };
	struct blk_config nothing = { .medium = BLK_NULL, .file = -1, .depth = 16 };

	for (int mode = 0; mode < 4; mode++) {
		transfers(&memory, mode & 1, mode & 2 ? 4 : 0);
		transfers(&cached, mode & 1, mode & 2 ? 4 : 0);
		transfers(&nothing, mode & 1, mode & 2 ? 4 : 0);
	}
	cached.uring = false;
	transfers(&cached, false, 4);
	odd_ones(&memory, false);
	odd_ones(&memory, true);
	short_file();
	mapped();
	waits();
	order();
	late();
	return 0;
}
