# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Looking at rings for a while before sleeping. Part of `_virtqueue.pyx`, whose rule, imports and declarations hold here too.

@cython.final
cdef class Poll:
    def __cinit__(self, uint64_t budget):
        self.core = vq_poll_begin(budget)

    def look(self, list queues not None, Gate gate not None):
        cdef vq_device *at[VQ_POLL_MAX]
        cdef size_t count = min(len(queues), <size_t> VQ_POLL_MAX), i
        cdef DeviceQueue queue
        cdef uint64_t due
        for i in range(count):
            queue = queues[i]
            at[i] = &queue.vq
        for queue in queues:
            queue.memory.busy += 1
        with nogil:
            due = vq_poll_look(&self.core, &gate.core, at, count)
        for queue in queues:
            queue.memory.busy -= 1
        return [queues[i] for i in range(count) if due >> i & 1]

    def slept(self, uint64_t nanoseconds):
        vq_poll_slept(&self.core, nanoseconds)

    @property
    def window(self):
        return self.core.window
