# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Who may open a file, and how somebody else may."""

from __future__ import annotations

import grp
import os
import pwd
import stat


def how_to_grant(path: str) -> str:
    """What lets this user open *path* for reading and writing."""
    status = os.stat(path)
    group, user = _group(status.st_gid), _user(os.geteuid())
    if status.st_mode & 0o060 == 0o060 and status.st_gid != 0:
        return f"sudo usermod -aG {group} {user}, and log in again"
    if stat.S_ISCHR(status.st_mode):
        return f"sudo chgrp kvm {path} && sudo chmod 660 {path}, with {user} in the group kvm (again after each bind)"
    return f"sudo chgrp kvm {path} && sudo chmod 660 {path}, or have its maker do so (vdpa-bridge serve --socket-mode 660 --socket-group kvm)"


def who_may(path: str) -> str:
    """``root:kvm, mode 660``."""
    status = os.stat(path)
    return f"{_user(status.st_uid)}:{_group(status.st_gid)}, mode {stat.S_IMODE(status.st_mode):o}"


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
