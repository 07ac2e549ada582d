# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# cython: language_level=3
"""What `_virtqueue.pyx` uses of the C core, and the fields of its classes, for other native modules to cimport."""

cimport cython
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "iova.h" nogil:
    enum: IOVA_RO, IOVA_WO, IOVA_RW
    struct iova_region:
        uint64_t iova, last
        void *host
        uint32_t perm
    struct iova_map:
        iova_region *regions
        size_t count
        uint64_t generation
    struct iova_pieces:
        iovec *iov
        uint64_t *iova
        size_t used, capacity
    void iova_map_init(iova_map *map)
    void iova_map_destroy(iova_map *map)
    int iova_map_add(iova_map *map, uint64_t iova, uint64_t size, void *host, uint32_t perm)
    long iova_map_remove(iova_map *map, uint64_t iova, uint64_t size)
    void iova_map_clear(iova_map *map)
    int iova_refresh(const iova_map *map, iovec *iov, const uint64_t *iova, size_t count, uint32_t perm)
    int iova_read(const iova_map *map, uint64_t iova, void *to, uint64_t length)
    int iova_write(const iova_map *map, uint64_t iova, const void *source, uint64_t length)
    bint iova_map_poisoned(const iova_map *map)

cdef extern from "guard.h" nogil:
    int guard_add(void *address, uint64_t size)
    int guard_remove(void *address)
    int guard_poisoned(const void *address)
    uint64_t guard_events()

cdef extern from "doorbell.h" nogil:
    void doorbell_ring(void *page, uint16_t queue)
    void doorbell_ring_data(void *page, uint16_t queue, uint16_t offset)

cdef extern from "chain.h" nogil:
    struct chain_part:
        const iovec *iov
        size_t count
    uint64_t chain_gather(chain_part source, uint64_t offset, void *to, uint64_t length)
    uint64_t chain_scatter(chain_part to, uint64_t offset, const void *source, uint64_t length)
    uint64_t chain_zero(chain_part to, uint64_t offset, uint64_t length)
    uint64_t chain_copy(chain_part to, uint64_t to_offset, chain_part source, uint64_t offset, uint64_t length)
    int64_t chain_from_file(chain_part to, int fd, int64_t file_offset, uint64_t skip, uint64_t length)
    int64_t chain_to_file(chain_part source, int fd, int64_t file_offset, uint64_t skip, uint64_t length)

cdef extern from "virtqueue.h" nogil:
    enum: VQ_OK, VQ_INDIRECT_MAX, VRING_MAX_NUM
    const uint32_t VQ_PACKED_START
    bint vq_num_valid(uint32_t num, bint packed)
    bint vq_base_valid(uint32_t num, uint32_t base, bint packed)
    struct vq_fault:
        int code
    int vq_fault_describe(const vq_fault *fault, char *text, size_t size)

    struct vq_chain:
        iovec *iov
        uint32_t readable_pieces, writable_pieces
        uint64_t readable, writable
        uint16_t head
    struct vq_used:
        uint32_t written
        uint16_t head
    struct vq_miss:
        uint64_t iova
        uint32_t perm
    struct vq_device_config:
        const iova_map *map
        uint64_t desc, avail, used
        uint32_t num, base
        bint event_idx, indirect, packed, wait, in_order
    struct vq_device:
        vq_device_config config
        uint16_t used_idx
        uint32_t in_flight
        uint32_t missing
        vq_fault fault
        vq_miss *misses
    int vq_device_init(vq_device *vq, const vq_device_config *config)
    void vq_device_destroy(vq_device *vq)
    uint32_t vq_device_base(const vq_device *vq)
    size_t vq_device_pop(vq_device *vq, vq_chain *chains, size_t limit, iova_pieces *pieces)
    int vq_device_push(vq_device *vq, const vq_used *done, size_t count)
    int vq_device_put_back(vq_device *vq, const uint16_t *heads, size_t count)
    int vq_device_enable_kick(vq_device *vq)
    void vq_device_disable_kick(vq_device *vq)
    size_t vq_device_misses(vq_device *vq)
    void vq_device_refuse(vq_device *vq, uint64_t iova)

    struct vq_layout_t "vq_layout":
        uint64_t desc, avail, used, tables, size
    vq_layout_t vq_layout(uint32_t num, uint32_t table_entries, bint packed)
    struct vq_buffer:
        uint64_t iova
        uint32_t length
    struct vq_done:
        uint64_t token
        uint32_t written
        uint16_t head
    struct vq_driver_config:
        void *area
        uint64_t iova
        uint32_t num, table_entries, base
        bint event_idx, packed, overstated, in_order, notification_data
    struct vq_driver:
        vq_driver_config config
        uint32_t free, in_flight
        vq_fault fault
    int vq_driver_init(vq_driver *vq, const vq_driver_config *config)
    void vq_driver_destroy(vq_driver *vq)
    int vq_driver_add(vq_driver *vq, const vq_buffer *buffers, size_t readable, size_t writable, uint64_t token)
    int vq_driver_publish(vq_driver *vq)
    uint16_t vq_driver_offset(const vq_driver *vq)
    size_t vq_driver_reap(vq_driver *vq, vq_done *done, size_t limit)
    int vq_driver_enable_call(vq_driver *vq)
    void vq_driver_disable_call(vq_driver *vq)

