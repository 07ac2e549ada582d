# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# The memory of the native rings: the IOVA map, and the guard against files that shrink. Part of `_virtqueue.pyx`, whose
# rule, imports and declarations hold here too.

@cython.final
cdef class IovaMap:
    def __cinit__(self):
        iova_map_init(&self.map)

    def __dealloc__(self):
        iova_map_destroy(&self.map)

    cdef int settle(self) except -1:
        for _ in range(PATIENCE):
            if not self.busy:
                return 0
            with nogil:
                usleep(100)
        raise OSError(EBUSY, "I/O on this memory did not end within 5 s")

    cdef int unpoisoned(self, uint64_t before) except -1:
        if guard_events() != before and iova_map_poisoned(&self.map):
            raise OSError(EFAULT, "shared memory was truncated by its owner")
        return 0

    def add(self, uint64_t iova, uint64_t size, uintptr_t address, uint32_t perm):
        self.settle()
        cdef int error = -iova_map_add(&self.map, iova, size, <void *> address, perm)
        if error:
            reason = "overlaps a region" if error == EEXIST else strerror(error)
            raise OSError(error, f"map IOVA 0x{iova:x} size 0x{size:x} address 0x{address:x} perm {perm}: {reason}")

    def remove(self, uint64_t iova, uint64_t size):
        self.settle()
        cdef long removed = iova_map_remove(&self.map, iova, size)
        if removed < 0:
            raise OSError(-removed, f"unmap IOVA 0x{iova:x} size 0x{size:x}: empty, or wraps")
        return removed

    def clear(self):
        self.settle()
        iova_map_clear(&self.map)

    def read(self, uint64_t iova, Py_ssize_t length):
        if length < 0:
            raise ValueError("negative length")
        cdef uint64_t before = guard_events()
        cdef bytes out = PyBytes_FromStringAndSize(NULL, length)
        if iova_read(&self.map, iova, PyBytes_AS_STRING(out), length):
            raise OSError(EFAULT, f"read of {length} bytes at IOVA 0x{iova:x}: not mapped for reading")
        self.unpoisoned(before)
        return out

    def write(self, uint64_t iova, object data):
        cdef uint64_t before = guard_events()
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        cdef int error = iova_write(&self.map, iova, view.buf, view.len)
        PyBuffer_Release(&view)
        if error:
            raise OSError(EFAULT, f"write of {view.len} bytes at IOVA 0x{iova:x}: not mapped for writing")
        self.unpoisoned(before)

    def regions(self):
        cdef list out = []
        cdef iova_region *region
        for region in self.map.regions[:self.map.count]:
                out.append((region.iova, <object> (region.last - region.iova) + 1, <uintptr_t> region.host, region.perm))
        return out

    @property
    def poisoned(self):
        return iova_map_poisoned(&self.map)

    def __len__(self):
        return self.map.count


def guard(uintptr_t address, uint64_t size):
    cdef int error = -guard_add(<void *> address, size)
    if error in (EINVAL, EEXIST):
        reason = "overlaps a guarded mapping" if error == EEXIST else "empty, or not page aligned"
        raise ValueError(f"guard 0x{address:x} size 0x{size:x}: {reason}")
    if error:
        raise OSError(error, strerror(error))


cdef int guarded(uintptr_t address, int state) except -1:
    if state < 0:
        raise ValueError(f"no guarded mapping starts at 0x{address:x}")
    return state


def unguard(uintptr_t address):
    guarded(address, guard_remove(<void *> address))


def map_guarded(int fd, uint64_t size, uint64_t offset, bint writable):
    cdef void *start = mmap(NULL, size, PROT_READ | PROT_WRITE if writable else PROT_READ, MAP_SHARED, fd, <off_t> offset)
    cdef int error = errno
    if start == MAP_FAILED:
        raise OSError(error, strerror(error))
    try:
        guard(<uintptr_t> start, size)
    except BaseException:
        munmap(start, size)
        raise
    return <uintptr_t> start


def unmap_guarded(uintptr_t address, uint64_t size):
    unguard(address)
    munmap(<void *> address, size)


def poisoned(uintptr_t address):
    return guarded(address, guard_poisoned(<void *> address)) > 0


def ring_doorbell(uintptr_t page, uint16_t queue, offset=None):
    if offset is None:
        doorbell_ring(<void *> page, queue)
    else:
        doorbell_ring_data(<void *> page, queue, offset)
