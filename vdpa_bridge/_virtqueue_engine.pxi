# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Engines and the loops that run them without the GIL. Part of `_virtqueue.pyx`, whose rule and imports hold here too.

from threading import RLock

cdef extern from "engine.h" nogil:
    enum: ENGINE_RINGS
    struct engine_ring:
        vq_device *vq
        vq_chain *chains
        vq_used *done
        iova_pieces *pieces
        int call
        bint due
    struct engine:
        engine_ring *rings
        int fd
        uint32_t in_flight
    struct loop:
        vq_poll_t poll
        bint paused, closing
    int loop_init(loop *l, gate *g, uint64_t budget)
    void loop_destroy(loop *l)
    int loop_add(loop *l, engine *e)
    void loop_remove(loop *l, engine *e)
    int loop_refit(loop *l, engine *e, int fd)
    int loop_watch(loop *l, engine *e, int kick)
    void loop_unwatch(loop *l, int kick)
    void loop_look(loop *l, engine *e)
    engine *loop_run(loop *l)

cdef extern from "blk_memory.h" nogil:
    struct blk_memory:
        bint lost
    int blk_memory_init(blk_memory *m, int file, uint64_t size, bint writable)
    void blk_memory_destroy(blk_memory *m)
    void blk_memory_forget(blk_memory *m, uint64_t offset, uint64_t length)

cdef extern from "blk_engine.h" nogil:
    enum: BLK_CACHED, BLK_RESIDENT, BLK_DIRECT, BLK_NULL
    struct blk_config:
        int medium, file, direct
        uint32_t align, depth
        blk_memory *memory
        bint readonly, uring
    struct uring:
        int fd
    struct blk_engine:
        engine engine
        uint64_t capacity
        uint32_t block
        bint stable_writes
        int failure
        uring uring
    int blk_engine_init(blk_engine *b, const blk_config *config)
    void blk_engine_destroy(blk_engine *b)

cdef extern from "net_engine.h" nogil:
    enum: NET_LOOP, NET_ECHO, NET_SINK, NET_SOURCE
    struct net_engine:
        engine engine
        uint32_t header
        unsigned char *mac
        bint used
    void net_engine_init(net_engine *n, int kind)


@cython.final
cdef class Gate:

    def __cinit__(self):
        self.lock = RLock()
        if gate_init(&self.core):
            raise MemoryError

    def __dealloc__(self):
        gate_destroy(&self.core)

    def __enter__(self):
        if not self.lock.acquire(False):
            gate_await(&self.core, True)
            try:
                self.lock.acquire()
            finally:
                gate_await(&self.core, False)
        if self.depth == 0 and not gate_try(&self.core):
            with nogil:
                gate_hold(&self.core)
        self.depth += 1
        return self

    def __exit__(self, kind, value, trace):
        self.depth -= 1
        if self.depth == 0:
            gate_release(&self.core)
        self.lock.release()



cdef class Engine:
    cdef engine *core
    cdef list queues
    cdef Loop loop  # while one of its queues is served
    cdef readonly object served
    cdef readonly object thread
    cdef int kicks[ENGINE_RINGS]

    def __init__(self):
        raise TypeError("an engine is made by its own class")

    cdef int set_up(self, engine *core, Py_ssize_t first, Py_ssize_t count, object thread) except -1:
        self.core, self.served, self.thread = core, range(first, first + count), thread
        self.queues = [None] * count
        return 0

    @property
    def in_flight(self):
        return self.core.in_flight


@cython.final
cdef class BlkMemory:
    cdef blk_memory memory

    def __cinit__(self, int file, uint64_t size, bint writable):
        cdef int error = -blk_memory_init(&self.memory, file, size, writable)
        if error:
            raise OSError(error, strerror(error))

    def __dealloc__(self):
        blk_memory_destroy(&self.memory)

    def close(self):
        blk_memory_destroy(&self.memory)

    def forget(self, uint64_t offset, uint64_t length):
        blk_memory_forget(&self.memory, offset, length)


