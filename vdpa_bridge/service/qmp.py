# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The monitor: a UNIX socket on which QMP clients (qmp-shell, libraries, scripts) watch and control a running service.

Rules of this file: it knows messages and no command (``qmp_commands``). Devices never wait for it: it lives in a thread of its
own, commands in others, and who sends nonsense, too much, or does not read is answered with an error or hung up on.
Written after QEMU's docs/interop/qmp-spec: messages end with a line, and need not when a client sends them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial

from qemu.qmp import Message, Runstate
from qemu.qmp.error import ProtocolError
from qemu.qmp.message import UnexpectedTypeError
from qemu.qmp.protocol import AsyncProtocol

from ..errors import reason
from .journal import event as log
from .listening import Listener
from .qmp_commands import COMMANDS, EVENTS, QmpError, greeting

_log = logging.getLogger(__name__)

MOST_CLIENTS = 16
LONGEST = 1 << 16
"""Bytes of a message."""
DEEPEST = 64
"""Braces and brackets within one another."""
MOST_UNREAD = 1 << 20
"""Bytes that a client may leave unread."""
_CHUNK = 1 << 14
_PATIENCE = 1.0
"""Seconds for a client to take its last messages, and for the thread to end."""

Execute = Callable[[str, Mapping[str, object]], object]
"""Carries out a command with arguments that fit it. In any thread; OSError, ValueError and QmpError are the client's answer."""


class Splitter:
    """Finds the JSON objects in a stream of bytes, without understanding them."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._reset()

    def _reset(self) -> None:
        self._at = self._depth = 0
        self._text = self._escape = False

    def feed(self, data: bytes) -> None:
        """More bytes came."""
        self._data += data

    def next(self) -> bytes | None:
        """The next object, None until there is one. QmpError for what cannot be one, after which the rest of the line is ignored."""
        if not self._depth:
            self._data = self._data.lstrip(b" \t\r\n")
            if self._data and self._data[0] not in b"{[":
                self._drop()
                raise QmpError("Invalid JSON syntax: a message is an object")
        for at in range(self._at, len(self._data)):
            byte = self._data[at]
            if self._text:
                self._text = self._escape or byte != 0x22
                self._escape = byte == 0x5C and not self._escape
            elif byte == 0x22:
                self._text = True
            elif byte in b"{[":
                self._depth += 1
                if self._depth > DEEPEST:
                    self._drop()
                    raise QmpError(f"JSON nesting depth limit of {DEEPEST} exceeded")
            elif byte in b"}]":
                self._depth -= 1
                if not self._depth:
                    message, self._data = bytes(self._data[: at + 1]), self._data[at + 1 :]
                    self._reset()
                    return message
        self._at = len(self._data)
        if self._at > LONGEST:
            raise EOFError
        return None

    def _drop(self) -> None:
        _, _, self._data = self._data.partition(b"\n")
        self._reset()


class Session(AsyncProtocol[Message]):
    """One client. *execute* carries out its commands, one after the other."""

    def __init__(self, execute: Execute) -> None:
        super().__init__(readbuflen=LONGEST)
        self._execute = execute
        self._splitter = Splitter()
        self.negotiated = False
        """Whether it has said qmp_capabilities, and hears of events."""

    async def serve(self, client: socket.socket) -> None:
        """Until the client is gone, or ``hang_up``."""
        with contextlib.suppress(Exception):  # whatever it was: it is the client that was lost
            await self.connect(client)
            self.say(greeting())
            while self.runstate == Runstate.RUNNING:
                await self.runstate_changed()
        ending = asyncio.ensure_future(self.disconnect())
        await asyncio.wait({ending}, timeout=_PATIENCE)
        self.abort()
        with contextlib.suppress(Exception):
            await ending

    def abort(self) -> None:
        """Let go of what the client did not read."""
        if self._writer is not None:
            self._writer.transport.abort()

    def hang_up(self) -> None:
        """End soon; what was said goes out before."""
        if self.runstate == Runstate.RUNNING:
            self._schedule_disconnect()

    def say(self, message: Mapping[str, object]) -> None:
        """Send a message, without waiting; who leaves too much unread is hung up on."""
        if self.runstate == Runstate.RUNNING and self._writer is not None:
            if self._writer.transport.get_write_buffer_size() > MOST_UNREAD:
                self.abort()
            else:
                self._outgoing.put_nowait(Message(message))

    def _do_send(self, msg: Message) -> None:
        assert self._writer is not None
        self._writer.write(bytes(msg) + b"\r\n")

    async def _do_recv(self) -> Message:
        assert self._reader is not None
        while True:
            try:
                data = self._splitter.next()
                if data is not None:
                    return Message(data)
            except EOFError:
                self._refuse(QmpError(f"a message has at most {LONGEST} bytes"), None)
                raise
            except QmpError as error:
                self._refuse(error, None)
            except UnexpectedTypeError:
                self._refuse(QmpError("QMP input must be a JSON object"), None)
            except (ProtocolError, ValueError):  # which it is for bytes that are no text, and numbers that are too long
                self._refuse(QmpError("Invalid JSON syntax"), None)
            else:
                if not (more := await self._reader.read(_CHUNK)):
                    raise EOFError
                self._splitter.feed(more)
                continue
            await self._written()

    async def _on_message(self, msg: Message) -> None:
        try:
            answer = await self._answer(msg)
        except QmpError as error:
            self._refuse(error, msg)
        except (OSError, ValueError) as error:
            self._refuse(QmpError(reason(error)), msg)
        except Exception:
            _log.exception("a defect of this service, at command %s", msg.get("execute"), extra={"event": "qmp"})
            self._refuse(QmpError("a defect of this service; its log says more"), msg)
        else:
            self.say({"return": answer} | _id(msg))
        await self._written()

    async def _written(self) -> None:
        """Until what was said is read, or about to be: a client waits for itself."""
        await asyncio.sleep(0)
        if self._writer is not None:
            await self._writer.drain()

    async def _answer(self, msg: Message) -> object:
        if unexpected := set(msg) - {"execute", "arguments", "id"}:
            raise QmpError(f"QMP input member '{min(unexpected)}' is unexpected")
        name, arguments = msg.get("execute"), msg.get("arguments", {})
        if not isinstance(name, str):
            raise QmpError("QMP input lacks member 'execute', a string")
        if not isinstance(arguments, dict):
            raise QmpError("QMP input member 'arguments' must be an object")
        if not self.negotiated and name != "qmp_capabilities":
            raise QmpError("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
        if name not in COMMANDS:
            raise QmpError(f"The command {name} has not been found", "CommandNotFound")
        COMMANDS[name].check(arguments)
        if name == "qmp_capabilities":
            if self.negotiated:
                raise QmpError("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
            if enable := arguments.get("enable"):
                raise QmpError(f"Capability '{enable[0]}' is not offered")
            self.negotiated = True
            return {}
        return await _elsewhere(partial(self._execute, name, arguments))

    def _refuse(self, error: QmpError, msg: Message | None) -> None:
        self.say({"error": {"class": error.kind, "desc": str(error)}} | _id(msg))


def _id(msg: Message | None) -> dict[str, object]:
    return {"id": msg["id"]} if msg is not None and "id" in msg else {}


async def _elsewhere(action: Callable[[], object]) -> object:
    """What *action* returns or raises, in a thread of its own: a device may be busy, and must not be waited for here."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[object] = loop.create_future()

    def settle(result: object, error: BaseException | None) -> None:
        if not done.done():
            done.set_result(result) if error is None else done.set_exception(error)

    def run() -> None:
        result, failed = None, None
        try:
            result = action()
        except Exception as error:
            failed = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, failed)

    try:
        threading.Thread(target=run, name="QMP command", daemon=True).start()
    except RuntimeError:
        raise OSError(errno.EAGAIN, "no thread is left for the command") from None
    return await done


