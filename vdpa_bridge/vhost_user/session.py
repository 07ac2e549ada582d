# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The back-end's side of one connection without I/O: messages in, replies out, in whichever mode the client chooses.

Rule of this file: what a client does wrong ends in an error that names the rule and the value. In vDPA mode a request
that is well framed gets an errno; what breaks framing ends the connection, after a last reply with EPROTO.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from dataclasses import replace

from .. import _ioctl
from ..backends.base import Backend
from ..errors import ProtocolError, RemoteProtocolError, reason
from ..flags import ProtocolFeature
from ..wire import U64
from . import messages as m
from .framing import VERSION, Frame
from .legacy_server import LegacyService
from .messages import message_name
from .vdpa_mode import HELLO_OP, OUR_HELLO, RELAYED, Hello, answer_bytes, check_hello, parse_request, reply_bytes

_log = logging.getLogger(__name__)

_NEUTRAL = {m.GET_FEATURES.number, m.GET_PROTOCOL_FEATURES.number, m.SET_OWNER.number}
"""Messages that a client of either mode may begin with."""


class Session:
    """One client of one device. Takes over the back-end. *vdpa* is ``require``, ``prefer`` or ``off``.

    *relay*: legacy clients get a relay where the device cannot have their memory or rings. Those in vDPA mode are told the
    device's limits, and keep to them.
    """

    def __init__(self, backend: Backend, vdpa: str = "prefer", relay: bool = True) -> None:
        self._backend = backend
        self._vdpa = vdpa
        self._legacy: LegacyService | None = LegacyService(backend, 0 if vdpa == "off" else ProtocolFeature.VDPA, relay)
        self._handle: Callable[[Frame], bytes] = self._undecided

    @property
    def mode(self) -> str:
        """``vDPA``, ``legacy`` or ``undecided``."""
        return "vDPA" if self._legacy is None else "undecided" if self._handle == self._undecided else "legacy"

    @property
    def relayed(self) -> str:
        """Why there is a relay between the client and the device, empty if there is none."""
        return self._legacy.relayed if self._legacy is not None else ""

    @property
    def event(self) -> int:
        """An eventfd to wait for beside the client's messages, -1 for none; ``on_event`` when it is readable."""
        return -1 if self._legacy is None else self._legacy.event

    @property
    def waits_for(self) -> str:
        """What the client has to say before its rings can work, empty if nothing is known to be missing."""
        return self._legacy.waits_for if self._legacy is not None else ""

    def on_event(self) -> None:
        """What the device has to say goes to the client."""
        if self._legacy is not None:
            self._legacy.on_event()

    def handle(self, message: Frame) -> bytes:
        """Carry out one message and return what to send back. RemoteProtocolError ends the connection."""
        try:
            return self._handle(message)
        finally:
            if message.fds:
                message.close()

    def last_words(self, error: ProtocolError) -> bytes:
        """The reply that tells a vDPA-mode client why the connection ends; nothing for others, who could not read it."""
        request = getattr(error, "request", None)
        return reply_bytes(request, errno.EPROTO) if self._legacy is None and request is not None else b""

    def close(self) -> None:
        """Give the device back: reset, unmapped."""
        if self._legacy is not None:
            self._legacy.close()
        self._backend.close()

    # The first messages decide -------------------------------------------------------------------------------------------

    def _undecided(self, message: Frame) -> bytes:
        assert self._legacy is not None
        if message.request == m.SET_PROTOCOL_FEATURES.number:
            accepted = U64.unpack(message.payload).value if len(message.payload) == U64.layout.size else 0
            if accepted & ProtocolFeature.VDPA and self._vdpa != "off":
                if accepted != ProtocolFeature.VDPA:
                    raise RemoteProtocolError(f"SET_PROTOCOL_FEATURES {accepted:#x}: VDPA goes with no other bit in revision 1")
                self._legacy.close()
                self._legacy = None
                self._handle = self._hello
                return b""
            self._decide_for_legacy(message)
        elif message.request not in _NEUTRAL:
            self._decide_for_legacy(message)
        return self._legacy.handle(message)

    def _decide_for_legacy(self, message: Frame) -> None:
        if self._vdpa == "require":
            raise RemoteProtocolError(f"{message_name(message.request)}: this server requires VHOST_USER_PROTOCOL_F_VDPA, the client did not accept it")
        assert self._legacy is not None
        self._handle = self._legacy.handle

    # vDPA mode -----------------------------------------------------------------------------------------------------------

    def _hello(self, message: Frame) -> bytes:
        if message.request != HELLO_OP.number or message.flags != VERSION:
            raise RemoteProtocolError(f"{message_name(message.request)} instead of HELLO", message.request)
        try:
            check_hello(Hello.unpack(message.payload))
        except (ValueError, RemoteProtocolError) as error:
            raise RemoteProtocolError(f"HELLO: {error}", message.request) from None
        self._handle = self._operation
        return reply_bytes(message.request, 0, replace(OUR_HELLO, flags=RELAYED if self._backend.relayed else 0))

    def _operation(self, message: Frame) -> bytes:
        number = message.request
        if message.flags != VERSION:
            raise RemoteProtocolError(f"{message_name(number)}: flags {message.flags:#x}, a request has {VERSION:#x}", number)
        try:
            op, request = parse_request(message)
            return answer_bytes(op, self._backend.call(op, request))
        except OSError as error:
            if error.errno is None:
                raise
            return reply_bytes(number, error.errno)
        except LookupError as error:
            if _ioctl.kind(number) != _ioctl.VHOST or number < 0x100:
                raise RemoteProtocolError(f"{error}: vDPA mode takes nothing else", number) from None
            return reply_bytes(number, errno.ENOTTY)
        except ValueError as error:
            _log.info("%s: %s: %s", self._backend.name, message_name(number), error)
            return reply_bytes(number, errno.EBADMSG)
        except ProtocolError as error:  # the way to the device behind us broke, which is not this client's fault
            _log.warning("%s: %s: %s", self._backend.name, message_name(number), reason(error))
            return reply_bytes(number, errno.EIO)


