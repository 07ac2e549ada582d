# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Who is to blame decides the type of an error.

    OSError                 the device answered with an errno (the text says operation, device, cause, hint)
    ValueError, TypeError   the caller asked for something that cannot be right
    ProtocolError           somebody broke the vhost-user protocol
      LocalProtocolError      we would have (nothing was sent)
      RemoteProtocolError     the peer did
        PeerClosed              it went away (also a ConnectionError)
        PeerTimeout             it did not answer in time (also a TimeoutError)
        NotOffered              it lacks a protocol feature that is required
    FeatureError            device and driver found no common ground (a RuntimeError)
    DataError               what was read is not what was written (also an OSError, EILSEQ)
    DeviceBroken            the device, or the memory it shares with us, cannot be trusted any more (also an OSError, EIO)
"""

from __future__ import annotations

import errno
import os
import signal


class ProtocolError(Exception):
    """The vhost-user protocol was broken. Raised only as one of its subclasses."""


class LocalProtocolError(ProtocolError):
    """This side was about to break the protocol; nothing has been sent."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol; the connection is of no use any more. *request* is the number of its message, if known."""

    def __init__(self, text: str, request: int | None = None) -> None:
        super().__init__(text)
        self.request = request


class PeerClosed(RemoteProtocolError, ConnectionError):
    """The peer closed the connection."""


class PeerTimeout(RemoteProtocolError, TimeoutError):
    """The peer did not answer within the connection's timeout."""


class NotOffered(RemoteProtocolError):
    """The peer does not offer a protocol feature that was asked for."""


class FeatureError(RuntimeError):
    """Feature negotiation failed; the text names the features."""


class DataError(OSError):
    """What was read is not what was written; the text says which sector has what instead."""


class DeviceBroken(OSError):
    """The device did what no device may do, or shows DEVICE_NEEDS_RESET; only a reset helps. errno is EIO."""

    def __init__(self, text: str) -> None:
        super().__init__(errno.EIO, text)


def device_error(number: int, what: str, where: str, why: str = "") -> OSError:
    """An OSError whose text says operation, device, cause and, where known, what to do."""
    text = f"{what} on {where}: {os.strerror(number)}"
    return OSError(number, f"{text}: {why}" if why else text)


def errno_name(number: int) -> str:
    """``EINVAL``; the kernel's name where libc has two, ``errno 524`` where it has none."""
    return {errno.EOPNOTSUPP: "EOPNOTSUPP", errno.EAGAIN: "EAGAIN"}.get(number) or errno.errorcode.get(number, f"errno {number}")


def signal_name(number: int) -> str:
    """``SIGSEGV``; ``signal 35`` where libc has no name for it."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def reason(error: BaseException) -> str:
    """The text of an error without the ``[Errno 22]`` that ``str`` puts before it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__
