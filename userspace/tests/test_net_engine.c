// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* Queue pairs without a wire: what comes back by which rule, cut or dropped, and in which order. */
#include <errno.h>

#include "net_engine.h"
#include "test.h"

enum { NUM = 16, HEADER = 12, FRAME = 64, SLOT = 8192 };

static const uint8_t own[6] = { 2, 0, 0, 0, 0, 1 }, group[6] = { 1, 0, 94, 0, 0, 1 }, other[6] = { 2, 0, 0, 0, 0, 2 };

struct pair {
	struct bench rx, tx;
	struct net_engine net;
	struct vq_chain chains[2][ENGINE_BATCH];
	struct vq_used done[2][NUM];
};

static void open_pair(struct pair *p, enum net_kind kind, bool packed)
{
	struct bench *benches[] = { &p->rx, &p->tx };

	memset(p, 0, sizeof(*p));
	net_engine_init(&p->net, kind);
	p->net.header = HEADER;
	p->net.used = true;
	memcpy(p->net.mac, own, sizeof(own));
	for (size_t i = 0; i < 2; i++) {
		bench_open(benches[i], NUM, 4, true, base_at(5, NUM, packed), packed);
		p->net.engine.rings[i] = (struct engine_ring){ .vq = &benches[i]->device,
							       .chains = p->chains[i],
							       .done = p->done[i],
							       .pieces = &benches[i]->pieces,
							       .call = -1 };
	}
}

static void close_pair(struct pair *p)
{
	bench_close(&p->rx);
	bench_close(&p->tx);
}

static int turn(struct pair *p)
{
	return p->net.engine.ops->turn(&p->net.engine);
}

/* A frame of `bytes`, header included, or a buffer for one; in two pieces when `cut`. */
static void post(struct bench *b, uint64_t token, uint32_t bytes, uint32_t cut, bool write)
{
	struct vq_buffer buffers[2] = { { DATA_IOVA + token * SLOT, bytes } };
	size_t count = 1;

	if (cut) {
		buffers[0].length = cut;
		buffers[count++] = (struct vq_buffer){ DATA_IOVA + token * SLOT + cut, bytes - cut };
	}
	CHECK(vq_driver_add(&b->driver, buffers, write ? 0 : count, write ? count : 0, token) >= 0);
	CHECK(vq_driver_publish(&b->driver) >= 0);
}

static void send(struct pair *p, uint64_t token, const uint8_t *to, uint32_t bytes, uint32_t cut)
{
	uint8_t *at = p->tx.data + token * SLOT;

	memset(at, 0x30 + (int)token, bytes);
	memset(at, 0, HEADER);
	if (bytes >= HEADER + 6)
		memcpy(at + HEADER, to, 6);
	post(&p->tx, token, bytes, cut, false);
}

static size_t reap(struct bench *b, struct vq_done *done)
{
	size_t count = vq_driver_reap(&b->driver, done, NUM);

	CHECK(b->driver.fault.code == VQ_OK && b->device.in_flight == 0);
	return count;
}

