# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge call``: any operation of the table, by name. Complete because generic: no code per operation."""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

import click

from .common import SIZE, Command, Output, Trace, common_options, opened, target_argument

if TYPE_CHECKING:
    from ..ops import Call, Op

_ZERO = {"num", "flags", "log"}
"""Fields of ring questions and addresses that one leaves out; for requests that only ask."""
_PERMISSIONS = {"ro": 1, "wo": 2, "rw": 3}


@click.command(
    cls=Command,
    short_help="Carry out any operations by name.",
    examples="""
vdpa-bridge call /dev/vhost-vdpa-0 GET_STATUS
vdpa-bridge call model:blk GET_CONFIG offset=0 length=8
vdpa-bridge call model:net SET_OWNER SET_VRING_NUM index=0 num=64 GET_VRING_SIZE index=0
vdpa-bridge call model:blk SET_OWNER SET_VRING_KICK index=0 fd=new
vdpa-bridge call model:blk SET_OWNER IOTLB_UPDATE iova=1M memory=64K perm=ro
vdpa-bridge ops                     the operations and their fields
""",
)
@target_argument
@click.argument("words", nargs=-1, required=True, metavar="OP [KEY=VALUE]... [OP ...]")
@click.option("--keep-going", is_flag=True, help="Go on after an operation that failed.")
@common_options
def command(target: str, words: tuple[str, ...], keep_going: bool, output: Output, trace: Trace) -> int:
    """Carry out operations on TARGET in one session, and print the fields of each reply.

    Integers may be decimal or 0x..., sizes K/M/G, data is hex. For eventfds, fd=new makes one and fd=none takes the
    old one away. IOTLB_UPDATE takes memory=SIZE for fresh memory, or file=PATH.
    """
    from ..backends.trace import format_payload
    from ..errors import errno_name, reason
    from ..wire import EMPTY

    results: list[dict[str, Any]] = []
    failed = 0
    with contextlib.ExitStack() as stack:
        calls = parse_calls(words, stack)
        device = stack.enter_context(opened(target, trace))
        for op, request in calls:
            result: dict[str, Any] = {"op": op.name}
            results.append(result)
            try:
                reply = device.backend.call(op, request)
            except OSError as error:
                failed = 1
                result |= {"errno": errno_name(error.errno or 0), "error": reason(error)}
                click.echo(f"error: {reason(error)}", err=True)
                if not keep_going:
                    break
                continue
            result["reply"] = {field.name: _plain(getattr(reply, field.name)) for field in fields(reply)}
            if not output.json:
                click.echo(f"{op.name}: {'ok' if reply is EMPTY else format_payload(op, reply)}")
    output.emit(results)
    return failed


def _plain(value: Any) -> int | str:
    return value.hex() if isinstance(value, bytes) else int(value)


def parse_calls(words: tuple[str, ...], stack: contextlib.ExitStack) -> list[Call]:
    """Words to requests: one with ``=`` is a field of the operation before it. Descriptors made here close with *stack*.

    ValueError that names operation and field.
    """
    from ..ops import BY_NAME

    groups: list[tuple[Op[Any, Any], dict[str, str]]] = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            op = BY_NAME.get(word.upper())
            if op is None:
                near = [name for name in BY_NAME if word.upper() in name]
                raise ValueError(
                    f"{word}: no such operation; " + (f"did you mean {', '.join(near)}?" if near else "vdpa-bridge ops lists them")
                )
            groups.append((op, {}))
        elif not groups:
            raise ValueError(f"{word}: a field comes after its operation: OP KEY=VALUE")
        else:
            groups[-1][1][key] = value
    return [(op, _request(op, given, stack)) for op, given in groups]


def _request(op: Op[Any, Any], given: dict[str, str], stack: contextlib.ExitStack) -> Any:
    from .. import _ioctl
    from ..wire import EMPTY, IotlbUpdate

    names = {field.name: field for field in fields(op.request)}
    values: dict[str, Any] = {}
    if op.request is IotlbUpdate:
        _memory(given, values, stack)
    for key, text in given.items():
        if key not in names:
            raise ValueError(f"{op.name}: no field {key}; " + (f"it has {', '.join(names)}" if names else "it takes none"))
        values[key] = _value(op, key, text, str(names[key].type), stack)
    for name, field in names.items():
        asks = _ioctl.direction(op.number) == _ioctl.IOC_READ | _ioctl.IOC_WRITE
        if name not in values and (name in ("flags", "log") or (name in _ZERO and asks)):
            values[name] = 0
        if name not in values and field.default is MISSING:
            raise ValueError(f"{op.name}: {name}= is missing; it takes {', '.join(names)}")
    if op.request.__name__ == "Empty":
        return EMPTY
    request = op.request(**values)
    try:
        request.to_message()
    except struct.error as error:
        raise ValueError(f"{op.name}: a value does not fit its field: {error}") from None
    return request


def _value(op: Op[Any, Any], key: str, text: str, kind: str, stack: contextlib.ExitStack) -> int | bytes:
    try:
        if kind == "bytes":
            return bytes.fromhex(text)
        if key == "fd" and text == "none":
            return -1
        if key == "fd" and text == "new":
            fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            stack.callback(os.close, fd)
            return fd
        if key == "perm" and text.lower() in _PERMISSIONS:
            return _PERMISSIONS[text.lower()]
        try:
            return int(text, 0)
        except ValueError:
            return SIZE.convert(text, None, None)
    except (ValueError, click.BadParameter):
        what = "hex digits" if kind == "bytes" else "a number, none or new" if key == "fd" else "a number (decimal, 0x... or 64K)"
        raise ValueError(f"{op.name}: {key}={text} is not {what}") from None


def _memory(given: dict[str, str], values: dict[str, Any], stack: contextlib.ExitStack) -> None:
    """``memory=SIZE`` or ``file=PATH`` instead of a descriptor; the size of the mapping follows from it."""
    memory, path = given.pop("memory", None), given.pop("file", None)
    if memory is not None:
        size = SIZE.convert(memory, None, None)
        fd = os.memfd_create("vdpa-bridge-call", os.MFD_CLOEXEC)
        stack.callback(os.close, fd)
        os.ftruncate(fd, size)
    elif path is not None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        size = os.fstat(fd).st_size
    else:
        return
    values |= {"fd": fd, "size": size}
