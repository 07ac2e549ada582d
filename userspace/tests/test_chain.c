// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* Moving bytes: every call against a flat buffer, on random pieces; then files, short transfers and errors. */
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "test.h"

enum { MOST = 40, SPAN = 64 };

/* Cuts `memory` into pieces, gaps between them; returns the bytes in them. */
static size_t cut(uint64_t *seed, uint8_t *memory, struct iovec *iov, size_t count)
{
	size_t bytes = 0;

	for (size_t i = 0; i < count; i++) {
		iov[i].iov_base = memory + i * SPAN;
		iov[i].iov_len = random_below(seed, SPAN); /* empty ones too */
		bytes += iov[i].iov_len;
	}
	return bytes;
}

static size_t lesser(size_t a, size_t b)
{
	return a < b ? a : b;
}

static void against_flat(uint64_t seed)
{
	uint8_t memory[2][MOST * SPAN], flat[2][MOST * SPAN], bytes[MOST * SPAN];
	struct iovec iov[2][MOST];

	for (int round = 0; round < 400; round++) {
		size_t count = 1 + random_below(&seed, MOST - 1), other = 1 + random_below(&seed, MOST - 1);
		size_t size[2] = { cut(&seed, memory[0], iov[0], count), cut(&seed, memory[1], iov[1], other) };
		struct chain_part to = { iov[0], count }, from = { iov[1], other };
		size_t a = random_below(&seed, (uint32_t)size[0] + 20), b = random_below(&seed, (uint32_t)size[1] + 20);
		size_t length = random_below(&seed, MOST * SPAN), rest_a = size[0] > a ? size[0] - a : 0;
		size_t rest_b = size[1] > b ? size[1] - b : 0, moved;

		for (size_t i = 0; i < sizeof(bytes); i++)
			bytes[i] = memory[0][i] = memory[1][i] = (uint8_t)next_random(&seed);
		CHECK(chain_bytes(to) == size[0]);
		CHECK(chain_gather(to, 0, flat[0], sizeof(flat[0])) == size[0]);
		CHECK(chain_gather(from, 0, flat[1], sizeof(flat[1])) == size[1]);

		moved = lesser(length, rest_b);
		CHECK(chain_gather(from, b, bytes, length) == moved);
		CHECK(!memcmp(bytes, flat[1] + lesser(b, size[1]), moved));

		moved = lesser(length, rest_a);
		CHECK(chain_scatter(to, a, bytes, length) == moved);
		memcpy(flat[0] + lesser(a, size[0]), bytes, moved);

		moved = lesser(length, lesser(rest_a, rest_b));
		CHECK(chain_copy(to, a, from, b, length) == moved);
		memcpy(flat[0] + lesser(a, size[0]), flat[1] + lesser(b, size[1]), moved);

		moved = lesser(length / 2, rest_a);
		CHECK(chain_zero(to, a, length / 2) == moved);
		memset(flat[0] + lesser(a, size[0]), 0, moved);

		CHECK(chain_gather(to, 0, bytes, sizeof(bytes)) == size[0]);
		CHECK(!memcmp(bytes, flat[0], size[0]));
	}
}

static void files(void)
{
	enum { PARTS = 3000, PART = 3 };
	static uint8_t memory[PARTS * PART], back[PARTS * PART];
	static struct iovec iov[PARTS];
	struct chain_part all = { iov, PARTS };
	int fd = memfd_create("file", MFD_CLOEXEC | MFD_ALLOW_SEALING), pair[2];

	CHECK(fd >= 0);
	for (size_t i = 0; i < PARTS; i++)
		iov[i] = (struct iovec){ memory + i * PART, PART };
	for (size_t i = 0; i < sizeof(memory); i++)
		memory[i] = (uint8_t)(i * 31 + i / 256);

	/* More pieces than one system call takes, at offsets on both sides. */
	CHECK(chain_to_file(all, fd, 100, 10, sizeof(memory)) == sizeof(memory) - 10);
	CHECK(pread(fd, back, sizeof(back), 100) == (ssize_t)sizeof(memory) - 10);
	CHECK(!memcmp(back, memory + 10, sizeof(memory) - 10));
	memset(memory, 0, sizeof(memory));
	CHECK(chain_from_file(all, fd, 100, 10, UINT32_MAX) == sizeof(memory) - 10); /* short at end of file */
	CHECK(!memcmp(back, memory + 10, sizeof(memory) - 10));
	CHECK(chain_from_file(all, fd, 1 << 20, 0, 5) == 0);
	CHECK(chain_from_file(all, fd, 0, sizeof(memory), 5) == 0);
	CHECK(chain_from_file(all, fd, 0, UINT64_MAX, 5) == 0);
	CHECK(chain_from_file(all, fd, -2, 0, 5) == -EINVAL);
	CHECK(chain_from_file(all, fd, INT64_MAX, 0, 5) == -EINVAL);
	CHECK(chain_from_file(all, fd, 0, 0, UINT64_MAX) == -EINVAL);
	CHECK(chain_from_file(all, -1, 0, 0, 5) == -EBADF);
	CHECK(chain_from_file(all, fd, -1, 0, sizeof(memory)) == -EMSGSIZE);
	CHECK(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE) == 0);
	CHECK(chain_to_file(all, fd, 0, 0, 5) == -EPERM);
	CHECK(close(fd) == 0);

	/* One message is one transfer, whatever the piece size. */
	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) == 0);
	CHECK(chain_from_file(all, pair[1], -1, 0, 100) == -EAGAIN);
	CHECK(chain_to_file(all, pair[0], -1, 1, 10) == 10 && chain_to_file(all, pair[0], -1, 2, 20) == 20);
	CHECK(chain_from_file(all, pair[1], -1, 200, 100) == 10 && !memcmp(memory + 200, memory + 1, 10));
	CHECK(chain_from_file(all, pair[1], -1, 200, 100) == 20 && !memcmp(memory + 200, memory + 2, 20));
	CHECK(close(pair[0]) == 0 && close(pair[1]) == 0);
}

int main(void)
{
	for (uint64_t seed = 1; seed <= 10; seed++)
		against_flat(seed * 104729);
	files();
	return 0;
}
