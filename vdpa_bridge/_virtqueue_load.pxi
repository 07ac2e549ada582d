# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Load generators, bound: each is one queue's, or one queue pair's, and runs without the GIL. Part of `_virtqueue.pyx`,
# whose rule, imports and declarations hold here too.

LOAD_MORE, LOAD_DONE, LOAD_SILENT = LOAD_STATE_MORE, LOAD_STATE_DONE, LOAD_STATE_SILENT
LOAD_BROKEN, LOAD_FAILED = LOAD_STATE_BROKEN, LOAD_STATE_FAILED
POLL_ALWAYS = VQ_POLL_ALWAYS
SHORTEST_FRAME, LARGEST_BATCH = LOAD_NET_SHORTEST, LOAD_NET_BATCH


@cython.final
cdef class Histogram:
    def __cinit__(self):
        histogram_clear(&self.core)

    @staticmethod
    cdef Histogram of(const histogram *core):
        cdef Histogram made = Histogram.__new__(Histogram)
        made.core = core[0]
        return made

    def add(self, uint64_t value):
        histogram_add(&self.core, value)

    def merge(self, Histogram other not None):
        histogram_merge(&self.core, &other.core)

    def quantile(self, double part):
        if not 0 <= part <= 1:
            raise ValueError(f"a share of {part}")
        return histogram_quantile(&self.core, part)

    def buckets(self):
        return [self.core.buckets[i] for i in range(HISTOGRAM_BUCKETS)]

    @property
    def count(self):
        return self.core.count

    @property
    def total(self):
        return self.core.sum

    @property
    def least(self):
        return self.core.least if self.core.count else 0

    @property
    def most(self):
        return self.core.most


cdef object described(const pattern_report *report):
    cdef char text[200]
    if report.fault == PATTERN_GOOD:
        return None
    pattern_describe(report, text, sizeof(text))
    return (<bytes> text).decode()


def fill_pattern(data, uint64_t sector, uint64_t generation, uint64_t seed):
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_WRITABLE)
    try:
        if view.len % PATTERN_SECTOR or <uintptr_t> view.buf % 8:
            raise ValueError(f"{view.len} bytes are no whole sectors, or lie unaligned")
        pattern_fill(view.buf, view.len, sector, generation, seed)
    finally:
        PyBuffer_Release(&view)


def check_pattern(data, uint64_t sector, uint64_t generation, uint64_t seed):
    cdef Py_buffer view
    cdef pattern_report report
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if view.len % PATTERN_SECTOR or <uintptr_t> view.buf % 8:
            raise ValueError(f"{view.len} bytes are no whole sectors, or lie unaligned")
        report = pattern_check(view.buf, view.len, sector, generation, seed)
    finally:
        PyBuffer_Release(&view)
    return described(&report)


cdef load_ring ring_of(DriverQueue queue, int kick, int call, uintptr_t doorbell, uint16_t index):
    return load_ring(&queue.vq, kick, call, <void *> doorbell, index)


cdef load_pace pace_of(object interval, object goal, object patience, uint64_t poll) except *:
    cdef load_pace pace
    memset(&pace, 0, sizeof(pace))
    pace.interval, pace.goal, pace.patience, pace.poll = interval, goal, patience, vq_poll_begin(poll)
    return pace


cdef object state_of(int state, int number):
    if state == LOAD_STATE_ERRNO:
        raise OSError(number, strerror(number))
    return state


