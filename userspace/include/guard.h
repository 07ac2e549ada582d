// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * guard: live on when a peer shrinks the file behind memory it shared.
 *
 * A guarded mapping that faults with SIGBUS is replaced by zeroed private memory and counts as poisoned; the access
 * that faulted then sees zeros. Every other SIGBUS goes to the handler that was there before, or kills as it would have.
 * Rule: the handler calls only mmap, sigaction and raise, and takes no lock.
 * Synchronization: any thread. Unguard before munmap: the two together wait for a handler at work on the mapping.
 */
#ifndef VDPA_BRIDGE_GUARD_H
#define VDPA_BRIDGE_GUARD_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* 0, -EINVAL (empty, not page aligned, wraps), -EEXIST (overlaps a guarded mapping), -ENOMEM, or sigaction's error. */
int guard_add(void *address, uint64_t size);

/* 0, or -ENOENT when no guarded mapping starts there. */
int guard_remove(void *address);

/* 1 or 0, or -ENOENT when no guarded mapping starts there. */
int guard_poisoned(const void *address);

/* Whether the range touches a poisoned mapping. */
bool guard_poisoned_range(const void *address, uint64_t size);

/* Counts poisonings in this process; a cheap way to know that nothing happened since the last look. */
static inline uint64_t guard_events(void)
{
	extern _Atomic uint64_t guard_poisonings;

	return atomic_load_explicit(&guard_poisonings, memory_order_relaxed);
}

#endif