@cython.final
cdef class BlkEngine(Engine):
    cdef blk_engine blk
    cdef BlkMemory memory
    cdef bint made

    def __init__(self, Py_ssize_t index, int file, object capacity, *, object medium="cached", BlkMemory memory=None, int direct=-1, uint32_t align=512, uint32_t block=1,
                 bint readonly=False, bint stable_writes=False, bint io_uring=True, uint32_t depth=128, object thread=0):
        cdef blk_config config
        names = {"cached": BLK_CACHED, "resident": BLK_RESIDENT, "direct": BLK_DIRECT, "null": BLK_NULL}
        if medium not in names:
            raise ValueError(f"medium {medium!r}; there is: {', '.join(names)}")
        if not 0 < depth <= 1 << 15 or depth & (depth - 1):
            raise ValueError(f"depth {depth} is not a power of 2 up to {1 << 15}")
        if not align or align & (align - 1):
            raise ValueError(f"alignment {align} is not a power of 2")
        if not block or block & (block - 1):
            raise ValueError(f"{block} sectors in a block, which is not a power of 2")
        config.medium, config.file, config.direct, config.align, config.depth = names[medium], file, direct, align, depth
        config.readonly, config.uring, self.memory = readonly, io_uring, memory
        config.memory = NULL if memory is None else &memory.memory
        if self.made:
            raise TypeError("an engine is made once")
        if blk_engine_init(&self.blk, &config):
            raise MemoryError
        self.made = True
        self.blk.capacity, self.blk.block, self.blk.stable_writes = capacity, block, stable_writes
        self.set_up(&self.blk.engine, index, 1, thread)

    def __dealloc__(self):
        if self.made:  # else its descriptors are none of ours: all zeroes would be stdin
            blk_engine_destroy(&self.blk)

    @property
    def capacity(self):
        return self.blk.capacity

    @capacity.setter
    def capacity(self, uint64_t sectors):
        self.blk.capacity = sectors

    @property
    def stable_writes(self):
        return self.blk.stable_writes

    @stable_writes.setter
    def stable_writes(self, bint stable):
        self.blk.stable_writes = stable

    @property
    def io_uring(self):
        return self.blk.uring.fd >= 0

    @property
    def failure(self):
        return self.blk.failure


@cython.final
cdef class NetEngine(Engine):
    cdef net_engine net

    def __init__(self, Py_ssize_t pair, object kind, uint32_t header, *, object thread=0):
        kinds = {"loop": NET_LOOP, "echo": NET_ECHO, "sink": NET_SINK, "source": NET_SOURCE}
        if kind not in kinds:
            raise ValueError(f"kind {kind!r}; there is: {', '.join(kinds)}")
        if header not in (10, 12):
            raise ValueError(f"a header of {header} bytes; it has 10 or 12")
        net_engine_init(&self.net, kinds[kind])
        self.net.header = header
        self.set_up(&self.net.engine, 2 * pair, 2, thread)

    def follow(self, bytes mac not None, bint used):
        if len(mac) != 6:
            raise ValueError(f"a MAC address of {len(mac)} bytes")
        memcpy(self.net.mac, PyBytes_AS_STRING(mac), 6)
        self.net.used = used


@cython.final
cdef class Loop:
    cdef loop core
    cdef Gate gate
    cdef dict engines
    cdef bint made

    def __cinit__(self, Gate gate not None, uint64_t budget=50000):
        cdef int error = -loop_init(&self.core, &gate.core, budget)
        if error:
            raise OSError(error, strerror(error))
        self.gate, self.engines, self.made = gate, {}, True

    def __dealloc__(self):
        self.free()

    def free(self):
        if self.made:
            self.made = False
            loop_destroy(&self.core)

    def run(self):
        cdef engine *asks
        while True:
            with nogil:
                asks = loop_run(&self.core)
            if asks == NULL:
                return None
            if (found := self.engines.get(<uintptr_t> asks)) is not None:  # else its rings went meanwhile
                return found

    def attach(self, Engine engine not None, Py_ssize_t index, DeviceQueue queue not None, int kick=-1, int call=-1):
        cdef Py_ssize_t at = engine.served.index(index)
        cdef engine_ring *ring = &engine.core.rings[at]
        cdef int error = 0
        if ring.vq != NULL:
            raise ValueError(f"queue {index} is served already")
        engine.queues[at], engine.kicks[at] = queue, kick
        ring.vq, ring.chains, ring.done, ring.pieces = &queue.vq, queue.chains, queue.done, &queue.bare_pieces
        ring.call, ring.due = call, False
        if <uintptr_t> engine.core not in self.engines:
            error = -loop_add(&self.core, engine.core)
            if not error:
                self.engines[<uintptr_t> engine.core] = engine
        else:
            loop_look(&self.core, engine.core)
        engine.loop = self
        if not error and kick >= 0:
            error = -loop_watch(&self.core, engine.core, kick)
        if error:
            engine.kicks[at] = -1
            self.detach(engine, index)
            raise OSError(error, f"queue {index}: {strerror(error)}")

    def detach(self, Engine engine not None, Py_ssize_t index):
        cdef Py_ssize_t at = engine.served.index(index)
        cdef engine_ring *ring = &engine.core.rings[at]
        if engine.kicks[at] >= 0:
            loop_unwatch(&self.core, engine.kicks[at])
        ring.vq = NULL
        ring.call = engine.kicks[at] = -1
        engine.queues[at] = None
        if not any(engine.queues) and self.engines.pop(<uintptr_t> engine.core, None) is not None:
            loop_remove(&self.core, engine.core)
            engine.loop = None

    def look(self, Engine engine not None):
        if <uintptr_t> engine.core in self.engines:
            loop_look(&self.core, engine.core)

    def set_call(self, Engine engine not None, Py_ssize_t index, int call):
        engine.core.rings[<Py_ssize_t> engine.served.index(index)].call = call

    def pause(self, bint paused=True):
        self.core.paused = paused
        loop_look(&self.core, NULL)

    def close(self):
        self.core.closing = True
        loop_look(&self.core, NULL)

    @property
    def budget(self):
        return self.core.poll.budget
