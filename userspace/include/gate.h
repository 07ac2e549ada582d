// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * gate: loops that serve rings, and operations that find them at rest.
 *
 * Rule: a loop touches rings, and what they lead to, only inside. Who holds the gate knows that no loop is inside; loops
 * look at gate_wanted between two batches and step aside. What a loop writes on its way out is seen by who holds, and
 * the other way round.
 * Synchronization: any number of loops; one holder at a time, which is the caller's business.
 */
#ifndef VDPA_BRIDGE_GATE_H
#define VDPA_BRIDGE_GATE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* A loop, as holders know it. */
struct gate_member {
	_Atomic int writing; /* the eventfd that it signals just now, or -1 */
	struct gate_member *next;
};

struct gate {
	_Atomic uint32_t wanted, inside, aside;
	_Atomic uint32_t awaiting; /* who wants to be the next holder */
	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct gate_member *members;
};

int gate_init(struct gate *gate);
void gate_destroy(struct gate *gate);

/* While the gate is held. */
void gate_join(struct gate *gate, struct gate_member *member);
void gate_quit(struct gate *gate, struct gate_member *member);

/* For loops: waits as long as the gate is held. */
void gate_enter(struct gate *gate);
void gate_leave(struct gate *gate);

static inline bool gate_wanted(struct gate *gate)
{
	return atomic_load_explicit(&gate->wanted, memory_order_relaxed);
}

/*
 * Adds 1 to an eventfd that a driver shares, from inside. The driver can fill its counter so that this waits; who wants
 * to hold the gate meanwhile drains it.
 */
void gate_signal(struct gate_member *member, int eventfd);

/* For holders: `gate_try` never waits, and gate_hold goes on where it said false. */
bool gate_try(struct gate *gate);
void gate_hold(struct gate *gate);
void gate_release(struct gate *gate);

/* A holder that is in no hurry looks whether somebody waits for it to be done, who says so before and after. */
static inline bool gate_awaited(const struct gate *gate)
{
	return atomic_load_explicit(&gate->awaiting, memory_order_relaxed);
}

static inline void gate_await(struct gate *gate, bool waiting)
{
	atomic_fetch_add_explicit(&gate->awaiting, waiting ? 1 : UINT32_MAX, memory_order_relaxed);
}

#endif
