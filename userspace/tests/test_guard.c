// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* Memory whose file shrinks: the access goes on with zeros, the queue breaks, every other SIGBUS dies as before. */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "test.h"

enum { SIZE = 1 << 16 };

static int open_shared(size_t size)
{
	int fd = memfd_create("shared", MFD_CLOEXEC);

	CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
	return fd;
}

static uint8_t *map_shared(int fd, size_t size)
{
	uint8_t *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	CHECK(memory != MAP_FAILED);
	return memory;
}

/* Not seen by ThreadSanitizer, to which replacing a page under other threads is a race, as it is meant to be. */
__attribute__((no_sanitize_thread, noinline)) static uint8_t touch(const uint8_t *memory)
{
	return *(const volatile uint8_t *)memory;
}

static void rules(void)
{
	int fd = open_shared(SIZE);
	uint8_t *memory = map_shared(fd, SIZE);

	CHECK(guard_add(memory, 0) == -EINVAL && guard_add(memory + 1, 4096) == -EINVAL && guard_add(NULL, 1) == -EINVAL);
	CHECK(guard_add(memory, UINT64_MAX) == -EINVAL);
	CHECK(guard_remove(memory) == -ENOENT && guard_poisoned(memory) == -ENOENT);
	CHECK(guard_add(memory + 4096, 8192) == 0);
	CHECK(guard_add(memory, SIZE) == -EEXIST && guard_add(memory + 8192, 1) == -EEXIST);
	CHECK(guard_add(memory, 4096) == 0 && guard_add(memory + 12288, 1) == 0);
	CHECK(guard_poisoned(memory) == 0 && guard_poisoned(memory + 4096) == 0);
	CHECK(guard_remove(memory) == 0 && guard_remove(memory + 4096) == 0 && guard_remove(memory + 12288) == 0);
	CHECK(guard_add(memory, SIZE) == 0 && guard_remove(memory) == 0);
	CHECK(munmap(memory, SIZE) == 0 && close(fd) == 0);
}

/* The area of a driver's ring lives in a file of its own; it is cut under a queue at work. */
static void shrunk_ring(bool packed)
{
	struct vq_layout layout = vq_layout(64, 0, packed);
	uint32_t base = packed ? VQ_PACKED_START : 0;
	struct iova_map map;
	struct vq_driver driver;
	struct vq_device device;
	struct vq_chain chain;
	struct iovec iov[64];
	uint64_t iova[64];
	struct iova_pieces pieces = { iov, iova, 0, 64 };
	struct vq_done done;
	int fd = open_shared(SIZE);
	uint8_t *memory = map_shared(fd, SIZE);
	uint64_t before = guard_events();

	CHECK(guard_add(memory, SIZE) == 0);
	iova_map_init(&map);
	CHECK(iova_map_add(&map, 0, SIZE, memory, IOVA_RW) == 0);
	CHECK(vq_driver_init(&driver, &(struct vq_driver_config){ .area = memory,
								  .num = 64,
								  .base = base,
								  .packed = packed }) == 0);
	CHECK(vq_device_init(&device, &(struct vq_device_config){ .map = &map,
								  .desc = layout.desc,
								  .avail = layout.avail,
								  .used = layout.used,
								  .num = 64,
								  .base = base,
								  .packed = packed }) == 0);
	CHECK(vq_driver_add(&driver, &(struct vq_buffer){ 8192, 512 }, 1, 0, 7) == 0 && vq_driver_publish(&driver) == 1);
	CHECK(vq_device_pop(&device, &chain, 1, &pieces) == 1 && !iova_map_poisoned(&map));
	CHECK(ftruncate(fd, 0) == 0);
	CHECK(vq_device_push(&device, &(struct vq_used){ 0, chain.head }, 1) == -EPROTO);
	CHECK(device.fault.code == VQ_POISONED && iova_map_poisoned(&map) && guard_poisoned(memory) == 1);
	CHECK(guard_events() == before + 1);
	CHECK(vq_driver_reap(&driver, &done, 1) <= 1 && driver.fault.code == VQ_POISONED);
	CHECK(vq_driver_publish(&driver) == -EPROTO);
	CHECK(touch(memory + SIZE - 1) == 0); /* all of it is private now */
	CHECK(guard_remove(memory) == 0 && munmap(memory, SIZE) == 0 && close(fd) == 0);
	vq_device_destroy(&device);
	vq_driver_destroy(&driver);
	iova_map_destroy(&map);
}

