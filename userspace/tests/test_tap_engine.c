// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* Queue pairs on something that carries packets: a socket pair, whose other end is in the test's hands. */
#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tap_engine.h"
#include "test.h"

enum { NUM = 256, TABLE = 1024, RX = 0, TX = 1 };

static struct bench benches[2];
static struct tap_engine tap;
static struct vq_chain chains[2][ENGINE_BATCH];
static struct vq_used done[2][NUM];
static int far;
static uint64_t seed = 7;

static void open_pair(bool merge, bool packed, bool in_order)
{
	int room = 1 << 20, ends[2];

	tap_engine_init(&tap);
	tap.header = NET_HEADER;
	tap.merge = merge;
	tap.used = tap.plugged = tap.filter.promisc = true;
	tap.fresh = false;
	tap.to_driver = tap.from_driver = (struct net_terms){ .csum = true, .gso = 1 << 1 };
	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, ends) == 0);
	tap.engine.fd = ends[0];
	far = ends[1];
	for (int i = 0; i < 2; i++) {
		CHECK(setsockopt(ends[i], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room)) == 0);
		bench_start(&benches[i], NUM, i == TX ? TABLE : 0, true, base_at(NUM - 3, NUM, packed), packed, in_order);
		tap.engine.rings[i] = (struct engine_ring){
			.vq = &benches[i].device, .chains = chains[i], .done = done[i], .pieces = &benches[i].pieces, .call = -1
		};
	}
}

static void close_pair(void)
{
	bench_close(&benches[RX]);
	bench_close(&benches[TX]);
	close(far);
	close(tap.engine.fd);
}

static int turn(void)
{
	int result = tap.engine.ops->turn(&tap.engine);

	CHECK(benches[RX].device.in_flight == 0 && benches[TX].device.in_flight == 0);
	return result;
}

/* A packet that says which it is. */
static uint64_t packet(uint8_t *to, uint8_t number, uint64_t length)
{
	memset(to, 0, NET_HEADER);
	for (uint64_t i = 0; i < length; i++)
		to[NET_HEADER + i] = (uint8_t)(number + i % 251);
	return NET_HEADER + length;
}

static uint32_t sizes[NUM];

static void post(uint64_t at, uint32_t size)
{
	struct vq_buffer buffer = { DATA_IOVA + at * (DATA_SIZE / NUM), size };

	sizes[at] = size;
	CHECK(vq_driver_add(&benches[RX].driver, &buffer, 0, 1, at) >= 0 && vq_driver_publish(&benches[RX].driver) >= 0);
}

/* Buffers of any sizes up to `most`, which come at any time: frames lie in as many as they say, whole and in order. */
static void merged(bool packed, bool in_order, uint32_t most, uint32_t longest)
{
	static uint8_t sent[NET_HEADER + NET_LARGEST], got[NET_HEADER + NET_LARGEST + DATA_SIZE / NUM];
	uint8_t out = 0, in = 0;
	uint32_t lengths[256], ahead = 0;
	uint64_t at = 0, free = NUM, filled = 0;
	unsigned count = 0, parts = 0;

	open_pair(true, packed, in_order);
	while (in < 200) {
		struct vq_done back[NUM];
		size_t some;

		if (out < 200 && ahead < 20 && random_below(&seed, 2)) {
			lengths[out] = NET_SHORTEST + random_below(&seed, random_below(&seed, 4) ? 1500 : longest - NET_SHORTEST + 1);
			some = (size_t)packet(sent, out, lengths[out]);
			if (send(far, sent, some, 0) == (ssize_t)some) {
				out++;
				ahead++;
			}
		}
		for (uint32_t i = random_below(&seed, 40); i && free; i--, free--, at = (at + 1) % NUM)
			post(at, 1 + random_below(&seed, most));
		CHECK(!(turn() & TURN_ASKS));
		some = vq_driver_reap(&benches[RX].driver, back, NUM);
		CHECK(benches[RX].driver.fault.code == VQ_OK);
		for (size_t i = 0; i < some; i++, free++) {
			memcpy(got + filled, benches[RX].data + back[i].token * (DATA_SIZE / NUM), back[i].written);
			CHECK(back[i].written <= sizes[back[i].token]);
			filled += back[i].written;
			parts++;
			if (filled >= NET_HEADER)
				count = got[10] | (unsigned)got[11] << 8;
			if (!count || parts < count)
				continue;
			CHECK(filled == packet(sent, in, lengths[in]));
			CHECK(memcmp(got + NET_HEADER, sent + NET_HEADER, lengths[in]) == 0);
			in++;
			ahead--;
			filled = parts = count = 0;
		}
	}
	CHECK(tap.received.frames == 200 && tap.received.dropped == 0);
	close_pair();
}

