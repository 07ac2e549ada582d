# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# cython: language_level=3, boundscheck=False, wraparound=False, auto_pickle=False, binding=False, autotestdict=False
"""vhost-user framing without I/O: bytes and descriptors in, whole messages out. `framing.pyi` documents every name here.

Rule of this file: it trusts nothing about the peer. A stream socket delivers descriptors with the data that carried
them, but may glue messages together before and cut them anywhere behind; so descriptors queue up and every message
claims as many as its own content announces. What nobody claims, or what is missing, breaks the protocol.

It is native because each message comes through here, and knows no message.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint32_t
from libc.string cimport memcpy

import os
import struct

from ..errors import RemoteProtocolError

cdef struct header:
    uint32_t request, flags, size

cdef enum:
    FLAG_VERSION = 0x1
    FLAG_VERSION_MASK = 0x3
    FLAG_REPLY = 0x4
    FLAG_NEED_REPLY = 0x8
    MOST_FDS = 32

HEADER = struct.Struct("=III")
VERSION, VERSION_MASK, REPLY, NEED_REPLY = FLAG_VERSION, FLAG_VERSION_MASK, FLAG_REPLY, FLAG_NEED_REPLY
REPLY_FLAGS = VERSION | REPLY
MAX_FDS = MOST_FDS


def close_all(fds):
    for fd in fds:
        os.close(fd)


def frame(uint32_t request, bytes payload not None=b"", uint32_t flags=FLAG_VERSION):
    cdef header head = header(request, flags, <uint32_t> PyBytes_GET_SIZE(payload))
    cdef bytes out = PyBytes_FromStringAndSize(NULL, sizeof(head) + head.size)
    memcpy(PyBytes_AS_STRING(out), &head, sizeof(head))
    memcpy(PyBytes_AS_STRING(out) + sizeof(head), PyBytes_AS_STRING(payload), head.size)
    return out


@cython.final
@cython.freelist(8)
cdef class Frame:
    cdef readonly object request, flags
    cdef readonly bytes payload
    cdef readonly list fds

    def __init__(self, request, flags, bytes payload not None, list fds=None):
        self.request, self.flags, self.payload, self.fds = request, flags, payload, [] if fds is None else fds

    def __eq__(self, other):
        if not isinstance(other, Frame):
            return NotImplemented
        return (self.request, self.flags, self.payload, self.fds) == (other.request, other.flags, other.payload, other.fds)

    __hash__ = None

    def __repr__(self):
        return f"Frame(request={self.request!r}, flags={self.flags!r}, payload={self.payload!r}, fds={self.fds!r})"

    @property
    def need_reply(self):
        return bool(self.flags & FLAG_NEED_REPLY)

    def take_fds(self):
        fds, self.fds = self.fds, []
        return fds

    def close(self):
        close_all(self.take_fds())


@cython.final
cdef class Receiver:
    cdef object wanted, describe
    cdef uint32_t max_payload
    cdef bytes buffer
    cdef Py_ssize_t at
    cdef bint cut
    cdef list fds

    def __init__(self, fds_wanted, uint32_t max_payload, describe):
        self.wanted, self.max_payload, self.describe = fds_wanted, max_payload, describe
        self.buffer, self.fds = b"", []

    @property
    def partial(self):
        return PyBytes_GET_SIZE(self.buffer) > self.at

    def feed(self, data, list fds not None, *, bint cut=False):
        self.buffer = bytes(data) if self.at == PyBytes_GET_SIZE(self.buffer) else self.buffer[self.at :] + data
        self.at, self.cut = 0, cut
        if fds:
            self.fds += fds
            if len(self.fds) > MOST_FDS:
                raise RemoteProtocolError(f"{len(self.fds)} descriptors for one message, at most {MAX_FDS} are allowed")

    def next(self):
        cdef Py_ssize_t have = PyBytes_GET_SIZE(self.buffer) - self.at
        cdef const char *start = PyBytes_AS_STRING(self.buffer) + self.at
        cdef header head
        cdef Frame result
        if have < <Py_ssize_t> sizeof(head):
            return None
        memcpy(&head, start, sizeof(head))
        if head.flags & FLAG_VERSION_MASK != FLAG_VERSION:
            raise self.wrong(head.request, f"flags {head.flags:#x} carry version {head.flags & FLAG_VERSION_MASK}, not {VERSION}")
        if head.size > self.max_payload:
            raise self.wrong(head.request, f"payload of {head.size} bytes, at most {self.max_payload} are allowed")
        if have < <Py_ssize_t> sizeof(head) + head.size:
            return None
        self.at += sizeof(head) + head.size
        result = Frame.__new__(Frame)
        result.request, result.flags, result.fds = head.request, head.flags, []
        result.payload = PyBytes_FromStringAndSize(start + sizeof(head), head.size)
        least, most = self.wanted(result.request, result.payload)
        if most or self.fds:
            self.claim(result, least, most)
        return result

    cdef object wrong(self, request, why):
        return RemoteProtocolError(f"{self.describe(request)}: {why}", request)

    cdef int claim(self, Frame result, Py_ssize_t least, Py_ssize_t most) except -1:
        cdef bint last = self.at == PyBytes_GET_SIZE(self.buffer)
        cdef Py_ssize_t take = most if last else least  # an optional descriptor is this message's only when no other message follows
        if len(self.fds) < least:
            raise self.wrong(result.request, f"{least} descriptors announced, {len(self.fds)} came")
        result.fds = self.fds[:take]
        del self.fds[:take]
        if last and self.fds and not self.cut:
            result.close()
            raise self.wrong(result.request, f"{len(self.fds)} more descriptors than the message announces")
        return 0

    def close(self):
        fds, self.fds, self.buffer, self.at = self.fds, [], b"", 0
        close_all(fds)
