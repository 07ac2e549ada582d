# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# cython: language_level=3, boundscheck=False, wraparound=False, auto_pickle=False, binding=False, autotestdict=False
"""One recvmsg on a stream socket, with the descriptors that came. `recvmsg.pyi` documents every name here.

It is native because `socket.recvmsg_into` makes a dozen objects for a message of twenty bytes.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR, errno
from libc.string cimport memcpy, memset

from os import strerror

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "<sys/socket.h>" nogil:
    enum: MSG_CTRUNC, MSG_CMSG_CLOEXEC, SOL_SOCKET, SCM_RIGHTS
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level, cmsg_type
    ssize_t recvmsg(int fd, msghdr *message, int flags)
    cmsghdr *CMSG_FIRSTHDR(msghdr *message)
    cmsghdr *CMSG_NXTHDR(msghdr *message, cmsghdr *before)
    unsigned char *CMSG_DATA(cmsghdr *control)
    size_t CMSG_LEN(size_t length)
    size_t CMSG_SPACE(size_t length)

cdef enum:
    MOST_BYTES = 65536
    MOST_FDS = 253  # in one message, for the kernel (SCM_MAX_FD)
    WORDS = 2 + MOST_FDS  # a cmsghdr, and room to spare

CHUNK = MOST_BYTES


def receive(int sock, size_t most_fds):
    cdef char data[MOST_BYTES]
    cdef size_t control[WORDS]
    cdef iovec part
    cdef msghdr message
    cdef cmsghdr *rights
    cdef ssize_t count = -1
    cdef size_t i
    cdef int error, fd
    cdef list fds = []
    if most_fds > MOST_FDS:
        raise ValueError(f"{most_fds} descriptors, of at most {MOST_FDS}")
    while count < 0:
        part.iov_base, part.iov_len = data, sizeof(data)
        memset(&message, 0, sizeof(message))
        message.msg_iov, message.msg_iovlen = &part, 1
        message.msg_control, message.msg_controllen = control, CMSG_SPACE(most_fds * sizeof(fd))
        with nogil:
            count = recvmsg(sock, &message, MSG_CMSG_CLOEXEC)
            error = errno
        if count < 0:
            if error != EINTR:
                raise OSError(error, strerror(error))
            PyErr_CheckSignals()
    rights = CMSG_FIRSTHDR(&message)
    while rights != NULL:
        if rights.cmsg_level == SOL_SOCKET and rights.cmsg_type == SCM_RIGHTS:
            for i in range((rights.cmsg_len - CMSG_LEN(0)) // sizeof(fd)):
                memcpy(&fd, CMSG_DATA(rights) + i * sizeof(fd), sizeof(fd))
                fds.append(fd)
        rights = CMSG_NXTHDR(&message, rights)
    return PyBytes_FromStringAndSize(data, count), fds, message.msg_flags & MSG_CTRUNC != 0