class Monitor:
    """Listens at *path* and serves all who come. The socket is there from the beginning, its clients are served after ``start``.

    Nothing has to be opened afterwards, so that a sandbox can be closed in between.
    """

    def __init__(self, path: str, execute: Execute) -> None:
        """OSError when the socket cannot be had."""
        self._listener = Listener.bind(path)
        self._listener.sock.setblocking(False)
        self._execute = execute
        self._loop = asyncio.new_event_loop()
        self._sessions: dict[asyncio.Task[None], Session] = {}
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="QMP monitor", daemon=True)

    def start(self) -> None:
        """Serve clients."""
        self._thread.start()

    def emit(self, name: str, **data: object) -> None:
        """Tell all clients. Any thread; harmless after ``close``."""
        assert set(data) == set(EVENTS[name].data), name
        now = time.time_ns()
        stamp = {"seconds": now // 10**9, "microseconds": now // 1000 % 10**6}
        message: dict[str, object] = {"event": name, "timestamp": stamp}
        if data:
            message["data"] = data
        with contextlib.suppress(RuntimeError):  # closed
            self._loop.call_soon_threadsafe(self._tell, message)

    def _tell(self, message: Mapping[str, object]) -> None:
        for session in self._sessions.values():
            if session.negotiated:
                session.say(message)

    def close(self) -> None:
        """Hang up on all, once they have had what was said, or had the time for it. Harmless when done before."""
        if self._loop.is_closed():
            return
        if self._thread.ident is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(3 * _PATIENCE)
        else:
            self._loop.close()
        self._listener.close()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        coming = self._loop.create_task(self._come())
        stop = self._loop.create_task(self._stop.wait())
        await asyncio.wait({coming, stop}, return_when=asyncio.FIRST_COMPLETED)
        for task in (coming, stop):
            task.cancel()
        for session in self._sessions.values():
            session.hang_up()
        await asyncio.gather(coming, stop, *self._sessions, return_exceptions=True)

    async def _come(self) -> None:
        waits = False
        while True:
            try:
                client, _ = await self._loop.sock_accept(self._listener.sock)
            except OSError as error:
                if not waits:
                    log(logging.WARNING, "qmp", f"a client has to wait: {reason(error)}")
                waits = True
                await asyncio.sleep(_PATIENCE)
                continue
            waits = False
            if len(self._sessions) >= MOST_CLIENTS:
                log(logging.WARNING, "qmp", f"a client is turned away: {MOST_CLIENTS} are here")
                client.close()
                continue
            session = Session(self._execute)
            task = self._loop.create_task(session.serve(client))
            self._sessions[task] = session
            task.add_done_callback(self._sessions.pop)
