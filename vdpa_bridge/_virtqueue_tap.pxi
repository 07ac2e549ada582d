# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# The engine of queue pairs on taps, and the rules by which it passes frames. Part of `_virtqueue.pyx`, whose rule and imports
# hold here too.

cdef extern from "net_rules.h" nogil:
    enum: NET_MACS, NET_TOP, VNET_HEADER "NET_HEADER"
    struct net_terms:
        bint csum, ecn, valid
        uint8_t gso
    bint net_header_agreed(uint8_t *header, uint64_t length, const net_terms *terms)
    struct net_filter:
        bint promisc, nobcast, tagged
        bint *all
        bint *none
        uint8_t *mac
        uint32_t *count
        uint8_t macs[2][64][6]
        uint64_t *vlans
    bint net_filter_accepts(const net_filter *filter, const uint8_t *top)

cdef extern from "tap_engine.h" nogil:
    struct tap_tally:
        uint64_t frames, large, dropped
    struct tap_engine:
        engine engine
        net_terms from_driver, to_driver
        net_filter filter
        uint32_t header
        bint merge, used, plugged, fresh, gone
        int failure
        tap_tally sent, received
        uint64_t lost
    void tap_engine_init(tap_engine *tap)
    void tap_engine_forget(tap_engine *tap)


cdef net_terms terms_of(terms) except *:
    cdef net_terms found
    found.csum, found.ecn, found.valid, found.gso = terms
    return found


def header_agreed(bytes packet not None, terms):
    cdef net_terms agreed = terms_of(terms)
    cdef uint8_t header[VNET_HEADER]
    if len(packet) < VNET_HEADER:
        raise ValueError(f"{len(packet)} bytes hold no header")
    memcpy(header, PyBytes_AS_STRING(packet), VNET_HEADER)
    if not net_header_agreed(header, len(packet) - VNET_HEADER, &agreed):
        return None
    return PyBytes_FromStringAndSize(<char *> header, VNET_HEADER)


@cython.final
cdef class NetFilter:
    cdef net_filter core

    def __init__(self, bytes mac not None, *, bint promisc=False, tuple every=(False, False), tuple none=(False, False), bint nobcast=False, tables=((), ()), vlans=None):
        cdef Py_ssize_t group
        if len(mac) != 6:
            raise ValueError(f"a MAC address of {len(mac)} bytes")
        memset(&self.core, 0, sizeof(self.core))
        memcpy(self.core.mac, PyBytes_AS_STRING(mac), 6)
        self.core.promisc, self.core.nobcast, self.core.tagged = promisc, nobcast, vlans is not None
        for group in range(2):
            self.core.all[group], self.core.none[group] = every[group], none[group]
            if len(tables[group]) > NET_MACS:
                raise ValueError(f"{len(tables[group])} addresses; a table has {NET_MACS}")
            for address in tables[group]:
                if len(address) != 6:
                    raise ValueError(f"a MAC address of {len(address)} bytes")
                memcpy(self.core.macs[group][self.core.count[group]], PyBytes_AS_STRING(address), 6)
                self.core.count[group] += 1
        for tag in vlans or ():
            if not 0 <= tag < 4096:
                raise ValueError(f"a VLAN tag of {tag}")
            self.core.vlans[<int> tag // 64] |= <uint64_t> 1 << (<int> tag % 64)

    def accepts(self, bytes frame not None):
        cdef uint8_t top[NET_TOP]
        memset(top, 0, sizeof(top))
        memcpy(top, PyBytes_AS_STRING(frame), min(<size_t> len(frame), sizeof(top)))
        return net_filter_accepts(&self.core, top)


@cython.final
cdef class TapEngine(Engine):
    cdef tap_engine tap

    def __init__(self, Py_ssize_t pair, uint32_t header, *, bint merge=False, object thread=0):
        if header not in (10, 12):
            raise ValueError(f"a header of {header} bytes; it has 10 or 12")
        if self.loop is not None:
            raise TypeError("an engine is made once")
        tap_engine_init(&self.tap)
        self.tap.header, self.tap.merge = header, merge
        self.set_up(&self.tap.engine, 2 * pair, 2, thread)

    def follow(self, *, NetFilter wants not None, from_driver, to_driver, bint used, bint plugged):
        self.tap.filter = wants.core
        self.tap.from_driver, self.tap.to_driver = terms_of(from_driver), terms_of(to_driver)
        self.tap.used, self.tap.plugged = used, plugged

    def use(self, int fd, bint gone=False):
        cdef int error = 0
        self.tap.fresh, self.tap.gone = False, gone
        if fd < 0:
            tap_engine_forget(&self.tap)
        if fd == self.tap.engine.fd:
            return
        if self.loop is None:
            self.tap.engine.fd = fd
        else:
            error = -loop_refit(&self.loop.core, &self.tap.engine, fd)
        if error:
            raise OSError(error, strerror(error))

    def ask(self):
        self.tap.fresh = True

    def failed(self):
        cdef int error = self.tap.failure
        self.tap.failure = 0
        return error

    @property
    def fd(self):
        return self.tap.engine.fd

    @property
    def sent(self):
        return self.tap.sent.frames, self.tap.sent.large, self.tap.sent.dropped

    @property
    def received(self):
        return self.tap.received.frames, self.tap.received.large, self.tap.received.dropped
