# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# cython: language_level=3, boundscheck=False, wraparound=False, auto_pickle=False, binding=False, autotestdict=False
"""The native rings, bound; `_virtqueue.pyi` documents every name here.

Rule: convert and check Python values, keep what C points into alive, hold no ring logic. Batches cross once. The GIL is
released for file I/O only: everything else is shorter than giving it up and taking it back. The C declarations and the
fields of the classes are in `_virtqueue.pxd`, the IOVA map and the guard in `_virtqueue_memory.pxi`, slots,
load generators, relays and engines in files of theirs.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EBUSY, EEXIST, EFAULT, EINVAL, ENOSPC, EPROTO, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport off_t, usleep

from os import strerror
from types import GenericAlias

PERM_RO = IOVA_RO
PERM_WO = IOVA_WO
PERM_RW = IOVA_RW

cdef object fault_text(const vq_fault *fault):
    cdef char text[160]
    if fault.code == VQ_OK:
        return None
    vq_fault_describe(fault, text, sizeof(text))
    return (<bytes> text).decode()


cdef object broken_error(const vq_fault *fault):
    return OSError(EPROTO, f"virtqueue is broken: {fault_text(fault)}")


cdef object answer(int due, const vq_fault *fault):
    """1 or 0 as a bool; negative is a broken queue, for what the binding passes is valid otherwise."""
    if due < 0:
        raise broken_error(fault)
    return due > 0


cdef uint32_t checked_num(object num, bint packed) except 0:
    if not 0 < num <= VRING_MAX_NUM or not vq_num_valid(num, packed):
        raise ValueError(f"ring size {num} is not {'' if packed else 'a power of 2 '}up to {VRING_MAX_NUM}")
    return num


cdef uint32_t checked_base(uint32_t num, object base, bint packed) except? 0:
    if base is None:
        return VQ_PACKED_START if packed else 0
    if not 0 <= base <= 0xFFFFFFFF or not vq_base_valid(num, base, packed):
        raise ValueError(f"base {base} is not {'two positions in the ring with their wrap counters' if packed else 'a 16-bit index'}")
    return base


cdef vq_layout_t checked_layout(uint32_t num, object table_entries, bint packed) except *:
    if not 0 <= table_entries <= VQ_INDIRECT_MAX:
        raise ValueError(f"{table_entries} entries per indirect table, of at most {VQ_INDIRECT_MAX}")
    return vq_layout(num, table_entries, packed)


include "_virtqueue_memory.pxi"


@cython.final
@cython.freelist(256)
cdef class Chain:
    def __init__(self):
        raise TypeError("chains come from DeviceQueue.pop_many()")

    def __dealloc__(self):
        if self.iov != self.own_iov:
            free(self.iov)

    cdef int fill(self, DeviceQueue queue, const vq_chain *chain, const iova_pieces *pieces) except -1:
        cdef size_t count = <size_t> chain.readable_pieces + chain.writable_pieces
        self.iov, self.iova = self.own_iov, self.own_iova
        if count > INLINE:
            self.iov = <iovec *> malloc(count * (sizeof(iovec) + sizeof(uint64_t)))
            if self.iov == NULL:
                raise MemoryError
            self.iova = <uint64_t *> (self.iov + count)
        memcpy(self.iov, chain.iov, count * sizeof(iovec))
        memcpy(self.iova, pieces.iova + (chain.iov - pieces.iov), count * sizeof(uint64_t))
        self.memory, self.queue, self.chain, self.live = queue.memory, queue, chain[0], True
        self.generation = queue.memory.map.generation
        self.turn = queue.popped
        queue.popped += 1
        return 0

    cdef int refresh(self) except -1:
        """The pieces point into memory that is mapped now; before every access."""
        if not self.live:
            raise ValueError("the chain was handed back already")
        if self.generation == self.memory.map.generation:
            return 0
        cdef size_t count = self.chain.readable_pieces
        if iova_refresh(&self.memory.map, self.iov, self.iova, count, IOVA_RO) or iova_refresh(
            &self.memory.map, self.iov + count, self.iova + count, self.chain.writable_pieces, IOVA_WO
        ):
            raise OSError(EFAULT, "memory of the chain is no longer mapped")
        self.generation = self.memory.map.generation
        return 0

    cdef chain_part readable_part(self):
        return chain_part(self.iov, self.chain.readable_pieces)

    cdef chain_part writable_part(self):
        return chain_part(self.iov + self.chain.readable_pieces, self.chain.writable_pieces)

    @property
    def head(self):
        return self.chain.head

    @property
    def readable(self):
        return self.chain.readable

    @property
    def writable(self):
        return self.chain.writable

    def read(self, uint64_t offset=0, length=None):
        self.refresh()
        cdef uint64_t before = guard_events()
        cdef uint64_t size = rest(self.chain.readable, offset, length)
        cdef bytes out = PyBytes_FromStringAndSize(NULL, size)
        chain_gather(self.readable_part(), offset, PyBytes_AS_STRING(out), size)
        self.memory.unpoisoned(before)
        return out

    def write(self, object data, uint64_t offset=0):
        self.refresh()
        cdef uint64_t before = guard_events()
        cdef uint64_t done
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        done = chain_scatter(self.writable_part(), offset, view.buf, view.len)
        PyBuffer_Release(&view)
        self.memory.unpoisoned(before)
        return done

    def copy_from(self, Chain src not None, uint64_t src_offset=0, uint64_t dst_offset=0, length=None):
        self.refresh()
        src.refresh()
        cdef uint64_t before = guard_events()
        cdef uint64_t size = rest(src.chain.readable, src_offset, length)
        cdef uint64_t done = chain_copy(self.writable_part(), dst_offset, src.readable_part(), src_offset, size)
        self.memory.unpoisoned(before)
        src.memory.unpoisoned(before)
        return done

    def zero(self, uint64_t offset=0, length=None):
        self.refresh()
        cdef uint64_t before = guard_events()
        cdef uint64_t done = chain_zero(self.writable_part(), offset, rest(self.chain.writable, offset, length))
        self.memory.unpoisoned(before)
        return done

    def preadv(self, int fd, int64_t file_offset, uint64_t skip=0, length=None):
        self.refresh()
        cdef uint64_t size = rest(self.chain.writable, skip, length)
        cdef chain_part part = self.writable_part()
        cdef int64_t done = 0
        self.memory.busy += 1
        with nogil:
            done = chain_from_file(part, fd, file_offset, skip, size)
        self.memory.busy -= 1
        return moved(done)

    def pwritev(self, int fd, int64_t file_offset, uint64_t skip=0, length=None):
        self.refresh()
        cdef uint64_t size = rest(self.chain.readable, skip, length)
        cdef chain_part part = self.readable_part()
        cdef int64_t done
        self.memory.busy += 1
        with nogil:
            done = chain_to_file(part, fd, file_offset, skip, size)
        self.memory.busy -= 1
        return moved(done)


cdef object moved(int64_t done):
    if done < 0:
        raise OSError(-done, strerror(-done))
    return done


cdef uint64_t rest(uint64_t size, uint64_t offset, object length) except? 0:
    """Bytes from `offset` to the end, at most `length` of them."""
    cdef uint64_t left = size - offset if offset < size else 0
    if length is None:
        return left
    return min(left, <uint64_t> length)


@cython.final
cdef class DeviceQueue:
    def __cinit__(
        self, IovaMap memory not None, object num, uint64_t desc, uint64_t avail, uint64_t used,
        *, object base=None, bint event_idx=False, bint indirect=True, bint packed=False, bint wait=False, bint in_order=False,
    ):
        cdef vq_device_config config
        cdef uint32_t entries = checked_num(num, packed)
        cdef int error
        config.map, config.num, config.base = &memory.map, entries, checked_base(entries, base, packed)
        config.desc, config.avail, config.used = desc, avail, used
        config.event_idx, config.indirect, config.packed = event_idx, indirect, packed
        config.wait, config.in_order = wait, in_order
        self.memory = memory
        self.done = <vq_used *> malloc(entries * sizeof(vq_used))
        self.pieces.capacity = PIECES + entries
        self.pieces.iov = <iovec *> malloc(self.pieces.capacity * (sizeof(iovec) + sizeof(uint64_t)))
        if self.done == NULL or self.pieces.iov == NULL:
            raise MemoryError
        self.bare_pieces = self.pieces
        self.pieces.iova = <uint64_t *> (self.pieces.iov + self.pieces.capacity)
        error = -vq_device_init(&self.vq, &config)
        if error == EINVAL:
            needed = "16, 4 and 4" if packed else "16, 2 and 4"
            raise ValueError(f"ring areas 0x{desc:x}, 0x{avail:x}, 0x{used:x} are not aligned to {needed} bytes")
        if error == EFAULT:
            raise OSError(EFAULT, fault_text(&self.vq.fault))
        if error:
            raise MemoryError

    def __dealloc__(self):
        vq_device_destroy(&self.vq)
        free(self.pieces.iov)
        free(self.done)

    def pop_many(self, Py_ssize_t limit=64):
        cdef list out = []
        cdef size_t count, i
        cdef Chain chain
        while limit > 0:
            self.pieces.used = 0
            count = vq_device_pop(&self.vq, self.chains, min(limit, BATCH), &self.pieces)
            if count == 0:
                break
            for i in range(count):
                chain = Chain.__new__(Chain)
                chain.fill(self, &self.chains[i], &self.pieces)
                out.append(chain)
            limit -= count
        if not out and self.vq.fault.code != VQ_OK:
            raise broken_error(&self.vq.fault)
        return out

    def push_many(self, completed):
        cdef size_t count = 0
        cdef Chain chain
        cdef list taken = []
        try:
            for chain, written in completed:
                if chain is None or not chain.live or chain.queue is not self:
                    raise ValueError("not a chain in flight on this queue")
                if not 0 <= written <= chain.chain.writable or written > 0xFFFFFFFF:
                    raise ValueError(f"{written} bytes written, of {chain.chain.writable} writable")
                chain.live = False
                taken.append(chain)
                self.done[count].head = chain.chain.head
                self.done[count].written = written
                count += 1
        except BaseException:
            for chain in taken:
                chain.live = True
            raise
        cdef int due = vq_device_push(&self.vq, self.done, count)
        if due == -EAGAIN:
            for chain in taken:
                chain.live = True
            raise BlockingIOError(EAGAIN, "the ring waits for a mapping")
        return answer(due, &self.vq.fault)

    def put_back(self, list chains not None):
        cdef size_t count = len(chains)
        cdef uint64_t first = self.popped - count
        cdef Chain chain
        cdef size_t i
        cdef uint16_t *heads = <uint16_t *> self.done  # large enough: every chain in flight has an entry there
        if count > self.vq.in_flight:
            raise ValueError("more chains than are in flight on this queue")
        for i in range(count):
            chain = chains[i]
            if chain is None or not chain.live or chain.queue is not self or chain.turn != first + i:
                raise ValueError("not the last chains popped from this queue, in their order")
            heads[i] = chain.chain.head
        if vq_device_put_back(&self.vq, heads, count):
            raise broken_error(&self.vq.fault)
        for chain in chains:
            chain.live = False
        self.popped = first

    def enable_kick(self):
        return answer(vq_device_enable_kick(&self.vq), &self.vq.fault)

    def disable_kick(self):
        vq_device_disable_kick(&self.vq)

    @property
    def patient(self):
        return self.vq.config.wait

    @property
    def waits(self):
        return self.vq.missing != 0

    def misses(self):
        return [(self.vq.misses[i].iova, self.vq.misses[i].perm) for i in range(vq_device_misses(&self.vq))]

    def refuse(self, uint64_t iova):
        vq_device_refuse(&self.vq, iova)

    @property
    def num(self):
        return self.vq.config.num

    @property
    def base(self):
        return vq_device_base(&self.vq)

    @property
    def used_idx(self):
        return self.vq.used_idx

    @property
    def in_flight(self):
        return self.vq.in_flight

    @property
    def broken(self):
        return fault_text(&self.vq.fault)


@cython.final
cdef class DriverQueue:
    def __cinit__(
        self, uintptr_t address, uint64_t size, uint64_t iova, object num,
        *, object table_entries=0, bint event_idx=False, object base=None, object owner=None, bint packed=False,
        bint overstated=False, bint in_order=False, bint notification_data=False,
    ):
        cdef vq_driver_config config
        cdef uint32_t entries = checked_num(num, packed)
        cdef int error
        self.layout = checked_layout(entries, table_entries, packed)
        if size < self.layout.size:
            raise ValueError(f"ring area has {size} bytes, needs {self.layout.size}")
        config.area, config.iova, config.num = <void *> address, iova, entries
        config.base = checked_base(entries, base, packed)
        config.table_entries, config.event_idx, config.packed = table_entries, event_idx, packed
        config.overstated, config.in_order, config.notification_data = overstated, in_order, notification_data
        self.owner, self.held = owner, [None] * entries
        self.most = max(entries, <uint32_t> table_entries)
        self.buffers = <vq_buffer *> malloc(self.most * sizeof(vq_buffer))
        if self.buffers == NULL:
            raise MemoryError
        error = -vq_driver_init(&self.vq, &config)
        if error == EINVAL:
            if packed and config.base >> 16 != config.base & 0xFFFF:
                raise ValueError(f"base 0x{config.base:x}: a driver starts with nothing in flight, both its halves the same")
            raise ValueError(f"ring area at 0x{address:x}, IOVA 0x{iova:x} is not aligned to 16 bytes")
        if error:
            raise MemoryError

    def __dealloc__(self):
        vq_driver_destroy(&self.vq)
        free(self.buffers)

    def __class_getitem__(cls, item):
        return GenericAlias(cls, item)

    cdef size_t take(self, object segments, size_t count) except? 0:
        for iova, length in segments:
            if count == self.most:
                raise ValueError(f"chain has more than {self.most} buffers")
            if not 0 < length <= 0xFFFFFFFF:
                raise ValueError(f"buffer of {length} bytes")
            self.buffers[count].iova = iova
            self.buffers[count].length = length
            count += 1
        return count

    def add_many(self, requests):
        cdef Py_ssize_t added = 0
        cdef size_t readable, count
        cdef int head
        for device_reads, device_writes, token in requests:
            readable = self.take(device_reads, 0)
            count = self.take(device_writes, readable)
            head = vq_driver_add(&self.vq, self.buffers, readable, count - readable, 0)
            if head == -ENOSPC:
                break
            if head == -EPROTO:
                raise broken_error(&self.vq.fault)
            if head < 0:
                raise ValueError(f"chain of {count} buffers: none, too many, or more than 2^32 bytes")
            self.held[head] = token
            added += 1
        return added

    def publish(self):
        return answer(vq_driver_publish(&self.vq), &self.vq.fault)

    def reap(self, Py_ssize_t limit=64):
        cdef list out = []
        cdef size_t count, i
        while limit > 0:
            count = vq_driver_reap(&self.vq, self.done, min(limit, BATCH))
            for i in range(count):
                out.append((self.held[self.done[i].head], self.done[i].written))
                self.held[self.done[i].head] = None
            if count < BATCH:
                break
            limit -= count
        if not out and self.vq.fault.code != VQ_OK:
            raise broken_error(&self.vq.fault)
        return out

    def enable_call(self):
        return answer(vq_driver_enable_call(&self.vq), &self.vq.fault)

    def disable_call(self):
        vq_driver_disable_call(&self.vq)

    @property
    def num(self):
        return self.vq.config.num

    @property
    def desc(self):
        return self.vq.config.iova + self.layout.desc

    @property
    def avail(self):
        return self.vq.config.iova + self.layout.avail

    @property
    def used(self):
        return self.vq.config.iova + self.layout.used

    @property
    def offset(self):
        return vq_driver_offset(&self.vq) if self.vq.config.notification_data else None

    @property
    def free(self):
        return self.vq.free

    @property
    def in_flight(self):
        return self.vq.in_flight

    @property
    def broken(self):
        return fault_text(&self.vq.fault)


include "_virtqueue_slots.pxi"
include "_virtqueue_load.pxi"


def ring_layout(num, table_entries=0, bint packed=False):
    cdef vq_layout_t layout = checked_layout(checked_num(num, packed), table_entries, packed)
    return layout.desc, layout.avail, layout.used, layout.tables, layout.size


include "_virtqueue_poll.pxi"
include "_virtqueue_relay.pxi"
include "_virtqueue_engine.pxi"
include "_virtqueue_tap.pxi"
