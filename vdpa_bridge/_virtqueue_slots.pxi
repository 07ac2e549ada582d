# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Buffers of one size that a queue posts again and again, bound. Part of `_virtqueue.pyx`, whose rule, imports and
# declarations hold here too.

@cython.final
cdef class Slots:
    def __cinit__(
        self, DriverQueue queue not None, uintptr_t address, uint64_t iova, uint32_t stride, uint32_t count,
        *, bint writable=False, object owner=None,
    ):
        cdef int error = -vq_slots_init(&self.core, &queue.vq, <void *> address, iova, stride, count, writable)
        if error == EINVAL:
            raise ValueError(f"{count} slots of {stride} bytes")
        if error:
            raise MemoryError
        self.queue, self.owner, self.others = queue, owner, []

    def __dealloc__(self):
        vq_slots_destroy(&self.core)

    def __class_getitem__(cls, item):
        return GenericAlias(cls, item)

    cdef size_t reap_some(self) except? 0:
        """Up to BATCH completed chains into the queue's `done`; those of others are put aside."""
        cdef DriverQueue queue = self.queue
        cdef size_t count = vq_driver_reap(&queue.vq, queue.done, BATCH)
        if count == 0 and queue.vq.fault.code != VQ_OK:
            raise broken_error(&queue.vq.fault)
        for i in range(count):
            if vq_slots_take(&self.core, &queue.done[i]) < 0:
                self.others.append((queue.held[queue.done[i].head], queue.done[i].written))
                queue.held[queue.done[i].head] = None
        return count

    def add(self, lengths):
        cdef uint32_t length
        cdef size_t added = 0
        for size in lengths:
            length = self.checked(size)
            if not vq_slots_add(&self.core, &length, False, 1):
                break
            added += 1
        return added

    def fill(self, length):
        cdef uint32_t size = self.checked(length)
        return vq_slots_add(&self.core, &size, False, self.core.idle_count)

    cdef uint32_t checked(self, object length) except 0:
        if not 0 < length <= self.core.stride:
            raise ValueError(f"{length} bytes in a slot of {self.core.stride}")
        return length

    def copy(self, data, Py_ssize_t first=0, uint32_t skip=0):
        cdef list items = data if isinstance(data, list) else list(data)
        cdef Py_ssize_t at = first
        cdef uint32_t length
        cdef Py_buffer view
        cdef uint8_t *to
        if first < 0:
            raise ValueError(f"item {first} of {len(items)}")
        while at < len(items) and vq_slots_room(&self.core, 1):
            PyObject_GetBuffer(items[at], &view, PyBUF_SIMPLE)
            try:
                length = self.checked(skip + view.len)
                to = vq_slots_data(&self.core, vq_slots_next(&self.core, 0))
                memset(to, 0, skip)
                memcpy(to + skip, view.buf, view.len)
            finally:
                PyBuffer_Release(&view)
            if not vq_slots_add(&self.core, &length, False, 1):
                break
            at += 1
        return at - first

    def upcoming(self, size_t count):
        return [vq_slots_next(&self.core, i) for i in range(min(count, self.core.idle_count))]

    def collect(self):
        cdef size_t count, done = 0
        while True:
            count = self.reap_some()
            done += count
            if count < BATCH:
                return done

    def reap(self):
        cdef list out = []
        cdef size_t i, count = self.reap_some()
        cdef vq_done *done = self.queue.done
        for i in range(count):
            if done[i].token:
                out.append((<int> (done[i].token - 1), done[i].written))
        return out

    def read(self, done, uint32_t skip=0):
        cdef list out = []
        cdef uint32_t slot, written
        for slot, written in done:
            if slot >= self.core.count or not skip <= written <= self.core.stride:
                raise ValueError(f"slot {slot} with {written} bytes, {skip} of which are skipped")
            out.append(PyBytes_FromStringAndSize(<const char *> vq_slots_data(&self.core, slot) + skip, written - skip))
        return out

    def take_others(self):
        cdef list others = self.others
        if others:
            self.others = []
        return others

    @property
    def idle(self):
        return self.core.idle_count
