# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What to serve and where: words of a command line and tables of a TOML file become DeviceSpecs.

Rule of this file: it reads and judges text; nothing is opened. Whatever is wrong is a ValueError that says where.
"""

from __future__ import annotations

import grp
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

VDPA_MODES = ("require", "prefer", "off")
RELAY_MODES = ("auto", "on", "off")
_KEYS = ("target", "socket-path", "socket-mode", "socket-group", "vdpa", "relay", "timeout", "name")
_SCHEME = re.compile(r"(model|child|vdpa|vhost-user):")
_LONGEST_PATH = 107
"""Bytes of sun_path without its final zero (unix(7))."""
_TIMEOUT = 0.1, 3600.0


@dataclass(frozen=True)
class DeviceSpec:
    """One device. Without *socket_path* its socket is inherited. *timeout* in seconds; *group* is a GID, None leaves it alone."""

    target: str
    socket_path: str | None = None
    name: str = ""
    mode: int = 0o600
    group: int | None = None
    vdpa: str = "prefer"
    timeout: float = 5.0
    relay: str = "auto"


def parse_mode(text: str) -> int:
    """``660`` to 0o660; ValueError for anything but permission bits in octal."""
    if not re.fullmatch(r"(0o)?[0-7]{1,4}", text) or int(text, 8) > 0o777:
        raise ValueError(f"{text} is not an octal mode up to 777")
    return int(text, 8)


def parse_group(text: str) -> int:
    """The GID of a group by name or number."""
    if text.isdecimal():
        if int(text) >= 2**32 - 1:
            raise ValueError(f"{text} is no group number")
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise ValueError(f"no group is called {text!r}; see getent group") from None


def split_word(word: str) -> tuple[str | None, str]:
    """``PATH=TARGET`` to (PATH, TARGET), a target alone to (None, TARGET): an = behind a scheme or a ? belongs to the target."""
    path, equals, target = word.partition("=")
    if not equals or "?" in path or _SCHEME.match(path):
        return None, word
    if not path or not target:
        raise ValueError(f"{word!r}: a device is written PATH=TARGET")
    return path, target


class Configuration(NamedTuple):
    """What a file says: devices, and where monitors come to, empty for nowhere."""

    devices: list[DeviceSpec]
    qmp: str


def read_config(path: str, defaults: DeviceSpec) -> Configuration:
    """The ``[[device]]`` tables of a TOML file, and ``qmp``; what tables leave open comes from *defaults*. OSError, ValueError."""
    try:
        data = tomllib.loads(Path(path).read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    tables, qmp = data.pop("device", []), data.pop("qmp", "")
    if not isinstance(qmp, str):
        raise ValueError(f"{path}: qmp = {qmp!r} is not a text in quotes")
    if data or not isinstance(tables, list) or not tables:
        raise ValueError(f"{path}: {', '.join(data) or 'nothing'} found; the file holds qmp, [[device]] tables and nothing else")
    specs = []
    for number, table in enumerate(tables, 1):
        try:
            specs.append(_from_table(table, defaults))
        except ValueError as error:
            raise ValueError(f"{path}: device {number}: {error}") from None
    return Configuration(specs, qmp)


def _from_table(table: object, defaults: DeviceSpec) -> DeviceSpec:
    if not isinstance(table, Mapping):
        raise ValueError("is no table")
    if unknown := [key for key in table if key not in _KEYS]:
        raise ValueError(f"unknown key {', '.join(unknown)}; there is: {', '.join(_KEYS)}")
    values = dict(table)
    group = values.get("socket-group")
    if isinstance(group, int) and not isinstance(group, bool):
        values["socket-group"] = str(group)
    timeout = values.pop("timeout", defaults.timeout)
    for key, value in values.items():
        if not isinstance(value, str) or not value:
            hint = ': octal, as in "660"' if key == "socket-mode" else ""
            raise ValueError(f"{key} = {value!r} is not a text in quotes{hint}")
    if "target" not in values:
        raise ValueError("target is missing")
    if not isinstance(timeout, (int, float)) or isinstance(timeout, bool):
        raise ValueError(f"timeout = {timeout!r} is not a number of seconds")
    return replace(
        defaults,
        target=values["target"],
        socket_path=values.get("socket-path"),
        name=values.get("name", ""),
        mode=parse_mode(values["socket-mode"]) if "socket-mode" in values else defaults.mode,
        group=parse_group(values["socket-group"]) if "socket-group" in values else defaults.group,
        vdpa=values.get("vdpa", defaults.vdpa),
        relay=values.get("relay", defaults.relay),
        timeout=float(timeout),
    )


def checked(specs: Iterable[DeviceSpec]) -> list[DeviceSpec]:
    """The same, each with a name; ValueError for what cannot be served, alone or beside the others."""
    specs = [spec if spec.name else replace(spec, name=_default_name(spec)) for spec in specs]
    for spec in specs:
        if not re.fullmatch(r"[\w.@+-]{1,64}", spec.name):
            raise ValueError(f"name {spec.name!r}: 1 to 64 letters, digits and . _ @ + -; give the device a name = in the configuration")
        if spec.vdpa not in VDPA_MODES:
            raise ValueError(f"{spec.name}: vdpa = {spec.vdpa}; it is require, prefer or off")
        if spec.relay not in RELAY_MODES:
            raise ValueError(f"{spec.name}: relay = {spec.relay}; it is auto, on or off")
        if not _TIMEOUT[0] <= spec.timeout <= _TIMEOUT[1]:
            raise ValueError(f"{spec.name}: timeout = {spec.timeout:g}; it has {_TIMEOUT[0]:g} to {_TIMEOUT[1]:g} seconds")
        if spec.socket_path is not None and not 0 < (size := len(spec.socket_path.encode())) <= _LONGEST_PATH:
            raise ValueError(f"{spec.name}: socket path {spec.socket_path} has {size} bytes; {_LONGEST_PATH} is what fits")
    paths = Counter(str(Path(spec.socket_path).absolute()) for spec in specs if spec.socket_path is not None)
    for what, count in (("socket path", paths), ("name", Counter(spec.name for spec in specs))):
        if twice := [text for text, times in count.items() if times > 1]:
            raise ValueError(f"two devices have {what} {twice[0]}")
    return specs


def _default_name(spec: DeviceSpec) -> str:
    """The socket's file name without .sock, as far as a name can have it."""
    place = spec.socket_path if spec.socket_path is not None else spec.target.partition("?")[0]
    return re.sub(r"[^\w.@+-]+", "-", Path(place).name.removesuffix(".sock"))[:64].strip("-") or "device"