/* More mappings than one chunk of slots holds; only those that were cut become poisoned. */
static void many(void)
{
	enum { COUNT = 500, EACH = 4096 };
	static uint8_t *memory[COUNT];
	int whole = open_shared(EACH), cut = open_shared(EACH);

	for (int i = 0; i < COUNT; i++) {
		memory[i] = map_shared(i % 3 ? whole : cut, EACH);
		CHECK(guard_add(memory[i], EACH) == 0);
		memory[i][5] = 1;
	}
	CHECK(ftruncate(cut, 0) == 0);
	for (int i = 0; i < COUNT; i++)
		CHECK(touch(memory[i] + 5) == (i % 3 ? 1 : 0) && guard_poisoned(memory[i]) == (i % 3 ? 0 : 1));
	CHECK(guard_poisoned_range(memory[0], 1) && !guard_poisoned_range(memory[1], EACH));
	for (int i = 0; i < COUNT; i++)
		CHECK(guard_remove(memory[i]) == 0 && munmap(memory[i], EACH) == 0);
	CHECK(close(whole) == 0 && close(cut) == 0);
}

/* Threads that guard, lose, touch and unguard mappings of their own, all at once. */
static void *churn(void *unused)
{
	(void)unused;
	for (int i = 0; i < 300; i++) {
		int fd = open_shared(8192);
		uint8_t *memory = map_shared(fd, 8192);

		CHECK(guard_add(memory, 8192) == 0);
		memory[0] = 3;
		if (i % 2)
			CHECK(ftruncate(fd, 0) == 0);
		CHECK(touch(memory + 4096) == 0 && guard_poisoned(memory) == i % 2);
		CHECK(guard_remove(memory) == 0 && munmap(memory, 8192) == 0 && close(fd) == 0);
	}
	return NULL;
}

/* Several threads fault on the same mapping together. */
static _Atomic(uint8_t *) common;

static void *fault(void *unused)
{
	uint8_t *memory;

	(void)unused;
	while (!(memory = atomic_load(&common)))
		;
	for (int page = 0; page < SIZE; page += 4096)
		CHECK(touch(memory + page) == 0);
	return NULL;
}

static void threads(void)
{
	enum { THREADS = 4 };
	pthread_t thread[THREADS];
	int fd = open_shared(SIZE);
	uint8_t *memory = map_shared(fd, SIZE);

	for (int i = 0; i < THREADS; i++)
		CHECK(pthread_create(&thread[i], NULL, churn, NULL) == 0);
	for (int i = 0; i < THREADS; i++)
		CHECK(pthread_join(thread[i], NULL) == 0);

	memset(memory, 9, SIZE);
	CHECK(guard_add(memory, SIZE) == 0);
	for (int i = 0; i < THREADS; i++)
		CHECK(pthread_create(&thread[i], NULL, fault, NULL) == 0);
	CHECK(ftruncate(fd, 0) == 0);
	atomic_store(&common, memory);
	for (int i = 0; i < THREADS; i++)
		CHECK(pthread_join(thread[i], NULL) == 0);
	CHECK(guard_poisoned(memory) == 1 && guard_remove(memory) == 0);
	CHECK(munmap(memory, SIZE) == 0 && close(fd) == 0);
}

static void quiet_exit(int number)
{
	_exit(40 + (number == SIGBUS));
}

/* What a SIGBUS that is not ours does, in a child: the wait status. */
static int elsewhere(struct sigaction *previous, bool sent)
{
	int status;
	pid_t child = fork();

	CHECK(child >= 0);
	if (child == 0) {
		int fd = open_shared(8192);
		uint8_t *memory = map_shared(fd, 8192), *other = map_shared(fd, 8192);

		alarm(20);
		CHECK(sigaction(SIGBUS, previous, NULL) == 0);
		CHECK(guard_add(memory, 8192) == 0 && ftruncate(fd, 0) == 0);
		CHECK(touch(memory) == 0);
		if (sent)
			raise(SIGBUS);
		else
			touch(other); /* the same file, not guarded */
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child);
	return status;
}

static void others(void)
{
	struct sigaction fatal = { .sa_handler = SIG_DFL }, ignore = { .sa_handler = SIG_IGN };
	struct sigaction mine = { .sa_handler = quiet_exit };
	int status;

	for (int sent = 0; sent < 2; sent++) {
		status = elsewhere(&fatal, sent);
		CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
		status = elsewhere(&mine, sent);
		CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 41);
	}
	status = elsewhere(&ignore, true);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	status = elsewhere(&ignore, false);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
}

int main(void)
{
	others(); /* first: the children start without our handler */
	rules();
	shrunk_ring(false);
	shrunk_ring(true);
	many();
	threads();
	others(); /* and again with it installed before theirs */
	return 0;
}
