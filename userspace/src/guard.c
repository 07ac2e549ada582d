// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * The SIGBUS guard. Slots live in chunks that are never freed, so the handler can walk them without a lock; a slot's
 * state says who may touch it:
 *
 *   FREE -> LIVE (guard_add) -> POISONING (handler) -> POISONED (handler) -> FREE (guard_remove)
 *
 * Only the handler leaves LIVE for POISONING and comes back from it, and guard_remove waits while it is there: hence the
 * handler never maps over a range whose owner has been told that it is no longer guarded.
 */
#include "guard.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum state { FREE, LIVE, POISONING, POISONED };

struct slot {
	_Atomic uintptr_t start;
	_Atomic uintptr_t size;
	_Atomic int state;
};

enum { CHUNK_SLOTS = 128 };

struct chunk {
	struct slot slots[CHUNK_SLOTS];
	struct chunk *_Atomic next;
};

static struct chunk first;
_Atomic uint64_t guard_poisonings; /* see guard_events */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* serialises guard_add and guard_remove */
static struct sigaction previous;
static _Atomic long passing_on; /* thread that is inside the previous handler */

/* pair [G1]: acquire, sees a chunk's zeroed slots with the release in free_slot. */
#define for_each_slot(each)                                                                                        \
	for (struct chunk *chunk = &first; chunk; chunk = atomic_load_explicit(&chunk->next, memory_order_acquire)) \
		for (struct slot *each = chunk->slots; each < chunk->slots + CHUNK_SLOTS; each++)

static bool covers(struct slot *slot, uintptr_t address)
{
	uintptr_t start = atomic_load_explicit(&slot->start, memory_order_relaxed);

	return address - start < atomic_load_explicit(&slot->size, memory_order_relaxed);
}

/* Replaces the mapping at a fault; false when it is not guarded. The faulting instruction then runs again. */
static bool poison(uintptr_t address)
{
	for_each_slot(slot) {
		/* pair [G2]: acquire, sees the range stored before LIVE in guard_add. */
		int state = atomic_load_explicit(&slot->state, memory_order_acquire);
		void *mapped;

		if (state == FREE || !covers(slot, address))
			continue;
		if (state == POISONING)
			return true; /* another thread is at it: fault again until it is done */
		/* pair [G3]: from here to the release below guard_remove waits. */
		if (!atomic_compare_exchange_strong(&slot->state, &state, POISONING))
			return true; /* lost a race: look again by faulting again */
		if (!covers(slot, address)) { /* the slot was reused in between */
			atomic_store_explicit(&slot->state, state, memory_order_release);
			return true;
		}
		mapped = mmap((void *)atomic_load(&slot->start), atomic_load(&slot->size), PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
		if (mapped == MAP_FAILED) {
			atomic_store_explicit(&slot->state, state, memory_order_release);
			return false;
		}
		atomic_fetch_add(&guard_poisonings, 1);
		/* pair [G3]: release, lets guard_remove go on after the mapping is replaced. */
		atomic_store_explicit(&slot->state, POISONED, memory_order_release);
		return true;
	}
	return false;
}

/* What would have happened without us. SIGBUS is blocked here, so raise() takes effect on return. */
static void pass_on(int number, siginfo_t *info, void *context)
{
	bool sent = info->si_code <= 0; /* by kill() or the like, not by a fault */
	long self = syscall(SYS_gettid);

	if (previous.sa_handler == SIG_IGN && sent)
		return;
	if (previous.sa_handler == SIG_DFL || previous.sa_handler == SIG_IGN || atomic_load(&passing_on) == self) {
		struct sigaction fatal = { .sa_handler = SIG_DFL };

		sigaction(number, &fatal, NULL);
		if (sent)
			raise(number); /* a fault comes back by itself */
		return;
	}
	atomic_store(&passing_on, self);
	if (previous.sa_flags & SA_SIGINFO)
		previous.sa_sigaction(number, info, context);
	else
		previous.sa_handler(number);
	atomic_store(&passing_on, 0);
}

static void handler(int number, siginfo_t *info, void *context)
{
	int saved = errno;

	if (info->si_code != BUS_ADRERR || !poison((uintptr_t)info->si_addr))
		pass_on(number, info, context);
	errno = saved;
}

/* Puts our handler in front, again if somebody installed theirs since. Under the lock. */
static int install(void)
{
	struct sigaction ours = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART };
	struct sigaction current;

	if (sigaction(SIGBUS, NULL, &current))
		return -errno;
	if ((current.sa_flags & SA_SIGINFO) && current.sa_sigaction == handler)
		return 0;
	previous = current; /* before ours can run */
	sigemptyset(&ours.sa_mask);
	return sigaction(SIGBUS, &ours, NULL) ? -errno : 0;
}

/* A free slot, in a new chunk when all are taken. Under the lock. */
static struct slot *free_slot(void)
{
	struct chunk *last = NULL, *fresh;

	for_each_slot(slot) {
		if (atomic_load_explicit(&slot->state, memory_order_relaxed) == FREE)
			return slot;
		last = chunk;
	}
	fresh = calloc(1, sizeof(*fresh));
	if (!fresh)
		return NULL;
	/* pair [G1]: release, publishes the zeroed slots to the handler's walk. */
	atomic_store_explicit(&last->next, fresh, memory_order_release);
	return fresh->slots;
}

int guard_add(void *address, uint64_t size)
{
	uintptr_t start = (uintptr_t)address;
	uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
	struct slot *slot;
	int error;

	if (start == 0 || size == 0 || start % page || start + (size - 1) < start)
		return -EINVAL;
	size = (size + page - 1) / page * page; /* a mapping's last page is mapped whole */
	pthread_mutex_lock(&lock);
	for_each_slot(other) {
		if (atomic_load(&other->state) != FREE &&
		    (covers(other, start) || atomic_load(&other->start) - start < size)) {
			error = -EEXIST;
			goto out;
		}
	}
	error = install();
	if (error)
		goto out;
	slot = free_slot();
	if (!slot) {
		error = -ENOMEM;
		goto out;
	}
	atomic_store_explicit(&slot->start, start, memory_order_relaxed);
	atomic_store_explicit(&slot->size, size, memory_order_relaxed);
	/* pair [G2]: release, the handler that sees LIVE sees the range. */
	atomic_store_explicit(&slot->state, LIVE, memory_order_release);
out:
	pthread_mutex_unlock(&lock);
	return error;
}

static struct slot *starting_at(uintptr_t start)
{
	for_each_slot(slot)
		if (atomic_load(&slot->state) != FREE && atomic_load(&slot->start) == start)
			return slot;
	return NULL;
}

int guard_remove(void *address)
{
	struct slot *slot;

	pthread_mutex_lock(&lock);
	slot = starting_at((uintptr_t)address);
	while (slot) {
		int state = atomic_load(&slot->state);

		/* pair [G3]: a handler at work holds POISONING; wait until its mapping is in place. */
		if (state != POISONING && atomic_compare_exchange_strong(&slot->state, &state, FREE))
			break;
		sched_yield();
	}
	pthread_mutex_unlock(&lock);
	return slot ? 0 : -ENOENT;
}

int guard_poisoned(const void *address)
{
	struct slot *slot = starting_at((uintptr_t)address);

	return slot ? atomic_load(&slot->state) >= POISONING : -ENOENT;
}

bool guard_poisoned_range(const void *address, uint64_t size)
{
	uintptr_t start = (uintptr_t)address;

	for_each_slot(slot) {
		if (atomic_load(&slot->state) < POISONING)
			continue;
		if (covers(slot, start) || atomic_load(&slot->start) - start < size)
			return true;
	}
	return false;
}
