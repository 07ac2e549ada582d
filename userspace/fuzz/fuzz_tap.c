// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * The tap's engine against a driver that writes anything at any time, and packets of any kind: rings, tables and buffers lie in
 * memory that the program scribbles over between turns; the other end of a socket pair is what a tap would be.
 */
#include <sys/socket.h>
#include <unistd.h>

#include "fuzz.h"
#include "tap_engine.h"

enum { NUM = 16, TABLE = 32, ROOM = 64, RX = 0 };

static struct tap_engine tap;
static struct bench benches[2];
static struct vq_chain chains[2][ENGINE_BATCH];
static struct vq_used done[2][NUM];
static int far = -1;

/* Buffers become available: a few, of a few sizes, anywhere. */
static void offer(struct program *p, struct bench *b, bool write)
{
	struct vq_buffer buffers[8];
	size_t count = 1 + (next_byte(p) & 7);

	for (size_t i = 0; i < count; i++)
		buffers[i] = (struct vq_buffer){ DATA_IOVA + next_byte(p) * 16u, 1 + next_byte(p) * (next_byte(p) & 1 ? 1u : 40u) };
	if (vq_driver_add(&b->driver, buffers, write ? 0 : count, write ? count : 0, 0) >= 0)
		(void)vq_driver_publish(&b->driver);
}

static void arrive(struct program *p)
{
	static uint8_t bytes[NET_HEADER + NET_LARGEST + 2];
	size_t size = next_byte(p) & 1 ? next_byte(p) : next_word(p) + (next_byte(p) & 31u);

	memset(bytes, 0x11, size < 80 ? size : 80);
	for (size_t i = 0; i < NET_HEADER + NET_TOP; i++)
		bytes[i] = next_byte(p) & 1 ? next_byte(p) : 0;
	(void)!send(far, bytes, size, 0);
}

static void settings(struct program *p)
{
	uint8_t bits = next_byte(p);

	tap.plugged = bits & 1;
	tap.used = bits & 2;
	tap.fresh = bits & 4;
	tap.filter.promisc = bits & 8;
	tap.filter.tagged = bits & 16;
	tap.to_driver = tap.from_driver = (struct net_terms){ bits & 32, bits & 64, bits & 128, next_byte(p) };
}

static void step(struct program *p)
{
	static uint8_t out[NET_HEADER + NET_LARGEST + 1];
	struct bench *b = &benches[next_byte(p) & 1];
	struct vq_done back[NUM];

	switch (next_byte(p) % 12) {
	case 0:
		scribble(p, b->area, vq_layout(NUM, TABLE, b->device.config.packed).size);
		break;
	case 1:
	case 2:
	case 3:
		offer(p, b, b == &benches[RX]);
		break;
	case 4:
	case 5:
		arrive(p);
		break;
	case 6:
		scribble(p, b->data, 4096);
		break;
	case 7:
		(void)vq_driver_reap(&b->driver, back, NUM);
		break;
	case 8:
		while (recv(far, out, sizeof(out), 0) > 0)
			;
		break;
	case 9:
		if (tap.engine.ops->arm(&tap.engine) < 0)
			CHECK(benches[0].device.fault.code != VQ_OK || benches[1].device.fault.code != VQ_OK);
		tap.engine.ops->disarm(&tap.engine);
		break;
	case 10:
		settings(p);
		break;
	default:
		(void)tap.engine.ops->turn(&tap.engine);
		for (int i = 0; i < 2; i++)
			CHECK(benches[i].device.in_flight == 0 || benches[i].device.fault.code != VQ_OK);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct program p = { data, data + size };
	uint8_t mode = next_byte(&p);
	int ends[2];

	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, ends) == 0);
	far = ends[1];
	tap_engine_init(&tap);
	tap.engine.fd = ends[0];
	tap.header = mode & 1 ? 10 : NET_HEADER;
	tap.merge = mode & 2 && !(mode & 1);
	tap.used = tap.plugged = tap.filter.promisc = true;
	tap.fresh = false;
	for (int i = 0; i < 2; i++) {
		bench_start(&benches[i], NUM, TABLE, mode & 8, base_at(mode & 16 ? NUM - 1 : 0, NUM, mode & 4), mode & 4, mode & 32);
		benches[i].pieces.capacity = ROOM;
		tap.engine.rings[i] = (struct engine_ring){
			.vq = &benches[i].device, .chains = chains[i], .done = done[i], .pieces = &benches[i].pieces, .call = -1
		};
	}
	while (!at_end(&p))
		step(&p);
	for (int i = 0; i < 2; i++)
		bench_close(&benches[i]);
	close(ends[0]);
	close(ends[1]);
	return 0;
}
