// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * engine: a device, or a part of it, that needs nobody but a loop to serve its rings.
 *
 * Rule: an engine does what is plain, fast. Anything else, refusals included, it leaves in the ring (engine_put_back) and
 * asks for its owner, who knows the device in full. It allocates nothing per request.
 *
 * Rule of the loop: rings are touched inside the gate alone, and a loop leaves it only with no chain in hand, requests in
 * flight included. So an operation that holds the gate finds rings at rest, and may unmap memory.
 */
#ifndef VDPA_BRIDGE_ENGINE_H
#define VDPA_BRIDGE_ENGINE_H

#include "gate.h"
#include "virtqueue.h"
#include "vq_poll.h"

enum { ENGINE_RINGS = 2, ENGINE_BATCH = 64, LOOP_ENGINES = 256 };

/* A ring that an engine serves. All of it belongs to the owner, who changes it while the gate is held. */
struct engine_ring {
	struct vq_device *vq; /* NULL: there is none now */
	struct vq_chain *chains; /* ENGINE_BATCH */
	struct vq_used *done; /* as many as the ring has entries */
	struct iova_pieces *pieces; /* room for the longest chain */
	int call; /* eventfd or -1 */
	bool due; /* the engine: the driver waits for a call */
};

/* What a turn ends with. */
enum engine_turn {
	TURN_IDLE = 0,
	TURN_MOVED = 1, /* something was done: look again soon */
	TURN_ASKS = 2, /* the owner is needed: for a request, or because a ring is broken */
};

struct engine;

struct engine_ops {
	/* One batch: what completed, then what is new. */
	int (*turn)(struct engine *engine);
	/* Asks for kicks (and whatever else starts it); 1: there is work already; 0: none; negative: as TURN_ASKS. */
	int (*arm)(struct engine *engine);
	/* The other way round, before turns. */
	void (*disarm)(struct engine *engine);
	/* Waits until no request is in flight, and takes none. May be NULL when `in_flight` is never set. */
	void (*drain)(struct engine *engine);
};

struct engine {
	const struct engine_ops *ops;
	struct engine_ring rings[ENGINE_RINGS];
	int fd; /* readable when there is something besides kicks, or -1; see loop_refit */
	bool writes; /* the loop looks at it, too, once `fd` can be written to again */
	uint32_t in_flight;
	bool hot; /* the loop looks at it by itself, kicks are off */
	bool asks; /* the loop leaves it alone until its owner has looked */
};

/* Hands chains back and notes whether a call is due; false when the ring is broken. */
bool engine_push(struct engine_ring *ring, const struct vq_used *done, size_t count);

/* Leaves `count` chains of the last pop, from `first` to its end, in the ring. */
void engine_put_back(struct engine_ring *ring, size_t first, size_t count);

/* `arm` and `disarm` for engines that wait for kicks of all their rings. */
int engine_arm(struct engine *engine);
void engine_disarm(struct engine *engine);

/* A thread's worth of engines. While requests come in quick succession a loop looks for them itself, as its `poll` has it. */
struct loop {
	struct gate *gate;
	struct gate_member member;
	int epoll, wake;
	struct engine *engines[LOOP_ENGINES];
	uint32_t count; /* slots in use, empty ones between them included */
	struct vq_poll poll;
	bool paused, closing;
};

/* It looks for `budget` ns at most. 0 or -errno. Both while the gate is held, as all that follows but loop_run. */
int loop_init(struct loop *loop, struct gate *gate, uint64_t budget);
void loop_destroy(struct loop *loop);

/* An engine comes in, and is looked at; 0, -ENOSPC, or epoll's error. */
int loop_add(struct loop *loop, struct engine *engine);
void loop_remove(struct loop *loop, struct engine *engine);

/* From now on `fd` is the engine's, or -1, and is watched when the engine is in the loop. The one before is still open. 0 or epoll's error. */
int loop_refit(struct loop *loop, struct engine *engine, int fd);

/* Kicks wake the engine, which is in the loop. 0 or epoll's error. */
int loop_watch(struct loop *loop, struct engine *engine, int kick);
void loop_unwatch(struct loop *loop, int kick);

/* Look at an engine, without a kick; NULL: at whether to go on. */
void loop_look(struct loop *loop, struct engine *engine);

/*
 * Serves, without the gate being held, until an engine asks for its owner, which is left alone until loop_look; it may have
 * been removed when this returns. NULL when the loop is `closing`. One thread at a time.
 */
struct engine *loop_run(struct loop *loop);

#endif