/* One buffer for each frame: what fits none is lost alone, and the buffer is the next one's. */
static void whole(bool packed)
{
	static uint8_t bytes[NET_HEADER + NET_LARGEST];
	struct vq_done back[NUM];

	open_pair(false, packed, false);
	for (uint64_t i = 0; i < 4; i++)
		post(i, 500);
	for (int i = 0; i < 6; i++) {
		uint64_t size = packet(bytes, (uint8_t)i, i % 2 ? 489 : 488);

		CHECK(send(far, bytes, size, 0) == (ssize_t)size);
	}
	CHECK(send(far, bytes, NET_HEADER + NET_SHORTEST - 1, 0) > 0); /* no frame */
	CHECK(turn() == TURN_MOVED && turn() == TURN_IDLE);
	CHECK(vq_driver_reap(&benches[RX].driver, back, NUM) == 3 && tap.received.dropped == 3 && tap.received.frames == 3);
	for (uint64_t i = 0; i < 3; i++)
		CHECK(back[i].written == 500 && benches[RX].data[i * (DATA_SIZE / NUM) + NET_HEADER] == 2 * i && benches[RX].data[i * (DATA_SIZE / NUM) + 10] == 1);
	bytes[0] = 1; /* a checksum behind the end */
	bytes[7] = 2;
	CHECK(send(far, bytes, 500, 0) > 0 && turn() == TURN_MOVED && tap.received.dropped == 4);
	tap.filter.promisc = false; /* to nobody's address */
	CHECK(packet(bytes, 2, 100) && send(far, bytes, 112, 0) > 0 && turn() == TURN_MOVED);
	CHECK(vq_driver_reap(&benches[RX].driver, back, NUM) == 0 && tap.received.dropped == 4);
	memcpy(tap.filter.mac, bytes + NET_HEADER, 6);
	tap.plugged = false;
	CHECK(send(far, bytes, 112, 0) > 0 && turn() == TURN_MOVED && tap.received.dropped == 5);
	tap.plugged = true;
	CHECK(send(far, bytes, 112, 0) > 0 && turn() == TURN_MOVED && vq_driver_reap(&benches[RX].driver, back, NUM) == 1);
	close_pair();
}

/* A packet in `pieces` buffers that touch. */
static void submit(const uint8_t *bytes, uint32_t size, uint32_t pieces, uint64_t token)
{
	struct vq_buffer buffers[TABLE];
	uint32_t each = size / pieces, at = 0;

	memcpy(benches[TX].data, bytes, size);
	for (uint32_t i = 0; i < pieces; i++) {
		buffers[i] = (struct vq_buffer){ DATA_IOVA + at, i + 1 < pieces ? each : size - at };
		at += each;
	}
	CHECK(vq_driver_add(&benches[TX].driver, buffers, pieces, 0, token) >= 0 && vq_driver_publish(&benches[TX].driver) >= 0);
}

