# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Pseudoterminals of one's own, with a link by which others find them."""

from __future__ import annotations

import os
import select
import termios
import tty

from ..service.listening import SocketFile

_SIZE = 24, 80
"""Rows and columns, until somebody says otherwise."""


class Terminal:
    """The end of a pseudoterminal that others do not see. What goes through it is not changed."""

    def __init__(self, link: str | None = None) -> None:
        """*link* is made, or leads to another terminal from now on, until ``close``. OSError."""
        self._master, other = os.openpty()
        self._link: SocketFile | None = None
        try:
            tty.setraw(other)
            termios.tcsetwinsize(other, _SIZE)
            self.path = os.ttyname(other)
            """How others open it."""
            if link is not None:
                if os.path.islink(link):
                    os.unlink(link)
                os.symlink(self.path, link)
                self._link = SocketFile(link)
        except BaseException:
            os.close(self._master)
            raise
        finally:
            os.close(other)
        self._poll = select.poll()
        self._poll.register(self._master, 0)

    def fileno(self) -> int:
        """The descriptor; -1 once closed."""
        return self._master

    @property
    def is_open(self) -> bool:
        """Whether somebody has it open."""
        return not self._poll.poll(0)  # hung up otherwise

    def close(self) -> None:
        """Harmless when done before."""
        if self._master < 0:
            return
        os.close(self._master)
        self._master = -1
        if self._link is not None:
            try:
                self._link.remove()
            except OSError:  # locked up by now; whoever started us removes it
                pass
