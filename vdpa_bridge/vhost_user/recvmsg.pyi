# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What `recvmsg.pyx` is to Python."""

CHUNK: int
"""The most bytes that one ``receive`` takes."""

def receive(sock: int, most_fds: int) -> tuple[bytes, list[int], bool]:
    """What came on the descriptor *sock*, the descriptors with it, which are the caller's, and whether some were lost.

    Lost are those beyond *most_fds* (at most 253), and those for which this process has no room (RLIMIT_NOFILE). No bytes:
    the peer hung up. OSError as recvmsg(2) has it; BlockingIOError after SO_RCVTIMEO. Waits without the GIL.
    """
