// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * chain: moving bytes in and out of the pieces of a chain.
 *
 * Rule: offsets and lengths are cut at the end of the pieces, never trusted; every call returns what it really moved.
 */
#ifndef VDPA_BRIDGE_CHAIN_H
#define VDPA_BRIDGE_CHAIN_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

/* A run of iovecs: one part of a chain, readable or writable. */
struct chain_part {
	const struct iovec *iov;
	size_t count;
};

uint64_t chain_bytes(struct chain_part part);
uint64_t chain_gather(struct chain_part from, uint64_t offset, void *to, uint64_t length);
uint64_t chain_scatter(struct chain_part to, uint64_t offset, const void *from, uint64_t length);
uint64_t chain_zero(struct chain_part to, uint64_t offset, uint64_t length);
uint64_t chain_copy(struct chain_part to, uint64_t to_offset, struct chain_part from, uint64_t from_offset,
		    uint64_t length);

/*
 * File to part and part to file, `skip` bytes into the part; loops over short transfers, EINTR included. `file_offset`
 * -1 is the fd's own position and exactly one transfer (a socket, a tap). Returns the bytes moved, or -errno when the
 * first transfer failed (-EMSGSIZE: one transfer would need more than 1024 iovecs).
 */
int64_t chain_from_file(struct chain_part to, int fd, int64_t file_offset, uint64_t skip, uint64_t length);
int64_t chain_to_file(struct chain_part from, int fd, int64_t file_offset, uint64_t skip, uint64_t length);

#endif
