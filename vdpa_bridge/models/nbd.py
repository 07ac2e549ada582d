# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Blocks on an NBD server, so that whatever has one can stand behind a disk: qemu-nbd, nbdkit and its plugins, ...

Rule of this file: what an export can do is looked at for each request anew, as another connection may say otherwise.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterator, Sequence
from urllib.parse import parse_qs, urlsplit

from ..libnbd import FUA, MAXIMUM, MINIMUM, NO_HOLE, PREFERRED, Connection
from ..virtqueue import Chain
from .image import Image, Limits, Pending, Range, Transfer
from .nbd_export import Export
from .needs import Needs

_LONGEST = 16 << 20
"""Bytes that a request may move."""
_TRIM, _ZERO = 256 << 20, 32 << 20
"""Bytes of a command that moves none, so that no server is at one for long."""
_ZEROES = bytes(1 << 20)
_RESOLVER = "/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/gai.conf"
_TRUST = "/etc/ssl/certs"


class NbdImage(Image):
    """The export that *uri* names: ``nbd://HOST/EXPORT``, ``nbd+unix:///EXPORT?socket=PATH``, ``nbds://...`` (nbd_connect_uri(3))."""

    def __init__(self, uri: str, *, readonly: bool = False, timeout: float = 30) -> None:
        """A request has *timeout* seconds. OSError when it cannot be had, or is to be written and cannot; FileNotFoundError when
        there is no libnbd; ValueError for what is no such URI."""
        self._uri = uri = re.sub(r"^(nbds?) (?=\w+:)", r"\1+", uri)  # a + in the options of a target is a blank
        self._readonly = readonly
        self._made = False
        self.needs = _needs(uri)
        self._export = Export(uri, timeout, self._check, lambda: self.changed(), lambda queues: self.served(queues))
        self.sources = self._export.sources

    def _check(self, server: Connection) -> None:
        """Learn what the export can do; OSError if it cannot be, or go on to be, this disk."""
        block = max(server.ask("get_block_size", MINIMUM), 512)
        if not self._readonly and server.ask("is_read_only"):
            raise OSError(errno.EROFS, f"{self._uri} is for reading alone: write readonly=on")
        if self._made:
            if block > self.limits.block:
                raise OSError(errno.EINVAL, f"{self._uri} has blocks of {block} bytes now, and the disk has smaller ones")
            return
        self._made = True
        self.limits = Limits(
            block=block,
            physical=max(block, 4096),
            best=server.ask("get_block_size", PREFERRED),
            discard=_TRIM if server.ask("can_trim") else 0,
            longest=_LONGEST,
            unmaps=bool(server.ask("can_zero")),
        )

    def measure(self) -> int:
        """As the server said when it was connected to last."""
        return self._export.size

    def renew(self) -> None:
        """Connect anew."""
        self._export.renew()

    @property
    def full(self) -> bool:  # type: ignore[override]
        """By bytes."""
        return self._export.full

    def read(self, chain: Chain, offset: int, length: int) -> Transfer:
        """EINVAL for more than the limit."""
        self._bound(length)
        buffer = bytearray(length)

        def stage(server: Connection) -> Iterator[int]:
            for start, size in _pieces([(offset, length)], _payload(server)):
                yield server.read(buffer, start - offset, size, start)

        return self._export.ask([stage], length, lambda: chain.write(memoryview(buffer)))

    def write(self, chain: Chain, offset: int, skip: int, length: int, stable: bool) -> Transfer:
        """EINVAL as for ``read``."""
        self._bound(length)
        data = chain.read(skip, length)

        def stage(server: Connection) -> Iterator[int]:
            for start, size in _pieces([(offset, length)], _payload(server)):
                yield server.write(data[start - offset : start - offset + size], start, FUA if stable and server.ask("can_fua") else 0)

        return self._export.ask([stage, *[_flush_without_fua] * stable], length)

    def flush(self) -> Transfer:
        """Nothing, for a server that has no cache."""
        return self._export.ask([_flush])

    def discard(self, ranges: Sequence[Range], stable: bool) -> Transfer:
        """NBD_CMD_TRIM, where the server has it."""

        def stage(server: Connection) -> Iterator[int]:
            for start, size in _pieces(ranges, _TRIM) if server.ask("can_trim") else ():
                yield server.trim(size, start)

        return self._export.ask([stage, *[_flush] * stable])

    def zero(self, ranges: Sequence[Range], unmap: bool, stable: bool) -> Transfer:
        """NBD_CMD_WRITE_ZEROES, where the server has it, or zeroes."""

        def stage(server: Connection) -> Iterator[int]:
            if server.ask("can_zero"):
                for start, size in _pieces(ranges, _ZERO):
                    yield server.zero(size, start, 0 if unmap else NO_HOLE)
            else:
                for start, size in _pieces(ranges, min(len(_ZEROES), _payload(server))):
                    yield server.write(_ZEROES[:size], start)

        return self._export.ask([stage, *[_flush] * stable])

    def settle(self, transfers: Collection[Pending]) -> None:
        """Those that do not end in time fail."""
        self._export.settle(transfers)

    def abandon(self) -> None:
        """The next driver's requests are begun when those of this one have ended."""
        self._export.abandon()

    def close(self) -> None:
        """Without a word to a server that does not answer."""
        self._export.close()

    def _bound(self, length: int) -> None:
        if length > self.limits.longest:
            raise OSError(errno.EINVAL, f"a request of {length} bytes, of at most {self.limits.longest}")


def _pieces(ranges: Sequence[Range], longest: int) -> Iterator[Range]:
    """Ranges, none of them longer."""
    for offset, length in ranges:
        for start in range(offset, offset + length, longest):
            yield start, min(longest, offset + length - start)


def _payload(server: Connection) -> int:
    """Bytes of a command at most."""
    return server.ask("get_block_size", MAXIMUM) or _LONGEST


def _flush(server: Connection) -> Iterator[int]:
    if server.ask("can_flush"):
        yield server.flush()


def _flush_without_fua(server: Connection) -> Iterator[int]:
    if not server.ask("can_fua"):
        yield from _flush(server)


def _needs(uri: str) -> Needs:
    """For a connection that is made anew. ValueError for one that is over neither a UNIX socket nor TCP."""
    place = urlsplit(uri)
    query = parse_qs(place.query)
    files = [os.path.abspath(path) for name in ("tls-certificates", "tls-psk-file") for path in query.get(name, ())]
    if place.scheme in ("nbd+unix", "nbds+unix"):
        return Needs(read=tuple(files), connect=tuple(os.path.abspath(path) for path in query.get("socket", ())))
    if place.scheme not in ("nbd", "nbds"):
        raise ValueError(f"{uri}: an NBD server is at nbd:, nbds:, nbd+unix: or nbds+unix:")
    files += [path for path in (*_RESOLVER, *[_TRUST] * (place.scheme == "nbds")) if os.path.exists(path)]
    return Needs(read=tuple(files), network=True)
