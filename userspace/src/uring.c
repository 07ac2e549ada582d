// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* Partners of the barriers here are in the kernel: [R] the submission queue's tail, [S] the completion queue's tail, [T] its head. */
#include "uring.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__has_include) && __has_include(<linux/io_uring.h>) && defined(SYS_io_uring_setup)
#include <linux/io_uring.h>

static void *map(int fd, uint64_t size, off_t offset)
{
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset);

	return at == MAP_FAILED ? NULL : at;
}

static int set_up(struct uring *uring, const struct io_uring_params *p, int file)
{
	uint64_t submissions = p->sq_off.array + p->sq_entries * sizeof(uint32_t);
	uint64_t completions = p->cq_off.cqes + p->cq_entries * sizeof(struct io_uring_cqe);
	uint32_t *array;
	uint8_t *rings;

	if (!(p->features & IORING_FEAT_SINGLE_MMAP) || !(p->features & IORING_FEAT_SUBMIT_STABLE))
		return -ENOSYS; /* before Linux 5.5 */
	uring->rings_size = submissions > completions ? submissions : completions;
	uring->requests_size = p->sq_entries * sizeof(struct io_uring_sqe);
	uring->rings = rings = map(uring->fd, uring->rings_size, IORING_OFF_SQ_RING);
	uring->requests = uring->sqes = map(uring->fd, uring->requests_size, IORING_OFF_SQES);
	if (!rings || !uring->sqes)
		return -ENOMEM;
	uring->sq_tail = (_Atomic uint32_t *)(void *)(rings + p->sq_off.tail);
	uring->cq_head = (_Atomic uint32_t *)(void *)(rings + p->cq_off.head);
	uring->cq_tail = (_Atomic uint32_t *)(void *)(rings + p->cq_off.tail);
	uring->sq_mask = p->sq_entries - 1;
	uring->cq_mask = p->cq_entries - 1;
	uring->cqes = (struct io_uring_cqe *)(void *)(rings + p->cq_off.cqes);
	array = (uint32_t *)(void *)(rings + p->sq_off.array);
	for (uint32_t i = 0; i < p->sq_entries; i++)
		array[i] = i;
	if (syscall(SYS_io_uring_register, uring->fd, IORING_REGISTER_FILES, &file, 1))
		return -errno;
	return 0;
}

int uring_open(struct uring *uring, uint32_t entries, int file)
{
	struct io_uring_params parameters = { .flags = 0 };
	int error;

	memset(uring, 0, sizeof(*uring));
	uring->entries = entries;
	uring->fd = (int)syscall(SYS_io_uring_setup, entries, &parameters);
	if (uring->fd < 0)
		return -errno;
	error = set_up(uring, &parameters, file);
	if (error)
		uring_close(uring);
	return error;
}

void uring_add(struct uring *uring, enum uring_request request, const struct iovec *iov, uint32_t count, uint64_t offset,
	       bool stable, uint64_t token)
{
	static const uint8_t codes[] = {
		[URING_READ] = IORING_OP_READV,
		[URING_WRITE] = IORING_OP_WRITEV,
		[URING_FLUSH] = IORING_OP_FSYNC,
	};
	struct io_uring_sqe *entry = &uring->sqes[uring->tail & uring->sq_mask];

	*entry = (struct io_uring_sqe){ .opcode = codes[request],
					.flags = IOSQE_FIXED_FILE,
					.fd = 0,
					.off = offset,
					.addr = (uintptr_t)iov,
					.len = count,
					.user_data = token };
	if (request == URING_FLUSH)
		entry->fsync_flags = IORING_FSYNC_DATASYNC;
	else if (stable)
		entry->rw_flags = RWF_DSYNC;
	uring->tail++;
	uring->added++;
	/* pair [R]: release, the entry is there before the tail says so. */
	atomic_store_explicit(uring->sq_tail, uring->tail, memory_order_release);
}

int uring_submit(struct uring *uring, uint32_t wait)
{
	while (uring->added || wait) {
		long taken = syscall(SYS_io_uring_enter, uring->fd, uring->added, wait, wait ? IORING_ENTER_GETEVENTS : 0, NULL, 0);

		if (taken < 0 && errno != EINTR)
			return -errno;
		if (taken >= 0) {
			uring->added -= (uint32_t)taken;
			wait = 0;
		}
	}
	return 0;
}

bool uring_take_back(struct uring *uring, uint64_t *token)
{
	if (!uring->added)
		return false;
	uring->added--;
	uring->tail--;
	*token = uring->sqes[uring->tail & uring->sq_mask].user_data;
	atomic_store_explicit(uring->sq_tail, uring->tail, memory_order_relaxed); /* the kernel looks only when entered */
	return true;
}

bool uring_ready(const struct uring *uring)
{
	/* pair [S]: acquire, sees the completion stored before the kernel's tail. */
	return uring->fd >= 0 && atomic_load_explicit(uring->cq_tail, memory_order_acquire) !=
					 atomic_load_explicit(uring->cq_head, memory_order_relaxed);
}

bool uring_reap(struct uring *uring, uint64_t *token, int32_t *result)
{
	uint32_t head;

	if (!uring_ready(uring))
		return false;
	head = atomic_load_explicit(uring->cq_head, memory_order_relaxed);
	*token = uring->cqes[head & uring->cq_mask].user_data;
	*result = uring->cqes[head & uring->cq_mask].res;
	/* pair [T]: release, it was read before the kernel may write there again. */
	atomic_store_explicit(uring->cq_head, head + 1, memory_order_release);
	return true;
}

void uring_close(struct uring *uring)
{
	if (uring->rings)
		munmap(uring->rings, uring->rings_size);
	if (uring->requests)
		munmap(uring->requests, uring->requests_size);
	if (uring->fd >= 0)
		close(uring->fd);
	*uring = (struct uring){ .fd = -1 };
}

#else

int uring_open(struct uring *uring, uint32_t entries, int file)
{
	(void)file;
	*uring = (struct uring){ .fd = -1, .entries = entries };
	return -ENOSYS;
}

void uring_close(struct uring *uring)
{
	(void)uring;
}

void uring_add(struct uring *uring, enum uring_request request, const struct iovec *iov, uint32_t count, uint64_t offset,
	       bool stable, uint64_t token)
{
	(void)uring, (void)request, (void)iov, (void)count, (void)offset, (void)stable, (void)token;
}

int uring_submit(struct uring *uring, uint32_t wait)
{
	(void)uring, (void)wait;
	return -ENOSYS;
}

bool uring_take_back(struct uring *uring, uint64_t *token)
{
	(void)uring, (void)token;
	return false;
}

bool uring_ready(const struct uring *uring)
{
	(void)uring;
	return false;
}

bool uring_reap(struct uring *uring, uint64_t *token, int32_t *result)
{
	(void)uring, (void)token, (void)result;
	return false;
}

#endif
