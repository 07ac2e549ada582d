// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * A block client that shares no code with what it is used to try: its own protocol, its own ring.
 *
 * Rule of these files: whatever goes wrong ends the process, with a text on stderr and a status that says which kind of wrong.
 */
#ifndef CLIENT_H
#define CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum status {
	WRONG_PEER = 1,	   /* refused, hung up, or answered what no back-end answers */
	WRONG_USAGE = 2,
	NOT_COMPLETED = 3, /* a request or a message got no answer in time */
	WRONG_DATA = 4,	   /* what was read is not what was written, or a request failed */
};

enum { RING_SIZE = 128, TIMEOUT_S = 20 };

/* Where our memory lies for the device, and more of it. Not where it lies for us, so that who mixes the two is found out. */
#define GUEST_ADDRESS 0x40000000ull
#define LATER_ADDRESS 0x80000000ull

struct memory {
	int fd;
	uint8_t *base;
	size_t size;
	uint64_t guest; /* where it lies for the device */
};

/* Offsets into the memory. */
struct ring_place {
	uint64_t desc, avail, used;
};

struct device {
	const char *path;
	int fd;
	int kick, call;
	bool node;	 /* /dev/vhost-vdpa-N instead of a socket */
	bool table;	 /* SET_MEM_TABLE even where memory slots are offered */
	uint64_t wanted; /* features besides those that every session has */
	uint64_t features, protocol;
	uint64_t sectors;
};

struct workload {
	uint64_t requests;
	uint32_t depth, bytes;
	uint64_t seed;
	bool skip_writes;
	uint64_t memory_at, grow_at; /* for the device */
};

_Noreturn void fail(enum status status, const char *format, ...) __attribute__((format(printf, 2, 3)));
double seconds(void);

/* vhost_user.c: legacy vhost-user. */
void user_connect(struct device *device);
void user_negotiate(struct device *device);
void user_start(struct device *device, const struct memory *memory, const struct ring_place *place, uint16_t base);
void user_add_memory(struct device *device, const struct memory *memory, const struct memory *present);
void user_start_queue(struct device *device, const struct memory *memory, const struct ring_place *place, uint32_t index, uint32_t num,
		      uint32_t base, int kick, int call);
uint16_t user_stop(struct device *device);
uint64_t user_get_features(struct device *device);

/* vhost_vdpa.c: the kernel's node. */
void node_open(struct device *device);
void node_start(struct device *device, const struct memory *memory, const struct ring_place *place);
void node_stop(struct device *device);

/* ring.c: one split ring of block requests, from an index on. */
struct ring;
struct ring *ring_new(struct memory *memory, const struct workload *load);
struct ring_place ring_place(void);
size_t ring_memory(const struct workload *load);
void ring_move_data(struct ring *ring, struct memory *memory);
void ring_clear(struct ring *ring);
double ring_run(struct ring *ring, struct device *device, bool write);
uint16_t ring_index(const struct ring *ring);

#endif