/* Each rule with frames to everybody concerned, whole and in pieces. */
static void rules(enum net_kind kind, bool packed, uint32_t cut)
{
	static struct pair p;
	struct vq_done done[NUM];
	size_t back = kind == NET_LOOP ? 2 : kind == NET_ECHO ? 4 : 0;

	open_pair(&p, kind, packed);
	for (int round = 0; round < 40; round++) {
		for (uint64_t i = 0; i < 4; i++)
			post(&p.rx, i, 512, cut, true);
		send(&p, 0, own, HEADER + FRAME, cut);
		send(&p, 1, other, HEADER + FRAME, cut);
		send(&p, 2, group, HEADER + FRAME, cut);
		send(&p, 3, own, HEADER + 5, 0); /* too short to say where it goes */
		CHECK(turn(&p) == TURN_MOVED);
		CHECK(reap(&p.tx, done) == 4);
		if (kind == NET_SOURCE) {
			CHECK(reap(&p.rx, done) == 4 && done[0].written == HEADER + 60);
			CHECK(p.rx.data[10] == 1 && p.rx.data[HEADER] == 0xff && memcmp(p.rx.data + HEADER + 6, own, 6) == 0);
			continue;
		}
		CHECK(reap(&p.rx, done) == back);
		for (size_t i = 0; i < back; i++) {
			uint64_t sent = kind == NET_LOOP ? 2 * i : i;
			uint32_t bytes = sent == 3 ? HEADER + 5 : HEADER + FRAME;

			CHECK(done[i].token == i && done[i].written == bytes);
			CHECK(p.rx.data[i * SLOT + 10] == (kind == NET_ECHO));
			CHECK(memcmp(p.rx.data + i * SLOT + HEADER, p.tx.data + sent * SLOT + HEADER, bytes - HEADER) == 0);
		}
		/* The buffers that were not needed are the first ones next time. */
		for (size_t i = back; kind == NET_LOOP && i < 4; i++)
			send(&p, i, own, HEADER + FRAME, 0);
		CHECK(turn(&p) == (kind == NET_LOOP ? TURN_MOVED : TURN_IDLE));
		CHECK(reap(&p.rx, done) == (kind == NET_LOOP ? 2 : 0) && reap(&p.tx, done) == (kind == NET_LOOP ? 2 : 0));
		CHECK(kind != NET_LOOP || (done[0].token == 2 && done[1].token == 3));
		if (kind == NET_SINK) /* takes no buffer, ever */
			break;
	}
	close_pair(&p);
}

/* Without buffers frames are dropped; long ones are cut; nothing comes back on a pair that is not in use. */
static void limits(void)
{
	static struct pair p;
	struct vq_done done[NUM];

	open_pair(&p, NET_LOOP, false);
	for (uint64_t i = 0; i < 3; i++)
		send(&p, i, group, 5000, 0);
	post(&p.rx, 0, 100, 0, true);
	post(&p.rx, 1, SLOT, 50, true);
	CHECK(turn(&p) == TURN_MOVED && reap(&p.tx, done) == 3);
	CHECK(reap(&p.rx, done) == 2 && done[0].written == 100 && done[1].written == NET_LONGEST);
	p.net.used = false;
	post(&p.rx, 0, 100, 0, true);
	send(&p, 0, group, 100, 0);
	CHECK(turn(&p) == TURN_MOVED && reap(&p.tx, done) == 1 && reap(&p.rx, done) == 0);
	CHECK(turn(&p) == TURN_IDLE && p.net.engine.ops->arm(&p.net.engine) == 0);
	p.net.engine.rings[0].vq = NULL; /* the other ring is not there: nothing is taken */
	send(&p, 0, group, 100, 0);
	CHECK(turn(&p) == TURN_IDLE && p.net.engine.ops->arm(&p.net.engine) == 0 && reap(&p.tx, done) == 0);
	close_pair(&p);
}

/* Who breaks a ring is reported to the owner. */
static void broken(void)
{
	static struct pair p;
	struct vq_buffer nowhere = { .iova = 0x10, .length = 64 };

	open_pair(&p, NET_LOOP, false);
	CHECK(vq_driver_add(&p.rx.driver, &nowhere, 0, 1, 0) >= 0 && vq_driver_publish(&p.rx.driver) >= 0);
	send(&p, 0, own, 100, 0);
	CHECK(turn(&p) & TURN_ASKS && p.rx.device.fault.code == VQ_CHAIN_UNMAPPED && p.tx.device.fault.code == VQ_OK);
	close_pair(&p);
}

int main(void)
{
	for (int mode = 0; mode < 4; mode++)
		for (enum net_kind kind = NET_LOOP; kind <= NET_SOURCE; kind++)
			rules(kind, mode & 1, mode & 2 ? 13 : 0);
	limits();
	broken();
	return 0;
}