@cython.final
cdef class BlkLoad:
    def __cinit__(
        self, DriverQueue queue not None, int kick, int call, uintptr_t doorbell, uint16_t index, uintptr_t address, uint64_t iova,
        *, depth, block, segment, first, blocks, reads, random, verify, seed, interval=0, goal=0, patience, poll=0, object owner=None,
    ):
        cdef load_blk_config config
        cdef int error
        if queue.vq.in_flight:
            raise ValueError(f"queue {index} is in use: {queue.vq.in_flight} chains are in flight")
        config.ring = ring_of(queue, kick, call, doorbell, index)
        config.pace = pace_of(interval, goal, patience, poll)
        config.memory, config.iova = <uint8_t *> address, iova
        config.depth, config.block, config.segment, config.first, config.blocks = depth, block, segment, first, blocks
        config.reads, config.random, config.verify, config.seed = reads, random, verify, seed
        self.queue, self.owner = queue, owner
        error = -load_blk_init(&self.core, &config)
        if error == EINVAL:
            raise ValueError(f"a ring of {queue.num} entries has no room for {depth} requests of {block} bytes at once")
        if error:
            raise MemoryError

    def __dealloc__(self):
        load_blk_destroy(&self.core)

    @staticmethod
    def memory(uint32_t depth, uint32_t block):
        return load_blk_memory(depth, block)

    def run(self, uint64_t nanoseconds):
        cdef int state, number
        with nogil:
            state = load_blk_run(&self.core, nanoseconds)
            number = errno
        return state_of(state, number)

    def stop(self):
        self.core.config.pace.stopping = True

    def sweep(self):
        if self.core.started != self.core.finished or not self.core.config.verify:
            raise ValueError("only what was written, with verify and at rest, can be read back")
        load_blk_sweep(&self.core)

    def forget(self):
        memset(&self.core.counts, 0, sizeof(self.core.counts))
        histogram_clear(&self.core.counts.read_latency)
        histogram_clear(&self.core.counts.write_latency)

    @property
    def counts(self):
        return self.core.counts.reads, self.core.counts.writes, self.core.counts.compared

    @property
    def in_flight(self):
        return self.core.started - self.core.finished

    @property
    def latencies(self):
        return Histogram.of(&self.core.counts.read_latency), Histogram.of(&self.core.counts.write_latency)

    @property
    def failed(self):
        return self.core.failed_write, self.core.failed_sector, self.core.failed_status

    @property
    def wrong(self):
        return described(&self.core.wrong)


cdef int in_use(Slots slots, uint32_t most) except -1:
    """ValueError when a chain of others is in flight, or more than `most` slots are."""
    cdef uint32_t lent = slots.core.count - slots.core.idle_count
    if slots.queue.vq.in_flight != lent or lent > most:
        raise ValueError(f"a queue is in use: {slots.queue.vq.in_flight} chains are in flight, {lent} of them slots")
    return 0


@cython.final
cdef class NetLoad:
    def __cinit__(
        self, Slots outgoing not None, Slots incoming not None, sender, receiver,
        *, mode, header, frame, room, batch, window, linger, seed, interval=0, goal=0, patience, poll=0,
    ):
        cdef load_net_config config
        memset(&config, 0, sizeof(config))
        kick, call, doorbell, index = sender
        config.sender = ring_of(outgoing.queue, kick, call, doorbell, index)
        kick, call, doorbell, index = receiver
        config.receiver = ring_of(incoming.queue, kick, call, doorbell, index)
        config.outgoing, config.incoming = &outgoing.core, &incoming.core
        config.pace = pace_of(interval, goal, patience, poll)
        config.mode = <load_net_mode> (<int> mode)
        config.header, config.frame, config.room, config.batch = header, frame, room, batch
        config.window, config.linger, config.seed = window, linger, seed
        self.outgoing, self.incoming = outgoing, incoming
        in_use(outgoing, 0)
        in_use(incoming, incoming.core.count)
        if load_net_init(&self.core, &config):
            raise ValueError(f"frames of {frame} bytes (from {LOAD_NET_SHORTEST} on), {batch} at once (up to {LOAD_NET_BATCH}), in slots of {outgoing.core.stride}")

    def run(self, uint64_t nanoseconds):
        cdef int state, number
        with nogil:
            state = load_net_run(&self.core, nanoseconds)
            number = errno
        return state_of(state, number)

    def stop(self):
        self.core.config.pace.stopping = True

    def forget(self):
        memset(&self.core.counts, 0, sizeof(self.core.counts))
        histogram_clear(&self.core.counts.latency)

    @property
    def counts(self):
        cdef load_net_counts *counts = &self.core.counts
        return counts.sent, counts.received, counts.received_bytes, counts.ours, counts.reordered, counts.foreign, counts.lost

    @property
    def in_flight(self):
        return self.core.started - self.core.finished

    @property
    def latency(self):
        return Histogram.of(&self.core.counts.latency)

    @property
    def headless(self):
        return self.core.headless