static void outgoing(bool packed)
{
	static uint8_t bytes[NET_HEADER + NET_LARGEST + 1], got[NET_HEADER + NET_LARGEST + 1];
	static const uint32_t pieces[] = { 1, 2, 13, TABLE - 1, TABLE };
	static const uint32_t lengths[] = { NET_SHORTEST, 1500, 9000, NET_LARGEST };
	struct vq_done back[NUM];
	uint64_t frames = 0, taken;

	open_pair(true, packed, false);
	for (size_t i = 0; i < 5; i++)
		for (size_t k = 0; k < 4; k++) {
			uint32_t size = (uint32_t)packet(bytes, (uint8_t)(i + k), lengths[k]);

			if (size < 2 * pieces[i])
				continue;
			submit(bytes, size, pieces[i], 0);
			CHECK(turn() == TURN_MOVED && vq_driver_reap(&benches[TX].driver, back, NUM) == 1);
			CHECK(recv(far, got, sizeof(got), 0) == (ssize_t)size && memcmp(bytes, got, size) == 0);
			frames++;
		}
	CHECK(tap.sent.frames == frames && tap.sent.dropped == 0);
	submit(bytes, NET_HEADER + NET_LARGEST + 1, 1, 0);
	submit(bytes, NET_HEADER - 1, 1, 0);
	submit(bytes, NET_HEADER + NET_SHORTEST - 1, 1, 0);
	CHECK(turn() == TURN_MOVED && vq_driver_reap(&benches[TX].driver, back, NUM) == 3 && tap.sent.dropped == 3);
	CHECK(recv(far, got, sizeof(got), 0) == -1 && errno == EAGAIN);
	/* A full one is waited for, with nothing lost. */
	packet(bytes, 0, 60000);
	for (uint64_t i = 0; i < NUM; i++)
		submit(bytes, NET_HEADER + 60000, 1, i);
	while (turn() == TURN_MOVED)
		;
	taken = vq_driver_reap(&benches[TX].driver, back, NUM);
	CHECK(tap.blocked && taken < NUM && tap.engine.ops->arm(&tap.engine) == 0);
	while (taken < NUM) {
		CHECK(recv(far, got, sizeof(got), 0) == NET_HEADER + 60000);
		(void)turn();
		taken += vq_driver_reap(&benches[TX].driver, back, NUM);
	}
	CHECK(tap.lost == 0);
	close_pair();
}

/* Whose tap is to be seen to, is not there, or fails. */
static void asking(void)
{
	uint8_t bytes[NET_HEADER + 60];
	struct vq_done back[NUM];
	int fd;

	open_pair(true, false, false);
	fd = tap.engine.fd;
	tap.engine.fd = -1;
	tap.fresh = true;
	CHECK(turn() == TURN_IDLE && tap.engine.ops->arm(&tap.engine) == 0);
	submit(bytes, (uint32_t)packet(bytes, 1, 60), 1, 0);
	CHECK(turn() == TURN_ASKS && turn() == TURN_ASKS);
	tap.fresh = false; /* and has none: lost, which is said once */
	CHECK(turn() == (TURN_MOVED | TURN_ASKS) && tap.failure == ENETDOWN);
	submit(bytes, sizeof(bytes), 1, 0);
	CHECK(turn() == TURN_MOVED && tap.lost == 2 && vq_driver_reap(&benches[TX].driver, back, NUM) == 2);
	post(0, 200);
	CHECK(turn() == TURN_ASKS);
	tap.engine.fd = fd;
	CHECK(turn() == TURN_IDLE && send(far, bytes, sizeof(bytes), 0) > 0 && turn() == TURN_MOVED);
	tap.fresh = true;
	CHECK(turn() == TURN_IDLE);
	post(1, 200);
	CHECK(turn() == TURN_ASKS);
	tap.fresh = false;
	tap.failure = 0;
	tap.engine.fd = open("/dev/null", O_PATH | O_CLOEXEC); /* EBADF */
	CHECK(turn() == TURN_ASKS && tap.failure == EBADF);
	close(tap.engine.fd);
	tap.engine.fd = -1;
	tap.gone = true;
	CHECK(turn() == TURN_IDLE);
	tap.engine.fd = fd;
	close_pair();
}

int main(void)
{
	for (int mode = 0; mode < 4; mode++) {
		merged(mode & 1, mode & 2, 2000, 9000);
		merged(mode & 1, mode & 2, 700, NET_LARGEST); /* more buffers than a batch */
		merged(mode & 1, mode & 2, 4000, NET_LARGEST);
	}
	for (int packed = 0; packed < 2; packed++) {
		whole(packed);
		outgoing(packed);
	}
	asking();
	return 0;
}
