// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* One cursor walks a part; all the copies are loops over the runs it yields. */
#include "chain.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

struct cursor {
	struct chain_part part; /* what is left, the current piece first */
	size_t into; /* bytes of that piece that are behind us */
};

static struct cursor seek(struct chain_part part, uint64_t offset)
{
	while (part.count && offset >= part.iov->iov_len) {
		offset -= part.iov->iov_len;
		part.iov++;
		part.count--;
	}
	return (struct cursor){ .part = part, .into = part.count ? (size_t)offset : 0 };
}

/* The rest of the current piece, at most `length` bytes of it; 0 at the end. */
static size_t run(const struct cursor *at, uint64_t length, uint8_t **bytes)
{
	size_t rest;

	if (!at->part.count)
		return 0;
	*bytes = (uint8_t *)at->part.iov->iov_base + at->into;
	rest = at->part.iov->iov_len - at->into;
	return rest < length ? rest : (size_t)length;
}

static void advance(struct cursor *at, size_t length)
{
	at->into += length;
	while (at->part.count && at->into == at->part.iov->iov_len) { /* empty pieces are passed over */
		at->part.iov++;
		at->part.count--;
		at->into = 0;
	}
}

uint64_t chain_bytes(struct chain_part part)
{
	uint64_t bytes = 0;

	for (size_t i = 0; i < part.count; i++)
		bytes += part.iov[i].iov_len;
	return bytes;
}

uint64_t chain_gather(struct chain_part from, uint64_t offset, void *to, uint64_t length)
{
	struct cursor at = seek(from, offset);
	uint64_t done = 0;
	uint8_t *bytes;
	size_t here;

	while (done < length && (here = run(&at, length - done, &bytes))) {
		memcpy((uint8_t *)to + done, bytes, here);
		advance(&at, here);
		done += here;
	}
	return done;
}

uint64_t chain_scatter(struct chain_part to, uint64_t offset, const void *from, uint64_t length)
{
	struct cursor at = seek(to, offset);
	uint64_t done = 0;
	uint8_t *bytes;
	size_t here;

	while (done < length && (here = run(&at, length - done, &bytes))) {
		memcpy(bytes, (const uint8_t *)from + done, here);
		advance(&at, here);
		done += here;
	}
	return done;
}

uint64_t chain_zero(struct chain_part to, uint64_t offset, uint64_t length)
{
	struct cursor at = seek(to, offset);
	uint64_t done = 0;
	uint8_t *bytes;
	size_t here;

	while (done < length && (here = run(&at, length - done, &bytes))) {
		memset(bytes, 0, here);
		advance(&at, here);
		done += here;
	}
	return done;
}

uint64_t chain_copy(struct chain_part to, uint64_t to_offset, struct chain_part from, uint64_t from_offset,
		    uint64_t length)
{
	struct cursor target = seek(to, to_offset), source = seek(from, from_offset);
	uint64_t done = 0;
	uint8_t *out, *in;
	size_t here;

	while (done < length && (here = run(&target, length - done, &out)) && (here = run(&source, here, &in))) {
		memmove(out, in, here); /* a driver may give the same memory for both */
		advance(&target, here);
		advance(&source, here);
		done += here;
	}
	return done;
}

enum { WINDOW = 1024 }; /* IOV_MAX on Linux */

/* Fills the window from a cursor without moving it; the bytes in it, and whether they are all of `length`. */
static uint64_t window(struct cursor at, uint64_t length, struct iovec *iov, int *count, bool *all)
{
	uint64_t bytes = 0;
	uint8_t *start;
	size_t here = 0;

	for (*count = 0; *count < WINDOW && bytes < length && (here = run(&at, length - bytes, &start)); (*count)++) {
		iov[*count] = (struct iovec){ .iov_base = start, .iov_len = here };
		advance(&at, here);
		bytes += here;
	}
	*all = bytes == length || at.part.count == 0;
	return bytes;
}

typedef ssize_t transfer(int fd, const struct iovec *iov, int count, off_t offset);

static ssize_t in(int fd, const struct iovec *iov, int count, off_t offset)
{
	return offset < 0 ? readv(fd, iov, count) : preadv(fd, iov, count, offset);
}

static ssize_t out(int fd, const struct iovec *iov, int count, off_t offset)
{
	return offset < 0 ? writev(fd, iov, count) : pwritev(fd, iov, count, offset);
}

static int64_t move(transfer *go, struct chain_part part, int fd, int64_t file_offset, uint64_t skip, uint64_t length)
{
	struct cursor at = seek(part, skip);
	struct iovec iov[WINDOW];
	uint64_t done = 0;

	if (file_offset < -1 || length > INT64_MAX || (file_offset >= 0 && (int64_t)length > INT64_MAX - file_offset))
		return -EINVAL;
	while (done < length) {
		uint64_t bytes;
		ssize_t moved;
		bool all;
		int count;

		bytes = window(at, length - done, iov, &count, &all);
		if (bytes == 0)
			break;
		if (file_offset < 0 && !all)
			return -EMSGSIZE;
		do
			moved = go(fd, iov, count, file_offset < 0 ? -1 : file_offset + (int64_t)done);
		while (moved < 0 && errno == EINTR);
		if (moved < 0)
			return done ? (int64_t)done : -errno;
		done += (uint64_t)moved;
		if (moved == 0 || file_offset < 0)
			break;
		at = seek(part, skip + done);
	}
	return (int64_t)done;
}

int64_t chain_from_file(struct chain_part to, int fd, int64_t file_offset, uint64_t skip, uint64_t length)
{
	return move(in, to, fd, file_offset, skip, length);
}

int64_t chain_to_file(struct chain_part from, int fd, int64_t file_offset, uint64_t skip, uint64_t length)
{
	return move(out, from, fd, file_offset, skip, length);
}
