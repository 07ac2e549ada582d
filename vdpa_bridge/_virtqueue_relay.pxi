# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# A ring of ours behind a client's. Part of `_virtqueue.pyx`, whose rule, imports and declarations hold here too.

KICK, CALL, AGAIN, MOVED = RELAY_KICK, RELAY_CALL, RELAY_AGAIN, RELAY_MOVED


@cython.final
cdef class Relay:
    def __cinit__(self, DeviceQueue source not None, DriverQueue to not None, IovaMap places not None):
        cdef int error = -relay_init(&self.core, &source.vq, &to.vq, &places.map)
        if error == EINVAL:
            raise ValueError(f"a ring of {to.num} entries behind one of {source.num}")
        if error:
            raise MemoryError
        self.source, self.to, self.places = source, to, places

    def __dealloc__(self):
        relay_destroy(&self.core)

    def move(self, bint take=True):
        cdef int due
        self.source.memory.busy += 1
        self.places.busy += 1
        with nogil:
            due = relay_move(&self.core, take)
        self.source.memory.busy -= 1
        self.places.busy -= 1
        if due < 0:
            raise broken_error(&self.to.vq.fault if self.source.vq.fault.code == VQ_OK else &self.source.vq.fault)
        return due

    @property
    def open(self):
        return relay_open(&self.core)

    @property
    def base(self):
        cdef uint32_t base = 0
        return base if relay_base(&self.core, &base) else None