cdef extern from "slots.h" nogil:
    struct vq_slots:
        uint32_t stride, count, idle_count
    int vq_slots_init(vq_slots *slots, vq_driver *vq, void *memory, uint64_t iova, uint32_t stride, uint32_t count, bint writable)
    void vq_slots_destroy(vq_slots *slots)
    uint16_t vq_slots_next(const vq_slots *slots, size_t ahead)
    uint8_t *vq_slots_data(const vq_slots *slots, uint16_t slot)
    size_t vq_slots_room(const vq_slots *slots, size_t count)
    size_t vq_slots_add(vq_slots *slots, const uint32_t *lengths, bint each, size_t count)
    int vq_slots_take(vq_slots *slots, const vq_done *done)

cdef extern from "histogram.h" nogil:
    enum: HISTOGRAM_BUCKETS
    struct histogram:
        uint64_t count, sum, least, most
        uint64_t *buckets
    void histogram_clear(histogram *histogram)
    uint32_t histogram_bucket(uint64_t value)
    void histogram_add(histogram *histogram, uint64_t value)
    void histogram_merge(histogram *into, const histogram *other)
    uint64_t histogram_quantile(const histogram *histogram, double part)

cdef extern from "pattern.h" nogil:
    enum: PATTERN_GOOD, PATTERN_SECTOR
    struct pattern_report:
        int fault
        uint64_t sector
    void pattern_fill(void *data, size_t bytes, uint64_t sector, uint64_t generation, uint64_t seed)
    pattern_report pattern_check(const void *data, size_t bytes, uint64_t sector, uint64_t generation, uint64_t seed)
    int pattern_describe(const pattern_report *report, char *text, size_t size)

cdef extern from "gate.h" nogil:
    struct gate:
        pass
    int gate_init(gate *g)
    void gate_destroy(gate *g)
    bint gate_try(gate *g)
    void gate_hold(gate *g)
    void gate_release(gate *g)
    void gate_await(gate *g, bint waiting)

cdef extern from "vq_poll.h" nogil:
    enum: VQ_POLL_MAX
    uint64_t VQ_POLL_ALWAYS
    struct vq_poll_t "vq_poll":
        uint64_t budget, window
    vq_poll_t vq_poll_begin(uint64_t budget)
    uint64_t vq_poll_look(vq_poll_t *poll, const gate *g, vq_device **queues, size_t count)
    void vq_poll_slept(vq_poll_t *poll, uint64_t nanoseconds)

cdef extern from "load.h" nogil:
    int LOAD_STATE_MORE "LOAD_MORE", LOAD_STATE_DONE "LOAD_DONE", LOAD_STATE_SILENT "LOAD_SILENT"
    int LOAD_STATE_BROKEN "LOAD_BROKEN", LOAD_STATE_FAILED "LOAD_FAILED", LOAD_STATE_ERRNO "LOAD_ERRNO"
    struct load_ring:
        vq_driver *vq
        int kick, call
        void *doorbell
        uint16_t index
    struct load_pace:
        uint64_t interval, goal, patience
        vq_poll_t poll
        bint stopping

cdef extern from "load_blk.h" nogil:
    struct load_blk_config:
        load_ring ring
        load_pace pace
        uint8_t *memory
        uint64_t iova
        uint32_t depth, block, segment
        uint64_t first, blocks
        uint32_t reads
        bint random, verify
        uint64_t seed
    struct load_blk_counts:
        uint64_t reads, writes, compared
        histogram read_latency, write_latency
    struct load_blk:
        load_blk_config config
        load_blk_counts counts
        uint64_t started, finished
        uint64_t failed_sector
        bint failed_write
        uint8_t failed_status
        pattern_report wrong
    uint64_t load_blk_memory(uint32_t depth, uint32_t block)
    int load_blk_init(load_blk *load, const load_blk_config *config)
    void load_blk_destroy(load_blk *load)
    int load_blk_run(load_blk *load, uint64_t slice)
    void load_blk_sweep(load_blk *load)

