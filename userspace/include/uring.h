// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * uring: what an engine needs of io_uring, by its system calls (io_uring_enter(2)); no library.
 *
 * Rule: one file, which is registered, so requests name none. Where the kernel, or the headers that this was built with,
 * have no io_uring, uring_open says -ENOSYS.
 * Synchronization: one thread at a time.
 */
#ifndef VDPA_BRIDGE_URING_H
#define VDPA_BRIDGE_URING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

enum uring_request { URING_READ, URING_WRITE, URING_FLUSH };

struct io_uring_sqe;
struct io_uring_cqe;

struct uring {
	int fd; /* -1: not open; readable while completions wait */
	uint32_t entries;
	uint32_t added; /* not submitted yet */
	_Atomic uint32_t *sq_tail, *cq_head, *cq_tail;
	uint32_t tail, sq_mask, cq_mask;
	struct io_uring_sqe *sqes;
	struct io_uring_cqe *cqes;
	void *rings, *requests;
	uint64_t rings_size, requests_size;
};

/* For up to `entries` requests in flight (a power of 2) on `file`. 0 or -errno. */
int uring_open(struct uring *uring, uint32_t entries, int file);
void uring_close(struct uring *uring);

/*
 * Adds a request, of which there are fewer than `entries` in flight. `iov` may change after uring_submit. `stable`: a
 * write ends when the medium has it.
 */
void uring_add(struct uring *uring, enum uring_request request, const struct iovec *iov, uint32_t count, uint64_t offset,
	       bool stable, uint64_t token);

/* Submits what was added, and waits for `wait` completions. 0 or -errno. */
int uring_submit(struct uring *uring, uint32_t wait);

/* After that failed: the token of the last request that was not submitted, and is not any more; false when all were. */
bool uring_take_back(struct uring *uring, uint64_t *token);

/* One completion: its token and what the system call would have returned, or -errno; false when there is none. */
bool uring_reap(struct uring *uring, uint64_t *token, int32_t *result);

/* Whether a completion waits. */
bool uring_ready(const struct uring *uring);

#endif