cdef extern from "load_net.h" nogil:
    enum: LOAD_NET_SHORTEST, LOAD_NET_BATCH
    enum load_net_mode:
        pass
    struct load_net_config:
        load_ring sender, receiver
        vq_slots *outgoing
        vq_slots *incoming
        load_pace pace
        load_net_mode mode
        uint32_t header, frame, room, batch, window
        uint64_t linger, seed
    struct load_net_counts:
        uint64_t sent, received, received_bytes, ours, reordered, foreign, lost
        histogram latency
    struct load_net:
        load_net_config config
        load_net_counts counts
        uint64_t started, finished, open
        uint32_t headless
    int load_net_init(load_net *load, const load_net_config *config)
    int load_net_run(load_net *load, uint64_t slice)

cdef extern from "relay.h" nogil:
    enum: RELAY_KICK, RELAY_CALL, RELAY_AGAIN, RELAY_MOVED
    struct relay:
        pass
    int relay_init(relay *r, vq_device *source, vq_driver *to, const iova_map *places)
    void relay_destroy(relay *r)
    int relay_move(relay *r, bint take)
    uint64_t relay_open(const relay *r)
    bint relay_base(const relay *r, uint32_t *base)

cdef enum:
    BATCH = 64  # chains per crossing into C
    INLINE = 4  # pieces a Chain holds without memory of its own
    PIECES = 2048  # pieces per pop, so that one chain of VQ_INDIRECT_MAX buffers always fits
    PATIENCE = 50_000  # x 100 us: how long a change of the map waits for I/O


@cython.final
cdef class IovaMap:
    cdef iova_map map
    cdef int busy  # I/O in progress without the GIL
    cdef int settle(self) except -1
    cdef int unpoisoned(self, uint64_t before) except -1


@cython.final
cdef class Chain:
    cdef IovaMap memory
    cdef DeviceQueue queue
    cdef bint live  # popped and not handed back
    cdef uint64_t turn  # how many of its queue were popped before it
    cdef vq_chain chain
    cdef uint64_t generation  # of the map, when the pieces were looked up
    cdef iovec *iov
    cdef uint64_t *iova
    cdef iovec own_iov[INLINE]
    cdef uint64_t own_iova[INLINE]
    cdef int fill(self, DeviceQueue queue, const vq_chain *chain, const iova_pieces *pieces) except -1
    cdef int refresh(self) except -1
    cdef chain_part readable_part(self)
    cdef chain_part writable_part(self)


@cython.final
cdef class DeviceQueue:
    cdef IovaMap memory
    cdef vq_device vq
    cdef uint64_t popped  # chains, less those put back
    cdef iova_pieces pieces
    cdef iova_pieces bare_pieces  # the same without IOVAs, which engines have no use for
    cdef vq_chain chains[BATCH]
    cdef vq_used *done


@cython.final
cdef class DriverQueue:
    cdef vq_driver vq
    cdef vq_layout_t layout
    cdef vq_buffer *buffers
    cdef size_t most  # buffers of the longest chain
    cdef vq_done done[BATCH]
    cdef list held  # token by head, or by buffer id
    cdef object owner
    cdef size_t take(self, object segments, size_t count) except? 0


@cython.final
cdef class Slots:
    cdef DriverQueue queue
    cdef vq_slots core
    cdef object owner
    cdef list others  # (token, written) of chains that are not ours
    cdef uint32_t checked(self, object length) except 0
    cdef size_t reap_some(self) except? 0


@cython.final
cdef class Histogram:
    cdef histogram core
    @staticmethod
    cdef Histogram of(const histogram *core)


@cython.final
cdef class BlkLoad:
    cdef DriverQueue queue
    cdef load_blk core
    cdef object owner


@cython.final
cdef class NetLoad:
    cdef Slots outgoing, incoming
    cdef load_net core


@cython.final
cdef class Poll:
    cdef vq_poll_t core


@cython.final
cdef class Gate:
    cdef gate core
    cdef object lock
    cdef uint32_t depth


@cython.final
cdef class Relay:
    cdef relay core
    cdef DeviceQueue source
    cdef DriverQueue to
    cdef IovaMap places
